"""Sets of scenes and of pixels: against brute force, through ScanNet's own files, labels, the cache and the samples."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.rooms import RoomsConfig
from geo_pretrain.training.data.frame import Pair, SkippedFrames, resize_frame
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.samples.pairs import check_labels
from geo_pretrain.training.data.sources.registry import FrameRange
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.data.sources.scannet import ScanNet, ScanNetConfig
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.data.surfaces import sets as module
from geo_pretrain.training.data.surfaces.fusing import fuse_points
from geo_pretrain.training.data.surfaces.oversegmentation import plane_normals, segment_mesh, segment_points
from geo_pretrain.training.data.surfaces.sets import SceneSets, Sets, label_sets, pixel_sets
from geo_pretrain.training.recipe import DataSpec
from tests.scannet_layout import STEP, write_scannet
from tests.training.conftest import write_recording
from tests.training.data.surfaces.test_fusing import crop_frame, frames_of, world_points

SCAN = "scene0000_00"


@pytest.fixture(scope="module")
def rooms():
    return Rooms(RoomsConfig(scenes=1, frames=5, width=96, height=64))


@pytest.fixture(scope="module")
def room_sets(rooms, tmp_path_factory):
    return Sets(rooms, cache_dir=tmp_path_factory.mktemp("cache")).scene(rooms.scenes()[0])


@pytest.fixture(scope="module")
def written(tmp_path_factory, rooms):
    """A scan with mesh, without segments; read-only."""
    root = tmp_path_factory.mktemp("scans")
    write_scannet(root, rooms, frames=4, lost=())
    return root


@pytest.fixture
def scan(tmp_path, written):
    """Its mesh alone, to put segments beside and to break."""
    folder = tmp_path / SCAN
    (folder / "pose").mkdir(parents=True)
    name = f"{SCAN}_vh_clean_2.ply"
    (folder / name).write_bytes((written / SCAN / name).read_bytes())
    return folder


def write_segs(scan, ids, **changes):
    """As ScanNet's Segmentator writes them."""
    tree = {
        "params": {"segMinVerts": "20", "kThresh": "0.01"},
        "sceneId": scan.name,
        "segIndices": ids if isinstance(ids, (str, type(None))) else [int(i) for i in ids],
    }
    path = scan / f"{scan.name}_vh_clean_2.0.010000.segs.json"
    path.write_text(json.dumps(tree | changes))
    return path


# Pixels


def brute_pixels(frame, points, ids, radius):
    out = np.full(frame.depth.shape, -1)
    world, _ = world_points(frame)
    for (i, j), point in zip(np.argwhere(frame.depth > 0), world, strict=True):
        gap = np.linalg.norm(points.astype(float) - point, axis=1)
        if gap.min() < radius:
            out[i, j] = ids[gap.argmin()]
    return out


def test_set_of_a_pixel_is_that_of_the_nearest_point_within_5_cm(recording):
    frame = crop_frame(frames_of(SevenScenes(recording))[0])
    rng = np.random.default_rng(0)
    world, _ = world_points(frame)
    points = (world[rng.permutation(len(world))[:60]] + rng.normal(0, 0.03, (60, 3))).astype(np.float32)
    sets = SceneSets(points, rng.integers(1000, size=60))
    for radius in (0.05, 0.1):
        want = brute_pixels(frame, points, sets.ids, radius)
        got = pixel_sets(frame, sets, radius=radius)
        assert got.dtype == np.int64
        assert (got != want).mean() < 0.002  # float32 world points: near-ties
        assert 0.1 < (want[frame.depth > 0] >= 0).mean() < 1
    assert (pixel_sets(frame, sets) == pixel_sets(frame, sets, radius=0.05)).all()


def test_pixels_without_depth_and_scenes_without_points_have_no_set(recording):
    frame = frames_of(SevenScenes(recording))[0]
    ids = pixel_sets(
        frame, SceneSets(world_points(frame)[0].astype(np.float32), np.zeros((frame.depth > 0).sum(), int))
    )
    assert ((ids == 0) == (frame.depth > 0)).all()
    assert not (frame.depth > 0).all()
    assert (pixel_sets(frame, SceneSets(np.zeros((0, 3), np.float32), np.zeros(0, np.int64))) == -1).all()
    blind = replace(frame, depth=np.zeros_like(frame.depth))
    assert (pixel_sets(blind, SceneSets(np.zeros((1, 3), np.float32), np.zeros(1, np.int64))) == -1).all()


