"""File formats: recognize one, read its pickle, and locate its tensor storages."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from geo_pretrain.hub.unpickle.budget import Budget
from geo_pretrain.hub.unpickle.machine import Machine
from geo_pretrain.hub.unpickle.names import ITEM, NAME_LENGTH, Name, Refused, Unreadable, shown
from geo_pretrain.hub.unpickle.nodes import CELLS, Storage, kind

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
ACCEPTED = "files of torch.save and pickles of numpy arrays"


@dataclass
class Opened:
    """A file whose pickle has been read: the top-level value, and the positions of its storages."""

    top: Any
    records: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)  # key -> (start, bytes, crc or 0)


def read_file(data: Any, budget: Budget, limits: Mapping[str, Any]) -> Opened:
    """Recognize the file's format and read its pickle. `data` is a memory map or bytes."""
    head = data[:512]
    if head[:4] == b"PK\x03\x04":
        return read_zip(data, budget, limits)
    if what := other_format(head):
        raise Unreadable(f"it is {what}; accepted are {ACCEPTED}")
    if head[:1] not in (b"\x80", b"(", b"}", b"]", b"c"):  # protocol 2 and later, or a container of protocol 0 or 1
        raise Unreadable(f"it is no pickle; accepted are {ACCEPTED}")
    machine = Machine(data, budget)
    top = machine.run()
    if type(top) is int and top == LEGACY_MAGIC:
        return read_legacy(data, machine, budget)
    nothing_after(machine.at, data)
    return Opened(top)


def other_format(head: bytes) -> str | None:
    """Describe a format that cannot be read, by its first bytes; None if it may be a pickle."""
    if not head:
        return "empty"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not the file behind it (a login, quota or confirmation page)"
    if text.startswith((b"{", b"version https://git-lfs")):
        return "text (JSON or a Git LFS pointer)"
    if head[257:262] == b"ustar":
        return "a tar archive (torch before 0.2 wrote such files; save it again with a newer torch)"
    if len(head) > 8 and head[8:10] in (b'{"', b"{ ", b"{}") and int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file already; it needs no extraction"
    magics = {
        b"\x1f\x8b": "compressed with gzip; unpack it first",
        b"BZh": "compressed with bzip2; unpack it first",
        b"\xfd7zXZ": "compressed with xz; unpack it first",
        b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
        b"7z\xbc\xaf": "a 7z archive; unpack it first",
        b"Rar!": "a RAR archive; unpack it first",
        b"PK": "an empty or damaged zip archive",
        b"\x89HDF": "an HDF5 file",
        b"\x93NUMPY": "a numpy .npy file",
        b"\x7fELF": "a program",
        b"MZ": "a program",
    }
    return next((what for magic, what in magics.items() if head.startswith(magic)), None)


def nothing_after(at: int, data: Any) -> None:
    """Raises `Refused` when bytes follow the end of the pickle or the last storage."""
    if at != len(data):
        raise Refused(f"{len(data) - at} bytes follow its end")


def read_legacy(data: Any, machine: Machine, budget: Budget) -> Opened:
    """torch < 1.6: pickles of magic number, protocol, system, object and storage keys; then the raw storages."""
    declared: dict[str, Storage] = {}

    def persistent(given: Any) -> Any:
        if isinstance(given, tuple) and len(given) == 4 and given[0] == "module":
            return given[1]
        if not isinstance(given, tuple) or len(given) != 6:
            raise Refused("its pickle refers to data in a way torch does not")
        whole = storage_of(given[:5])
        known = declared.setdefault(whole.key, whole)
        if (known.dtype, known.count) != (whole.dtype, whole.count):
            raise Unreadable(f"storage {shown(whole.key)} is declared in two ways")
        return view_of(whole, given[5])

    if machine.run() != LEGACY_PROTOCOL:
        raise Unreadable("it is of a protocol that torch < 1.6 did not write")
    system = machine.run()
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise Unreadable("it was written on a big-endian machine; save it again on a little-endian one")
    machine.persistent = persistent
    top, keys = machine.run(), machine.run()
    budget.check_names()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise Unreadable("its list of storages is none")
    records, at = {}, machine.at
    for key in keys:
        if key not in declared:
            raise Unreadable(f"storage {shown(key)} belongs to no tensor")
        if len(data) - at < 8:
            raise Unreadable("it breaks off among its storages; download it again")
        (count,) = struct.unpack("<q", data[at : at + 8])
        size = declared[key].count * ITEM[declared[key].dtype]
        if count != declared[key].count:
            raise Unreadable(f"storage {shown(key)} has {count} elements, {declared[key].count} are declared")
        if size > len(data) - at - 8:
            raise Unreadable("it breaks off among its storages; download it again")
        records[key] = (at + 8, size, 0)
        at += 8 + size
    nothing_after(at, data)
    return Opened(top, records)


