"""Depth frames fused to weighted points with labels, against a plain twin."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from geo_pretrain.rooms import RoomsConfig
from geo_pretrain.training.data.frame import Frame, resize_frame
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.data.surfaces import fusing
from geo_pretrain.training.data.surfaces.fusing import fuse_points
from geo_pretrain.training.data.surfaces.sets import label_sets
from tests.training.data.surfaces.test_fusing import world_points


@pytest.fixture(scope="module")
def rooms():
    return Rooms(RoomsConfig(scenes=1, frames=5, width=96, height=64))


def twin_fuse(frames, kind):
    cells = {}
    for frame in frames:
        points = np.float32(world_points(frame)[0]).astype(float)
        labels = label_sets(frame, kind)[frame.depth > 0] if kind else np.full(len(points), -1)
        for point, z, label in zip(points, frame.depth[frame.depth > 0].astype(float), labels, strict=True):
            towards = frame.cam_to_world[:3, 3] - point
            row = point, towards / np.linalg.norm(towards), max(z, 0.5) ** -4, int(label)
            cells.setdefault(tuple(np.floor(point / 0.02).astype(int)), []).append(row)
    out = []
    for rows in cells.values():
        share = np.array([w for *_, w, _ in rows])
        votes = Counter()
        for *_, w, label in rows:
            votes[label] += w
        most = min(votes, key=lambda label: (-votes[label], label))
        out.append((*np.average([p for p, *_ in rows], axis=0, weights=share),
                    *np.average([t for _, t, *_ in rows], axis=0, weights=share), share.sum(), most))  # fmt: skip
    return np.array(out)


@pytest.mark.parametrize("pending", [1, 2_000_000])
@pytest.mark.parametrize("kind", [None, "instance"])
def test_fused_points_are_the_weighted_means_of_every_voxel(rooms, monkeypatch, kind, pending):
    monkeypatch.setattr(fusing, "_PENDING", pending)
    frames = [resize_frame(rooms.load(rooms.scenes()[0], f"000{k}"), (32, 48)) for k in (0, 1, 0)]
    frames[2] = replace(frames[0], depth=frames[0].depth * 0.2)  # some nearer than half a meter
    labels = None if kind is None else partial(label_sets, kind=kind)
    got, want = fuse_points(frames, labels), twin_fuse(frames, kind)
    assert (frames[2].depth < 0.5).any()
    assert len(got.points) < sum(frame.depth.size for frame in frames)
    np.testing.assert_allclose(got.points, want[:, :3], atol=1e-5)
    np.testing.assert_allclose(got.towards, want[:, 3:6], atol=1e-5)
    np.testing.assert_allclose(got.weights, want[:, 6], rtol=1e-5)
    np.testing.assert_array_equal(got.labels, want[:, 7])
    assert len(np.unique(got.labels)) == 1 if kind is None else len(np.unique(got.labels)) > 3


@pytest.mark.parametrize("labels", [(2, 5), (5, 2)])
def test_of_labels_with_equal_weights_a_fused_point_has_the_lower(labels):
    intrinsics = np.array([[1e3, 0, -1], [0, 1e3, -1], [0, 0, 1]])  # two pixels in one voxel
    instance = np.array([labels], np.int32)
    frame = Frame(
        "s", "0", np.zeros((1, 2, 3), np.uint8), np.ones((1, 2), np.float32), intrinsics, np.eye(4), None, instance
    )
    assert fuse_points([frame], lambda frame: frame.instance).labels.tolist() == [2]


def test_large_frames_are_thinned_before_they_are_fused():
    depth = np.ones((480, 640), np.float32)
    intrinsics = np.diag([5.0, 5.0, 1.0])  # no two pixels in one voxel
    big = Frame("s", "0", np.zeros((480, 640, 3), np.uint8), depth, intrinsics, np.eye(4))
    assert len(fuse_points([big]).points) == 240 * 320
