"""Files that can be made again: written whole or not at all; arrays carry a digest, and damaged ones are made again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from geo_pretrain.errors import DataError

Arrays = Mapping[str, np.ndarray]


def cached_arrays(path: Path, make: Callable[[], Arrays], what: str) -> Arrays:
    """The arrays in a safetensors file; made and written there when the file is missing or damaged.

    Raises `DataError`, which calls the arrays `what`, where the file cannot be written.
    """
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="np") as file:
        arrays: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if (file.metadata() or {}).get("sha256") == arrays_digest(arrays):
            return arrays
    arrays = {name: np.ascontiguousarray(array) for name, array in make().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file(dict(arrays), name, metadata={"sha256": arrays_digest(arrays)})
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"Cannot write the {what} to {str(path)!r} ({error.strerror}). "
            "Set GEO_PRETRAIN_CACHE to a folder that can be written."
        ) from error
    return arrays


def arrays_digest(arrays: Arrays) -> str:
    """sha256 hex over names, types, shapes and values, whatever the order."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}:{array.dtype.str}{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see the old or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)
