"""Shards: frames of any source come back bit for bit from tar files that webdataset reads too."""

from __future__ import annotations

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.files import read_sealed
from geo_pretrain.training.data.frame import Frame, SkippedFrames, resize_frame
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.shard_files import write_shards
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.data.sources.shards import index_path, make_index
from geo_pretrain.training.recipe import DataSpec
from tests.front_door import geo_pretrain
from tests.recording_layouts import golden_frames, tar_member, write_tars
from tests.training.conftest import recording, write_recording  # noqa: F401 (a fixture)


def camera(frame):
    return frame.intrinsics, frame.cam_to_world


class Frames:
    """Frames of three scenes with names that have dots and slashes, ids, depth of several units, one broken."""

    name = "frames"
    note = "taken with care"

    def __init__(self):
        rng = np.random.default_rng(0)
        first, second = golden_frames(2, (24, 32))
        ids = {"semantic": rng.integers(-1, 9, (24, 32)).astype(np.int16), "instance": np.full((24, 32), 70, np.int32)}
        as_held = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])  # up is the camera's -y
        far = (np.arange(768).reshape(24, 32) / 5000).astype(np.float32)
        self.frames = {
            ("room", "0"): Frame("room", "0", first.color, first.depth.astype(np.float32), *camera(first)),
            ("room", "1"): Frame("room", "1", second.color, rng.random((24, 32), np.float32), *camera(second), **ids),
            ("room", "2"): None,
            ("a/b.c", "1305.25"): Frame("a/b.c", "1305.25", second.color, far, second.intrinsics, as_held, posed=False),
        }

    def scenes(self):
        return ["room", "a/b.c"]

    def frame_ids(self, scene):
        return [id for name, id in self.frames if name == scene]

    def load(self, scene, id):
        if self.frames[scene, id] is None:
            raise BadFrame(f"{scene}/{id}", "is broken")
        return self.frames[scene, id]

    def fingerprint(self):
        return "abc"


def opened(root, **options):
    return open_source(DataSpec(source="shards", path=str(root), options=options))


def assert_equal(found, wanted):
    for name, value in vars(wanted).items():
        got = getattr(found, name)
        if isinstance(value, np.ndarray):
            assert got.dtype == value.dtype, name
            np.testing.assert_array_equal(got, value, err_msg=name)
        else:
            assert got == value, name


def by_webdataset(path):
    """Samples as webdataset groups them: consecutive files with one name up to the first dot."""
    samples = []
    with tarfile.open(path) as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            base, _, kind = name.partition(".")
            key = f"{folder}/{base}"
            if not samples or samples[-1]["__key__"] != key:
                samples.append({"__key__": key})
            assert kind not in samples[-1]
            samples[-1][kind] = archive.extractfile(member).read()
    return samples


def test_frames_come_back_bit_for_bit(tmp_path):
    source = Frames()
    written = write_shards(source, tmp_path, frames=3)
    assert (written.made, written.present, written.frames) == (2, 0, 3)
    assert written.skips.reasons == {"room/2": "is broken"}
    back = opened(tmp_path)
    assert back.scenes() == source.scenes()
    assert back.frame_ids("room") == ["0", "1"]
    for scene, id in (("room", "0"), ("room", "1"), ("a/b.c", "1305.25")):
        assert_equal(back.load(scene, id), source.load(scene, id))
    assert back.unposed() == ["a/b.c"]
    samples = by_webdataset(tmp_path / "000000.tar")
    assert [sorted(sample) for sample in samples] == [
        ["__key__", "color.png", "depth.png", "json"],
        ["__key__", "color.png", "depth.npy", "instance.png", "json", "semantic.npy"],
    ]
    assert json.loads(by_webdataset(tmp_path / "000001.tar")[0]["json"])["depth_scale"] == 5000
    assert back.raw_depth("a/b.c", "1305.25")[0, 3] == 3


