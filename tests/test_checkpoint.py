"""The checkpoint folder: what is refused, and that a killed writer leaves the old or the new one, never a mixture."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from xxhash import xxh3_128

from geo_pretrain import checkpoint as module
from geo_pretrain import digests, staging
from geo_pretrain.checkpoint import (
    Checkpoint,
    read_checkpoint,
    read_weights,
    verify_file,
    verify_files,
    write_checkpoint,
)
from geo_pretrain.errors import CheckpointError, DigestMismatch
from tests.forked import Forked
from tests.zoo import (
    ARCH,
    ARCH_3D,
    CONTRACT,
    CONTRACT_3D,
    LICENSE,
    role_weights,
    unsealed,
    weights_3d,
    write_tiny,
    write_tiny_3d,
)


def change_config(folder: Path, **changes: object) -> None:
    """Change a config.json as a person does: it has no digest of its own any more."""
    config = unsealed(folder)
    for path, value in changes.items():
        *parents, key = path.split("__")
        target = config
        for parent in parents:
            target = target[parent]
        if value is None:
            del target[key]
        else:
            target[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_holds_what_was_written(tmp_path: Path):
    written = write_tiny(tmp_path / "tiny")
    names = "README.md config.json decoder.safetensors encoder.safetensors golden.safetensors log.jsonl recipe.yaml"
    assert sorted(p.name for p in (tmp_path / "tiny").iterdir()) == names.split()
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]
    found = read_checkpoint(tmp_path / "tiny")
    assert found == written
    assert (found.name, found.arch, found.contract, found.license) == ("tiny_net_r18", ARCH, CONTRACT, LICENSE)
    assert found.provenance == {"steps": 7, "seed": 0}
    assert found.finished
    verify_files(found)
    # digests and tensors as other code sees them
    data = (tmp_path / "tiny/encoder.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == found.files["encoder.safetensors"].sha256
    stored = load_file(tmp_path / "tiny/encoder.safetensors")
    expected = role_weights("encoder")
    assert stored.keys() == expected.keys() == read_weights(found, "encoder").keys()
    assert all(torch.equal(stored[key], expected[key]) for key in expected)
    assert (tmp_path / "tiny/recipe.yaml").read_text() == "name: tiny\n"


def test_a_network_in_one_piece_has_one_file(tmp_path: Path):
    found = write_tiny_3d(tmp_path / "tiny")
    assert (tmp_path / "tiny/model.safetensors").is_file()
    assert found.network_roles() == found.network_roles(decoder=False) == ("model",)
    assert read_weights(found, "model").keys() == weights_3d().keys()
    assert (found.contract, found.arch) == (CONTRACT_3D, ARCH_3D)
    other = write_tiny(tmp_path / "other")
    assert other.network_roles() == ("encoder", "decoder")
    assert other.network_roles(decoder=False) == ("encoder",)


def test_views_and_shared_tensors_can_be_written(tmp_path: Path):
    big = torch.arange(100.0).reshape(10, 10)
    found = write_tiny(tmp_path / "tiny", weights={"encoder": {"a": big[:, 0], "b": big.T, "c": big.T}})
    weights = read_weights(found, "encoder")
    assert torch.equal(weights["a"], big[:, 0])
    assert torch.equal(weights["c"], big.T)
    assert found.files["encoder.safetensors"].size < 2000


def test_the_log_may_be_a_file(tmp_path: Path):
    (tmp_path / "run.jsonl").write_bytes(b'{"loss": 1}\n')
    write_tiny(tmp_path / "tiny", log=tmp_path / "run.jsonl", finished=False)
    assert (tmp_path / "tiny/log.jsonl").read_bytes() == b'{"loss": 1}\n'
    assert not read_checkpoint(tmp_path / "tiny").finished


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "one bit"),
        (lambda data: data + b"\0", "longer"),
        (lambda data: b"", "empty"),
    ],
)
def test_altered_files_are_refused_with_both_digests(tmp_path: Path, damage, what: str):
    found = write_tiny(tmp_path / "tiny")
    path = tmp_path / "tiny/encoder.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DigestMismatch) as caught:
        read_weights(found, "encoder")
    for part in (str(path), actual, found.files["encoder.safetensors"].sha256):
        assert part in str(caught.value)
    with pytest.raises(DigestMismatch):
        verify_files(found)


def write_small(folder: Path, *, with_xxh3: bool) -> Checkpoint:
    """A file of few bytes with tensors of every kind that needs care: scalars, empty ones, halves."""
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7), "c": torch.empty(0), "d": torch.ones(3).half()}
    write_tiny(folder, weights={"encoder": state})
    if not with_xxh3:
        change_config(folder, **{"files__encoder.safetensors__xxh3": None})
    return read_checkpoint(folder)


@pytest.mark.parametrize("with_xxh3", [True, False], ids=["xxh3", "an older folder"])
def test_any_altered_byte_is_found(tmp_path: Path, with_xxh3: bool):
    found = write_small(tmp_path / "tiny", with_xxh3=with_xxh3)
    stored = found.files["encoder.safetensors"]
    path = tmp_path / "tiny/encoder.safetensors"
    data = path.read_bytes()
    assert (stored.xxh3 is not None) == with_xxh3
    weights = read_weights(found, "encoder")
    assert {key: tuple(value.shape) for key, value in weights.items()} == {"a": (2, 3), "b": (), "c": (0,), "d": (3,)}
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(DigestMismatch, match=f"sha256 is .*, expected {stored.sha256}"):
            read_weights(found, "encoder")
        with pytest.raises(DigestMismatch):
            verify_file(found, "encoder.safetensors", load_digest=True)
    path.write_bytes(data)
    verify_file(found, "encoder.safetensors", load_digest=True)


def test_xxh3_is_stored_beside_sha256_and_compared_at_each_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = write_tiny(tmp_path / "tiny")
    for name, stored in found.files.items():
        assert stored.xxh3 == xxh3_128((tmp_path / "tiny" / name).read_bytes()).hexdigest()
    read: list[str] = []
    monkeypatch.setattr(module, "sha256", lambda path: read.append(path.name))
    read_weights(found, "encoder")
    verify_file(found, "README.md", load_digest=True)
    assert read == []  # sha256 takes several times longer


def test_a_wrong_xxh3_is_refused_although_sha256_agrees(tmp_path: Path):
    write_tiny(tmp_path / "tiny")
    change_config(tmp_path / "tiny", **{"files__encoder.safetensors__xxh3": "1" * 32})
    found = read_checkpoint(tmp_path / "tiny")
    with pytest.raises(DigestMismatch, match=f"xxh3 is [0-9a-f]{{32}}, expected {'1' * 32}, although sha256"):
        read_weights(found, "encoder")
    with pytest.raises(DigestMismatch, match=r"config\.json was altered"):
        verify_file(found, "encoder.safetensors", load_digest=True)


def test_weights_load_in_a_process_that_was_forked_after_a_load(tmp_path: Path):
    """As a data loader's worker may: threads of a pool that all hashes share would be missing there."""
    found = write_tiny(tmp_path / "tiny", weights={"encoder": {"a": torch.zeros(1 << 20)}})
    code = f"""
import os
from geo_pretrain.checkpoint import read_checkpoint, read_weights
found = read_checkpoint({str(found.folder)!r})
read_weights(found, "encoder")
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:
    read_weights(found, "encoder")
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_missing_and_unlisted_files_are_refused(tmp_path: Path):
    found = write_tiny(tmp_path / "tiny")
    with pytest.raises(CheckpointError, match="no file with role 'heads'; it has: encoder, decoder, golden"):
        read_weights(found, "heads")
    (tmp_path / "tiny/stranger.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"stranger.safetensors: is not listed in config.json"):
        verify_files(found)
    (tmp_path / "tiny/decoder.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"decoder.safetensors: is missing; config.json lists it with \d+ bytes"):
        read_weights(found, "decoder")
    assert read_weights(found, "encoder")  # the other role does not suffer


def test_a_file_that_is_no_safetensors_is_refused_even_with_the_right_digest(tmp_path: Path):
    write_tiny(tmp_path / "tiny")
    junk = b"not tensors"
    (tmp_path / "tiny/encoder.safetensors").write_bytes(junk)
    entry = {"role": "encoder", "size": len(junk), "sha256": hashlib.sha256(junk).hexdigest()}
    change_config(tmp_path / "tiny", files={"encoder.safetensors": entry})
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        read_weights(read_checkpoint(tmp_path / "tiny"), "encoder")


VOXELS = CONTRACT_3D.to_dict()
GOOD = {"role": "encoder", "size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "key 'format' is missing"),
        ({"format": "1"}, "key 'format' is '1'; int is accepted"),
        ({"format": True}, "key 'format' is True; int is accepted"),
        ({"format": 2}, "format is 2; this version reads format 1; a newer geo_pretrain wrote it"),
        ({"name": 3}, "key 'name' is 3; str is accepted"),
        ({"name": "../x"}, r"name is '\.\./x'"),
        ({"arch__name": None}, r"key 'arch\.name' is missing"),
        ({"arch__name": "resnet_unit"}, "Unknown architecture 'resnet_unit'. Closest: 'resnet_unet'"),
        ({"arch__args": []}, r"key 'arch\.args' is \[\]; dict is accepted"),
        ({"contract": {"kind": "voxel", "voxel_size": 0.02}}, r"missing \['channels', 'coordinates', 'offset'"),
        ({"contract": VOXELS | {"voxel_size": [0.1, 1.0, 0.1]}}, "accepted for cartesian ones: one edge in meters"),
        ({"contract": VOXELS | {"reduce": "last"}}, "reduce is 'last'; accepted: 'first', 'mean'"),
        ({"contract__kind": "sound"}, "contract kind is 'sound'; accepted: image, voxel"),
        ({"contract__mean": None}, r"missing \['mean'\]"),
        ({"contract__std": [1.0]}, "equal lengths"),
        ({"contract__size": 5}, "config.json"),
        ({"licence__weights": ""}, "license chain is incomplete, nothing given for: weights"),
        ({"licence__datasets": []}, "nothing given for: datasets"),
        ({"licence__datasets": [3]}, "config.json"),
        ({"licence": None}, "key 'licence' is missing"),
        ({"files": []}, r"key 'files' is \[\]; dict is accepted"),
        ({"files": {"../encoder.safetensors": GOOD}}, "plain names inside the folder are accepted"),
        ({"files": {"/etc/x.safetensors": GOOD}}, "plain names inside the folder"),
        ({"files": {"a/b.safetensors": GOOD}}, "plain names inside the folder"),
        ({"files": {"encoder.bin": GOOD}}, "only .safetensors files may hold tensors"),
        ({"files": {"e.safetensors": GOOD | {"sha256": "xyz"}}}, "64 hex digits are accepted"),
        ({"files": {"e.safetensors": GOOD | {"xxh3": "xyz"}}}, r"safetensors\.xxh3' is 'xyz'; 32 hex digits are"),
        ({"files": {"e.safetensors": GOOD | {"xxh3": 5}}}, r"safetensors\.xxh3' is 5; str is accepted"),
        ({"files": {"e.safetensors": {"role": "encoder", "size": 1}}}, r"'files\.e\.safetensors\.sha256' is missing"),
        ({"files": {"e.safetensors": 5}}, "'files.e.safetensors' is 5"),
        ({"finished": 1}, "key 'finished' is 1; bool is accepted"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_refused_naming_file_and_key(tmp_path: Path, changes: dict, message: str):
    write_tiny(tmp_path / "tiny")
    change_config(tmp_path / "tiny", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(tmp_path / "tiny")
    assert str(tmp_path / "tiny/config.json") in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe\x00"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_checkpoint(tmp_path)


def test_places_that_are_no_checkpoint_are_named(tmp_path: Path):
    run = tmp_path / "training.run"
    run.mkdir()
    with pytest.raises(
        CheckpointError, match=r"training does not exist yet: its run, in .*\.run, has not taken a step\."
    ):
        read_checkpoint(tmp_path / "training")
    (run / "log.jsonl").write_text('{"step": 1}\n{"step": 250, "lr": 0.1}\n{"step": 25')
    with pytest.raises(CheckpointError, match=r"is at step 250\. It is written when that ends"):
        read_checkpoint(tmp_path / "training")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_checkpoint(tmp_path)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a checkpoint folder and is left alone"):
        write_tiny(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(CheckpointError, match="is a file"):
        write_tiny(tmp_path / "thesis.txt")


def test_wrong_roles_and_names_are_refused(tmp_path: Path):
    with pytest.raises(
        CheckpointError, match=r"roles \['brain'\]; accepted: one or more of encoder, decoder, model, heads"
    ):
        write_tiny(tmp_path / "tiny", weights={"brain": {"a": torch.zeros(1)}})
    with pytest.raises(CheckpointError, match=r"Checkpoint name '\.\./x'"):
        write_tiny(tmp_path / "tiny", name="../x")
    assert not list(tmp_path.iterdir())


def test_replacing_keeps_notes_and_drops_files_of_the_old_one(tmp_path: Path):
    write_tiny(tmp_path / "tiny")
    (tmp_path / "tiny/notes.txt").write_text("mine")
    write_tiny(tmp_path / "tiny", weights={"encoder": role_weights("encoder")}, provenance={"steps": 8})
    found = read_checkpoint(tmp_path / "tiny")
    assert found.provenance == {"steps": 8}
    verify_files(found)
    assert not (tmp_path / "tiny/decoder.safetensors").exists()
    assert (tmp_path / "tiny/notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_replacing_drops_whatever_the_old_one_listed(tmp_path: Path):
    """As the file of a fine-tuned backbone in one piece, whose name no pre-trained one has."""
    folder = write_tiny(tmp_path / "tiny").folder
    (folder / "encoder.safetensors").rename(folder / "backbone.safetensors")
    config = unsealed(folder)
    config["files"]["backbone.safetensors"] = config["files"].pop("encoder.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    verify_files(read_checkpoint(folder))
    verify_files(write_tiny(folder, provenance={"steps": 8}))
    assert not (folder / "backbone.safetensors").exists()


def test_a_reader_that_comes_between_the_renames_waits_for_the_new_one(tmp_path: Path, monkeypatch: Any):
    folder = write_tiny(tmp_path / "tiny").folder
    move, seen = staging.move, []
    reader = threading.Thread(target=lambda: seen.append(read_checkpoint(folder).provenance))

    def slow(source: Path, target: Path) -> None:
        move(source, target)
        if source == folder:
            reader.start()
            reader.join(0.5)

    monkeypatch.setattr(staging, "move", slow)
    write_tiny(folder, provenance={"steps": 8})
    reader.join()
    assert seen == [{"steps": 8}]
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_a_failing_write_leaves_the_old_one_and_no_rubbish(tmp_path: Path):
    write_tiny(tmp_path / "tiny")
    with pytest.raises(TypeError):
        write_tiny(tmp_path / "tiny", provenance={"steps": object()})
    assert read_checkpoint(tmp_path / "tiny").provenance["steps"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def write_and_die(folder: Path, place: int) -> None:
    """Replace a checkpoint, and be killed before the disk operation of this number."""
    calls = itertools.count(1)

    def dying(function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == place:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    operations = ((module, "_save_tensors"), (staging, "sync_files"), (staging, "sync_folder"))
    for owner, name in ((Path, "replace"), (staging.shutil, "rmtree"), *operations):
        setattr(owner, name, dying(getattr(owner, name)))
    write_tiny(folder, provenance={"steps": 8})


def test_a_writer_killed_at_any_step_leaves_the_old_or_the_new_one(tmp_path: Path):
    """Every disk operation that matters is a place to die; the last writer outlives all of them."""
    for place in range(1, 100):
        folder = tmp_path / str(place) / "tiny"
        write_tiny(folder)
        (folder / "notes.txt").write_text("mine")
        writer = Forked(partial(write_and_die, folder, place))
        output, _ = writer.communicate()
        assert writer.returncode in (0, -signal.SIGKILL), output
        if writer.returncode == 0:
            break
    folders = [path / "tiny" for path in sorted(tmp_path.iterdir(), key=lambda path: int(path.name))]
    seen = []
    for folder in folders:
        found = read_checkpoint(folder)
        verify_files(found)
        seen.append(found.provenance["steps"])
        write_tiny(folder, provenance={"steps": 9})
        assert read_checkpoint(folder).provenance == {"steps": 9}
        assert (folder / "notes.txt").read_text() == "mine"
        assert [p.name for p in folder.parent.iterdir()] == ["tiny"]
    assert seen == sorted(seen)
    assert seen.count(7) >= 5  # before the swap
    assert seen.count(8) >= 3  # after it


def test_the_format_module_does_not_import_torch():
    code = "import sys, geo_pretrain.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert module.FORMAT == 1


def test_any_altered_byte_of_a_config_is_noticed(tmp_path: Path):
    """A contract's mean, a digest, a name: whatever is said of the weights is as trusted as they are."""
    path = write_tiny(tmp_path / "tiny").folder / "config.json"
    good, rng = path.read_bytes(), random.Random(0)
    want = read_checkpoint(tmp_path / "tiny")
    digest = json.loads(good)["files"]["encoder.safetensors"]["sha256"]
    changes = [
        good.replace(digest.encode(), bytes(64 * "0", "ascii")),
        good.replace(b'"finished": true', b'"finished": false'),
    ]
    for at in rng.sample(range(len(good)), 150):
        changes.append(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
    changes += [good[:at] for at in rng.sample(range(len(good) - 2), 30)]
    for data in changes:
        path.write_bytes(data)
        try:
            found = read_checkpoint(tmp_path / "tiny")
        except CheckpointError:
            continue
        assert found == want, "white space, or the name of the key of the digest"


def test_numbers_that_json_has_not_are_written_as_texts(tmp_path: Path):
    found = write_tiny(tmp_path / "tiny", provenance={"epoch": float("nan"), "in": [{"loss": float("-inf")}, 1.5]})
    assert found.provenance == {"epoch": "nan", "in": [{"loss": "-inf"}, 1.5]}
    json.loads((tmp_path / "tiny/config.json").read_text(), parse_constant=pytest.fail)


def test_a_config_of_format_one_stays_readable(tmp_path: Path):
    """Bytes written by hand: changing the writer and the reader together must not go unnoticed."""
    config = """{"format": 1, "name": "a_b_c", "arch": {"name": "resnet_unet", "args": {"depth": 18}},
    "contract": {"kind": "image", "channels": ["R", "G", "B"], "value_range": [0.0, 1.0], "mean": [0.5, 0.5, 0.5],
                 "std": [1.0, 1.0, 1.0], "size": [96, 128], "interpolation": "nearest"},
    "files": {"encoder.safetensors": {"role": "encoder", "size": 8,
              "sha256": "0000000000000000000000000000000000000000000000000000000000000000"}},
    "licence": {"code": "MIT", "weights": "MIT", "datasets": [["rooms", "MIT"]], "base_model": "none"},
    "provenance": {}, "finished": true, "something": "a later minor version may add keys"}"""
    (tmp_path / "config.json").write_text(config)
    found = read_checkpoint(tmp_path)
    assert found.contract.size == (96, 128)
    assert found.license.datasets == (("rooms", "MIT"),)
    assert found.arch.args == {"depth": 18}


def test_writing_needs_every_part():
    with pytest.raises(TypeError, match="license"):
        write_checkpoint(Path("x"), name="a_b_c", arch=ARCH, contract=CONTRACT, weights={}, golden={})  # type: ignore[call-arg]


def test_a_file_that_is_cut_while_it_is_hashed_is_altered_and_does_not_end_the_process(tmp_path, monkeypatch):
    class Cutting:  # it has no update_mmap: a map of a file that is cut ends the process
        def __init__(self):
            self.digest = xxh3_128()

        def update(self, block):
            self.digest.update(block)
            (tmp_path / "file").write_bytes(b"")

        def hexdigest(self):
            return self.digest.hexdigest()

    (tmp_path / "file").write_bytes(b"x" * 300)
    monkeypatch.setattr(digests, "xxh3_hasher", Cutting)
    monkeypatch.setattr(digests, "HASHED", 100)
    assert module.xxh3(tmp_path / "file") == xxh3_128(b"x" * 100).hexdigest()
