"""The tensors of one entry: chosen, checked against the file and the limits, and written as safetensors."""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from geo_pretrain.hub.unpickle.formats import Opened
from geo_pretrain.hub.unpickle.names import ITEM, SHOWN, WRITABLE, Refused, Unreadable, shown
from geo_pretrain.hub.unpickle.nodes import CELLS, Array, Dict, Dtype, Storage, Tensor, kind, shown_key

BLOCK = 8 << 20  # bytes copied at a time
UNFOLDED = 4  # times the file's own size: the most that is written; tied weights and expanded views fit well
RANK = 32  # numpy's (1.x) limit of dimensions
KEY_LENGTH = 512
DEPTH, CELLS_OF_A_FILE = 4, 1_000_000  # of dicts inside dicts that are looked at
NUMPY_DTYPES = {"f2": "float16", "f4": "float32", "f8": "float64", "i1": "int8", "i2": "int16", "i4": "int32"}
NUMPY_DTYPES |= {"i8": "int64", "u1": "uint8", "b1": "bool", "?": "bool"}


@dataclass(frozen=True)
class Wanted:
    """One tensor to write: the position of its numbers in the file, and their layout."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements
    start: int  # first byte, in the file or, for arrays, in `data`
    data: bytes | None = None
    order: str = "<"

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        return self.count * ITEM[self.dtype]

    @property
    def span(self) -> int:
        """Number of elements from the first to the last, gaps included."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if self.count else 0


def choose(top: Any, entries: Sequence[str]) -> tuple[str, Dict]:
    """The first of `entries` with at least one tensor. Raises `Unreadable` listing what the file has instead.

    The entry "*" is all of the file: the tensors of dicts inside dicts, their keys joined by dots.
    """
    for entry in entries:
        values = top if entry == "" else top.get(entry) if isinstance(top, Dict) else None
        if entry == "*" and isinstance(top, Dict):
            values = flat(top)
        if isinstance(values, Dict) and any(unusable(value) is None for value in values.values()):
            return entry, values
    wanted = " or ".join(repr(entry) if entry else "the top level" for entry in entries)
    if not isinstance(top, Dict):
        raise Unreadable(f"its top level is {kind(top)}; accepted is a dict with tensors in {wanted}")
    lines = [f"{shown_key(key)!r}: {unusable(value) or 'tensor'}" for key, value in list(top.items())[:SHOWN]]
    more = f", and {len(top) - SHOWN} more" if len(top) > SHOWN else ""
    raise Unreadable(f"it has no tensors in {wanted}. Its top level holds {', '.join(lines) or 'nothing'}{more}")


def flat(top: Dict) -> Dict:
    """The tensors in `top` and in dicts inside it, under their keys joined by dots."""
    found = Dict()
    todo: list[tuple[str, Any, int]] = [("", top, 0)]
    seen = 0
    while todo:
        path, values, depth = todo.pop()
        for key, value in values.items():
            seen += 1
            if seen > CELLS_OF_A_FILE:
                raise Refused(f"its dicts hold more than {CELLS_OF_A_FILE} values")
            if not isinstance(key, str):
                continue  # an optimizer's state, by number
            if isinstance(value, Dict) and depth < DEPTH:
                todo.append((f"{path}{key}.", value, depth + 1))
            elif unusable(value) is None:
                if path + key in found:
                    found.repeated.add(path + key)
                found[path + key] = value
        found.repeated |= {path + key for key in values.repeated}
    return found


def unusable(value: Any) -> str | None:
    """Why a value is left out; None: it is a tensor that can be written."""
    if isinstance(value, Tensor):
        if not isinstance(value.storage, Storage):
            return f"tensor whose storage is {kind(value.storage)}"
        dtype = value.dtype or value.storage.dtype
        return None if dtype in WRITABLE else f"tensor of unsupported dtype {shown(dtype)}"
    if isinstance(value, Array):
        code = value.dtype.code if isinstance(value.dtype, Dtype) else "unknown"
        return None if code in NUMPY_DTYPES else f"array of unsupported dtype {shown(code)}"
    return kind(value)