@pytest.mark.parametrize("size", [(64, 96), (63, 95)])
def test_sampled_at_every_second_pixel_the_half_resolution_map_is_exact(rooms, room_sets, size):
    frame = resize_frame(rooms.load(rooms.scenes()[0], "0001"), size)
    frame.depth[10:13, 20:23] = 0
    exact, sampled = pixel_sets(frame, room_sets), pixel_sets(frame, room_sets, stride=2)
    assert sampled.shape == exact.shape == size
    assert (sampled[::2, ::2] == exact[::2, ::2]).all()
    for i, j in np.ndindex(size):
        assert sampled[i, j] == (exact[i // 2 * 2, j // 2 * 2] if frame.depth[i, j] > 0 else -1)
    assert (sampled == exact).mean() > 0.8


# Scenes


def test_sets_of_a_source_without_a_mesh_are_segments_of_its_fused_frames(rooms, room_sets):
    fused = fuse_points(frames_of(rooms))
    normals = plane_normals(fused.points, fused.towards, fused.weights)
    np.testing.assert_array_equal(room_sets.ids, segment_points(fused.points, normals))
    np.testing.assert_array_equal(room_sets.points, fused.points)
    np.testing.assert_array_equal(room_sets.normals, normals)
    assert len(np.unique(room_sets.ids)) > 10
    # Sets hardly cross from one thing to another: almost every pixel has the label that most of its set has.
    frame = rooms.load(rooms.scenes()[0], "0002")
    ids, labels = pixel_sets(frame, room_sets), frame.instance
    pure = sum(np.bincount(labels[ids == i]).max() for i in np.unique(ids))
    assert pure / ids.size > 0.85


def test_range_of_frames_has_its_own_sets(rooms, tmp_path):
    one, other = (
        Sets(FrameRange(rooms, *part), cache_dir=tmp_path).scene(rooms.scenes()[0]) for part in ((0, 0.2), (0.2, 0.4))
    )
    np.testing.assert_array_equal(one.points, fuse_points(frames_of(rooms)[:1]).points)
    np.testing.assert_array_equal(other.points, fuse_points(frames_of(rooms)[1:2]).points)


def test_broken_frames_are_left_out_and_scenes_of_one_source_keep_their_own_sets(tmp_path):
    folder = write_recording(tmp_path / "home" / "kitchen")
    office = write_recording(tmp_path / "home" / "office")
    for path in office.glob("frame-0000[0-4]0*"):
        path.unlink()
    source = SevenScenes(tmp_path / "home")
    for number in range(10, 60, 10):
        (folder / f"frame-0000{number}.depth.png").write_bytes(b"broken")
    sets = Sets(source, cache_dir=tmp_path).scene("kitchen")
    np.testing.assert_array_equal(sets.points, fuse_points([source.load("kitchen", "000000")]).points)
    other = fuse_points([source.load("office", "000050")])
    np.testing.assert_array_equal(Sets(source, cache_dir=tmp_path).scene("office").points, other.points)
    (folder / "frame-000000.depth.png").unlink()
    with pytest.raises(DataError, match="Scene 'kitchen' of source 'seven_scenes' has no readable frame"):
        Sets(source, cache_dir=tmp_path).scene("kitchen")


# ScanNet


def test_segments_that_come_with_a_scan_are_used_as_they_are(scan, tmp_path):
    source = ScanNet(tmp_path)
    count = len(source.vertices(SCAN))
    ids = np.arange(count)[::-1] // 7
    write_segs(scan, ids)
    sets = Sets(source, cache_dir=tmp_path / "cache").scene(SCAN)
    np.testing.assert_array_equal(sets.ids, ids)
    np.testing.assert_array_equal(sets.points, source.surface(SCAN).points)
    assert sets.ids.dtype == np.int64
    assert not (tmp_path / "cache").exists()
    in_range = Sets(FrameRange(source, 0, 0.5), cache_dir=tmp_path / "cache").scene(SCAN)
    np.testing.assert_array_equal(in_range.ids, ids)


@pytest.mark.parametrize("options", [{}, {"k_thresh": 0.05}, {"min_vertices": 5}])
def test_other_segments_are_computed_from_the_mesh(scan, tmp_path, rooms, options):
    if options:
        write_segs(scan, [0])  # of other parameters: not read
    mesh = rooms.generator.mesh(rooms.scenes()[0], 0.1)
    sets = Sets(ScanNet(tmp_path), cache_dir=tmp_path / "cache", **options).scene(SCAN)
    np.testing.assert_array_equal(sets.points, mesh.vertices)
    np.testing.assert_array_equal(sets.ids, segment_mesh(mesh.vertices, mesh.faces, **options))
    assert (np.einsum("ni,ni->n", sets.normals, mesh.normals)[np.unique(mesh.faces)] > 0).mean() > 0.99


def test_scan_without_a_mesh_has_its_frames_fused(written, tmp_path):
    for part in ("color", "depth", "pose", "intrinsic"):
        (tmp_path / SCAN / part).mkdir(parents=True)
        for path in (written / SCAN / part).iterdir():
            (tmp_path / SCAN / part / path.name).write_bytes(path.read_bytes())
    sets = Sets(ScanNet(tmp_path), cache_dir=tmp_path / "cache").scene(SCAN)
    np.testing.assert_array_equal(sets.points, fuse_points(frames_of(ScanNet(written))).points)


@pytest.mark.parametrize(
    "ids, changes, reason",
    [
        ([0, 0, 1], {}, "has 3 segments, expected one for each of the mesh's [0-9]+ vertices"),
        (None, {}, "'segIndices' is no list of whole numbers"),
        ([0, -1], {}, "'segIndices' is no list of whole numbers"),
        ([0], {"segIndices": [0.5, 1]}, "'segIndices' is no list of whole numbers"),
        ([0], {"segIndices": [[0], [1, 2]]}, "'segIndices' is no list of whole numbers"),
    ],
)
def test_broken_segments_are_an_error_that_names_the_file(scan, tmp_path, ids, changes, reason):
    path = write_segs(scan, ids, **changes)
    with pytest.raises(DataError, match=reason) as error:
        Sets(ScanNet(tmp_path)).scene(SCAN)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text, reason", [("[1, 2]", "has no 'segIndices'"), ('{"seg', "cannot be read")])
def test_a_file_of_something_else_is_an_error(scan, tmp_path, text, reason):
    write_segs(scan, [0]).write_text(text)
    with pytest.raises(DataError, match=rf"segs\.json: .*{reason}"):
        Sets(ScanNet(tmp_path)).scene(SCAN)


@pytest.mark.parametrize(
    "change, reason",
    [
        (
            lambda data: data.replace(b"int vertex_indices", b"int corner_indices"),
            "no list vertex_indices; they have cor",
        ),
        (lambda data: data[:-4] + b"\xff\xff\xff\x7f", "faces name vertices 0 to 2147483647, the file has 0 to"),
        (lambda data: data[:-4] + b"\xff\xff\xff\xff", "faces name vertices -1 to"),
        (lambda data: data[:-13] + b"\x02" + data[-8:], "some faces are no triangles"),
        (lambda data: data[:-5], "'face'.*cut off"),
    ],
)
def test_broken_faces_are_an_error_that_names_the_file(scan, tmp_path, change, reason):
    path = scan / f"{SCAN}_vh_clean_2.ply"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=reason) as error:
        Sets(ScanNet(tmp_path), cache_dir=tmp_path).scene(SCAN)
    assert str(path) in str(error.value)


def test_the_other_name_of_the_faces_list_and_a_mesh_without_faces(scan, tmp_path):
    path = scan / f"{SCAN}_vh_clean_2.ply"
    _, faces = ScanNet(tmp_path).triangles(SCAN)
    path.write_bytes(path.read_bytes().replace(b"vertex_indices", b"vertex_index"))
    np.testing.assert_array_equal(ScanNet(tmp_path).triangles(SCAN)[1], faces)
    path.write_bytes(path.read_bytes().replace(f"face {len(faces)}\n".encode(), b"face 0\n"))
    assert ScanNet(tmp_path).triangles(SCAN)[1].shape == (0, 3)


# Labels


def test_sets_of_labels_are_the_labels(rooms, tmp_path):
    frame = rooms.load(rooms.scenes()[0], "0000")
    semantic = frame.semantic.copy()
    semantic[:5] = 0
    ids = label_sets(replace(frame, semantic=semantic), "semantic")
    assert (ids[:5] == -1).all()
    assert (ids[5:] == frame.semantic[5:]).all()
    assert (Sets(rooms, kind="instance").pixels(frame) == frame.instance).all()
    sets = Sets(rooms, kind="semantic", cache_dir=tmp_path).scene(rooms.scenes()[0])
    assert set(np.unique(sets.ids)) <= {int(i) for f in frames_of(rooms) for i in np.unique(f.semantic)}
    assert (pixel_sets(frame, sets) == frame.semantic).mean() > 0.95
    things = Sets(rooms, kind="instance", cache_dir=tmp_path).scene(rooms.scenes()[0])
    assert (pixel_sets(frame, things) == frame.instance).mean() > 0.95
    assert not any(tmp_path.iterdir())


def test_frames_without_labels_cannot_have_sets_of_labels(recording):
    source = SevenScenes(recording)
    frame = frames_of(source)[0]
    for call in (lambda: label_sets(frame, "semantic"), lambda: Sets(source, kind="semantic").scene(frame.scene)):
        with pytest.raises(DataError, match=r"has no semantic labels.*such as rooms, or scannet.*kind 'segments'"):
            call()
    pairs = [Pair(frame.scene, id, id, 1.0) for id in ("999999", frame.id)]  # the first one cannot be read
    with pytest.raises(DataError, match=r"'task.sets' is 'semantic', but source 'seven_scenes' has no semantic labels"):
        check_labels(source, pairs, "semantic")
    with pytest.raises(DataError, match="has no instance labels"):
        label_sets(replace(frame, semantic=np.zeros(frame.depth.shape, np.int16)), "instance")


def test_label_images_of_a_scan(written, tmp_path, rooms):
    """At the color camera's size, 16 bits, as *_2d-label-filt.zip holds them; resized onto the depth grid."""
    scan = tmp_path / SCAN
    for part in ("color", "depth", "pose", "intrinsic", "label-filt", "instance-filt"):
        (scan / part).mkdir(parents=True)
        for path in (written / SCAN / part).iterdir() if "filt" not in part else []:
            (scan / part / path.name).write_bytes(path.read_bytes())
    depth = ScanNet(tmp_path).load(SCAN, "0").depth
    rng = np.random.default_rng(0)
    labels = rng.integers(1300, size=depth.shape).astype(np.uint16)
    objects = rng.integers(200, size=depth.shape).astype(np.uint8)
    Image.fromarray(labels.repeat(4, 0).repeat(4, 1)).save(scan / "label-filt" / "0.png")
    Image.fromarray(objects).save(scan / "instance-filt" / "0.png")
    assert ScanNet(tmp_path).load(SCAN, "0").semantic is None
    source = ScanNet(tmp_path, ScanNetConfig(labels="label-filt", instances="instance-filt"))
    frame = source.load(SCAN, "0")
    assert frame.semantic.dtype == np.int16
    assert frame.instance.dtype == np.int32
    np.testing.assert_array_equal(frame.semantic, labels)
    np.testing.assert_array_equal(
        Sets(source, kind="instance").pixels(frame), np.where(objects == 0, -1, objects.astype(int))
    )
    Image.fromarray(np.full(depth.shape, 40_001, np.uint16)).save(scan / "instance-filt" / "0.png")
    assert (ScanNet(tmp_path, ScanNetConfig(instances="instance-filt")).load(SCAN, "0").instance == 40_001).all()
    with pytest.raises(BadFrame, match=r"0\.png: label 40001 is above 32767"):
        ScanNet(tmp_path, ScanNetConfig(labels="instance-filt")).load(SCAN, "0")
    with pytest.raises(BadFrame, match=rf"label-filt.{STEP}\.png: annotation is missing"):
        source.load(SCAN, str(STEP))


# Memory and cache


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "semantics"}, "'kind' is 'semantics', accepted are .*Nearest: 'semantic'"),
        ({"k_thresh": -1.0}, "'k_thresh' is -1.0"),
        ({"min_vertices": 0}, "'min_vertices' is 0"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_read(rooms, options, message):
    with pytest.raises(RecipeError, match=message):
        Sets(rooms, **options)


def test_computed_sets_are_kept_and_made_again_when_damaged(rooms, tmp_path, monkeypatch):
    made, half = [], FrameRange(rooms, 0, 0.2)
    monkeypatch.setattr(module, "segment_points", lambda *a, **k: made.append(k) or segment_points(*a, **k))

    def sets(**options):
        return Sets(half, cache_dir=tmp_path, **options).scene(rooms.scenes()[0])

    first = sets()
    (path,) = (tmp_path / "sets").iterdir()
    again = sets()
    assert len(made) == 1
    for name in ("points", "ids", "normals"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        assert getattr(first, name).dtype == getattr(again, name).dtype
    arrays = load_file(path)
    arrays["ids"][0] += 1
    save_file(arrays, path, metadata={"sha256": "0" * 64})
    assert (sets().ids == first.ids).all()
    path.write_bytes(path.read_bytes()[:500])
    assert (sets().ids == first.ids).all()
    assert len(made) == 3
    sets(k_thresh=0.05)
    sets(min_vertices=21)
    assert len(made) == 5
    assert len(list((tmp_path / "sets").iterdir())) == 3  # and no temporary file


def test_kept_pairs_and_sets_are_those_of_the_sources_options(written, tmp_path):
    """Another camera puts the pixels of a scan without a mesh elsewhere."""
    root = tmp_path / "scans"
    for part in ("color", "depth", "pose", "intrinsic"):
        shutil.copytree(written / SCAN / part, root / SCAN / part)
    sources = ScanNet(root), ScanNet(root, ScanNetConfig(intrinsics=(60.0, 60.0, 43.5, 27.5)))
    spec, cache = DataSpec(overlap=(0.0, 1.0)), tmp_path / "cache"
    kept = [find_pairs(source, spec, skips=SkippedFrames(), cache_dir=cache) for source in sources]
    anew = [find_pairs(source, spec, skips=SkippedFrames()) for source in sources]
    assert kept == anew
    assert kept[0] != kept[1]
    for source in sources:
        sets = Sets(source, cache_dir=cache).scene(SCAN)
        np.testing.assert_array_equal(sets.points, fuse_points(frames_of(source)).points)
    assert len(list((cache / "sets").iterdir())) == 2


def test_cache_that_cannot_be_written_is_named(rooms, tmp_path):
    (tmp_path / "sets").write_text("a file")
    with pytest.raises(DataError, match=r"Cannot write the sets to .*GEO_PRETRAIN_CACHE"):
        Sets(rooms, cache_dir=tmp_path).scene(rooms.scenes()[0])


def test_maps_are_remembered_up_to_a_limit(rooms, tmp_path, monkeypatch):
    sets = Sets(rooms, cache_dir=tmp_path)
    frames = frames_of(rooms)
    want = [pixel_sets(frame, sets.scene(frame.scene), stride=2) for frame in frames]
    looked_up = []
    real = module._sampled_sets
    monkeypatch.setattr(module, "_sampled_sets", lambda frame, *rest: looked_up.append(frame.id) or real(frame, *rest))
    for _ in range(2):
        for frame, ids in zip(frames, want, strict=True):
            np.testing.assert_array_equal(sets.pixels(frame), ids)
    assert len(looked_up) == 5
    assert sets.pixels(resize_frame(frames[0], (32, 48))).shape == (32, 48)
    size = len(sets._maps[frames[0].scene, "0001", (64, 96)])
    assert 50 < size < 1536
    for limit, kept in ((size * 5 // 2, ["0003", "0004"]), (0, [])):
        monkeypatch.setattr(module, "_MAPS", limit)
        few = Sets(rooms, cache_dir=tmp_path)
        for frame, ids in zip(frames, want, strict=True):
            np.testing.assert_array_equal(few.pixels(frame), ids)
        assert [frame_id for _, frame_id, _ in few._maps] == kept
        assert few._bytes == sum(map(len, few._maps.values()))


def test_map_that_was_asked_for_last_is_kept_longest(rooms, tmp_path, monkeypatch):
    sets, frames = Sets(rooms, cache_dir=tmp_path), frames_of(rooms)
    monkeypatch.setattr(module, "_sampled_sets", lambda *_: np.full((32, 48), 5))
    for frame in frames[:3]:
        sets.pixels(frame)
    monkeypatch.setattr(module, "_MAPS", sets._bytes)
    sets.pixels(frames[0])
    sets.pixels(frames[3])
    assert [frame_id for _, frame_id, _ in sets._maps] == ["0002", "0000", "0003"]


def test_last_scenes_are_remembered(monkeypatch, rooms):
    monkeypatch.setattr(module, "_SCENES", 2)
    sets, found = Sets(rooms), []
    monkeypatch.setattr(sets, "_find", lambda scene: found.append(scene) or SceneSets(np.zeros((0, 3)), np.zeros(0)))
    for scene in "abaacab":
        sets.scene(scene)
    assert found == ["a", "b", "c", "b"]
