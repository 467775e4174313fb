"""Read safetensors into memory of our own: every byte is read once, and what is hashed is what is used.

safetensors' own reader maps the file: its tensors change when somebody overwrites the file, and the process dies when
it is cut. Its format is checked as strictly here; tests compare both.
"""

from __future__ import annotations

import io
import json
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from geo_pretrain.errors import CheckpointError, DigestMismatch, first_line

if TYPE_CHECKING:
    from torch import Tensor

PIECE, READERS = 4 << 20, 4  # bytes read at once; threads that read
HEADER_LIMIT = 100_000_000  # bytes, as in safetensors
DTYPES = {  # those of weights; the names in a file and in torch
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}


_Entry = tuple[str, str, tuple[int, ...], int, int]  # name, dtype, shape, first byte, byte behind the last


class NotTensors(CheckpointError):
    """A file that is no safetensors file, or holds other types than weights have; the message says why."""


class Hasher(Protocol):
    """A digest under way, of hashlib or xxhash."""

    def update(self, data: Any, /) -> Any:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The digest of all bytes so far."""


def read_tensors(path: Path, hasher: Hasher) -> tuple[dict[str, Tensor], int]:
    """Read all tensors of a safetensors file, to the CPU, and the file's size in bytes.

    `hasher` has seen every byte of the file in order afterwards. Raises `NotTensors` with the reason.
    """
    import torch

    with path.open("rb", buffering=0) as stream:
        source, size = _Source(stream), os.fstat(stream.fileno()).st_size
        tensors: dict[str, Tensor] = {}
        pieces: list[_Piece] = []
        for name, dtype, shape, at, end in _header(source, size, hasher):
            # each its own, since safetensors saves no shared memory; on the CPU, whatever torch's default is
            memory = torch.empty(end - at, dtype=torch.uint8, device="cpu")
            view = memory.numpy().data
            pieces += [_Piece(at + begin, view[begin : begin + PIECE]) for begin in range(0, end - at, PIECE)]
            tensors[name] = memory.view(getattr(torch, DTYPES[dtype])).reshape(shape)
        # Most of the time is the first touch of new memory, which threads share; this one hashes what they have read.
        with ThreadPoolExecutor(min(torch.get_num_threads(), READERS)) as pool:
            for batch in pool.map(source.fill, _batches(pieces)):
                for piece in batch:
                    hasher.update(piece.memory)
        if source.read(_Piece(size, memoryview(bytearray(1)))):
            raise NotTensors("the file grew while it was read")
    return tensors, size


class _Piece(NamedTuple):
    """Memory, and the place in a file of the bytes that belong there."""

    at: int
    memory: memoryview


def _batches(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Put neighbors together, so that small tensors are no tasks of their own."""
    batches: list[list[_Piece]] = []
    room = 0
    for piece in pieces:
        if len(piece.memory) > room:
            batches.append([])
            room = PIECE
        batches[-1].append(piece)
        room -= len(piece.memory)
    return batches


class _Source:
    """An open file that several threads read at places of their own."""

    def __init__(self, stream: io.FileIO) -> None:
        self.stream, self.turn = stream, threading.Lock()

    def fill(self, batch: list[_Piece]) -> list[_Piece]:
        """Read the bytes of each piece, all of them, and return the pieces."""
        for at, memory in batch:
            done = 0
            while done < len(memory):
                count = self.read(_Piece(at + done, memory[done:]))
                if not count:
                    raise NotTensors("it was cut while it was read")
                done += count
        return batch

    def read(self, piece: _Piece) -> int:
        """Read bytes of a piece; how many."""
        if hasattr(os, "preadv"):
            return os.preadv(self.stream.fileno(), [piece.memory], piece.at)
        with self.turn:  # Windows: one position for all
            self.stream.seek(piece.at)
            return self.stream.readinto(piece.memory) or 0


def load_tensors(path: Path, sha256: str | None = None, promised_by: str = "") -> dict[str, Tensor]:
    """`read_tensors` of a file whose sha256 another file states (None: none does).

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


def _header(source: _Source, size: int, hasher: Hasher) -> list[_Entry]:
    """Read and check the header: the tensors in the order in which they lie in the file, without gaps."""
    start = bytearray(8)
    if size < len(start):
        raise NotTensors(f"{size} bytes")
    source.fill([_Piece(0, memoryview(start))])
    length = int.from_bytes(start, "little")
    if length > min(HEADER_LIMIT, size - len(start)):
        raise NotTensors(f"a header of {length} bytes in a file of {size}")
    text = bytearray(length)
    source.fill([_Piece(len(start), memoryview(text))])
    hasher.update(start + text)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
        header.pop("__metadata__", None)
        entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda entry: entry[-2:])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NotTensors(f"its header is damaged: {first_line(error)}") from None
    at, base = 0, len(start) + length
    for name, _, _, begin, end in entries:
        if begin != at:
            raise NotTensors(f"{name!r} does not begin where the tensor before it ends")
        at = end
    if at != size - base:
        raise NotTensors(f"it holds {size - base} bytes of tensors, the header says {at}")
    return [(name, dtype, shape, base + begin, base + end) for name, dtype, shape, begin, end in entries]


def _entry(name: str, entry: Any) -> _Entry:
    """Check one tensor of a header."""
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
