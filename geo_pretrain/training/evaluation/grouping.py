"""Grouping points into instances: points moved toward their instance's center are clustered by distance and class.

Jiang et al., "PointGroup", CVPR 2020, as CSC's released code uses it (github.com/facebookresearch/
ContrastiveSceneContexts, MIT). Written from a description. Positions are in any unit; `radius` is in the same.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from geo_pretrain.errors import DataError
from geo_pretrain.training.checks import Count, NaturalNumber, Positive
from geo_pretrain.training.evaluation import grouping_loops

RELEASED_NEIGHBORS = 1000  # the limit of the released code, which cuts a large instance whose offsets are good
FARTHEST = 2**19  # cells from the first: what lies farther shares the outermost cells


@dataclass(frozen=True)
class Proposals:
    """Predicted instances of one cloud, which may overlap; the most confident one need not come first."""

    members: tuple[np.ndarray, ...]  # P arrays of point numbers, int64, each number once and rising
    classes: np.ndarray  # int64 [P], 1..C
    scores: np.ndarray  # float64 [P], any range

    @classmethod
    def of(
        cls, members: Sequence[Sequence[int] | np.ndarray], classes: Sequence[int], scores: Sequence[float]
    ) -> Proposals:
        """Make proposals of plain sequences."""
        rows = tuple(np.unique(np.asarray(one, np.int64)) for one in members)
        if not len(rows) == len(classes) == len(scores):
            raise ValueError(
                f"Got {len(rows)} members, {len(classes)} classes, {len(scores)} scores; accepted: as many."
            )
        return cls(rows, np.asarray(classes, np.int64), np.asarray(scores, np.float64))

    def __len__(self) -> int:
        return len(self.members)

    def masks(self, points: int) -> np.ndarray:
        """One mask over all points of the cloud for each proposal: bool [P, points]."""
        masks = np.zeros((len(self), points), bool)
        for mask, rows in zip(masks, self.members, strict=True):
            mask[rows] = True
        return masks

    def of_points(self, inverse: np.ndarray) -> Proposals:
        """The proposals of voxels as those of points: each point goes with its voxel `inverse` [N]."""
        order = np.argsort(inverse, kind="stable")
        highest = max((int(rows[-1]) for rows in self.members if len(rows)), default=-1)
        counts = np.bincount(inverse, minlength=highest + 1)
        starts = np.cumsum(counts) - counts
        members = []
        for rows in self.members:  # no masks of all points: a poor network makes thousands of proposals
            lengths = counts[rows]
            first = np.repeat(starts[rows] - (np.cumsum(lengths) - lengths), lengths)
            members.append(np.sort(order[first + np.arange(len(first))]))
        return Proposals(tuple(members), self.classes, self.scores)

    def ranked(self) -> Proposals:
        """The same proposals, the highest score first; equal scores keep their order."""
        order = np.argsort(-self.scores, kind="stable")
        return Proposals(tuple(self.members[k] for k in order), self.classes[order], self.scores[order])


def joined(*parts: Proposals) -> Proposals:
    """All proposals of several lists, one after the other."""
    return Proposals(
        tuple(rows for part in parts for rows in part.members),
        np.concatenate([part.classes for part in parts]),
        np.concatenate([part.scores for part in parts]),
    )


@dataclass(frozen=True)
class Grouping:
    """How points become proposals; the defaults are the released code's for voxels, but for `neighbors`."""

    radius: Positive = 1.5  # neighbors are closer than this, in voxels
    # Of a point's neighbors only the first of this number are followed; None: all. The released code: 1000.
    neighbors: Count | None = None
    cluster: Count = 50  # clusters with fewer points are dropped
    proposal: NaturalNumber = 100  # and then those that do not have more points than this
    score: Literal["mean", "median"] = "mean"  # of the class's logits over the points


def group(
    positions: np.ndarray,
    logits: np.ndarray,
    classes: np.ndarray,
    settings: Grouping = Grouping(),
    *,
    compiled: bool | None = None,
) -> Proposals:
    """Cluster points that lie together and have the same class; a cluster's score is its class's mean or median logit.

    Args:
        positions: float [N, 3], moved by the predicted offsets. logits: float [N, 1 + C]; column k is class k's.
        classes: int64 [N], the class of each point; points of class 0 are left out (no neighbors either).
        compiled: see `clusters`.

    Returns:
        Disjoint proposals in the order of their first points.
    """
    rows = np.flatnonzero(classes > 0)
    chosen = classes[rows]
    cluster = clusters(positions[rows], chosen, settings.radius, neighbors=settings.neighbors, compiled=compiled)
    order = np.argsort(cluster, kind="stable")
    sizes = np.bincount(cluster)
    ends = np.cumsum(sizes)
    members, labels, scores = [], [], []
    for size, end in zip(sizes, ends, strict=True):
        if size < settings.cluster or size <= settings.proposal:
            continue
        one = order[end - size : end]
        label = int(chosen[one[0]])
        values = logits[rows[one], label].astype(np.float64)
        members.append(rows[one])
        labels.append(label)
        scores.append(float(np.median(values) if settings.score == "median" else values.mean()))
    return Proposals.of(members, labels, scores)


