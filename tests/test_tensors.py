"""Reading safetensors: as safetensors itself does, but into memory that no file can change any more."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from geo_pretrain import tensors
from geo_pretrain.checkpoint import read_checkpoint, read_weights
from geo_pretrain.errors import CheckpointError, DigestMismatch
from geo_pretrain.loading import load_backbone
from geo_pretrain.tensors import DTYPES, NotTensors, load_tensors, read_tensors
from tests.zoo import write_tiny


def rich():
    """Tensors of every type and of odd shapes."""
    g = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 100, (3, 5), generator=g)
    typed = {f"of.{name}": numbers.to(getattr(torch, dtype)) for name, dtype in DTYPES.items()}
    bits = torch.tensor([0x7FC00001, 0x7F800001, -0x7FFFFFFF - 1, 1, -4194303], dtype=torch.int32)
    empty = {"empty": torch.zeros(3, 0), "number": torch.tensor(2.5), "none": torch.zeros(0)}
    return typed | {"NaN payloads": bits.view(torch.float32)} | empty


def same_bits(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert (value.dtype, value.shape) == (other[key].dtype, other[key].shape), key
        assert value.reshape(-1).view(torch.uint8).equal(other[key].reshape(-1).view(torch.uint8)), key


def ours(path):
    hasher = hashlib.sha256()
    found, size = read_tensors(path, hasher)
    assert hasher.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert size == path.stat().st_size
    return found


def test_tensors_are_those_that_safetensors_reads_and_each_has_memory_of_its_own(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(rich(), metadata={"a": "b"}))
    found = ours(path)
    same_bits(found, load(path.read_bytes()))
    filled = [tensor for tensor in found.values() if tensor.numel()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in filled}) == len(filled)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in filled)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in filled)
    save(found)  # safetensors refuses tensors that share memory


def spoilt(good: bytes, rng: random.Random) -> bytes:
    """A file with a few faults, most of them in its header."""
    data, header = bytearray(good), 8 + int.from_bytes(good[:8], "little")
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(min(header if rng.random() < 0.8 else len(data), len(data)))
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + rng.randint(1, 9)]
            case 3:
                data[at:at] = rng.randbytes(rng.randint(1, 9))
            case 4:
                data[at : at + 1] = rng.choice([b"0", b"9", b'"', b"}", b"-", b"1e3", b" "])
            case 5:
                data[:8] = struct.pack("<Q", rng.choice([0, 1, header - 9, header, 1 << 62, len(data)]))
        if not data:
            return b""
    return bytes(data)


def test_every_damaged_file_is_read_as_safetensors_reads_it_or_refused(tmp_path):
    """Neither accepts what the other refuses, but for types that weights do not have."""
    good, rng, path = save(rich(), metadata={"a": "b"}), random.Random(5), tmp_path / "x.safetensors"
    counts = {"both": 0, "neither": 0, "stricter": 0}
    for _ in range(500):
        data = spoilt(good, rng)
        path.write_bytes(data)
        try:
            theirs = load(data)
        except (SafetensorError, KeyError, ValueError, OverflowError, TypeError, RuntimeError):
            theirs = None
        try:
            found = ours(path)
        except NotTensors:
            counts["stricter" if theirs is not None else "neither"] += 1
            continue
        assert theirs is not None, data[:300]
        same_bits(found, theirs)
        counts["both"] += 1
    assert counts["both"] > 10
    assert counts["neither"] > 200
    assert counts["stricter"] < 10, counts


def hand_made(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
REFUSED = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "a header without end": hand_made(b"", length=1 << 63),
    "no JSON": hand_made(b"{"),
    "no object": hand_made([1]),
    "a tensor that is no object": hand_made({"a": 1}),
    "deep": hand_made(b"[" * 200_000),
    "a name twice": hand_made(b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2), b"\0" * 4),
    "a gap": hand_made({"a": F32 | {"data_offsets": [4, 8]}}, b"\0" * 8),
    "an overlap": hand_made({"a": F32, "b": F32}, b"\0" * 4),
    "bytes behind the last": hand_made({"a": F32}, b"\0" * 8),
    "another size": hand_made({"a": F32 | {"shape": [2]}}, b"\0" * 4),
    "a huge shape": hand_made({"a": F32 | {"shape": [1 << 62, 4, 0]}}, b"\0" * 4),
    "a negative shape": hand_made({"a": F32 | {"shape": [-1, -1]}}, b"\0" * 4),
    "a shape that is no number": hand_made({"a": F32 | {"shape": [1.0]}}, b"\0" * 4),
    "true": hand_made({"a": F32 | {"shape": [True]}}, b"\0" * 4),
    "complex": hand_made({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, b"\0" * 8),
    "float8": hand_made({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, b"\0" * 4),
    "no type": hand_made({"a": F32 | {"dtype": ["F32"]}}, b"\0" * 4),
}


@pytest.mark.parametrize("what", REFUSED)
def test_files_that_are_none_are_refused_with_the_reason(tmp_path, what):
    path = tmp_path / "x.safetensors"
    path.write_bytes(REFUSED[what])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: is not a safetensors file \(.+\)"):
        load_tensors(path, None, "")


def test_the_digest_that_another_file_states_is_compared(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"a": torch.ones(2)}))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_tensors(path, digest, "results.json")["a"].tolist() == [1, 1]
    with pytest.raises(DigestMismatch, match=r"results\.json states 00"):
        load_tensors(path, "00", "results.json")
    with pytest.raises(CheckpointError, match="No such file"):
        load_tensors(tmp_path / "gone", digest, "results.json")


@pytest.mark.parametrize("change", ["overwritten", "cut", "replaced", "removed"])
def test_a_loaded_network_does_not_change_with_its_file(tmp_path: Path, change):
    path = write_tiny(tmp_path / "tiny_net_r18").folder / "encoder.safetensors"
    network = load_backbone(tmp_path / "tiny_net_r18")
    before = {key: value.clone() for key, value in load_backbone(tmp_path / "tiny_net_r18").state_dict().items()}
    size = path.stat().st_size
    if change == "overwritten":  # as cp, rsync --inplace and editors do
        with path.open("r+b") as stream:
            stream.write(b"\0" * size)
    elif change == "cut":
        os.truncate(path, 100)
    elif change == "replaced":
        path.rename(path.with_suffix(".old"))
        path.write_bytes(b"\0" * size)
    else:
        path.unlink()
    same_bits(network.state_dict(), before)
    network(torch.ones(1, 3, 64, 64))  # a map of a cut file ends the process


def test_what_is_hashed_is_what_is_loaded(tmp_path: Path, monkeypatch):
    """The file is swapped, or its bytes change in place, at any moment of the read: refused, or the right weights."""
    checkpoint = read_checkpoint(write_tiny(tmp_path / "tiny_net_r18").folder)
    path = checkpoint.folder / "encoder.safetensors"
    good, want = path.read_bytes(), read_weights(checkpoint, "encoder")
    real, moment = tensors._Source.read, {}

    def read(source, piece):
        moment["left"] -= 1
        if moment["left"] == 0:
            data = bytearray(good)
            data[-1000:] = b"\1" * 1000
            target = path.with_suffix(".other") if moment["swap"] else path
            target.write_bytes(data)
            target.replace(path)
        return real(source, piece)

    monkeypatch.setattr(tensors._Source, "read", read)
    refused = []
    for swap in (True, False):
        for left in (1, 2, 3, 20, 60):
            path.write_bytes(good)
            moment |= {"left": left, "swap": swap}
            try:
                same_bits(read_weights(checkpoint, "encoder"), want)
            except DigestMismatch:
                refused.append(swap)
    assert refused == [False] * 5  # the changes in place; of a swapped file the one that was opened is read


@pytest.mark.parametrize("positioned", [True, False])
def test_large_files_are_read_and_hashed_in_pieces(tmp_path: Path, monkeypatch, positioned):
    """Several threads, pieces smaller than a tensor, and a system that reads at no position but the current one."""
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    rest = {"small": values[:3].clone(), "none": torch.zeros(0), "middle": torch.ones(90, 100)}
    named, path = {"large": values, **rest}, tmp_path / "many.safetensors"
    path.write_bytes(save(named))
    monkeypatch.setattr(tensors, "PIECE", 4099)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    if not positioned:
        monkeypatch.delattr(os, "preadv")
    read, size = read_tensors(path, hasher := hashlib.sha256())
    assert (hasher.hexdigest(), size) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    same_bits(read, named)
