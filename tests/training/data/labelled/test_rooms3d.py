"""Rooms as whole scans: fused labels by a loop over pixels, boxes that hold their objects' points, what tasks take."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from geo_pretrain.errors import UnknownName
from geo_pretrain.rooms import CLASSES, RoomsConfig
from geo_pretrain.training.data.labelled.clouds.rooms3d import DETECTED
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.data.surfaces.fusing import frame_cloud

TINY = {"scenes": 2, "val_scenes": 1, "frames": 3, "width": 64, "height": 64, "spacing": 0.05}
STUFF = ("wall", "floor", "ceiling")
PINNED = {
    "wall": 1842, "floor": 1853, "window": 734, "door": 648, "sofa": 1177, "table": 168, "cabinet": 463, "curtain": 151,
}  # fmt: skip


def rooms3d(task, split="train", **options):
    return open_labelled("rooms3d", None, split, task=task, options=TINY | options)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def fused_by_hand(scene):
    """voxel -> (mean point, mean color, (class, object) of most pixels), by a loop over all pixels of all frames."""
    rooms = Rooms(RoomsConfig(scenes=2, frames=3, width=64, height=64), cache="none")
    pixels = defaultdict(list)
    for id in rooms.frame_ids(scene):
        frame = rooms.load(scene, id)
        cloud, seen = frame_cloud(frame), frame.depth > 0
        names = zip(frame.semantic[seen].tolist(), frame.instance[seen].tolist(), strict=True)
        for point, color, name in zip(cloud.points.astype(np.float64), cloud.colors, names, strict=True):
            pixels[tuple(np.floor(point / 0.05).astype(int).tolist())].append((point, color, name))
    found = {}
    for voxel, seen in pixels.items():
        votes = Counter(name for _, _, name in seen)
        most = min(votes, key=lambda name: (-votes[name], name))
        found[voxel] = (np.mean([p for p, _, _ in seen], 0), np.mean([c for _, c, _ in seen], 0), most)
    return found


def test_scan_is_what_a_loop_over_pixels_fuses():
    source = rooms3d("instances3d")
    assert (source.name, source.split, source.classes, source.stuff) == ("rooms3d", "train", CLASSES[1:], STUFF)
    assert source.ids() == ["rooms_train_0000", "rooms_train_0001"]
    cloud, expected = source.load("rooms_train_0001"), fused_by_hand("rooms_train_0001")
    assert len(cloud) == len(expected)
    countable = 0
    for row, (point, color, (label, thing)) in enumerate(expected.values()):  # first seen first
        assert np.abs(cloud.points[row] - point).max() < 1e-5
        assert np.abs(cloud.colors[row] - color).max() <= 0.5 + 1e-9
        assert cloud.labels[row] == label
        is_stuff = CLASSES[label] in STUFF
        assert cloud.instances[row] == (0 if is_stuff else thing)
        countable += not is_stuff
    assert 0 < countable < len(cloud)
    assert cloud.boxes is None


def in_box(points, boxes, k):
    """Which points lie in box k, by its definition: turned back by the heading, within half its sizes."""
    c, s = np.cos(boxes.headings[k]), np.sin(boxes.headings[k])
    own = (points - boxes.centers[k]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return (np.abs(own) <= boxes.sizes[k] / 2 + 0.02).all(1)  # a mean over an edge lies a little outside


def test_boxes_hold_the_points_of_their_objects_in_their_own_heading():
    seen = oblique = 0
    for split in ("train", "val"):
        source = rooms3d("detection3d", split, min_points=30, val_scenes=3, frames=6)
        assert source.classes == DETECTED
        for id in source.ids():
            cloud = source.load(id)
            objects = [k for k in np.unique(cloud.instances) if k]
            assert len(objects) == len(cloud.boxes)
            assert ((cloud.instances > 0) <= (cloud.labels > 0)).all()
            for k, thing in enumerate(objects):
                mine = cloud.instances == thing
                assert mine.sum() >= 30
                assert set(cloud.labels[mine]) == {cloud.boxes.classes[k]}
                assert in_box(cloud.points[mine], cloud.boxes, k).mean() > 0.98
                seen += 1
            assert cloud.boxes.headings.dtype == cloud.boxes.centers.dtype == np.float32
            oblique += int((np.abs(np.sin(2 * cloud.boxes.headings)) > 0.1).sum())
    assert seen > 10
    assert oblique > 2  # where the sign of a heading matters


def test_objects_with_few_points_are_none_in_detection():
    all_of_them, large = rooms3d("detection3d", min_points=1), rooms3d("detection3d", min_points=200)
    many, few = (source.load("rooms_train_0000") for source in (all_of_them, large))
    assert 0 < len(few.boxes) < len(many.boxes)
    np.testing.assert_array_equal(few.labels, many.labels)
    sizes = np.bincount(many.instances)
    np.testing.assert_array_equal(few.instances, np.where(sizes[many.instances] >= 200, many.instances, 0))
    assert all_of_them.fingerprint() != large.fingerprint()


def test_scans_are_made_once_and_again_where_they_are_damaged():
    source = rooms3d("segmentation3d")
    path = source.cache_dir / "rooms_train_0000.safetensors"
    before, cloud = path.read_bytes(), source.load("rooms_train_0000")
    path.write_bytes(before[:-100])
    again = rooms3d("segmentation3d", scenes=1).load("rooms_train_0000")
    np.testing.assert_array_equal(cloud.points, again.points)
    np.testing.assert_array_equal(cloud.labels, again.labels)
    assert path.read_bytes() == before
    done = []
    source = open_labelled(
        "rooms3d", None, "val", task="segmentation3d", options=TINY, progress=lambda *at: done.append(at)
    )
    assert done == [(1, 1)]
    assert source.ids() == ["rooms_val_0000"]
    assert source.fingerprint() != rooms3d("segmentation3d").fingerprint()
    with pytest.raises(UnknownName, match="Unknown scan 'rooms_train_0000'"):
        source.load("rooms_train_0000")


def test_scans_are_those_of_this_version():
    """Counts of points by class, to a hundredth; where they change, so must `VERSION` or the rooms' `GENERATOR`."""
    cloud = rooms3d("instances3d", "val").load("rooms_val_0000")
    found = {CLASSES[k]: n for k, n in enumerate(np.bincount(cloud.labels).tolist()) if n > 100}
    assert found == pytest.approx(PINNED, rel=0.01)