def wanted_of(entry: Dict, opened: Opened, limits: Mapping[str, Any]) -> tuple[list[Wanted], dict[str, str]]:
    """The tensors of an entry, checked against the file and the limits, and the reasons for values left out."""
    if entry.repeated:
        raise Refused(f"it gives {shown(min(entry.repeated))!r} twice")
    wanted, skipped = [], {}
    for key, value in entry.items():
        reason = unusable(value)
        if reason is None and not isinstance(key, str):
            reason = "its key is no text"
        if reason is not None:
            skipped[shown_key(key)] = reason
            continue
        if len(key) > KEY_LENGTH or not key.isprintable() or re.search(r"[/\\]|\.\.|^__metadata__$", key) or not key:
            raise Refused(f"{shown(key)!r} is no name of a tensor")
        wanted.append(view(key, value, opened) if isinstance(value, Tensor) else array(key, value))
    if len(wanted) > limits["tensors"]:
        raise Refused(f"it holds {len(wanted)} tensors, {limits['tensors']} are accepted")
    total = sum(tensor.size for tensor in wanted)
    if total > limits["output"]:
        raise Refused(f"its tensors have {total} bytes, {limits['output']} are accepted")
    return wanted, skipped


def whole_numbers(value: Any) -> tuple[int, ...] | None:
    """The value as a shape; None if it is not one or too large."""
    if not isinstance(value, tuple | list) or len(value) > RANK:
        return None
    fits = all(type(number) is int and 0 <= number <= CELLS for number in value)
    return tuple(value) if fits and math.prod(max(1, number) for number in value) <= CELLS else None


def view(key: str, tensor: Tensor, opened: Opened) -> Wanted:
    """A torch tensor, checked to lie within its storage, and its storage within the file."""
    storage: Storage = tensor.storage
    dtype = tensor.dtype or storage.dtype
    shape = whole_numbers(tensor.size)
    # Strides of axes of length 0 or 1 may be anything: the product of strides is not limited, the span below is.
    stride = tensor.stride if isinstance(tensor.stride, tuple | list) else ()
    sound = all(type(number) is int and 0 <= number <= CELLS for number in (tensor.offset, *stride))
    if shape is None or len(stride) != len(shape) or not sound:
        raise Refused(f"tensor {shown(key)!r} has an impossible shape, stride or offset")
    if storage.key not in opened.records:
        raise Unreadable(f"tensor {shown(key)!r} refers to storage {shown(storage.key)!r}, which the file lacks")
    start, size, _ = opened.records[storage.key]
    if storage.count * ITEM[storage.dtype] != size:
        raise Unreadable(f"the storage of {shown(key)!r} has {size} bytes, {storage.count} x {storage.dtype} declared")
    whole = Wanted(key, dtype, shape, tuple(stride), start + storage.start * ITEM[storage.dtype])
    if not whole.count:  # an empty slice such as x[3:, 2:] may start beyond the storage; it has no number to read
        return Wanted(key, dtype, shape, tuple(stride), whole.start)
    if (tensor.offset + whole.span) * ITEM[dtype] > storage.length * ITEM[storage.dtype]:
        raise Refused(f"tensor {shown(key)!r} reaches beyond the end of its storage")
    return Wanted(key, dtype, shape, tuple(stride), whole.start + tensor.offset * ITEM[dtype])


def array(key: str, given: Array) -> Wanted:
    """A numpy array, whose numbers are in the pickle itself."""
    shape = whole_numbers(given.shape)
    if shape is None:
        raise Refused(f"array {shown(key)!r} has an impossible shape")
    dtype = NUMPY_DTYPES[given.dtype.code]
    try:  # Python 2 wrote texts
        data = given.data.encode("latin-1") if isinstance(given.data, str) else given.data
    except UnicodeEncodeError as error:
        raise Unreadable(f"the numbers of array {shown(key)!r} are not bytes") from error
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * ITEM[dtype]:
        raise Unreadable(f"array {shown(key)!r} has not as many numbers as its shape says")
    return Wanted(key, dtype, shape, strides(shape, given.fortran), 0, data, given.dtype.order)


