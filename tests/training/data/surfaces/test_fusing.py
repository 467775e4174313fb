"""Surfaces fused from frames, their cache, and the chunks cut from them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from geo_pretrain.errors import DataError
from geo_pretrain.rooms import RoomsConfig
from geo_pretrain.training.data.frame import Frame, Surface
from geo_pretrain.training.data.sources import rooms as room_source
from geo_pretrain.training.data.sources.registry import FrameRange
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.data.surfaces import fusing as module
from geo_pretrain.training.data.surfaces.chunks import chunk_box, crop_surface
from geo_pretrain.training.data.surfaces.fusing import Surfaces, cached_surface, frame_cloud, fuse
from tests.training.conftest import write_recording


def frames_of(source):
    scene = source.scenes()[0]
    return [source.load(scene, frame) for frame in source.frame_ids(scene)]


def world_points(frame):
    """Pixel by pixel, in the order of the image."""
    k, points, colors = frame.intrinsics, [], []
    for i, j in np.argwhere(frame.depth > 0):
        z = float(frame.depth[i, j])
        camera = [(j - k[0, 2]) * z / k[0, 0], (i - k[1, 2]) * z / k[1, 1], z, 1]
        points.append((frame.cam_to_world @ camera)[:3])
        colors.append(frame.color[i, j])
    return np.array(points), np.array(colors)


def slow_fuse(frames, voxel):
    cells = {}
    for frame in frames:
        for point, color in zip(*world_points(frame), strict=True):
            cells.setdefault(tuple(np.floor(np.float32(point) / voxel).astype(int)), []).append((*point, *color))
    return np.array([np.mean(rows, axis=0) for rows in cells.values()])


def test_cloud_of_a_frame_is_its_pixels_with_depth(recording):
    frame = frames_of(SevenScenes(recording))[0]
    cloud = frame_cloud(frame)
    points, colors = world_points(frame)
    assert len(cloud) == (frame.depth > 0).sum() < frame.depth.size
    np.testing.assert_allclose(cloud.points, points, atol=1e-5)
    assert (cloud.colors == colors).all()
    assert cloud.points.dtype == np.float32
    thin = frame_cloud(frame, 2)
    assert len(thin) == (frame.depth[::2, ::2] > 0).sum()


@pytest.mark.parametrize("pending", [1, 2_000_000])
def test_fused_surface_is_the_mean_of_every_voxel(recording, monkeypatch, pending):
    """Whether the frames are merged as they come or all at the end."""
    monkeypatch.setattr(module, "_PENDING", pending)
    frames = [crop_frame(frame) for frame in frames_of(SevenScenes(recording))[:3]]
    got, want = fuse(frames, 0.05), slow_fuse(frames, 0.05)
    assert len(got) == len(want) < sum((frame.depth > 0).sum() for frame in frames)
    for name, columns, limit in (("points", slice(3), 1e-5), ("colors", slice(3, 6), 0.501)):
        np.testing.assert_allclose(getattr(got, name).astype(float), want[:, columns], atol=limit)


def crop_frame(frame):
    part = np.s_[40:70, 60:100]
    intrinsics = frame.intrinsics - np.array([[0, 0, 60], [0, 0, 40], [0, 0, 0]])
    return Frame(frame.scene, frame.id, frame.color[part], frame.depth[part], intrinsics, frame.cam_to_world)


def test_large_frames_are_thinned_before_they_are_fused():
    big = Frame("s", "0", np.zeros((480, 640, 3), np.uint8), np.ones((480, 640), np.float32), np.eye(3), np.eye(4))
    assert len(fuse([big], 1e-3)) == 240 * 320


def test_source_without_a_surface_has_its_frames_fused_and_kept(tmp_path):
    folder = write_recording(tmp_path / "kitchen")
    (folder / "frame-000050.depth.png").write_bytes(b"broken")
    source = SevenScenes(folder)
    first = Surfaces(source, cache_dir=tmp_path).load("kitchen")
    want = fuse([source.load("kitchen", frame) for frame in source.frame_ids("kitchen")[:5]])
    assert (first.points == want.points).all()
    (path,) = (tmp_path / "surfaces").iterdir()
    save_again(path, "points", lambda points: points + 1)  # whoever reads the file would see it
    assert (Surfaces(source, cache_dir=tmp_path).load("kitchen").points == first.points + 1).all()
    (folder / "frame-000050.depth.png").write_bytes(b"broken otherwise")
    assert (Surfaces(SevenScenes(folder), cache_dir=tmp_path).load("kitchen").points == first.points).all()


def save_again(path, name, change):
    """Alter a cache file together with its digest."""
    arrays = load_file(path)
    arrays[name] = change(arrays[name])
    path.unlink()
    cached_surface(path, lambda: Surface(arrays["points"], arrays["colors"]))


@pytest.mark.parametrize("damage", ["truncated", "altered", "foreign"])
def test_damaged_cache_file_is_made_again(tmp_path, damage):
    surface = Surface(np.ones((5, 3), np.float32), np.full((5, 3), 7, np.uint8))
    path = tmp_path / "deep" / "surface.safetensors"
    cached_surface(path, lambda: surface)
    data = path.read_bytes()
    if damage == "foreign":
        save_file({"other": np.ones(3)}, path)
    else:
        path.write_bytes(data[:-3] if damage == "truncated" else data[:-1] + b"x")
    again = cached_surface(path, lambda: surface)
    assert (again.colors == 7).all()
    assert path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_cache_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "surfaces").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"Cannot write the surface .*GEO_PRETRAIN_CACHE"):
        cached_surface(tmp_path / "surfaces" / "a", lambda: Surface(np.ones((1, 3), np.float32), np.ones((1, 3), "u1")))


def test_scenes_of_one_source_keep_their_own_surfaces(tmp_path):
    for scene in ("one", "two"):
        write_recording(tmp_path / "data" / scene)
    for path in (tmp_path / "data" / "two").glob("frame-0000[1-5]0*"):
        path.unlink()
    source = SevenScenes(tmp_path / "data")
    for scene in ("one", "two"):
        frames = [source.load(scene, frame) for frame in source.frame_ids(scene)]
        assert (Surfaces(source, cache_dir=tmp_path).load(scene).points == fuse(frames).points).all()


def test_held_out_frames_are_not_fused(tmp_path, recording):
    source = SevenScenes(recording)
    half = FrameRange(source, 0.0, 0.5)
    fused = Surfaces(half, cache_dir=tmp_path).load(source.scenes()[0])
    assert (fused.points == fuse(frames_of(half)).points).all()
    assert len(half.frame_ids(source.scenes()[0])) == 3
    assert len(fused) < len(Surfaces(source, cache_dir=tmp_path).load(source.scenes()[0]))


def test_scene_without_a_readable_frame_is_an_error(tmp_path):
    folder = write_recording(tmp_path / "kitchen")
    for path in folder.glob("*.depth.png"):
        path.unlink()
    with pytest.raises(DataError, match="'kitchen' of source 'seven_scenes' has no readable frame"):
        Surfaces(SevenScenes(folder), cache_dir=tmp_path).load("kitchen")


def test_surfaces_travel_to_workers(tmp_path, recording):
    surfaces = Surfaces(SevenScenes(recording), tmp_path)
    name = surfaces.source.scenes()[0]
    there = pickle.loads(pickle.dumps(surfaces))
    assert (there.load(name).points == surfaces.load(name).points).all()


class Counted:
    """Scenes with surfaces of 100, 200, ... points, and a note of which were asked for."""

    def __init__(self):
        self.asked = []

    def surface(self, scene):
        self.asked.append(scene)
        return Surface(np.zeros((100 * int(scene), 3), np.float32), np.zeros((100 * int(scene), 3), np.uint8))


def test_the_latest_surfaces_are_remembered_up_to_a_limit_of_bytes(monkeypatch):
    monkeypatch.setattr(module, "_REMEMBERED", 15 * 600)  # a point takes 15 bytes
    source = Counted()
    surfaces = Surfaces(source)

    def load(*scenes):
        del source.asked[:]
        for scene in scenes:
            assert len(surfaces.load(scene)) == 100 * int(scene)
        return "".join(source.asked)

    assert load("1", "2", "3", "1", "2", "3") == "123"  # 600 points: all fit
    assert load("2", "1", "4") == "4"  # 3 and 2, used longest ago, make room
    assert load("4", "1") == ""
    assert load("3") == "3"  # for 4
    assert load("1", "2") == "2"
    assert load("9", "9") == "9"  # the last one stays, however large
    assert load("1") == "1"


@pytest.fixture(scope="module")
def rooms():
    return Rooms(RoomsConfig(scenes=1, frames=3, width=96, height=64))


def test_rooms_are_dense_enough_for_two_centimeter_voxels(rooms):
    """Hardly a voxel on a surface is empty (2.4 points fall into one on average)."""
    name = rooms.scenes()[0]
    surface = Surfaces(FrameRange(rooms, 0.0, 0.5)).load(name)
    labelled = rooms.generator.points(name, 400.0)
    cells = {tuple(cell) for cell in np.floor(surface.points / 0.02).astype(int)}
    probes = labelled.points[::7]
    filled = np.mean([tuple(cell) in cells for cell in np.floor(probes / 0.02).astype(int)])
    assert filled > 0.85


def test_surface_of_a_room_is_made_once_and_always_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(room_source, "SURFACE_DENSITY", 300.0)
    rooms = Rooms(RoomsConfig(scenes=1), cache_dir=tmp_path)
    name = rooms.scenes()[0]
    surface = rooms.surface(name)
    path = tmp_path / "surfaces" / f"{name}.safetensors"
    before = path.stat().st_mtime_ns
    assert (rooms.surface(name).points == surface.points).all()
    assert path.stat().st_mtime_ns == before
    path.unlink()
    assert (rooms.surface(name).points == surface.points).all()
    assert (surface.colors == rooms.generator.points(name, 300.0).colors).all()


def test_box_of_a_chunk_is_whole_meters_around_the_pixels_and_the_camera_behind_holes(recording):
    """methods.md 4.3: pixels without depth add the camera center."""
    frame = frames_of(SevenScenes(recording))[0]
    points, _ = world_points(frame)
    assert (frame.depth == 0).any()
    center = frame.cam_to_world[:3, 3]
    low, high = chunk_box(frame)
    np.testing.assert_array_equal(low, np.floor(np.minimum(points.min(0), center)))
    np.testing.assert_array_equal(high, np.ceil(np.maximum(points.max(0), center)))
    depth = np.where(frame.depth > 0, frame.depth, frame.depth.max())
    whole = Frame("s", "0", frame.color, depth, frame.intrinsics, frame.cam_to_world)
    points, _ = world_points(whole)
    low, high = chunk_box(whole)
    np.testing.assert_array_equal(low, np.floor(points.min(0)))
    np.testing.assert_array_equal(high, np.ceil(points.max(0)))


def test_frustum_box_touches_the_camera_and_holds_every_pixel():
    depth = np.array([[0, 2.0], [1.0, 3.0]], np.float32)
    intrinsics = np.array([[2.0, 0, 0.5], [0, 4.0, 0.5], [0, 0, 1]])
    pose = np.eye(4)
    pose[:3, 3] = 10
    low, high = chunk_box(
        Frame("s", "0", np.zeros((2, 2, 3), np.uint8), depth, intrinsics, pose), match_released_code=False
    )
    np.testing.assert_allclose(low, [10 - 1 / 2 * 3, 10 - 1 / 4 * 3, 10])
    np.testing.assert_allclose(high, [10 + 1 / 2 * 3, 10 + 1 / 4 * 3, 13])


def test_crop_keeps_what_lies_strictly_inside():
    points = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [1, 0.5, 0.5], [0.5, 0.5, 0], [0.999, 0.001, 0.5]], np.float32)
    surface = Surface(points, np.arange(15, dtype=np.uint8).reshape(5, 3))
    inside = crop_surface(surface, np.zeros(3), np.ones(3))
    assert inside.colors[:, 0].tolist() == [3, 12]
    assert (inside.points == points[[1, 4]]).all()
