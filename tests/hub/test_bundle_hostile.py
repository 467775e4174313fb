"""Bundles that were altered, cut or made to do harm: each is refused, and nothing of it is written."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from geo_pretrain.errors import CheckpointError
from geo_pretrain.hub import bundle as bundles
from geo_pretrain.hub.bundle import install_bundle, list_bundle
from tests.hub.test_bundle import NAME, NAME_3D, content
from tests.zoo import write_tiny

# A hostile bundle is made from the members of a good one; "change" edits the list of (header, bytes).
Members = list[tuple[tarfile.TarInfo, bytes]]


def members_of(path: Path, only: str = NAME) -> Members:
    with tarfile.open(path, "r:") as tar:
        found = [member for member in tar.getmembers() if member.name.startswith(only + "/")]
        return [(member, tar.extractfile(member).read()) for member in found]  # type: ignore[union-attr]


def write_tar(path: Path, members: Members, kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w:", format=kind) as tar:
        for header, data in members:
            tar.addfile(header, io.BytesIO(data) if header.size else None)
    return path


def plain(name: str, data: bytes = b"x", **changes: Any) -> tuple[tarfile.TarInfo, bytes]:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    for key, value in changes.items():
        setattr(header, key, value)
    return header, data


def link(name: str, kind: bytes, target: str = "/etc/passwd") -> tuple[tarfile.TarInfo, bytes]:
    return plain(name, b"", type=kind, linkname=target)


def renamed(members: Members, old: str, new: str) -> Members:
    return [(replace_name(header, header.name.replace(old, new)), data) for header, data in members]


def replace_name(header: tarfile.TarInfo, name: str) -> tarfile.TarInfo:
    return plain(name, b" " * header.size)[0]


def edited(members: Members, file: str, change: Callable[[bytes], bytes]) -> Members:
    return [
        plain(header.name, change(data)) if header.name.endswith(f"/{file}") else (header, data)
        for header, data in members
    ]


def config(members: Members, change: Callable[[dict[str, Any]], object]) -> Members:
    def edit(data: bytes) -> bytes:
        parsed = json.loads(data)
        parsed.pop("sha256")  # the digest of what is about to change
        change(parsed)
        return json.dumps(parsed).encode()

    return edited(members, "config.json", edit)


def without(members: Members, file: str) -> Members:
    return [member for member in members if not member[0].name.endswith(f"/{file}")]


def evil_listed(name: str) -> Callable[[Members], Members]:
    """A file that the inventory does list, under a name that leads elsewhere."""
    entry = {"role": "log", "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}

    def change(members: Members) -> Members:
        return [plain(f"{NAME}/{name}"), *config(members, lambda parsed: parsed["files"].update({name: entry}))]

    return change


HOSTILE: dict[str, tuple[Callable[[Members], Members], str]] = {
    "climbs out of the cache": (lambda m: [plain(f"{NAME}/../../evil.txt"), *m], "only <checkpoint's name>/<file>"),
    "an inventory that climbs": (evil_listed("../evil.txt"), "only <checkpoint's name>/<file>"),
    "a name that is dots": (lambda m: [plain("../config.json"), *m], "only <checkpoint's name>/<file>"),
    "an absolute path": (lambda m: [plain("/tmp/evil.txt"), *m], "only <checkpoint's name>/<file>"),
    "a folder too deep": (lambda m: [plain(f"{NAME}/deep/evil.txt"), *m], "only <checkpoint's name>/<file>"),
    "a file outside of any folder": (lambda m: [plain("evil.txt"), *m], "only <checkpoint's name>/<file>"),
    "a hidden file": (lambda m: [plain(f"{NAME}/.evil"), *m], "only <checkpoint's name>/<file>"),
    "a hidden folder": (lambda m: renamed(m, NAME, ".evil"), "only <checkpoint's name>/<file>"),
    "a backslash": (lambda m: [plain(f"{NAME}/..\\evil"), *m], "only <checkpoint's name>/<file>"),
    "a file that nobody listed": (lambda m: [plain(f"{NAME}/evil.py"), *m], r"evil\.py: is not listed in config"),
    "weights that nobody listed": (lambda m: [plain(f"{NAME}/heads.safetensors"), *m], "is not listed in config"),
    "a symbolic link": (lambda m: [link(f"{NAME}/log.jsonl", tarfile.SYMTYPE), *without(m, "log.jsonl")], "no plain"),
    "a hard link": (lambda m: [link(f"{NAME}/log.jsonl", tarfile.LNKTYPE), *without(m, "log.jsonl")], "no plain file"),
    "a linked folder": (lambda m: [link(NAME, tarfile.SYMTYPE, "/tmp"), *m], "no plain file"),
    "a folder": (lambda m: [link(NAME, tarfile.DIRTYPE), *m], "no plain file"),
    "a character device": (lambda m: [link(f"{NAME}/log.jsonl", tarfile.CHRTYPE), *m], "no plain file"),
    "a block device": (lambda m: [link(f"{NAME}/log.jsonl", tarfile.BLKTYPE), *m], "no plain file"),
    "a pipe": (lambda m: [link(f"{NAME}/log.jsonl", tarfile.FIFOTYPE), *m], "no plain file"),
    "a sparse file": (lambda m: [plain(f"{NAME}/x", type=tarfile.GNUTYPE_SPARSE), *m], "no plain file"),
    "the same file twice": (lambda m: [*m, m[0]], "twice"),
    "the same checkpoint twice": (lambda m: [*m, *m], "twice"),
    "no config": (lambda m: without(m, "config.json"), r"has no config\.json"),
    "no weights": (lambda m: without(m, "decoder.safetensors"), r"decoder\.safetensors: is missing"),
    "no golden values": (lambda m: without(m, "golden.safetensors"), "is missing; .* its golden file"),
    "another checkpoint's config": (lambda m: renamed(m, NAME, "tiny_other_r18"), f"calls it '{NAME}'"),
    "a config that is none": (lambda m: edited(m, "config.json", lambda data: b"{}"), "'format' is missing"),
    "a config of another format": (lambda m: config(m, lambda c: c.update(format=99)), "format is 99"),
    "a config too large": (lambda m: edited(m, "config.json", lambda d: d + b" " * (10 << 20)), "at most 10485760"),
    "an altered file": (lambda m: edited(m, "encoder.safetensors", lambda d: d[:-1] + b"!"), "sha256 is .* expected"),
    "an altered text": (lambda m: edited(m, "recipe.yaml", lambda d: d[:-1] + b"!"), "sha256 is .* expected"),
    "a shorter file": (lambda m: edited(m, "encoder.safetensors", lambda d: d[:-1]), "bytes, its config.json promises"),
    "a longer file": (
        lambda m: edited(m, "encoder.safetensors", lambda d: d + b"!"),
        "bytes, its config.json promises",
    ),
    "a pickle as weights": (
        lambda m: config(
            m, lambda c: c["files"].update({"heads.pth": {"role": "heads", "size": 1, "sha256": "0" * 64}})
        ),
        "only .safetensors files may hold tensors",
    ),
    "an incomplete license chain": (lambda m: config(m, lambda c: c["licence"].update(datasets=[])), "license chain"),
    "nothing": (lambda m: [], "holds no checkpoint"),
}


def refused(bundle: Path, cache: Path, message: str) -> None:
    """Installing raises and changes nothing; a checkpoint that is there stays as it is."""
    before, paths = content(cache), set(cache.rglob("*"))
    with pytest.raises(CheckpointError, match=message) as caught:
        install_bundle(bundle, cache)
    assert str(bundle) in str(caught.value)
    assert content(cache) == before
    assert set(cache.rglob("*")) == paths  # not even a folder or a lock


@pytest.mark.parametrize("case", list(HOSTILE))
def test_hostile_bundles_are_refused_and_nothing_is_written(bundle: Path, tmp_path: Path, case: str):
    change, message = HOSTILE[case]
    write_tiny(tmp_path / "cache/bundles" / NAME, provenance={"steps": 1})
    hostile = write_tar(tmp_path / "hostile.tar", change(members_of(bundle)))
    refused(hostile, tmp_path / "cache", message)
    assert sorted(os.listdir(tmp_path)) == ["cache", "hostile.tar"]


def test_the_hostile_corpus_is_complete_and_its_twin_is_accepted(bundle: Path, tmp_path: Path):
    assert len(HOSTILE) >= 35
    rewritten = write_tar(tmp_path / "x.tar", members_of(bundle))  # nothing changed: this is not why they are refused
    assert len(install_bundle(rewritten, tmp_path)) == 1


def test_the_number_of_files_has_a_limit(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    count = len(members_of(bundle)) + len(members_of(bundle, NAME_3D))
    monkeypatch.setattr(bundles, "MEMBER_LIMIT", count - 1)
    refused(bundle, tmp_path, f"holds more than {count - 1} files")
    monkeypatch.setattr(bundles, "MEMBER_LIMIT", count)
    assert len(install_bundle(bundle, tmp_path)) == 2


def test_extensions_of_the_tar_format_are_refused_unread(bundle: Path, tmp_path: Path):
    members = members_of(bundle)
    long = [plain(f"{NAME}/{'n' * 150}"), *members]
    for kind, typeflag in ((tarfile.PAX_FORMAT, "x"), (tarfile.GNU_FORMAT, "L")):
        refused(write_tar(tmp_path / "long.tar", long, kind), tmp_path, f"no plain file .*{typeflag}")
    # a global header may rename every file that follows
    with tarfile.open(tmp_path / "pax.tar", "w:", format=tarfile.PAX_FORMAT, pax_headers={"path": "../evil"}) as tar:
        for header, data in members:
            tar.addfile(header, io.BytesIO(data))
    refused(tmp_path / "pax.tar", tmp_path, "no plain file .*g")


def header_block(name: str, size: bytes) -> bytes:
    """A plain header with any size field, and its right checksum."""
    block = bytearray(plain(name, b"")[0].tobuf(tarfile.USTAR_FORMAT)[:512])
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (b"77777777777\0", "is cut off"),  # 8 GB
        (b"\x80" + b"\xff" * 11, "is cut off"),  # the largest that base 256 can say
        (b"\xff" * 12, "is cut off"),  # -1
        (b"\xff" * 10 + b"\xfc\x00", "is cut off"),  # -1024: leads back to the same header, for ever
        (b"notanumber!!", "damaged"),
    ],
)
def test_sizes_that_cannot_be_are_refused(bundle: Path, tmp_path: Path, size: bytes, message: str):
    hostile = tmp_path / "x.tar"
    hostile.write_bytes(header_block(f"{NAME}/log.jsonl", size) + bytes(512) + bundle.read_bytes())
    refused(hostile, tmp_path, message)


def test_files_that_are_no_bundles_say_so(bundle: Path, tmp_path: Path):
    data = bundle.read_bytes()
    cases = {
        "empty": (b"", "is cut off after 0 bytes"),
        "text": (b"# not a tar\n" * 100, "is not a bundle, or damaged"),
        "gzipped": (gzip.compress(data, 1), "is not a bundle, or damaged"),
        "zeros": (bytes(10240), "holds no checkpoint"),
        "joined": (data + data, "goes on after its end"),
        "trailing": (data + b"!", "goes on after its end"),
        "no end": (data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512), "is cut off"),
        "bad checksum": (data[:100] + b"7" + data[101:], "damaged"),
        "name in another encoding": ("ü".encode("latin1") + data[1:], "damaged"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_bytes(text)
        refused(tmp_path / name, tmp_path, message)
    with pytest.raises(CheckpointError, match="No such file"):
        install_bundle(tmp_path / "nowhere.tar", tmp_path)
    with pytest.raises(CheckpointError, match="Is a directory"):
        list_bundle(tmp_path)


def test_a_bundle_cut_anywhere_is_refused(bundle: Path, tmp_path: Path):
    data = bundle.read_bytes()
    end = len(data.rstrip(b"\0"))
    end += -end % 512 + 1024  # two blocks of zeros are the least that ends a tar
    chosen = random.Random(0).sample(range(end), 30)
    for length in (1, 511, 512, 513, end - 1, end - 512, *chosen):
        (tmp_path / "cut.tar").write_bytes(data[:length])
        refused(tmp_path / "cut.tar", tmp_path, f"is cut off after {length} bytes")
    (tmp_path / "cut.tar").write_bytes(data[:end])
    assert len(install_bundle(tmp_path / "cut.tar", tmp_path)) == 2


def test_a_flipped_bit_is_refused_or_changes_no_file(folders: tuple[Path, Path], bundle: Path, tmp_path: Path):
    data, generator = bundle.read_bytes(), random.Random(1)
    with tarfile.open(bundle, "r:") as tar:
        places = [member.offset + generator.randrange(512) for member in tar.getmembers() for _ in range(3)]
        places += [member.offset_data + generator.randrange(member.size) for member in tar.getmembers()]
    harmless = 0
    for number, place in enumerate(places):
        flipped = bytearray(data)
        flipped[place] ^= 1 << generator.randrange(8)
        (tmp_path / "x.tar").write_bytes(flipped)
        cache = tmp_path / f"cache{number}"
        try:
            installed = install_bundle(tmp_path / "x.tar", cache)
        except CheckpointError:
            assert content(cache) == {}
            continue
        harmless += 1
        # a config is known by nothing but itself; every file it lists is
        for folder, original in zip(installed, folders, strict=True):
            assert {k: v for k, v in content(folder).items() if k != "config.json"} == {
                k: v for k, v in content(original).items() if k != "config.json"
            }
    assert len(places) - harmless > 0.8 * len(places)