def test_the_library_webdataset_reads_them(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="the library webdataset is not installed")
    write_shards(Frames(), tmp_path)
    samples = list(webdataset.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == ["room/000000", "room/000001", "a/b.c/000003"]
    assert samples[0]["json"]["frame"] == "0"
    np.testing.assert_array_equal(samples[0]["color.png"], Frames().frames["room", "0"].color)


def test_shards_that_are_there_are_kept_and_torn_ones_made_again(tmp_path):
    write_shards(Frames(), tmp_path, frames=1, shard=(2, 2))
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["000001.tar", "000003.tar"]
    before = (tmp_path / "000001.tar").read_bytes()
    index_path(tmp_path / "000001.tar").unlink()  # killed between the two
    (tmp_path / "000003.tar").write_bytes(before)
    written = write_shards(Frames(), tmp_path, frames=1)
    assert (written.made, written.present, written.frames) == (4, 0, 3)
    assert (tmp_path / "000001.tar").read_bytes() == before
    assert write_shards(Frames(), tmp_path, frames=1).present == 4
    with pytest.raises(DataError, match=r"000000.tar holds other frames, or of other settings"):
        write_shards(Frames(), tmp_path, frames=1, jpeg=90)
    with pytest.raises(RecipeError, match="Shard 3/2 is given"):
        write_shards(Frames(), tmp_path, shard=(3, 2))


def test_shards_of_ours_that_lost_frames_are_told(tmp_path):
    write_shards(Frames(), tmp_path, frames=1)
    shard = tmp_path / "000000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-600])
    with pytest.raises(DataError, match=r"000000\.tar has \d+ bytes, the index beside it .* cut off or replaced"):
        opened(tmp_path).scenes()
    shard.unlink()
    with pytest.raises(DataError, match=r"000000\.tar is missing, its index is there"):
        opened(tmp_path).scenes()


def test_shards_of_others_are_indexed_once_and_their_index_follows_the_bytes(tmp_path, monkeypatch):
    root = write_tars(tmp_path / "tars", golden_frames(4, (48, 64)))
    first = root / "desk-000000.tar"
    source = opened(root)
    assert not index_path(first).exists()
    assert source.frame_ids("desk") == ["0000", "0001", "0002", "0003"]
    monkeypatch.setattr("geo_pretrain.training.data.sources.shards.make_index", lambda shard: 1 / 0)
    assert opened(root).fingerprint() == source.fingerprint()
    monkeypatch.undo()
    content = source.content()
    data, stat = first.read_bytes(), first.stat()
    first.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert opened(root).content() != content
    first.write_bytes(data[: len(data) // 2])  # cut off in the second frame
    with pytest.warns(UserWarning, match=r"desk-000000\.tar is cut off or damaged .*frames after it are left out"):
        assert opened(root).frame_ids("desk")[0] == "0000"
    assert "0003" in opened(root).frame_ids("desk")


def test_what_is_wrong_in_a_shard_is_told_with_its_frame(tmp_path):
    picture, depth = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (16, 12)).save(picture, "JPEG")
    Image.fromarray(np.full((12, 16), 900, np.uint16)).save(depth, "PNG")
    files = {"jpg": picture.getvalue(), "depth.png": depth.getvalue(), "json": b'{"intrinsics": [20, 20, 8, 6]}'}

    def shard(**changes):
        parts = {kind.replace("_", "."): data for kind, data in {**files, **changes}.items() if data is not None}
        data = b"".join(tar_member(f"x.{kind}", data) for kind, data in parts.items())
        (tmp_path / "one.tar").write_bytes(data + bytes(1024))
        return opened(tmp_path).load("one", "x")

    files["depth_png"] = files.pop("depth.png")
    assert not shard().posed
    for changes, reason in (
        ({"json": b"{}"}, "its .json has no 'intrinsics' of 3x3 numbers"),
        ({"json": b"{"}, "its .json cannot be read"),
        ({"json": b'{"intrinsics": [20, 20, 8, 6], "cam_to_world": [1]}'}, "no 'cam_to_world' of 4x4 numbers"),
        ({"jpg": None}, "has no color image; accepted are color.jpg"),
        ({"depth_png": None}, "has no depth image; accepted are depth.png"),
        ({"depth_png": b"abc"}, "depth image cannot be read"),
    ):
        with pytest.raises(BadFrame, match=rf"one.tar/x: .*{reason}"):
            shard(**changes)
    (tmp_path / "two.tar").write_bytes(b"no tar at all")
    with pytest.raises(BadFrame, match=r"two\.tar: is no tar file"):
        opened(tmp_path)
    (tmp_path / "two.tar").unlink()
    for name in ("one", "two"):
        (tmp_path / f"{name}.tar").write_bytes(tar_member("s/x.jpg", b"1") + bytes(1024))
    with pytest.raises(DataError, match=r"Frame s/x is in .*one.tar and again in .*two.tar"):
        opened(tmp_path)
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match="No frame in tar files in"):
        opened(tmp_path)


def test_a_command_writes_shards_that_train_the_same_pairs(tmp_path, recording):  # noqa: F811
    spec = DataSpec(source="seven_scenes", path=str(recording), size=(60, 80), overlap=(0.2, 1.0))
    told = geo_pretrain("data", "shards", f"seven_scenes:{recording}", "--out", tmp_path / "tars", "--size", "60x80")
    assert "6 frames, " in told.output
    assert f"--data shards:{tmp_path / 'tars'}" in told.output
    source, back = open_source(spec), opened(tmp_path / "tars")
    (scene,) = source.scenes()
    assert back.note == source.note != ""
    for id in source.frame_ids(scene):
        assert_equal(back.load(scene, id), resize_frame(source.load(scene, id), (60, 80)))
    assert find_pairs(back, spec, skips=SkippedFrames()) == find_pairs(source, spec, skips=SkippedFrames())
    assert (
        read_sealed(index_path(tmp_path / "tars" / "000000.tar"))["samples"]
        == make_index(tmp_path / "tars" / "000000.tar")["samples"]
    )
