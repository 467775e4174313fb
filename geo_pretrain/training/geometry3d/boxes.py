"""Upright boxes in 3D: corners, points inside, intersection over union.

A box is a row (x, y, z, length, width, height, heading): its center (m), its full lengths along its own axes (m), and
the angle (radians) from the cloud's x axis to its own, counter-clockwise seen from above. A hull is a box without
heading, as (x, y, z) of its lowest and of its highest corner.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geo_pretrain.sparse.backend import is_fast
from geo_pretrain.training.geometry3d import loops

# Signs of the corners: counter-clockwise below, then above them.
CORNERS = tuple((x, y, z) for z in (-1, 1) for x, y in ((1, 1), (-1, 1), (-1, -1), (1, -1)))
EDGES = tuple((k, (k + 1) % 4) for k in range(4)) + tuple((k + 4, (k + 1) % 4 + 4) for k in range(4))
EDGES += tuple((k, k + 4) for k in range(4))  # pairs of corners that an edge joins: 12
PAIRS = 1 << 16  # pairs of boxes that are compared at once
ON_EDGE = 1e-12  # of a box's side: a corner so near to the other's border is inside


def box_corners(boxes: Tensor) -> Tensor:
    """The corners of boxes [..., 7] in the order of `CORNERS`: [..., 8, 3] m.

    >>> box_corners(torch.tensor([0.0, 0, 0, 4, 2, 2, torch.pi / 2]))[0].round().tolist()
    [-1.0, 2.0, -1.0]
    """
    signs = boxes.new_tensor(CORNERS)
    half = boxes[..., None, 3:6] / 2 * signs
    cosine, sine = boxes[..., 6:].cos(), boxes[..., 6:].sin()
    x = cosine * half[..., 0] - sine * half[..., 1]
    y = sine * half[..., 0] + cosine * half[..., 1]
    return boxes[..., None, :3] + torch.stack([x, y, half[..., 2]], dim=-1)


def box_hulls(boxes: Tensor) -> Tensor:
    """The smallest hulls around boxes [..., 7]: [..., 6] m."""
    corners = box_corners(boxes)
    return torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1)


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether each point [..., N, 3] lies in each box [..., K, 7], its border included: bool [..., K, N]."""
    moved = points[..., None, :, :] - boxes[..., :, None, :3]
    cosine, sine = boxes[..., 6:].cos(), boxes[..., 6:].sin()
    x = cosine * moved[..., 0] + sine * moved[..., 1]
    y = cosine * moved[..., 1] - sine * moved[..., 0]
    half = boxes[..., 3:6] / 2
    inside = (x.abs() <= half[..., 0:1]) & (y.abs() <= half[..., 1:2])
    return inside & (moved[..., 2].abs() <= half[..., 2:3])


