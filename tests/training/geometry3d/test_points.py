"""Sampling and grouping of points: torch and numba against slow twins and small cases."""

from __future__ import annotations

import pytest
import torch

from geo_pretrain.sparse.backend import use
from geo_pretrain.training.geometry3d.points import (
    ball_query,
    farthest_points,
    gather_rows,
    interpolate,
    three_nearest,
)

BACKENDS = ("plain", "fast")


def cloud(*shape, seed=0):
    return torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed))


def slow_farthest(points, count, own, skip):
    """One point after another, as the kernel of PointNet++: distances of all points to all chosen ones."""
    chosen = [0]
    while len(chosen) < count:
        best, most = 0, -1.0
        for k in range(own):
            if skip and float((points[k] ** 2).sum()) <= 1e-3:
                continue
            nearest = min(float(((points[k] - points[c]) ** 2).sum()) for c in chosen)
            if nearest > most:
                best, most = k, nearest
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("skip", [False, True])
def test_farthest_points_are_the_slow_ones(backend: str, skip: bool):
    points = cloud(3, 40)
    points[:, 5], points[1, 9] = 0.01, 0.0  # near the origin
    points[0, 7] *= 20
    lengths = torch.tensor([40, 31, 6])
    with use(backend):
        got = farthest_points(points, 24, lengths=lengths, skip_near_origin=skip)
    for k in range(3):
        wanted = slow_farthest(points[k], 24, int(lengths[k]), skip)
        if k == 2:  # after six points all distances are 0
            assert got[k, :6].tolist() == wanted[:6] if not skip else got[k, :5].tolist() == wanted[:5]
            assert set(got[k].tolist()) <= set(range(6))
        else:
            assert got[k].tolist() == wanted
    assert (5 in got[2].tolist()) is not skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_equally_far_points_and_points_that_ran_out(backend: str):
    square = torch.tensor([[[1.0, 1, 0], [-1, -1, 0], [1, -1, 0], [-1, 1, 0]]])
    near = torch.full((1, 4, 3), 0.01)
    with use(backend):
        assert farthest_points(square, 6).tolist() == [[0, 1, 2, 3, 0, 0]]
        assert farthest_points(near, 3, skip_near_origin=True).tolist() == [[0, 0, 0]]


def slow_ball(points, center, radius, count):
    inside = [k for k, point in enumerate(points) if float(((point - center) ** 2).sum()) < radius**2][:count]
    return (inside + inside[:1] * count)[:count] if inside else [0] * count


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("radius", [0.05, 0.8, 10.0])
def test_ball_query_is_the_slow_one(backend: str, radius: float):
    points, centers = cloud(2, 30), cloud(2, 11, seed=1)
    for count in (4, 40):
        with use(backend):
            got = ball_query(points, centers, radius, count)
        for k in range(2):
            assert got[k].tolist() == [slow_ball(points[k], center, radius, count) for center in centers[k]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_point_on_the_ball_is_outside(backend: str):
    points = torch.tensor([[[0.5, 0, 0], [0.0, 0.25, 0]]])
    with use(backend):
        assert ball_query(points, torch.zeros(1, 1, 3), 0.5, 2).tolist() == [[[1, 1]]]
        assert ball_query(points, torch.zeros(1, 1, 3), 0.25, 2).tolist() == [[[0, 0]]]  # none: point 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_nearest_and_their_mean_are_the_slow_ones(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("geo_pretrain.training.geometry3d.points.CELLS", 100)  # in several blocks
    targets, sources = cloud(2, 9), cloud(2, 13, seed=1)
    features = torch.randn(2, 13, 4, generator=torch.Generator().manual_seed(2))
    with use(backend):
        distances, index = three_nearest(targets, sources)
    got = interpolate(features, distances, index)
    for b in range(2):
        for n in range(9):
            all_distances = [float((targets[b, n] - source).norm()) for source in sources[b]]
            nearest = sorted(range(13), key=all_distances.__getitem__)[:3]
            assert index[b, n].tolist() == nearest
            weights = [1 / (all_distances[k] + 1e-8) for k in nearest]
            mean = sum(w * features[b, k] for w, k in zip(weights, nearest, strict=True)) / sum(weights)
            torch.testing.assert_close(got[b, n], mean, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_interpolation_at_a_source_and_from_two_sources(backend: str):
    sources = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]])
    features = torch.tensor([[[0.0], [4.0]]])
    targets = torch.tensor([[[1.0, 0, 0], [0.25, 0, 0]]])
    with use(backend):
        distances, index = three_nearest(targets, sources)
    assert distances.tolist() == [[[0, 1, torch.inf], [0.25, 0.75, torch.inf]]]
    assert index.tolist() == [[[1, 0, 1], [0, 1, 0]]]
    assert interpolate(features, distances, index).flatten().tolist() == pytest.approx([4.0, 1.0], abs=1e-6)


def test_gathering_rows_passes_gradients():
    rows = torch.randn(2, 5, 3, requires_grad=True)
    index = torch.tensor([[[0, 4], [1, 1]], [[2, 2], [3, 0]]])
    got = gather_rows(rows, index)
    assert got.shape == (2, 2, 2, 3)
    assert torch.equal(got[1, 1, 0], rows[1, 3])
    got.sum().backward()
    assert rows.grad[0, 1].tolist() == [2.0, 2.0, 2.0]


def test_points_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 3\); accepted: float \[B, N, 3\]"):
        farthest_points(torch.zeros(4, 3), 2)
    with pytest.raises(ValueError, match="count is 0"):
        ball_query(torch.zeros(1, 4, 3), torch.zeros(1, 1, 3), 0.3, 0)
