"""Grouping points into instances: compiled and plain loops against a twin that compares every pair of points."""

from __future__ import annotations

import numpy as np
import pytest

from geo_pretrain.errors import DataError
from geo_pretrain.training.evaluation.grouping import (
    RELEASED_NEIGHBORS,
    Grouping,
    Proposals,
    clusters,
    group,
    joined,
)

PATHS = {"plain": False, "compiled": True}


@pytest.fixture(params=PATHS)
def compiled(request):
    if request.param == "compiled":
        pytest.importorskip("numba")
    return PATHS[request.param]


def slow_clusters(points, classes, radius, neighbors):
    """Breadth first over the first `neighbors` points within reach of each point, from all pairs."""
    points = points.astype(np.float64)
    inside = ((points[:, None] - points) ** 2).sum(-1) < radius**2
    near = [np.flatnonzero(row)[:neighbors] for row in inside]
    cluster, number = [-1] * len(points), 0
    for seed in range(len(points)):
        if cluster[seed] != -1:
            continue
        cluster[seed], queue = number, [seed]
        while queue:
            for other in near[queue.pop(0)]:
                if cluster[other] == -1 and classes[other] == classes[seed]:
                    cluster[other] = number
                    queue.append(other)
        number += 1
    return cluster


def blobs(seed, count=400):
    """Dense heaps and a thin haze, in shuffled order: some balls hold far more points than others."""
    rng = np.random.default_rng(seed)
    centers = rng.uniform(-20, 20, (6, 3))
    spread = rng.uniform(0.1, 3, 6)
    kind = rng.integers(0, 6, count)
    points = centers[kind] + rng.normal(size=(count, 3)) * spread[kind, None]
    points[: count // 4] = rng.uniform(-25, 25, (count // 4, 3))
    return rng.permutation(points).astype(np.float32), rng.integers(1, 3, count)


@pytest.mark.parametrize("neighbors", [None, 1000, 20, 3, 1])
@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_those_of_all_pairs(compiled, seed, neighbors):
    points, classes = blobs(seed)
    found = clusters(points, classes, 1.5, neighbors=neighbors, compiled=compiled)
    assert found.tolist() == slow_clusters(points, classes, 1.5, neighbors)
    assert 1 < found.max() < len(points)


@pytest.mark.parametrize("neighbors", [None, 3])
def test_neighbors_are_closer_than_the_radius(compiled, neighbors):
    points = np.array([[0, 0, 0], [1, 1, 0], [2.5, 1, 0], [2.5, 1, 1.49]])
    assert clusters(points, np.ones(4, np.int64), 1.5, neighbors=neighbors, compiled=compiled).tolist() == [0, 0, 1, 1]


def test_limit_follows_the_first_neighbors_only_and_so_cuts_a_heap(compiled):
    """Perfect offsets put an instance into one place: the released code keeps its first 1000 points (here: 4)."""
    heap, ones = np.zeros((10, 3)), np.ones(10, np.int64)
    assert clusters(heap, ones, 1.5, neighbors=4, compiled=compiled).tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert clusters(heap, ones, 1.5, neighbors=None, compiled=compiled).tolist() == [0] * 10
    mixed = np.array([2, 2, 2, 1, 1, 1, 1, 1, 1, 1])  # neighbors of other classes count
    assert clusters(heap, mixed, 1.5, neighbors=4, compiled=compiled).tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7]


def test_large_instance_with_perfect_offsets_is_one_proposal_unless_the_limit_is_the_released_one(compiled):
    heap, ones, logits = np.zeros((1200, 3)), np.ones(1200, np.int64), np.ones((1200, 2))
    assert [len(rows) for rows in group(heap, logits, ones, compiled=compiled).members] == [1200]
    released = group(heap, logits, ones, Grouping(neighbors=RELEASED_NEIGHBORS), compiled=compiled)
    assert [len(rows) for rows in released.members] == [1000]