def strides(shape: tuple[int, ...], fortran: bool = False) -> tuple[int, ...]:
    """The strides of a contiguous array, in elements."""
    axes = range(len(shape)) if fortran else range(len(shape) - 1, -1, -1)
    steps, step = dict.fromkeys(axes, 0), 1
    for axis in axes:
        steps[axis], step = step, step * shape[axis]
    return tuple(steps[axis] for axis in range(len(shape)))


def check_sums(entry: Dict, wanted: Sequence[Wanted], opened: Opened, data: Any) -> None:
    """Verify the checksums of the wanted storages; torch writes 0 for "not computed"."""
    keys = {tensor.key for tensor in wanted}
    for name in {value.storage.key for key, value in entry.items() if key in keys and isinstance(value, Tensor)}:
        start, size, crc = opened.records[name]
        actual = 0
        for at in range(start, start + size, BLOCK) if crc else ():
            actual = zlib.crc32(data[at : min(at + BLOCK, start + size)], actual)
        forget(data)
        if actual != crc:
            raise Unreadable(f"its storage {shown(name)!r} is damaged (its checksum differs); fetch it again")


def forget(data: Any) -> None:
    """Release the pages of the file read so far, so that memory holds one tensor and not all."""
    if isinstance(data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        data.madvise(mmap.MADV_DONTNEED)


def laid_out(wanted: Sequence[Wanted], file_size: int) -> tuple[bytes, list[Wanted]]:
    """The start of a safetensors file (header length, JSON header), and the tensors in the order of their numbers.

    Raises `Refused` when both together have more than `UNFOLDED` times the bytes of the file: views that repeat numbers
    (stride 0) and tensors that share a storage are each written in full, so that a small file could fill a disk.
    """
    header, at = {}, 0
    ordered = sorted(wanted, key=lambda tensor: (-ITEM[tensor.dtype], tensor.key))  # as safetensors: all are aligned
    for tensor in ordered:
        header[tensor.key] = {
            "dtype": WRITABLE[tensor.dtype][0],
            "shape": tensor.shape,
            "data_offsets": [at, at + tensor.size],
        }
        at += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    total = 8 + len(text) + at
    if total > UNFOLDED * file_size:
        largest = max(wanted, key=lambda tensor: tensor.size)
        raise Refused(
            f"its tensors unfold to {total} bytes ({shown(largest.key)!r} alone to {largest.size}), while the file has "
            f"{file_size}; up to {UNFOLDED} times its size is accepted"
        )
    return struct.pack("<Q", len(text)) + text, ordered


def write(start: bytes, ordered: Sequence[Wanted], data: Any, out: BinaryIO) -> None:
    """Write what `laid_out` has planned as a stream, so that memory stays small."""
    out.write(start)
    for tensor in ordered:
        for block in numbers(tensor, data):
            out.write(block)
        forget(data)


def numbers(tensor: Wanted, data: Any) -> Iterator[bytes]:
    """The numbers of a tensor in C order, little-endian, in blocks."""
    source = data if tensor.data is None else tensor.data
    if tensor.order == "<" and tensor.stride == strides(tensor.shape):
        for at in range(tensor.start, tensor.start + tensor.size, BLOCK):
            yield source[at : min(at + BLOCK, tensor.start + tensor.size)]
    elif tensor.count:
        import numpy as np  # takes longer than all the rest: only for what needs it

        code = WRITABLE[tensor.dtype][2]
        form = np.dtype(f"<{code}")
        raw = source[tensor.start : tensor.start + tensor.span * form.itemsize]
        flat = np.frombuffer(raw, np.dtype(tensor.order + code))
        strided = np.lib.stride_tricks.as_strided(flat, tensor.shape, [step * form.itemsize for step in tensor.stride])
        rows = strided if strided.ndim else strided[None]
        group = max(1, BLOCK * len(rows) // tensor.size)
        for first in range(0, len(rows), group):
            yield rows[first : first + group].astype(form, order="C").tobytes()
