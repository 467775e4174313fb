"""Voxelize points: integer coordinates, one feature row a voxel, and the voxel of every point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

INT32 = torch.iinfo(torch.int32)
DENSE = 2  # cells of the bounding box per row, up to which `unique_rows` has a table of them: right for surfaces


@dataclass(frozen=True)
class Voxels:
    """Occupied voxels in order of first occurrence among the points."""

    coords: Tensor  # int32 [M, 4], rows (batch, x, y, z), unique
    feats: Tensor  # [M, C]
    inverse: Tensor  # int64 [N], the voxel row of every point
    index: Tensor  # int64 [M], the first point of every voxel

    def __len__(self) -> int:
        return len(self.coords)


def voxelize(
    points: Tensor,
    feats: Tensor,
    voxel_size: float,
    *,
    reduce: Literal["first", "mean"] = "first",
    batch: Tensor | None = None,
) -> Voxels:
    """Quantize points [N, 3] (m) with features [N, C] to voxels of edge `voxel_size` (m).

    A voxel's integer coordinate is floor(x / voxel_size), towards minus infinity, divided in the points' own dtype as
    MinkowskiEngine does; voxel c covers [c, c + 1) * voxel_size. Its feature is that of its first point or the mean of
    all its points. `batch` [N] holds each point's batch number (default 0). Raises ValueError for points that are not
    finite or whose coordinate leaves 32 bits.

    >>> voxelize(torch.tensor([[0.01, 0.0, 0.0], [-0.01, 0.0, 0.0]]), torch.ones(2, 1), 0.02).coords.tolist()
    [[0, 0, 0, 0], [0, -1, 0, 0]]
    """
    _check(points, feats, voxel_size, batch)
    if reduce not in ("first", "mean"):
        raise ValueError(f"reduce is {reduce!r}; accepted: 'first', 'mean'.")
    # A tensor, not a number: CUDA would multiply by the number's reciprocal, and cell borders would move.
    cells = torch.floor(points / points.new_tensor(voxel_size))
    _check_range(cells, points, voxel_size)
    numbers = torch.zeros(len(points), 1, dtype=torch.int64, device=points.device)
    if batch is not None:
        numbers = batch.to(torch.int64)[:, None]
    rows = torch.cat([numbers, cells.to(torch.int64)], dim=1)
    index, inverse = unique_rows(rows)
    reduced = feats[index] if reduce == "first" else _mean(feats, inverse, len(index))
    return Voxels(rows[index].to(torch.int32), reduced, inverse, index)


def unique_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Find unique rows of int64 `rows` [N, D]: indices of first occurrences [M], ascending; every row's group [N]."""
    keys, span = _pack(rows)
    if keys is not None and span <= DENSE * len(rows):  # a table of all cells is quicker than sorting
        first = _first_rows(keys, span)
        index = torch.sort(first[first < len(rows)]).values
        places = torch.empty_like(first)
        places[keys[index]] = torch.arange(len(index), device=rows.device)
        return index, places[keys]
    if keys is None:  # extents beyond 63 bits together
        found, group = torch.unique(rows, dim=0, return_inverse=True)
    else:
        found, group = torch.unique(keys, return_inverse=True)
    index, order = torch.sort(_first_rows(group, len(found)))
    return index, inverted(order)[group]


def _first_rows(group: Tensor, groups: int) -> Tensor:
    """The first row of every group, int64 [groups]; the number of rows for a group without any."""
    first = torch.full((groups,), len(group), dtype=torch.int64, device=group.device)
    return first.scatter_reduce(0, group, torch.arange(len(group), device=group.device), reduce="amin")


def inverted(permutation: Tensor) -> Tensor:
    """The inverse of a permutation, int64 [N]."""
    places = torch.empty_like(permutation)
    places[permutation] = torch.arange(len(permutation), device=permutation.device)
    return places


def _pack(rows: Tensor) -> tuple[Tensor | None, int]:
    """Pack each row into a unique int64 key below the number returned; None when the extents do not fit in 63 bits."""
    if not len(rows):
        return rows.new_zeros(0), 0
    columns = rows.T.long().contiguous()  # quicker for all that follows than numbers D apart
    low, high = (edge.tolist() for edge in columns.aminmax(dim=1))
    extents = [most - least + 1 for least, most in zip(low, high, strict=True)]
    span = math.prod(extents)
    if span >= 1 << 63:
        return None, span
    key = columns[0] - low[0]
    for column, least, extent in zip(columns[1:], low[1:], extents[1:], strict=True):
        key.mul_(extent).add_(column - least)
    return key, span


def _mean(feats: Tensor, inverse: Tensor, count: int) -> Tensor:
    total = feats.new_zeros(count, feats.shape[1]).index_add(0, inverse, feats)
    return total / torch.bincount(inverse, minlength=count)[:, None].to(feats.dtype)


def _check(points: Tensor, feats: Tensor, voxel_size: float, batch: Tensor | None) -> None:
    if points.ndim != 2 or points.shape[1] != 3 or not points.is_floating_point():
        raise ValueError(f"points are {points.dtype} {tuple(points.shape)}; accepted: float [N, 3] in meters.")
    if feats.ndim != 2 or len(feats) != len(points):
        raise ValueError(f"feats are {tuple(feats.shape)}; accepted: [N, C] with N = {len(points)}, one row a point.")
    if batch is not None and (batch.shape != points.shape[:1] or batch.is_floating_point()):
        raise ValueError(f"batch is {batch.dtype} {tuple(batch.shape)}; accepted: integers [N], N = {len(points)}.")
    if not voxel_size > 0:
        raise ValueError(f"voxel_size is {voxel_size!r}; accepted: meters above 0.")
    if not (torch.isfinite(points.sum()) or torch.isfinite(points).all()):  # the sum is quicker, but may overflow
        bad = int((~torch.isfinite(points)).any(dim=1).sum())
        raise ValueError(f"{bad} of {len(points)} points are not finite; drop them first.")


def _check_range(cells: Tensor, points: Tensor, voxel_size: float) -> None:
    if not len(cells):
        return
    low, high = float(cells.min()), float(cells.max())  # Python compares exactly; float32 would round 2^31 - 1 up
    if low < INT32.min or high > INT32.max:
        raise ValueError(
            f"Voxel coordinates span [{low:.10g}, {high:.10g}]; 32-bit integers are accepted: points up to "
            f"{float(points.abs().max()):.4g} m are too far out for voxel_size {voxel_size:g} m."
        )
