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
from geo_pretrain.hub.unpickle.stand_ins import CELLS, Array, Dict, Dtype, Storage, Tensor, kind, shown_key

BLOCK = 8 << 20  # bytes copied at a time
RANK = 32  # numpy's (1.x) limit of dimensions
KEY_LENGTH = 512
NUMPY_DTYPES = {"f2": "float16", "f4": "float32", "f8": "float64", "i1": "int8", "i2": "int16", "i4": "int32"}
NUMPY_DTYPES |= {"i8": "int64", "u1": "uint8", "b1": "bool", "?": "bool"}


@dataclass(frozen=True)
class Wanted:
    """One tensor to write: where its numbers are, and how they are laid out."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements
    start: int  # byte in the file; for arrays in `data`
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
        """Elements from the first to behind the last."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if self.count else 0


def choose(top: Any, entries: Sequence[str]) -> tuple[str, Dict]:
    """The first of `entries` that holds at least one tensor. Raises `Unreadable` saying what the file has instead."""
    for entry in entries:
        found = top if entry == "" else top.get(entry) if isinstance(top, Dict) else None
        if isinstance(found, Dict) and any(unusable(value) is None for value in found.values()):
            return entry, found
    wanted = " or ".join(repr(entry) if entry else "the top level" for entry in entries)
    if not isinstance(top, Dict):
        raise Unreadable(f"its top level is {kind(top)}; accepted is a dict with tensors in {wanted}")
    lines = [f"{shown_key(key)!r}: {unusable(value) or 'tensor'}" for key, value in list(top.items())[:SHOWN]]
    more = f", and {len(top) - SHOWN} more" if len(top) > SHOWN else ""
    raise Unreadable(f"it has no tensors in {wanted}. Its top level holds {', '.join(lines) or 'nothing'}{more}")


def unusable(value: Any) -> str | None:
    """Why a value is not among the result; None: it is."""
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
    """The tensors of an entry, checked against the file and the limits; and what is left out, with the reason."""
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
    total = sum(one.size for one in wanted)
    if total > limits["output"]:
        raise Refused(f"its tensors have {total} bytes, {limits['output']} are accepted")
    return wanted, skipped


def whole_numbers(value: Any) -> tuple[int, ...] | None:
    """A shape or stride, if that is what it is."""
    if not isinstance(value, tuple | list) or len(value) > RANK:
        return None
    fits = all(type(number) is int and 0 <= number <= CELLS for number in value)
    return tuple(value) if fits and math.prod(max(1, number) for number in value) <= CELLS else None


def view(key: str, tensor: Tensor, opened: Opened) -> Wanted:
    """A tensor of torch, within the bounds of its storage and its storage within the file."""
    storage: Storage = tensor.storage
    dtype = tensor.dtype or storage.dtype
    shape = whole_numbers(tensor.size)
    # strides of no consequence may be anything, so only their product is not looked at
    stride = tensor.stride if isinstance(tensor.stride, tuple | list) else ()
    sound = all(type(number) is int and 0 <= number <= CELLS for number in (tensor.offset, *stride))
    if shape is None or len(stride) != len(shape) or not sound:
        raise Refused(f"tensor {shown(key)!r} has an impossible shape, stride or offset")
    if storage.key not in opened.records:
        raise Unreadable(f"tensor {shown(key)!r} refers to storage {shown(storage.key)!r}, which the file lacks")
    start, size, _ = opened.records[storage.key]
    if storage.count * ITEM[storage.dtype] != size:
        raise Unreadable(f"the storage of {shown(key)!r} has {size} bytes, {storage.count} x {storage.dtype} declared")
    found = Wanted(key, dtype, shape, tuple(stride), start + storage.start * ITEM[storage.dtype])
    if (tensor.offset + found.span) * ITEM[dtype] > storage.length * ITEM[storage.dtype]:
        raise Refused(f"tensor {shown(key)!r} reaches beyond the end of its storage")
    return Wanted(key, dtype, shape, tuple(stride), found.start + tensor.offset * ITEM[dtype])


def array(key: str, given: Array) -> Wanted:
    """An array of numpy, whose numbers lie in the pickle itself."""
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
    """Of a contiguous array, in elements."""
    axes = range(len(shape)) if fortran else range(len(shape) - 1, -1, -1)
    steps, step = dict.fromkeys(axes, 0), 1
    for axis in axes:
        steps[axis], step = step, step * shape[axis]
    return tuple(steps[axis] for axis in range(len(shape)))


def check_sums(entry: Dict, wanted: Sequence[Wanted], opened: Opened, data: Any) -> None:
    """The checksums of the records that are wanted; 0 is what torch writes for "not computed"."""
    keys = {one.key for one in wanted}
    for name in {value.storage.key for key, value in entry.items() if key in keys and isinstance(value, Tensor)}:
        start, size, crc = opened.records[name]
        found = 0
        for at in range(start, start + size, BLOCK) if crc else ():
            found = zlib.crc32(data[at : min(at + BLOCK, start + size)], found)
        forget(data)
        if found != crc:
            raise Unreadable(f"its storage {shown(name)!r} is damaged (its checksum differs); fetch it again")


def forget(data: Any) -> None:
    """Let go of the pages of the file that were read: memory then holds one tensor of it, not all."""
    if isinstance(data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        data.madvise(mmap.MADV_DONTNEED)


def write(wanted: Sequence[Wanted], data: Any, out: BinaryIO) -> None:
    """safetensors: the length of the header, the header (JSON), the numbers; streamed, so that memory stays small."""
    header, at = {}, 0
    ordered = sorted(wanted, key=lambda one: (-ITEM[one.dtype], one.key))  # as safetensors does: all are aligned
    for one in ordered:
        header[one.key] = {"dtype": WRITABLE[one.dtype][0], "shape": one.shape, "data_offsets": [at, at + one.size]}
        at += one.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    for one in ordered:
        for block in numbers(one, data):
            out.write(block)
        forget(data)


def numbers(one: Wanted, data: Any) -> Iterator[bytes]:
    """The numbers of a tensor in order, little-endian, in blocks."""
    source = data if one.data is None else one.data
    if one.order == "<" and one.stride == strides(one.shape):
        for at in range(one.start, one.start + one.size, BLOCK):
            yield source[at : min(at + BLOCK, one.start + one.size)]
    elif one.count:
        import numpy as np  # takes longer than all the rest: only for what needs it

        code = WRITABLE[one.dtype][2]
        form = np.dtype(f"<{code}")
        raw = source[one.start : one.start + one.span * form.itemsize]
        flat = np.frombuffer(raw, np.dtype(one.order + code))
        laid = np.lib.stride_tricks.as_strided(flat, one.shape, [step * form.itemsize for step in one.stride])
        rows = laid if laid.ndim else laid[None]
        group = max(1, BLOCK * len(rows) // one.size)
        for first in range(0, len(rows), group):
            yield rows[first : first + group].astype(form, order="C").tobytes()
