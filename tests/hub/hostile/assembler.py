"""Pickles put together instruction by instruction, and the files of torch and NumPy that hold them."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import Any


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def of(value: Any) -> bytes:
    """A value that is assembled already, or a number or text."""
    if isinstance(value, bytes):
        return value
    return text(value) if isinstance(value, str) else number(value)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def stacked(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def tuple_(*items: Any) -> bytes:
    return b"(" + b"".join(map(of, items)) + b"t"


def list_(*items: Any) -> bytes:
    return b"](" + b"".join(map(of, items)) + b"e"


def dict_(**items: Any) -> bytes:
    return pairs(*((text(key), value) for key, value in items.items()))


def pairs(*items: tuple[bytes, Any]) -> bytes:
    return b"}(" + b"".join(key + of(value) for key, value in items) + b"u"


def call(function: bytes, *arguments: Any) -> bytes:
    return function + tuple_(*arguments) + b"R"


def storage(key: Any = "0", count: int = 4, kind: bytes = name("torch", "FloatStorage"), *more: Any) -> bytes:
    return tuple_("storage", kind, key, "cpu", count, *more) + b"Q"


def tensor(size: bytes, stride: bytes, offset: Any = 0, of_storage: bytes | None = None) -> bytes:
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    hooks = name("collections", "OrderedDict") + b")R"
    return call(rebuild, of_storage or storage(), offset, size, stride, b"\x89", hooks)


GOOD = tensor(tuple_(4), tuple_(1))  # what a wanted tensor looks like, of the four floats of `torch_zip`
FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def proto(body: bytes, version: int = 2) -> bytes:
    return b"\x80" + bytes([version]) + body + b"."


def torch_zip(body: bytes, records: dict[str, bytes] | None = None, *, method: int = zipfile.ZIP_STORED) -> bytes:
    """What torch >= 1.6 writes: data.pkl and storages; `body` without protocol and stop."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("x/data.pkl", proto(body))
        for key, value in ({"x/data/0": FLOATS} if records is None else records).items():
            archive.writestr(key, value)
    return stream.getvalue()


def torch_legacy(
    body: bytes,
    *,
    keys: bytes | None = None,
    storages: bytes = struct.pack("<q", 4) + FLOATS,
    system: bytes | None = None,
) -> bytes:
    """What torch < 1.6 writes."""
    system = system or dict_(protocol_version=1001, little_endian=b"\x88")
    keys = list_("0") if keys is None else keys
    magic = number(0x1950A86A20F9469CFC6C)
    return proto(magic) + proto(number(1001)) + proto(system) + proto(body) + proto(keys) + storages


def legacy_tensor(view: bytes = b"N", kind: bytes = name("torch", "FloatStorage"), count: int = 4) -> bytes:
    return tensor(tuple_(4), tuple_(1), 0, storage("0", count, kind, view))


def numpy_dtype(code: str) -> bytes:
    state = tuple_(3, "<", b"N", b"N", b"N", -1, -1, 0)
    return call(name("numpy", "dtype"), code, b"\x89", b"\x88") + state + b"b"


def numpy_array(shape: bytes, data: bytes, dtype: bytes | None = None) -> bytes:
    start = call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), tuple_(0), raw(b"b"))
    return start + tuple_(1, shape, dtype or numpy_dtype("f4"), b"\x89", data) + b"b"
