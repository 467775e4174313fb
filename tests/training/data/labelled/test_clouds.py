"""Labelled clouds: back-projection and labels of voxels, by loops over pixels and points."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.rooms import CLASSES
from geo_pretrain.training.data.labelled.clouds.frames import labelled_clouds
from geo_pretrain.training.data.labelled.clouds.voxels import majority_label, voxels_of
from geo_pretrain.training.data.labelled.registry import open_labelled, subset
from tests.training.finetune.sweeps import Squares
from tests.training.painted_clouds import COLORS, ROOMS, painted


@pytest.fixture(scope="module")
def rooms():
    return tuple(open_labelled("rooms", None, split, task="segmentation", options=ROOMS) for split in ("train", "val"))


def test_majority_label_is_that_of_a_loop_over_voxels():
    generator = torch.Generator().manual_seed(0)
    labels, inverse = (torch.randint(high, (300,), generator=generator) for high in (5, 40))
    labels[inverse == 7] = 0
    expected = []
    for voxel in range(41):  # the last one has no point at all
        votes = Counter(int(label) for label, of in zip(labels, inverse, strict=True) if of == voxel and label > 0)
        expected.append(min(votes, key=lambda label: (-votes[label], label)) if votes else 0)
    assert majority_label(labels, inverse, 41).tolist() == expected
    assert expected[7] == expected[40] == 0
    assert len(set(expected)) == 5


def test_voxels_carry_the_labels_of_their_points():
    cloud = painted(0)
    coords, feats, labels = voxels_of(cloud, COLORS)
    inside: dict[tuple[int, ...], list[int]] = {}
    for point, label in zip(cloud.points, cloud.labels, strict=True):
        inside.setdefault(tuple(math.floor(np.float32(x) / np.float32(0.1)) for x in point), []).append(int(label))
    assert {tuple(row) for row in coords[:, 1:].tolist()} == set(inside)
    for row, label in zip(coords[:, 1:].tolist(), labels.tolist(), strict=True):
        known = [found for found in inside[tuple(row)] if found]
        assert (label in known) if known else label == 0
    assert feats.min() >= -0.5
    assert feats.max() <= 0.5


def test_turns_of_training_keep_labels_and_heights():
    """Turned upright, a point keeps its distance to the centroid, and nearly its height above it."""
    cloud = painted(1)
    fine = VoxelContract(0.001, ("R", "G", "B"), offset=-0.5)  # every point has a voxel of its own
    generator = torch.Generator().manual_seed(1)
    coords, feats, labels = voxels_of(cloud, fine, generator)
    assert len(coords) == len(cloud.points)
    points, center = torch.from_numpy(cloud.points), torch.from_numpy(cloud.points).mean(0)
    turned = coords[:, 1:] * 0.001
    assert torch.allclose((points - center).norm(dim=1), turned.norm(dim=1), atol=5e-3)
    assert (turned[:, 2] - (points - center)[:, 2]).abs().max() < 0.15
    assert not torch.allclose(turned, points - center, atol=0.1)
    assert torch.equal(labels, torch.from_numpy(cloud.labels))
    again = voxels_of(cloud, fine, torch.Generator().manual_seed(1))
    assert torch.equal(coords, again[0])
    assert torch.equal(feats, again[1])


def test_clouds_of_rooms_are_the_pixels_of_labelled_frames(rooms):
    train, _ = rooms
    clouds = labelled_clouds(train)
    assert [cloud.id for cloud in clouds] == train.ids()
    assert len(clouds) == 4
    scene, _, frame_id = clouds[1].id.partition("/")
    frame = train.rooms.load(scene, frame_id)
    k, row = frame.intrinsics, 0
    for v in range(frame.depth.shape[0]):
        for u in range(frame.depth.shape[1]):
            z = float(frame.depth[v, u])
            if z == 0:
                continue
            if (u + v) % 13 == 0:
                local = np.array([(u - k[0, 2]) / k[0, 0] * z, (v - k[1, 2]) / k[1, 1] * z, z, 1])
                assert np.allclose(clouds[1].points[row], (frame.cam_to_world @ local)[:3], atol=1e-4)
                assert clouds[1].colors[row].tolist() == frame.color[v, u].tolist()
                assert train.classes[clouds[1].labels[row] - 1] == CLASSES[frame.semantic[v, u]]
            row += 1
    assert row == len(clouds[1].points)
    assert max(len(cloud.points) for cloud in labelled_clouds(train, (32, 32))) <= 32 * 32
    part = subset(train, 0.5, 0)
    assert [cloud.id for cloud in labelled_clouds(part)] == part.ids() != train.ids()


def test_source_without_depth_is_refused():
    with pytest.raises(RecipeError, match=r"'squares' has no depth.*rooms"):
        labelled_clouds(Squares("train"))
