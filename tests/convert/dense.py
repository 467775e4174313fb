"""Sparse convolutions the dense way, with any library's kernel order: torch's conv3d read at the occupied cells.

A kernel is given as slices [n, Cin, Cout] with the offset (x, y, z) of each, so a library's order is written down as
its list of offsets and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Offsets = Sequence[tuple[int, int, int]]


def steps(size: int) -> range:
    """The offsets along one axis: centered for odd sizes, from 0 up for even ones."""
    return range(-(size // 2), size // 2 + 1) if size % 2 else range(size)


def x_fastest(size: int) -> list[tuple[int, int, int]]:
    return [(x, y, z) for z in steps(size) for y in steps(size) for x in steps(size)]


def z_fastest(size: int) -> list[tuple[int, int, int]]:
    return list(itertools.product(steps(size), repeat=3))


def convolve(coords: Tensor, feats: Tensor, kernel: Tensor, offsets: Offsets) -> Tensor:
    """Odd kernel, stride 1: coords [N, 4] (batch, x, y, z), feats [N, Cin] -> [N, Cout]."""
    weight = dense_weight(kernel, offsets)
    grid, cells = to_grid(coords, feats, lowest(coords))
    return at(F.conv3d(grid, weight, padding=weight.shape[-1] // 2), cells)


def downsample(coords: Tensor, feats: Tensor, kernel: Tensor, offsets: Offsets, out_coords: Tensor) -> Tensor:
    """Kernel 2, stride 2, values at `out_coords` [M, 4], which are even (in units of the input)."""
    weight = dense_weight(kernel, offsets)
    low = lowest(coords) // 2 * 2
    grid, _ = to_grid(coords, feats, low)
    cells = out_coords.long() - F.pad(low, (1, 0))
    return at(F.conv3d(F.pad(grid, [0, 1] * 3), weight, stride=2), cells // torch.tensor([1, 2, 2, 2]))


def upsample(coords: Tensor, feats: Tensor, kernel: Tensor, offsets: Offsets, out_coords: Tensor) -> Tensor:
    """Transposed kernel 2, stride 2, from even `coords` [N, 4] to values at the finer `out_coords` [M, 4]."""
    weight = dense_weight(kernel, offsets)
    halves = torch.cat([coords[:, :1], coords[:, 1:] // 2], dim=1)
    grid, _ = to_grid(halves, feats, lowest(halves))
    fine = F.conv_transpose3d(grid, weight.transpose(0, 1), stride=2)
    return at(fine, out_coords.long() - F.pad(2 * lowest(halves), (1, 0)))


def dense_weight(kernel: Tensor, offsets: Offsets) -> Tensor:
    """Slices as a weight [Cout, Cin, X, Y, Z] of torch's conv3d."""
    assert len(kernel) == len(offsets) == len(set(offsets))
    low = min(map(min, offsets))
    size = max(map(max, offsets)) - low + 1
    weight = kernel.new_full((kernel.shape[2], kernel.shape[1], size, size, size), torch.nan)
    for slice_, (x, y, z) in zip(kernel, offsets, strict=True):
        weight[:, :, x - low, y - low, z - low] = slice_.T
    return weight


def lowest(coords: Tensor) -> Tensor:
    return coords[:, 1:].long().amin(dim=0)


def to_grid(coords: Tensor, feats: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Features on a dense grid [B, C, X, Y, Z] whose first cell is `low`, and the cells [N, 4] of the coordinates."""
    cells = coords.long() - F.pad(low, (1, 0))
    grid = feats.new_zeros(*(cells.amax(dim=0) + 1).tolist(), feats.shape[1])
    grid[tuple(cells.T)] = feats
    return grid.movedim(-1, 1), cells


def at(grid: Tensor, cells: Tensor) -> Tensor:
    return grid.movedim(1, -1)[tuple(cells.T)]
