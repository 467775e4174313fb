"""Boxes in 3D: closed forms, a slow clipping of polygons, and suppression one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from geo_pretrain.sparse.backend import use
from geo_pretrain.training.geometry3d.boxes import (
    box_corners,
    box_hulls,
    box_iou,
    ground_overlap,
    hull_iou,
    points_in_boxes,
)
from geo_pretrain.training.geometry3d.suppression import suppress

BACKENDS = ("plain", "fast")
UNIT = torch.tensor([[0.0, 0, 0, 1, 1, 1, 0]])


def boxes(count, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    rows = np.concatenate(
        [rng.normal(0, spread, (count, 3)), rng.uniform(0.2, 3, (count, 3)), rng.uniform(-4, 4, (count, 1))], axis=1
    )
    return torch.from_numpy(rows.astype(np.float32))


def slow_corners(box):
    x, y, z, length, width, height, heading = box
    found = set()
    for a in (-0.5, 0.5):
        for b in (-0.5, 0.5):
            for c in (-0.5, 0.5):
                u, v = a * length, b * width
                found.add((x + u * math.cos(heading) - v * math.sin(heading),
                           y + u * math.sin(heading) + v * math.cos(heading), z + c * height))  # fmt: skip
    return sorted(found)


def slow_footprint(box):
    """Corners of the footprint, counter-clockwise."""
    x, y, _, length, width, _, heading = box
    ring = [(1, 1), (-1, 1), (-1, -1), (1, -1)]
    return [
        (x + a * length / 2 * math.cos(heading) - b * width / 2 * math.sin(heading),
         y + a * length / 2 * math.sin(heading) + b * width / 2 * math.cos(heading))
        for a, b in ring
    ]  # fmt: skip


def slow_overlap(first, second):
    """Sutherland and Hodgman: cut one polygon by each side's line of the other."""

    def side(point, a, b):
        return (b[0] - a[0]) * (point[1] - a[1]) - (b[1] - a[1]) * (point[0] - a[0])

    polygon, clip = slow_footprint(first), slow_footprint(second)
    for k in range(4):
        a, b, out = clip[k], clip[(k + 1) % 4], []
        for before, here in zip(polygon[-1:] + polygon[:-1], polygon, strict=True):
            one, other = side(before, a, b), side(here, a, b)
            if one * other < 0:
                t = one / (one - other)
                out.append((before[0] + t * (here[0] - before[0]), before[1] + t * (here[1] - before[1])))
            if other >= 0:
                out.append(here)
        polygon = out
        if not polygon:
            return 0.0
    ring = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return abs(sum(p[0] * q[1] - p[1] * q[0] for p, q in ring)) / 2


def slow_iou(first, second):
    shared = min(b[2] + b[5] / 2 for b in (first, second)) - max(b[2] - b[5] / 2 for b in (first, second))
    both = slow_overlap(first, second) * max(shared, 0.0)
    return both / (math.prod(first[3:6]) + math.prod(second[3:6]) - both)


def test_corners_and_hulls_are_the_slow_ones():
    rows = boxes(6)
    for corners, hull, box in zip(box_corners(rows), box_hulls(rows), rows.tolist(), strict=True):
        wanted = np.array(slow_corners(box))
        np.testing.assert_allclose(np.array(sorted(corners.tolist())), wanted, atol=1e-5)
        np.testing.assert_allclose(hull, [*wanted.min(0), *wanted.max(0)], atol=1e-5)