def storage_of(given: tuple[Any, ...]) -> Storage:
    """Parse torch's persistent id: ("storage", type, key, location, elements)."""
    tag, cls, key, _, count = given
    dtype = cls.storage if isinstance(cls, Name) else None
    if tag != "storage" or not isinstance(key, str) or len(key) > NAME_LENGTH or type(count) is not int:
        raise Refused("its pickle refers to data in a way torch does not")
    if dtype is None:
        raise Unreadable(f"it has a storage of {kind(cls)}")
    if not 0 <= count <= CELLS:
        raise Refused(f"it declares a storage of {count} elements")
    return Storage(key, dtype, count, 0, count)


def view_of(whole: Storage, view: Any) -> Storage:
    """Apply a view of a storage, as torch < 0.4 wrote them: (key, offset, elements)."""
    if view is None:
        return whole
    if not isinstance(view, tuple) or len(view) != 3 or type(view[1]) is not int or type(view[2]) is not int:
        raise Refused("its pickle refers to data in a way torch does not")
    start, length = view[1:]
    if start < 0 or length < 0 or start + length > whole.count:
        raise Refused("it has a view beyond the end of its storage")
    return Storage(whole.key, whole.dtype, whole.count, start, length)


def read_zip(data: Any, budget: Budget, limits: Mapping[str, Any]) -> Opened:
    """torch >= 1.6: a zip with <name>/data.pkl and an uncompressed record <name>/data/<key> for each storage."""
    tail = data[-22:]
    if tail[:4] != b"PK\x05\x06" or tail[20:] != b"\0\0":
        if data.rfind(b"PK\x05\x06", max(0, len(data) - (1 << 17))) < 0:
            raise Unreadable("it is a zip archive without its end: a truncated download; fetch it again")
        raise Refused("bytes follow the end of its zip archive")
    infos = listing(data, limits)
    pickles = [name for name in infos if name == "data.pkl" or name.endswith("/data.pkl")]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in infos):
        raise Unreadable("it is a TorchScript archive, a program (torch.jit.save); accepted are files of torch.save")
    if len(pickles) != 1:
        names = ", ".join(shown(name, 40) for name in list(infos)[:5])
        raise Unreadable(
            f"it is a zip archive with {len(pickles)} data.pkl, not a file of torch.save; it holds {names}"
        )
    folder = pickles[0].removesuffix("data.pkl")
    records = {}
    for name, info in infos.items():
        if name in (pickles[0], f"{folder}byteorder") or name.startswith(f"{folder}data/"):
            records[name.removeprefix(folder)] = record(data, name, info)
    disjoint(records.values())
    start, size, _ = records.get("byteorder", (0, 0, 0))
    if data[start : start + min(size, 16)] not in (b"", b"little"):
        raise Unreadable("it was written on a big-endian machine; save it again on a little-endian one")
    start, size, crc = records["data.pkl"]
    if size > limits["pickle"]:
        raise Refused(f"its data.pkl has {size} bytes, {limits['pickle']} are accepted")
    text = data[start : start + size]
    if crc and zlib.crc32(text) != crc:
        raise Unreadable("its data.pkl is damaged (its checksum differs); fetch it again")

    def persistent(given: Any) -> Storage:
        if not isinstance(given, tuple) or len(given) != 5:
            raise Refused("its pickle refers to data in a way torch does not")
        return storage_of(given)

    machine = Machine(text, budget, persistent)
    top = machine.run()
    nothing_after(machine.at, text)
    storages = {key.removeprefix("data/"): where for key, where in records.items() if key.startswith("data/")}
    return Opened(top, storages)


def listing(data: Any, limits: Mapping[str, Any]) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip archive by name."""
    try:
        with zipfile.ZipFile(data) as archive:  # a memory map is a file
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error, IndexError) as error:
        raise Unreadable(f"it is a damaged zip archive ({shown(str(error))}); fetch it again") from error
    if len(infos) > limits["records"]:
        raise Refused(f"its zip archive has {len(infos)} members, {limits['records']} are accepted")
    named = {info.filename: info for info in infos}
    if len(named) != len(infos) or any(info.filename != info.orig_filename for info in infos):
        raise Refused("its zip archive has two members of one name")
    return named


def record(data: Any, name: str, info: zipfile.ZipInfo) -> tuple[int, int, int]:
    """Locate an uncompressed member: (first byte, number of bytes, checksum)."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise Refused(f"its member {shown(name)} is compressed; torch.save does not compress")
    if info.flag_bits & 0x1:
        raise Refused(f"its member {shown(name)} is encrypted")
    at = info.header_offset
    head = data[at : at + 30] if at >= 0 else b""
    if len(head) != 30 or head[:4] != b"PK\x03\x04":
        raise Unreadable(f"its member {shown(name)} is not where the directory says")
    names, extra = struct.unpack("<HH", head[26:30])
    if data[at + 30 : at + 30 + names] != name.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
        raise Refused(f"its member {shown(name)} has another name in place")
    start = at + 30 + names + extra
    if start + info.file_size > len(data):
        raise Unreadable(f"its member {shown(name)} reaches beyond the end of the file")
    return start, info.file_size, info.CRC


def disjoint(records: Any) -> None:
    """Raises `Refused` when members share bytes, the way in which a small archive unfolds to a huge one."""
    end = 0
    for start, size, _ in sorted(records):
        if start < end:
            raise Refused("members of its zip archive overlap")
        end = start + size