def clusters(
    points: np.ndarray,
    classes: np.ndarray,
    radius: float,
    *,
    neighbors: int | None = None,
    compiled: bool | None = None,
) -> np.ndarray:
    """Number the cluster of each point, from 0 in the order of their first points: int64 [N].

    From the first point without a cluster, a cluster spreads from point to neighbor of the same class, breadth first.
    A point's neighbors are the points at a distance below `radius`; only the `neighbors` ones with the lowest numbers
    are followed, of whatever class. That limit makes following one-sided: where offsets are good and more points than
    that lie in one place, a cluster ends although more points lie in it (None: it does not).

    Args:
        points: float [N, 3]; distances are computed in float64. classes: int64 [N].
        compiled: use numba's machine code; None: if numba is installed. The clusters are the same.
    """
    points = np.ascontiguousarray(points, np.float64)
    if not np.isfinite(points).all():
        raise DataError("Points to be grouped are not finite: the network's offsets are not; try a lower optim.lr.")
    if not len(points):
        return np.zeros(0, np.int64)
    limited = neighbors is not None and neighbors < len(points)
    limit = len(points) if neighbors is None else neighbors
    cells = _cells(points, radius, None if limited else classes)
    layout = (cells.order, cells.starts, cells.of_point, cells.first, cells.last)
    if compiled if compiled is not None else importlib.util.find_spec("numba") is not None:
        loops = grouping_loops.compiled()
        if limited:
            return np.asarray(loops["grow"](points, classes, *layout, float(radius), limit))
        return np.asarray(loops["grow_all"](points, classes, *layout, float(radius)))
    return _grow(points, classes, cells, radius, limit)


@dataclass(frozen=True)
class _Cells:
    """Points sorted into cubes of one radius: a point's neighbors lie in the 27 cubes around it."""

    order: np.ndarray  # int64 [N]: points cell by cell, by number in each
    starts: np.ndarray  # int64 [M + 1]: where a cell begins in `order`
    of_point: np.ndarray  # int64 [N]: a point's cell
    first: (
        np.ndarray
    )  # int64 [M, 9]: the cells at z - 1, z, z + 1 in each of the 9 columns around a cell: from here ...
    last: np.ndarray  # int64 [M, 9]: ... to before here


def _cells(points: np.ndarray, radius: float, classes: np.ndarray | None) -> _Cells:
    """Sort points into cells; with `classes`, points of different classes go into different ones."""
    cell = np.floor((points - points.min(0)) / radius).clip(0, FARTHEST - 3).astype(np.int64) + 1
    axis = int(cell.max()) + 2
    kind = np.zeros(len(points), np.int64) if classes is None else np.unique(classes, return_inverse=True)[1]
    x, y, z = cell.T
    keys, of_point, counts = np.unique(
        ((kind * axis + x) * axis + y) * axis + z, return_inverse=True, return_counts=True
    )
    columns = [(dx * axis + dy) * axis for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    return _Cells(
        order=np.argsort(of_point, kind="stable"),
        starts=np.concatenate([[0], np.cumsum(counts)]),
        of_point=of_point,
        first=np.stack([np.searchsorted(keys, keys + column - 1) for column in columns], axis=1),
        last=np.stack([np.searchsorted(keys, keys + column + 1, side="right") for column in columns], axis=1),
    )


def _grow(points: np.ndarray, classes: np.ndarray, cells: _Cells, radius: float, limit: int) -> np.ndarray:
    """`clusters` without numba."""
    cluster = np.full(len(points), -1)
    number = 0
    for seed in range(len(points)):
        if cluster[seed] >= 0:
            continue
        cluster[seed] = number
        queue = [seed]
        for point in queue:  # it grows meanwhile
            cell = cells.of_point[point]
            spans = zip(cells.first[cell], cells.last[cell], strict=True)
            near = np.concatenate([cells.order[cells.starts[a] : cells.starts[b]] for a, b in spans if a < b])
            if limit < len(points):
                near.sort()
            else:  # all neighbors are followed: those that have a cluster need no look
                near = near[cluster[near] < 0]
            distance = points[near] - points[point]
            x, y, z = distance.T
            near = near[x * x + y * y + z * z < radius * radius][:limit]
            fresh = near[(cluster[near] < 0) & (classes[near] == classes[seed])]
            cluster[fresh] = number
            queue += fresh.tolist()
        number += 1
    return cluster
