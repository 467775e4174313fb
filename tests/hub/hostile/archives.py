"""Attacks by archives, files of old versions of torch, and plain pickles."""

from __future__ import annotations

import struct
import zipfile

from geo_pretrain.errors import CheckpointError
from tests.hub.hostile.assembler import (
    FLOATS,
    GOOD,
    dict_,
    legacy_tensor,
    list_,
    name,
    numpy_array,
    proto,
    raw,
    text,
    torch_legacy,
    torch_zip,
    tuple_,
)
from tests.hub.hostile.corpus import attack, lie, system

# Archives.


def renamed(made: bytes, old: bytes, new: bytes, *, which: int) -> bytes:
    """The same with one occurrence of a member's name changed: 0 is the one in place, -1 that of the directory."""
    parts = made.split(old)
    at = which % (len(parts) - 1)
    return old.join(parts[: at + 1]) + new + old.join(parts[at + 1 :])


def directory(made: bytes, field_at: int, form: str, value: int, member: int = 1) -> bytes:
    """The same with a field of one member's line in the directory changed."""
    at = -1
    for _ in range(member + 1):
        at = made.index(b"PK\x01\x02", at + 1)
    return made[: at + field_at] + struct.pack(form, value) + made[at + field_at + struct.calcsize(form) :]


PLAIN = torch_zip(dict_(a=GOOD))
lie("a compressed data.pkl", torch_zip(dict_(a=GOOD), method=zipfile.ZIP_DEFLATED), "is compressed")
attack(
    "a zip bomb of 50 MB",
    torch_zip(dict_(a=GOOD), {"x/data/0": bytes(50_000_000)}, method=zipfile.ZIP_DEFLATED),
    "is compressed",
)
lie(
    "a data.pkl beyond its limit",
    torch_zip(text("a" * 100_000) + b"0" + dict_(a=GOOD)),
    "1000 are accepted",
    pickle=1000,
)
lie(
    "more members than accepted",
    torch_zip(dict_(a=GOOD), {f"x/data/{i}": FLOATS for i in range(20)}),
    "21 members, 10 are accepted",
    records=10,
)
lie(
    "two members of one name",
    renamed(
        renamed(torch_zip(dict_(a=GOOD), {"x/data/0": FLOATS, "x/data/1": FLOATS}), b"x/data/1", b"x/data/0", which=0),
        b"x/data/1",
        b"x/data/0",
        which=-1,
    ),
    "two members of one name",
)
lie("a member with two names", renamed(PLAIN, b"x/data/0", b"x/data/1", which=0), "another name in place")
lie("two data.pkl", torch_zip(dict_(a=GOOD), {"y/data.pkl": proto(b"N")}), "2 data.pkl", CheckpointError)
lie("an encrypted member", directory(PLAIN, 8, "<H", 1), "encrypted")
INNER = (
    torch_zip(b"N", {"x/data/1": FLOATS}).split(b"PK\x03\x04")[-1].partition(b"PK\x01\x02")[0]
)  # a member as it lies
NESTED = torch_zip(dict_(a=GOOD), {"x/data/0": b"PK\x03\x04" + INNER, "x/data/1": FLOATS})
lie("members that overlap", directory(NESTED, 42, "<I", NESTED.index(INNER) - 4, member=2), "overlap")
lie("two names for one member", directory(PLAIN, 42, "<I", 0), "another name in place")
lie(
    "a member beyond the end",
    directory(directory(PLAIN, 20, "<I", 1 << 30), 24, "<I", 1 << 30),
    "beyond",
    CheckpointError,
)
lie("a member at the wrong place", directory(PLAIN, 42, "<I", 7), "where the directory says", CheckpointError)
lie("bytes behind an archive", PLAIN + b"\0" * 1000, "follow the end")
lie("an archive behind an archive", PLAIN + PLAIN[:-1] + b"x", "follow the end")
lie("bytes behind the pickle of an archive", torch_zip(dict_(a=GOOD) + b".garbage"), "bytes follow its end")
lie(
    "a program of TorchScript",
    torch_zip(dict_(a=GOOD), {"x/constants.pkl": b"", "x/code/a.py": b"import os"}),
    "TorchScript",
    CheckpointError,
)

# Legacy files and plain ones.

attack(
    "a second pickle behind the first",
    lambda c: proto(dict_(a=numpy_array(tuple_(4), raw(FLOATS)))) + proto(system(c)),
    "bytes follow",
)
lie("bytes behind a legacy file", torch_legacy(dict_(a=legacy_tensor())) + b"x", "1 bytes follow")
lie(
    "a legacy storage of another length",
    torch_legacy(dict_(a=legacy_tensor()), storages=struct.pack("<q", 1 << 40) + FLOATS),
    "4 are declared",
    CheckpointError,
)
lie(
    "a legacy storage of negative length",
    torch_legacy(dict_(a=legacy_tensor()), storages=struct.pack("<q", -1) + FLOATS),
    "4 are declared",
    CheckpointError,
)
lie(
    "a legacy file that declares more than it has",
    torch_legacy(dict_(a=legacy_tensor(count=1 << 40)), storages=struct.pack("<q", 1 << 40) + FLOATS),
    "breaks off among its storages",
    CheckpointError,
)
lie(
    "a legacy storage listed twice",
    torch_legacy(dict_(a=legacy_tensor()), keys=list_("0", "0")),
    "list of storages",
    CheckpointError,
)
lie("a legacy storage of nobody", torch_legacy(dict_(a=legacy_tensor()), keys=list_("1")), "no tensor", CheckpointError)
lie(
    "a legacy storage of two types",
    torch_legacy(dict_(a=legacy_tensor(), b=legacy_tensor(kind=name("torch", "DoubleStorage")))),
    "declared in two ways",
    CheckpointError,
)
lie("a legacy view beyond its storage", torch_legacy(dict_(a=legacy_tensor(tuple_("v", 2, 4)))), "view beyond")
lie("a legacy view before its storage", torch_legacy(dict_(a=legacy_tensor(tuple_("v", -1, 2)))), "view beyond")
lie("a legacy view of another shape", torch_legacy(dict_(a=legacy_tensor(tuple_("v", 1)))), "in a way torch does not")
lie("a stack that is empty", proto(b"R"), "empty stack", CheckpointError)
lie("a mark that is missing", proto(b"t"), "never set", CheckpointError)
lie("a value below the mark", proto(b"N(R"), "empty stack", CheckpointError)
lie("a memory of nothing", proto(b"h\x07"), "never remembered", CheckpointError)
lie("values left over", proto(b"NN"), "left over", CheckpointError)
lie("a pickle of a later Python", proto(b"N", 99), "protocol 99", CheckpointError)
lie("an instruction that is none", proto(b"\xff"), "no pickle instruction", CheckpointError)
