"""Data sets that scenezoo reads: its batches become frames; the library itself is tried where it is installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from geo_pretrain.errors import BadFrame, DataError, MissingDependency, RecipeError, UnknownName
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.data.sources.scenezoo import color_at, fisheye624, frame_of, pinhole_of, rays
from geo_pretrain.training.recipe import DataSpec
from tests.recording_layouts import golden_frames, write_sens

CAMERA = np.array([[50.0, 0, 31.5], [0, 50, 23.5], [0, 0, 1]])


@pytest.fixture(scope="module")
def frames():
    return golden_frames(3, (48, 64))


def batch_of(frames, **other):
    """What scenezoo returns for frames: arrays with a row each."""
    matrices = np.stack([frame.intrinsics for frame in frames])
    facts = {
        "indices": np.arange(len(frames)),
        "rgb": np.stack([frame.color for frame in frames]),
        "depth": np.stack([frame.depth for frame in frames]),
        "rgb_intrinsics": matrices.astype(np.float32),
        "depth_intrinsics": matrices.astype(np.float32),
        "world_to_camera": np.stack([np.linalg.inv(frame.cam_to_world) for frame in frames]),
        "camera_model": "PINHOLE",
        "depth_mode": None,
        "distortion": None,
    }
    return type("Batch", (SimpleNamespace,), {"__len__": lambda self: len(self.indices)})(**(facts | other))


class Dataset:
    def __init__(self, frames):
        self.frames, self.calls = frames, []

    def get_ids(self, split):
        return ["s/1", "s/2", "s/3"] if split is None else {"val": ["s/2"]}[split]

    def get_room_ids(self, id):
        if id == "s/2":
            raise FileNotFoundError("no rooms")
        return ["17", "9"]

    def get_frames(self, id, *, items, rotate_to_up, indices=None, step=1, source="a", room_id=None):
        assert not rotate_to_up
        if id == "s/3":
            raise ValueError("line 3 of the trajectory is broken\nmore")
        self.calls.append((id, source, room_id))
        chosen = list(range(0, 3, step)) if indices is None else indices
        batch = batch_of([self.frames[k] for k in chosen])
        batch.indices = np.array(chosen)
        return batch


def camera(name, *items, requires=()):
    return SimpleNamespace(name=name, items=("rgb", *items), requires=requires)


@pytest.fixture
def zoo(frames, monkeypatch):
    """A stand-in for the library: a data set with cameras, one with rooms, one without frames."""
    made = Dataset(frames)
    cameras = {
        "cameras": (camera("blind"), camera("a", "depth"), camera("b", "depth")),
        "rooms": (camera("view", "depth", requires=("room_id",)),),
        "meshes": (),
    }
    stand_in = SimpleNamespace(
        list_datasets=lambda include_aliases=False: [*cameras, *(["alias"] if include_aliases else [])],
        get_dataset_info=lambda name: SimpleNamespace(
            name=name.replace("alias", "cameras"),
            spec=SimpleNamespace(frame_sources=cameras[name.replace("alias", "cameras")]),
        ),
        get_dataset=lambda name, root: made,
    )
    monkeypatch.setitem(sys.modules, "scenezoo", stand_in)
    return made


def opened(root, **options):
    return open_source(DataSpec(source="scenezoo", path=str(root), options=options))


def test_scenes_and_frames_are_those_of_the_library(zoo, frames, tmp_path):
    for name in ("1", "3.zip"):
        (tmp_path / "data" / name).mkdir(parents=True)
    source = opened(tmp_path, dataset="Alias", camera="b", every=2)
    assert source.scenes() == ["s/1", "s/3"]  # those that lie on the disk
    assert source.frame_ids("s/1") == ["000000", "000002"]
    frame = source.load("s/1", "000002")
    np.testing.assert_allclose(frame.cam_to_world, frames[2].cam_to_world, atol=1e-6)
    np.testing.assert_allclose(frame.depth, frames[2].depth, rtol=1e-6)
    np.testing.assert_array_equal(frame.color, frames[2].color)
    assert zoo.calls == [("s/1", "b", None)] * 2  # listed once
    assert source.frame_ids("s/3") == ["unreadable"]
    with pytest.raises(BadFrame, match=r"s/3: scenezoo: line 3 of the trajectory is broken$"):
        source.load("s/3", "unreadable")
    assert opened(tmp_path, dataset="cameras", subset="val").scenes() == ["s/2"]
    assert opened(tmp_path, dataset="cameras", scenes=["x"]).scenes() == ["x"]
    assert opened(tmp_path, dataset="cameras").fingerprint() != source.fingerprint()
    with pytest.raises(DataError, match=r"cannot be listed: .*scenezoo: 'test'.* data\.options\.scenes="):
        opened(tmp_path, dataset="cameras", subset="test")


def test_rooms_are_scenes_of_their_own(zoo, tmp_path):
    source = opened(tmp_path, dataset="rooms")
    assert source.scenes() == ["s/1/17", "s/1/9", "s/3/17", "s/3/9"]
    assert source.frame_ids("s/1/9") == ["000000", "000001", "000002"]
    assert zoo.calls == [("s/1", "a", "9")]


def test_names_that_the_library_does_not_have_are_refused(zoo, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"'data\.options\.dataset' is missing; accepted are cameras, rooms"):
        opened(tmp_path)
    for options, text in (
        ({"dataset": "camera"}, "Unknown data set of scenezoo with frames 'camera'"),
        ({"dataset": "meshes"}, "'meshes'"),
        ({"dataset": "cameras", "camera": "blind"}, "Unknown camera of cameras with depth 'blind'"),
    ):
        with pytest.raises(UnknownName, match=text):
            opened(tmp_path, **options)
    with pytest.raises(DataError, match="expected one with the data set cameras"):
        opened(tmp_path / "nowhere", dataset="cameras")
    monkeypatch.setitem(sys.modules, "scenezoo", None)
    with pytest.raises(MissingDependency, match=r"pip install 'geo_pretrain\[datasets\]'"):
        opened(tmp_path, dataset="cameras")


def test_what_is_no_frame_says_why(frames):
    for other, reason in (
        ({"camera_model": "OPENCV"}, "camera is OPENCV, no pinhole camera"),
        ({"world_to_camera": None}, "has no intrinsics or no pose"),
        ({"world_to_camera": np.full((1, 4, 4), np.nan)}, "pose is not finite"),
        ({"depth_intrinsics": np.zeros((1, 3, 3))}, "intrinsics have the last row"),
        ({"depth": np.zeros((1, 48, 64))}, "no pixel has a valid depth"),
    ):
        with pytest.raises(BadFrame, match=f"scene/7: {reason}"):
            frame_of(batch_of(frames[:1], **other), "scene", "7")


def test_color_is_sampled_where_depth_is(frames):
    """A ramp of colors, four times as large and cut at its right: known at every pixel of depth."""
    large = np.array([[200.0, 0, 4 * 32 - 0.5], [0, 200, 4 * 24 - 0.5], [0, 0, 1]])
    rows, columns = np.indices((192, 200))
    ramp = np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    color, depth = color_at(ramp, large, np.ones((48, 64), np.float32), CAMERA)
    np.testing.assert_array_equal(depth[:, :49], 1)
    assert not depth[:, 51:].any()  # behind the edge of color, at 200 / 4 = 50
    want = np.stack(np.indices((48, 64))[::-1], axis=-1)[4:-4, 4:45] * 4 + 1.5
    assert np.abs(color[4:-4, 4:45, :2] - want).max() <= 1
    same, _ = color_at(frames[0].color, frames[0].intrinsics, frames[0].depth, frames[0].intrinsics)
    np.testing.assert_array_equal(same, frames[0].color)


def test_an_equidistant_fisheye_is_resampled_to_a_pinhole():
    """Without distortion the radius is the angle: a plane at 2 m, whose distance along the ray is 2 / cos(angle)."""
    directions = rays(CAMERA, (48, 64))
    position = fisheye624(directions, np.zeros(12))
    radius = np.linalg.norm(directions[..., :2], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(position, axis=-1), np.arctan(radius), atol=1e-9)
    rows, columns = np.indices((48, 64))
    angle = np.hypot(columns - 31.5, rows - 23.5) / 50  # of the fisheye's pixels
    ray = (2 / np.cos(angle)).astype(np.float32)
    color = np.repeat((angle * 255)[..., None].astype(np.uint8), 3, axis=-1)
    seen, distance = pinhole_of(color, ray, CAMERA, np.zeros(12))
    plane = distance / np.linalg.norm(directions, axis=-1)
    assert np.abs(plane - 2).max() < 0.02
    assert np.abs(seen[..., 0] / 255 - np.arctan(radius)).max() < 0.02
    batch = batch_of(golden_frames(1, (48, 64)), camera_model="FISHEYE624", depth_mode="ray_distance")
    batch.rgb, batch.depth, batch.distortion = color[None], ray[None], np.zeros((1, 12))
    batch.rgb_intrinsics = batch.depth_intrinsics = CAMERA[None]
    np.testing.assert_allclose(frame_of(batch, "s", "0").depth, plane, atol=1e-6)


def test_the_six_distortions_of_the_fisheye_by_hand():
    x, y = 0.3, -0.2
    k, p, s = [0.1, -0.02, 0.003, 0.004, -0.005, 0.0006], [0.01, -0.02], [0.03, -0.04, 0.05, 0.06]
    r = np.hypot(x, y)
    t = np.arctan(r)
    t = t + sum(k[i] * t ** (2 * i + 3) for i in range(6))
    u, v = x / r * t, y / r * t
    q = u * u + v * v
    want = [
        u + 2 * u * (u * p[0] + v * p[1]) + q * p[0] + s[0] * q + s[1] * q**2,
        v + 2 * v * (u * p[0] + v * p[1]) + q * p[1] + s[2] * q + s[3] * q**2,
    ]
    np.testing.assert_allclose(fisheye624(np.array([x, y, 1.0]), np.array([*k, *p, *s])), want, atol=1e-12)


@pytest.mark.skipif(find_spec("scenezoo") is None, reason="needs pip install 'geo_pretrain[datasets]'")
def test_the_library_reads_a_scan_as_we_do(frames, tmp_path):
    write_sens(tmp_path / "scans", frames)
    with (tmp_path / "scans/scene0000_00/scene0000_00.sens").open("ab") as file:
        file.write(bytes(8))  # the library wants the block of inertial measurements, though empty
    source = opened(tmp_path, dataset="scannet", scenes=["scene0000_00"])
    ours = open_source(DataSpec(source="scannet", path=str(tmp_path / "scans")))
    assert source.frame_ids("scene0000_00") == ["000000", "000025", "000050"]
    for theirs, own in zip(source.frame_ids("scene0000_00"), ours.frame_ids("scene0000_00"), strict=True):
        one, other = source.load("scene0000_00", theirs), ours.load("scene0000_00", own)
        np.testing.assert_allclose(one.depth, other.depth, atol=1e-6)
        np.testing.assert_array_equal(one.color, other.color)
        np.testing.assert_allclose(one.cam_to_world, other.cam_to_world, atol=1e-5)
        np.testing.assert_allclose(one.intrinsics, other.intrinsics, atol=1e-4)