def test_far_points_and_few_points(compiled):
    far = np.array([[0, 0, 0], [1e9, 0, 0], [1e9 + 1, 0, 0], [-1e12, 5, 1e12]])
    assert clusters(far, np.ones(4, np.int64), 1.5, compiled=compiled).tolist() == [0, 1, 1, 2]
    assert clusters(np.zeros((0, 3)), np.zeros(0, np.int64), 1.5, compiled=compiled).tolist() == []
    with pytest.raises(DataError, match="offsets are not"):
        clusters(np.array([[0, np.nan, 0]]), np.ones(1, np.int64), 1.5, compiled=compiled)


def line(counts, classes):
    """Heaps of points 10 apart on a line, one heap after the other."""
    positions = np.repeat(np.arange(len(counts)) * 10.0, counts)[:, None] * [1.0, 0, 0]
    return positions, np.repeat(classes, counts)


def test_proposals_have_more_points_than_the_minimum_and_the_mean_logit_of_their_class(compiled):
    positions, classes = line([101, 100, 300, 150], [1, 1, 0, 2])
    logits = np.random.default_rng(0).normal(size=(len(classes), 3))
    found = group(positions, logits, classes, compiled=compiled)
    assert [(rows[0], rows[-1], len(rows)) for rows in found.members] == [(0, 100, 101), (501, 650, 150)]
    assert found.classes.tolist() == [1, 2]
    np.testing.assert_allclose(found.scores, [logits[:101, 1].mean(), logits[501:, 2].mean()], rtol=1e-6)
    middle = group(positions, logits, classes, Grouping(score="median"), compiled=compiled)
    np.testing.assert_allclose(middle.scores, [np.median(logits[:101, 1]), np.median(logits[501:, 2])], rtol=1e-6)
    clusters_of_50 = group(positions, logits, classes, Grouping(proposal=0), compiled=compiled)
    assert [len(rows) for rows in clusters_of_50.members] == [101, 100, 150]
    assert len(group(positions, logits, classes, Grouping(cluster=102), compiled=compiled)) == 1
    assert len(group(positions, logits, np.zeros_like(classes), compiled=compiled)) == 0


def test_points_of_class_0_are_no_neighbors(compiled):
    positions, logits = np.zeros((30, 3)), np.zeros((30, 2))
    classes = np.repeat([0, 1], 15)
    few = Grouping(neighbors=15, cluster=1, proposal=14)
    (rows,) = group(positions, logits, classes, few, compiled=compiled).members
    assert rows.tolist() == list(range(15, 30))


def test_proposals_move_to_points_and_masks():
    voxels = Proposals.of([[2, 0], [1, 2]], [1, 2], [0.2, 0.7])
    inverse = np.array([0, 0, 1, 2, 2, 3])
    points = voxels.of_points(inverse)
    assert [rows.tolist() for rows in points.members] == [[0, 1, 3, 4], [2, 3, 4]]
    assert points.masks(6).astype(int).tolist() == [[1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0]]
    many = Proposals.of([[0, 3], [4, 1, 2], []], [1, 1, 1], [0, 0, 0])
    shuffled = np.random.default_rng(0).integers(0, 4, 50)  # voxel 4 has no point
    slow = [[k for k in range(50) if shuffled[k] in rows] for rows in ([0, 3], [4, 1, 2], [])]
    assert [rows.tolist() for rows in many.of_points(shuffled).members] == slow
    ranked = points.ranked()
    assert (ranked.classes.tolist(), ranked.scores.tolist()) == ([2, 1], [0.7, 0.2])
    both = joined(points, ranked)
    assert (len(both), both.classes.tolist()) == (4, [1, 2, 2, 1])
    assert Proposals.of([], [], []).of_points(inverse).masks(6).shape == (0, 6)
    with pytest.raises(ValueError, match="1 members, 2 classes"):
        Proposals.of([[1]], [1, 2], [0.5])
