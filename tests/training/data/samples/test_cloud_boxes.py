"""Boxes under augmentation, and the votes of points, against slow twins."""

from __future__ import annotations

import math

import numpy as np
import torch

from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D
from geo_pretrain.training.data.samples.cloud_boxes import (
    aligned_boxes,
    box_rows,
    moved_boxes,
    votes_by_box,
    votes_by_instance,
)
from geo_pretrain.training.geometry3d.boxes import box_corners, points_in_boxes

ROWS = torch.tensor([[1.0, 2, 0.5, 2, 1, 0.8, 0.3], [-1, 0, 0.2, 0.5, 0.7, 0.4, -2.0]])


def test_rows_of_boxes():
    boxes = Boxes3D(np.ones((2, 3), np.float32), np.full((2, 3), 2, np.float32), np.array([0.1, 0.2], np.float32),
                    np.array([1, 2]))  # fmt: skip
    assert box_rows(boxes)[1].tolist() == torch.tensor([1, 1, 1, 2, 2, 2, 0.2]).tolist()


def test_moved_boxes_hold_the_moved_corners():
    """A mirror, a turn, a scale and a shift together move the corners as they move points."""
    turn = torch.tensor([[math.cos(0.7), -math.sin(0.7), 0], [math.sin(0.7), math.cos(0.7), 0], [0, 0, 1]])
    for mirror in ((1, 1, 1), (-1, 1, 1), (1, -1, 1), (-1, -1, 1)):
        motion = torch.eye(4, dtype=torch.float64)
        motion[:3, :3] = (1.1 * turn @ torch.diag(torch.tensor(mirror).float())).double()
        motion[:3, 3] = torch.tensor([0.5, -1, 2])
        moved = moved_boxes(ROWS, motion)
        for box, row in zip(moved, ROWS, strict=True):
            corners = box_corners(row).double() @ motion[:3, :3].T + motion[:3, 3]
            distances = (corners[:, None] - box_corners(box)[None]).norm(dim=2)
            assert distances.amin(1).max() < 1e-5
            assert distances.amin(0).max() < 1e-5


def test_mirror_and_turn_as_the_released_code_writes_headings():
    """Clockwise headings: mirrored in x they become pi - heading, turned by an angle they lose it."""
    mirror = torch.diag(torch.tensor([-1.0, 1, 1, 1]))
    heading = -moved_boxes(ROWS, mirror)[:, 6]
    assert torch.allclose((heading - (math.pi + ROWS[:, 6])).cos(), torch.ones(2))


def test_aligned_boxes_are_hulls():
    aligned = aligned_boxes(ROWS)
    corners = box_corners(ROWS)
    assert torch.allclose(box_corners(aligned).amax(1), corners.amax(1), atol=1e-6)
    assert torch.allclose(box_corners(aligned).amin(1), corners.amin(1), atol=1e-6)
    assert aligned[:, 6].abs().max() == 0


def test_votes_by_instance_are_middles_of_the_points_given():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(60, 3, generator=generator)
    instances = torch.randint(0, 5, (60,), generator=generator)
    labels = torch.randint(0, 3, (60,), generator=generator)
    for given in (None, labels):
        centers, mask = votes_by_instance(points, instances, given)
        for k in range(60):
            own = points[instances == instances[k]]
            first = int((instances == instances[k]).nonzero()[0])
            wanted = int(instances[k]) > 0 and (given is None or int(given[first]) > 0)
            assert bool(mask[k]) is wanted
            middle = (own.amin(0) + own.amax(0)) / 2 if wanted else torch.zeros(3)
            assert torch.allclose(centers[k], middle.expand(3, 3), atol=1e-6)
    assert 0 < int(votes_by_instance(points, instances, labels)[1].sum()) < int((instances > 0).sum())
    nothing = votes_by_instance(points, torch.zeros(60, dtype=torch.int64), labels)
    assert not nothing[1].any()


def slow_votes(points, rows):
    """VoteNet's preparation of SUN RGB-D: slots are written one box after another."""
    inside = points_in_boxes(points, rows)
    votes, seen = np.zeros((len(points), 3, 3), np.float32), np.zeros(len(points), int)
    for b in range(len(rows)):
        for k in np.flatnonzero(inside[b]):
            votes[k, seen[k]] = rows[b, :3]
            if seen[k] == 0:
                votes[k, 1] = votes[k, 2] = rows[b, :3]
            seen[k] = min(2, seen[k] + 1)
    return votes, inside.any(0)


def test_votes_by_box_fill_and_overwrite_three_places():
    points = torch.rand(200, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rows = torch.tensor([[0.1 * k, 0.05 * k, 0, 1.2, 1.0, 1.4, 0.2 * k] for k in range(5)])
    centers, mask = votes_by_box(points, rows)
    wanted, inside = slow_votes(points, rows)
    assert np.array_equal(centers.numpy(), wanted)
    assert np.array_equal(mask.numpy(), inside)
    in_all = points_in_boxes(points, rows).all(0).nonzero()[0, 0]
    assert torch.equal(centers[in_all], rows[[0, 1, 4], :3])  # the fourth box's vote was overwritten
    assert votes_by_box(points, rows[:0])[1].sum() == 0