def hull_iou(a: Tensor, b: Tensor, *, plane: bool = False) -> Tensor:
    """Intersection over union of hulls [..., N, 6] and [..., M, 6]: [..., N, M]; 0 where both are empty.

    `plane`: of their footprints on the ground.
    """
    axes = 2 if plane else 3
    low = torch.maximum(a[..., :, None, :axes], b[..., None, :, :axes])
    high = torch.minimum(a[..., :, None, 3 : 3 + axes], b[..., None, :, 3 : 3 + axes])
    shared = (high - low).clamp(min=0).prod(-1)
    sizes = [(hull[..., 3 : 3 + axes] - hull[..., :axes]).prod(-1) for hull in (a, b)]
    union = sizes[0][..., :, None] + sizes[1][..., None, :] - shared
    return torch.where(union > 0, shared / union, 0)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of oriented boxes [N, 7] and [M, 7]: float64 [N, M].

    Footprints are clipped against each other; their shared area times the shared height is the intersection, as in
    VoteNet's evaluation.

    >>> box, moved = torch.tensor([[0.0, 0, 0, 2, 2, 1, 0]]), torch.tensor([[0.0, 0, 0.5, 2, 2, 1, torch.pi / 2]])
    >>> box_iou(box, torch.cat([box, moved])).round(decimals=4).tolist()
    [[1.0, 0.3333]]
    """
    first, second = a.double()[:, None], b.double()[None]
    top = torch.minimum(first[..., 2] + first[..., 5] / 2, second[..., 2] + second[..., 5] / 2)
    bottom = torch.maximum(first[..., 2] - first[..., 5] / 2, second[..., 2] - second[..., 5] / 2)
    shared = ground_overlap(a, b) * (top - bottom).clamp(min=0)
    union = first[..., 3:6].prod(-1) + second[..., 3:6].prod(-1) - shared
    return torch.where(union > 0, shared / union, 0)


def ground_overlap(a: Tensor, b: Tensor) -> Tensor:
    """The area (m2) that the footprints of boxes [N, 7] and [M, 7] share: float64 [N, M]."""
    shape = len(a), len(b)
    columns = [0, 1, 3, 4, 6]  # x, y, length, width, heading
    first = a[:, columns].double()[:, None].expand(*shape, 5).reshape(-1, 5).contiguous()
    second = b[:, columns].double()[None].expand(*shape, 5).reshape(-1, 5).contiguous()
    if is_fast(a) and is_fast(b):
        areas = torch.empty(len(first), dtype=torch.float64)
        loops.compiled()["overlap_areas"](first.numpy(), second.numpy(), areas.numpy())
    else:
        blocks = zip(first.split(PAIRS), second.split(PAIRS), strict=True)
        areas = torch.cat([_rectangle_overlap(one, other) for one, other in blocks])
    return areas.reshape(shape)


def _rectangle_overlap(a: Tensor, b: Tensor) -> Tensor:
    """The shared area of pairs of rectangles [P, 5] (x, y, length, width, heading): [P].

    The shared polygon's corners are corners of one rectangle inside the other and crossings of their sides. They are
    collected with their duplicates, sorted by direction from their mean, and summed up by the shoelace formula.
    """
    corners = [_rectangle_corners(rectangle) for rectangle in (a, b)]
    crossings, cross = _crossings(*corners)
    points = torch.cat([*corners, crossings], dim=1)  # [P, 4 + 4 + 16, 2]
    valid = torch.cat([_inside(corners[0], b), _inside(corners[1], a), cross], dim=1)
    weight = valid[..., None].to(points)
    middle = (points * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    spread = points - middle
    angles = torch.atan2(spread[..., 1], spread[..., 0]).masked_fill(~valid, math.inf)
    order = angles.argsort(dim=1)
    ring = spread.gather(1, order[..., None].expand(-1, -1, 2))
    real = valid.gather(1, order)
    ring = torch.where(real[..., None], ring, ring[:, :1])  # the others stand behind: they become the first corner
    following = ring.roll(-1, dims=1)
    doubled = (ring[..., 0] * following[..., 1] - ring[..., 1] * following[..., 0]).sum(1)
    return torch.where(real[:, 0], doubled.abs() / 2, 0)


def _rectangle_corners(rectangles: Tensor) -> Tensor:
    """Corners [P, 4, 2] of rectangles [P, 5], counter-clockwise."""
    signs = rectangles.new_tensor([corner[:2] for corner in CORNERS[:4]])
    half = rectangles[:, None, 2:4] / 2 * signs
    cosine, sine = rectangles[:, 4:].cos(), rectangles[:, 4:].sin()
    turned = [cosine * half[..., 0] - sine * half[..., 1], sine * half[..., 0] + cosine * half[..., 1]]
    return rectangles[:, None, :2] + torch.stack(turned, dim=-1)


def _inside(points: Tensor, rectangles: Tensor) -> Tensor:
    """Whether points [P, 4, 2] lie in their rectangle [P, 5]: bool [P, 4]."""
    moved = points - rectangles[:, None, :2]
    cosine, sine = rectangles[:, 4:].cos(), rectangles[:, 4:].sin()
    x, y = cosine * moved[..., 0] + sine * moved[..., 1], cosine * moved[..., 1] - sine * moved[..., 0]
    length, width = (rectangles[:, k : k + 1] / 2 * (1 + ON_EDGE) + ON_EDGE for k in (2, 3))
    return (x.abs() <= length) & (y.abs() <= width)


def _crossings(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sides of rectangles with corners a, b [P, 4, 2] cross: points [P, 16, 2], and whether they do."""
    p, q = a[:, :, None], b[:, None]
    r, s = (a.roll(-1, 1) - a)[:, :, None], (b.roll(-1, 1) - b)[:, None]
    cross = r[..., 0] * s[..., 1] - r[..., 1] * s[..., 0]
    moved = q - p
    parallel = cross == 0
    safe = torch.where(parallel, 1, cross)
    t = (moved[..., 0] * s[..., 1] - moved[..., 1] * s[..., 0]) / safe
    u = (moved[..., 0] * r[..., 1] - moved[..., 1] * r[..., 0]) / safe
    found = ~parallel & (t >= 0) & (t <= 1) & (u >= 0) & (u <= 1)
    return (p + t[..., None] * r).flatten(1, 2), found.flatten(1, 2)