def test_corners_of_a_turned_box():
    """A quarter turn to the left moves the box's own x axis onto the cloud's y axis."""
    corners = box_corners(torch.tensor([1.0, 2, 3, 4, 2, 6, math.pi / 2]))
    assert box_hulls(torch.tensor([1.0, 2, 3, 4, 2, 6, math.pi / 2])).tolist() == pytest.approx(
        [0, 0, 0, 2, 4, 6], abs=1e-6
    )
    assert corners[0].tolist() == pytest.approx([0, 4, 0], abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_iou_is_that_of_clipped_polygons(backend: str):
    first, second = boxes(14), boxes(17, seed=1)
    second[3], second[4, :6], second[5] = first[3], first[4, :6], first[5] * torch.tensor([1, 1, 1, 0.5, 0.5, 1, 1])
    with use(backend):
        got, areas = box_iou(first, second), ground_overlap(first, second)
    assert got.shape == (14, 17)
    for i, a in enumerate(first.tolist()):
        for j, b in enumerate(second.tolist()):
            assert got[i, j] == pytest.approx(slow_iou(a, b), abs=1e-9)
            assert areas[i, j] == pytest.approx(slow_overlap(a, b), abs=1e-9)
    assert got[3, 3] == pytest.approx(1, abs=1e-9)
    assert got[5, 5] == pytest.approx(0.25, abs=1e-6)
    assert (got > 0).float().mean() > 0.2  # the comparison has seen crossings


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_forms(backend: str):
    eighth = torch.tensor([[0.0, 0, 0, 1, 1, 1, math.pi / 4]])
    lifted, touching = torch.tensor([[0.0, 0, 0.5, 1, 1, 1, 0]]), torch.tensor([[1.0, 0, 0, 1, 1, 1, 0]])
    with use(backend):
        assert float(ground_overlap(UNIT, eighth)) == pytest.approx(2 * (math.sqrt(2) - 1), abs=1e-7)  # an octagon
        assert float(box_iou(UNIT, lifted)) == pytest.approx(1 / 3)
        assert float(box_iou(UNIT, touching)) == pytest.approx(0, abs=1e-9)
        assert float(box_iou(UNIT, UNIT + torch.tensor([0, 0, 0, 0, 0, 0, math.pi]))) == pytest.approx(1, abs=1e-6)
        assert float(box_iou(UNIT * 0, UNIT * 0)) == 0
        assert box_iou(UNIT[:0], UNIT).shape == (0, 1)


def test_iou_of_upright_boxes_is_that_of_hulls():
    first, second = boxes(10), boxes(12, seed=2)
    first[:, 6] = second[:, 6] = 0
    torch.testing.assert_close(box_iou(first, second).float(), hull_iou(box_hulls(first), box_hulls(second)), atol=1e-5,
                               rtol=1e-4)  # fmt: skip
    plane = hull_iou(box_hulls(first), box_hulls(second), plane=True)
    first[:, 2] = second[:, 2] = 0
    first[:, 5] = second[:, 5] = 1
    torch.testing.assert_close(plane, box_iou(first, second).float(), atol=1e-5, rtol=1e-4)


def test_points_in_boxes_are_those_within_all_faces():
    rows = boxes(5)
    points = torch.randn(300, 3, generator=torch.Generator().manual_seed(3))
    got = points_in_boxes(points, rows)
    assert got.shape == (5, 300)
    for k, (x, y, z, length, width, height, heading) in enumerate(rows.tolist()):
        ahead, aside = (math.cos(heading), math.sin(heading)), (-math.sin(heading), math.cos(heading))
        for n, (px, py, pz) in enumerate(points.tolist()):
            along = (px - x) * ahead[0] + (py - y) * ahead[1]
            across = (px - x) * aside[0] + (py - y) * aside[1]
            inside = abs(along) <= length / 2 and abs(across) <= width / 2 and abs(pz - z) <= height / 2
            assert bool(got[k, n]) is inside
    border = torch.tensor([[0.5, 0.5, 0.5], [0.5001, 0, 0]])
    assert points_in_boxes(border, UNIT).tolist() == [[True, False]]
    batched = points_in_boxes(torch.stack([points, points + 1]), torch.stack([rows, rows]))
    assert torch.equal(batched[0], got)
    assert torch.equal(batched[1], points_in_boxes(points + 1, rows))


def slow_suppress(hulls, scores, threshold, classes, plane):
    axes = (0, 1) if plane else (0, 1, 2)
    left = sorted(range(len(scores)), key=lambda k: (-scores[k], k))
    kept = []
    while left:
        best = left.pop(0)
        kept.append(best)

        def iou(other, best=best):
            a, b = hulls[best], hulls[other]
            both = math.prod(max(0.0, min(a[3 + d], b[3 + d]) - max(a[d], b[d])) for d in axes)
            return both / sum([math.prod(h[3 + d] - h[d] for d in axes) for h in (a, b)], -both)

        left = [k for k in left if iou(k) <= threshold or (classes is not None and classes[k] != classes[best])]
    return kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("plane", [False, True])
def test_suppression_is_the_slow_one(backend: str, by_class: bool, plane: bool):
    hulls = box_hulls(boxes(60, spread=0.7))
    generator = torch.Generator().manual_seed(4)
    scores = (torch.rand(60, generator=generator) * 20).round() / 20  # with ties
    classes = torch.randint(3, (60,), generator=generator) if by_class else None
    with use(backend):
        got = suppress(hulls, scores, 0.25, classes=classes, plane=plane)
    wanted = slow_suppress(hulls.tolist(), scores.tolist(), 0.25, None if classes is None else classes.tolist(), plane)
    assert got.tolist() == wanted
    assert 5 < len(wanted) < 50


def test_nothing_to_suppress():
    assert suppress(torch.zeros(0, 6), torch.zeros(0), 0.25).tolist() == []
