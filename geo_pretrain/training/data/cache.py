"""Cached arrays: written atomically with a digest; missing or damaged files are made again."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from geo_pretrain.errors import DataError
from geo_pretrain.files import atomic_write

Arrays = Mapping[str, np.ndarray]


def cached_arrays(path: Path, make: Callable[[], Arrays], what: str) -> Arrays:
    """Read arrays from a safetensors file; make and write them when the file is missing or damaged.

    Raises `DataError` where the file cannot be written, see `writing`.
    """
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="np") as file:
        arrays: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if (file.metadata() or {}).get("sha256") == arrays_digest(arrays):
            return arrays
    arrays = {name: np.ascontiguousarray(array) for name, array in make().items()}
    with writing(path, what) as part:
        part.write_bytes(save(dict(arrays), {"sha256": arrays_digest(arrays)}))  # save_file raises no OSError
    return arrays


@contextlib.contextmanager
def writing(path: Path, what: str) -> Iterator[Path]:
    """`atomic_write` for files of the cache. Where they cannot be written, a `DataError` calls them `what`."""
    try:
        with atomic_write(path) as part:
            yield part
    except OSError as error:
        raise DataError(
            f"Cannot write the {what} to {str(path)!r} ({error.strerror}). "
            "Set GEO_PRETRAIN_CACHE to a folder that can be written."
        ) from error


def arrays_digest(arrays: Arrays) -> str:
    """A sha256 (hex) over names, types, shapes and values, independent of the order."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}:{array.dtype.str}{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
