"""Sampling and grouping of points as PointNet++ does: farthest points, points in balls, three nearest neighbors.

Qi et al., "PointNet++", NeurIPS 2017. Clouds are batched: [B, N, 3]. Float32 points on the CPU are searched by numba's
loops where it is installed (see `sparse.backend`), all others by torch; the results are the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from geo_pretrain.sparse.backend import is_fast
from geo_pretrain.training.geometry3d import loops

NEAR_ORIGIN = 1e-3  # squared meters within which the released kernel takes a point for padding
CELLS = 1 << 24  # distances that are held at once


def farthest_points(
    points: Tensor, count: int, *, lengths: Tensor | None = None, skip_near_origin: bool = False
) -> Tensor:
    """Choose `count` points one by one, each farthest from those chosen before, from point 0: int64 [B, count].

    Of equally far points the first is taken. (The released kernel compares by pairs of threads: it takes another one,
    which has the same distance.) When all are taken, point 0 comes again.

    Args:
        points: [B, N, 3] m.
        lengths: int64 [B]; only the first `lengths[b]` points of cloud b are its own, the rest is padding.
        skip_near_origin: never choose a point whose squared norm is 1e-3 or less (3.2 cm), but for point 0: the kernel
            of PointNet++ takes them for padding. An accident of the released code, met by scenes around the origin.

    >>> farthest_points(torch.tensor([[[0.0, 0, 0], [1, 0, 0], [5, 0, 0], [2, 0, 0]]]), 3).tolist()
    [[0, 2, 3]]
    """
    _check(points, count)
    reach = points.new_full(points.shape[:2], torch.inf)
    if lengths is not None:
        reach[torch.arange(points.shape[1], device=points.device) >= lengths[:, None]] = -1
    if skip_near_origin:
        reach[points.square().sum(2) <= NEAR_ORIGIN] = -1
    chosen = torch.zeros(len(points), count, dtype=torch.int64, device=points.device)
    if is_fast(points):
        farthest = loops.compiled()["farthest"]
        for cloud, distances, row in zip(points.detach().contiguous(), reach, chosen, strict=True):
            farthest(cloud.numpy(), distances.numpy(), row.numpy())
        return chosen
    columns = points.detach().permute(2, 0, 1).contiguous()  # [3, B, N]: one long operation an axis
    last = chosen[:, :1]
    for place in range(1, count):
        moved = columns - columns.gather(2, last.expand(3, -1, -1))
        reach = torch.minimum(reach, moved[0] * moved[0] + moved[1] * moved[1] + moved[2] * moved[2])
        last = reach.argmax(1, keepdim=True)
        chosen[:, place : place + 1] = last
    return chosen


def ball_query(points: Tensor, centers: Tensor, radius: float, count: int) -> Tensor:
    """Find the first `count` points nearer to each center than `radius`, in order of index: int64 [B, M, count].

    Missing ones are filled up with the first; a ball without any point has point 0.

    >>> points = torch.tensor([[[0.0, 0, 0], [0.3, 0, 0], [0.2, 0, 0], [0.1, 0, 0]]])
    >>> ball_query(points, points[:, :1], 0.3, 2).tolist(), ball_query(points, points[:, 1:2], 0.15, 3).tolist()
    ([[[0, 2]]], [[[1, 2, 1]]])
    """
    _check(points, count)
    squared = points.new_tensor(radius).square()
    if is_fast(points) and is_fast(centers):
        found = torch.zeros(*centers.shape[:2], count, dtype=torch.int64)
        ball = loops.compiled()["ball"]
        for cloud, middle, rows in zip(points.detach().contiguous(), centers.detach().contiguous(), found, strict=True):
            ball(cloud.numpy(), middle.numpy(), squared.numpy()[()], rows.numpy())
        return found
    total = points.shape[1]
    parts = []
    for distances in _squared_distances(centers, points):
        places = torch.arange(total, device=points.device).expand_as(distances)
        places = torch.where(distances < squared, places, total)
        first = places.topk(min(count, total), dim=2, largest=False, sorted=True).values
        parts.append(torch.nn.functional.pad(first, (0, count - first.shape[2]), value=total))
    found = torch.cat(parts, dim=1)
    return torch.where(found == total, found[:, :, :1] % total, found)  # total % total: no point in the ball


def three_nearest(targets: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    """Find the three sources [B, M, 3] nearest to each target [B, N, 3]: distances (m) and int64 indices [B, N, 3].

    The nearest comes first. Of fewer than three sources the nearest is repeated at an infinite distance. No gradient
    goes through the distances, as in the released kernel.
    """
    targets, sources = targets.detach(), sources.detach()
    if is_fast(targets) and is_fast(sources):
        squared = targets.new_full((*targets.shape[:2], 3), torch.inf)
        index = torch.zeros(*targets.shape[:2], 3, dtype=torch.int64)
        nearest = loops.compiled()["nearest_three"]
        for own, others, rows, places in zip(targets.contiguous(), sources.contiguous(), squared, index, strict=True):
            nearest(own.numpy(), others.numpy(), rows.numpy(), places.numpy())
        return squared.sqrt(), torch.where(squared.isinf(), index[..., :1], index)
    parts = [
        block.topk(min(3, sources.shape[1]), dim=2, largest=False) for block in _squared_distances(targets, sources)
    ]
    squared, index = (torch.cat([part[k] for part in parts], dim=1) for k in (0, 1))
    missing = 3 - index.shape[2]
    if missing:
        squared = torch.nn.functional.pad(squared, (0, missing), value=torch.inf)
        index = torch.cat([index, index[:, :, :1].expand(-1, -1, missing)], dim=2)
    return squared.sqrt(), index


def interpolate(features: Tensor, distances: Tensor, index: Tensor) -> Tensor:
    """Average the features [B, M, C] of each target's three nearest sources by inverse distance: [B, N, C].

    `distances` and `index` [B, N, 3] are those of `three_nearest`; 1e-8 m is added to the distances.
    """
    weights = 1 / (distances + 1e-8)
    weights = weights / weights.sum(2, keepdim=True)
    return (gather_rows(features, index) * weights[..., None]).sum(2)


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Take rows [B, N, C] of each cloud by int64 `index` [B, ...]: [B, ..., C].

    >>> gather_rows(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([[1, 1], [0, 1]])).flatten().tolist()
    [2.0, 2.0, 3.0, 4.0]
    """
    flat = index.flatten(1)[..., None].expand(-1, -1, rows.shape[2])
    return rows.gather(1, flat).unflatten(1, index.shape[1:])


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Yield squared distances [B, m, M] of blocks of rows of a [B, N, 3] to all of b [B, M, 3], summed x, y, z."""
    step = max(1, CELLS // max(1, len(b) * b.shape[1]))
    for block in a.split(step, dim=1):
        squared = [(block[:, :, None, axis] - b[:, None, :, axis]).square() for axis in range(3)]
        yield squared[0] + squared[1] + squared[2]


def _check(points: Tensor, count: int) -> None:
    if points.ndim != 3 or points.shape[2] != 3 or not points.shape[1] or not points.is_floating_point():
        raise ValueError(f"points are {points.dtype} {tuple(points.shape)}; accepted: float [B, N, 3], N > 0.")
    if count < 1:
        raise ValueError(f"count is {count}; accepted: whole numbers from 1 up.")
