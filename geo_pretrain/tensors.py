"""Read safetensors into memory of our own: every byte is read once, and what is hashed is what is used.

safetensors' own reader maps the file: its tensors change when somebody overwrites the file, and the process dies when
it is cut. Its format is checked as strictly here; tests compare both.
"""

from __future__ import annotations

import io
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from geo_pretrain.errors import CheckpointError, DigestMismatch, first_line

if TYPE_CHECKING:
    from torch import Tensor

HEADER_LIMIT = 100_000_000  # bytes, as in safetensors
DTYPES = {  # those of weights; the names in a file and in torch
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}


class NotTensors(CheckpointError):
    """A file that is no safetensors file, or holds other types than weights have; the message says why."""


class Hasher(Protocol):
    """A digest under way, of hashlib or blake3."""

    def update(self, data: Any, /) -> Any:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The digest of all bytes so far."""


def read_tensors(path: Path, hasher: Hasher) -> tuple[dict[str, Tensor], int]:
    """Read all tensors of a safetensors file, to the CPU, and the file's size in bytes.

    `hasher` has seen every byte of the file in order afterwards. Raises `NotTensors` with the reason.
    """
    import torch

    with path.open("rb", buffering=0) as stream, _InTurn(hasher) as seen:
        size = os.fstat(stream.fileno()).st_size
        entries = _header(stream, size, seen)
        tensors: dict[str, Tensor] = {}
        for name, dtype, shape, count in entries:
            memory = torch.empty(count, dtype=torch.uint8)  # each its own: safetensors refuses to save shared memory
            _fill(stream, memory.numpy().data, seen)
            tensors[name] = memory.view(getattr(torch, DTYPES[dtype])).reshape(shape)
        if stream.read(1):
            raise NotTensors("the file grew while it was read")
    return tensors, size


class _InTurn:
    """A digest of pieces in the order given, computed by another thread while the next piece is read."""

    def __init__(self, hasher: Hasher) -> None:
        self.hasher, self.worker = hasher, ThreadPoolExecutor(1)

    def update(self, data: memoryview) -> None:
        self.worker.submit(self.hasher.update, data)

    def __enter__(self) -> _InTurn:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.shutdown()  # waits for all of them


def load_tensors(path: Path, sha256: str | None, promised_by: str) -> dict[str, Tensor]:
    """`read_tensors` of a file whose sha256 another file states (None: an older one, which states none).

    Raises `CheckpointError` (no such file, no safetensors) or `DigestMismatch`.
    """
    import hashlib

    hasher = hashlib.sha256()
    try:
        tensors, _ = read_tensors(path, hasher)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except NotTensors as error:
        raise CheckpointError(f"{path}: is not a safetensors file ({error}).") from None
    if sha256 not in (None, hasher.hexdigest()):
        raise DigestMismatch(f"{path}: sha256 is {hasher.hexdigest()}, {promised_by} states {sha256}; it was altered.")
    return tensors


def _header(stream: io.FileIO, size: int, hasher: _InTurn) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Read and check the header: (name, dtype, shape, bytes) of the tensors as they lie in the file, without gaps."""
    start = bytearray(8)
    if size < len(start):
        raise NotTensors(f"{size} bytes")
    _fill(stream, memoryview(start), hasher)
    length = int.from_bytes(start, "little")
    if length > min(HEADER_LIMIT, size - len(start)):
        raise NotTensors(f"a header of {length} bytes in a file of {size}")
    text = bytearray(length)
    _fill(stream, memoryview(text), hasher)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
        header.pop("__metadata__", None)
        entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda entry: entry[-2:])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NotTensors(f"its header is damaged: {first_line(error)}") from None
    at = 0
    for name, _, _, begin, end in entries:
        if begin != at:
            raise NotTensors(f"{name!r} does not begin where the tensor before it ends")
        at = end
    if at != size - len(start) - length:
        raise NotTensors(f"it holds {size - len(start) - length} bytes of tensors, the header says {at}")
    return [(name, dtype, shape, end - begin) for name, dtype, shape, begin, end in entries]


def _entry(name: str, entry: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """Check one tensor of a header: (name, dtype, shape, first byte, byte behind the last)."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"{name!r} is {dtype}; accepted: {', '.join(DTYPES)}")
    numbers = [*shape, begin, end]
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers):
        raise ValueError(f"{name!r} has shape {shape} and bytes {begin} to {end}")
    import torch

    needed = math.prod(shape) * getattr(torch, DTYPES[dtype]).itemsize
    if end - begin != needed:
        raise ValueError(f"{name!r} has {end - begin} bytes, its shape {shape} needs {needed}")
    return name, dtype, tuple(shape), begin, end


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key may stand twice."""
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a name stands twice")
    return tree


def _fill(stream: io.FileIO, memory: memoryview, hasher: _InTurn) -> None:
    """Read the next bytes of a file into the whole of `memory`, through the hasher."""
    done = 0
    while done < len(memory):
        count = stream.readinto(memory[done:])
        if not count:
            raise NotTensors("it was cut while it was read")
        done += count
    hasher.update(memory)
