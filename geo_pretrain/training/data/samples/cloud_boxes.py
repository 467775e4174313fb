"""The boxes of augmented clouds, and what their points vote for: centers of objects.

A box is a row as in `geometry3d.boxes`: center, full lengths, heading.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D
from geo_pretrain.training.geometry3d.boxes import box_hulls, points_in_boxes

VOTES = 3  # true votes of a point, which may lie in several boxes


def box_rows(boxes: Boxes3D) -> Tensor:
    """Boxes as rows: float32 [K, 7]."""
    parts = (torch.from_numpy(part).float() for part in (boxes.centers, boxes.sizes, boxes.headings[:, None]))
    return torch.cat(list(parts), dim=1)


def moved_boxes(rows: Tensor, motion: Tensor) -> Tensor:
    """Boxes [K, 7] in the frame that `motion` [4, 4] leads to; it mirrors, turns about z, scales evenly and shifts.

    >>> quarter = torch.tensor([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 5], [0, 0, 0, 1]])
    >>> moved_boxes(torch.tensor([[1.0, 0, 0, 2, 1, 1, 0]]), quarter)
    tensor([[0.0000, 1.0000, 5.0000, 2.0000, 1.0000, 1.0000, 1.5708]])
    """
    turn, shift = motion[:3, :3].double(), motion[:3, 3].double()
    exact = rows.double()
    ahead = torch.stack([exact[:, 6].cos(), exact[:, 6].sin(), torch.zeros(len(rows)).double()], dim=1) @ turn.T
    scale = turn.det().abs() ** (1 / 3)
    heading = torch.atan2(ahead[:, 1], ahead[:, 0])[:, None]
    return torch.cat([exact[:, :3] @ turn.T + shift, exact[:, 3:6] * scale, heading], dim=1).to(rows.dtype)


def aligned_boxes(rows: Tensor) -> Tensor:
    """The smallest boxes without heading around boxes [K, 7]: [K, 7].

    >>> aligned_boxes(torch.tensor([[0.0, 0, 0, 4, 2, 1, torch.pi / 2]])).round().tolist()
    [[0.0, 0.0, 0.0, 2.0, 4.0, 1.0, 0.0]]
    """
    hulls = box_hulls(rows)
    low, high = hulls[:, :3], hulls[:, 3:]
    return torch.cat([(low + high) / 2, high - low, torch.zeros_like(rows[:, 6:])], dim=1)


def votes_by_instance(points: Tensor, instances: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """What points [P, 3] vote for by their objects: centers [P, 3, 3] m, three times the same; and which vote, [P].

    An object's center is the middle of the box around its points that are given, as VoteNet's code does for ScanNet: it
    may differ a little from the center of its box. An object votes if its first point has a class (`labels` [P] > 0).
    """
    if labels is not None and len(points):
        _, number = torch.unique(instances, return_inverse=True)
        places = torch.arange(len(points))
        first = torch.full((int(number.max()) + 1,), len(points)).scatter_reduce(0, number, places, reduce="amin")
        instances = torch.where(labels[first][number] > 0, instances, 0)
    mask = instances > 0
    _, number = torch.unique(instances[mask], return_inverse=True)
    own = points[mask]
    count = int(number.max()) + 1 if len(number) else 0
    spread = number[:, None].expand(-1, 3)
    low = torch.full((count, 3), math.inf).scatter_reduce(0, spread, own, reduce="amin")
    high = torch.full((count, 3), -math.inf).scatter_reduce(0, spread, own, reduce="amax")
    centers = torch.zeros(len(points), 3)
    centers[mask] = ((low + high) / 2)[number]
    return centers[:, None].repeat(1, VOTES, 1), mask


def votes_by_box(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What points [P, 3] vote for by the boxes [K, 7] they lie in: centers [P, 3, 3] m; and which vote, bool [P].

    As VoteNet's code for SUN RGB-D: a point's first box fills all three places, a second one takes the second place,
    and a third and every later one the third.
    """
    centers = torch.zeros(len(points), VOTES, 3)
    seen = torch.zeros(len(points), dtype=torch.int64)
    for row, inside in zip(rows, points_in_boxes(points, rows), strict=True):
        centers[inside & (seen == 0)] = row[:3]
        later = (inside & (seen > 0)).nonzero()[:, 0]
        centers[later, seen[later].clamp(max=VOTES - 1)] = row[:3]
        seen += inside
    return centers, seen > 0
