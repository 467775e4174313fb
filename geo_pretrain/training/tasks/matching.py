"""Matches between pixels, voxels and points: which are drawn, and the features at matched pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sample_matches(target: Tensor, seeds: Sequence[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `count` matches of each pair uniformly: without replacement, or with it where there are fewer.

    Args:
        target: int64 [B, P] from `match_pixels`: the matched pixel of each pixel, -1 for none.
        seeds: one integer a pair; the draw of a pair depends on its seed alone, not on its batch or device.

    Returns:
        pixel1, pixel2: int64 [B, count] (all 0 for a pair without a match); matched: bool [B].
    """
    pixels = target.shape[-1]
    draws = [torch.rand(pixels + count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    draw = torch.stack(draws).to(target.device)
    has_match = target >= 0
    available = has_match.sum(-1, keepdim=True)
    # matched pixels first, in random order: the first of them, since no more are used
    order = torch.where(has_match, draw[:, :pixels], 2).topk(min(count, pixels), largest=False).indices
    rank = torch.arange(count, device=target.device).expand(len(target), -1)
    with_replacement = (draw[:, pixels:] * available).long()
    pixel1 = order.gather(-1, torch.where(available >= count, rank, with_replacement))
    matched = available[:, 0] > 0
    pixel1 = torch.where(matched[:, None], pixel1, 0)
    return pixel1, target.gather(-1, pixel1).clamp(min=0), matched


def one_match_each(matches: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw one match uniformly for each row of view 1, and of those at most `count`, uniformly too.

    matches: int64 [M, 2]. `generator` lives on the CPU, so that the draw is the same on every device.

    Returns int64 [n, 2].
    """
    shuffled = matches[draw(len(matches), len(matches), generator, matches.device)]
    rows, group = torch.unique(shuffled[:, 0], return_inverse=True)
    position = torch.arange(len(matches), device=matches.device)
    first = torch.full_like(rows, len(matches)).scatter_reduce(0, group, position, reduce="amin")
    return shuffled[first[draw(len(rows), count, generator, matches.device)]]


def draw(total: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw at most `count` different numbers below `total`, in random order: int64 [n]."""
    return torch.randperm(total, generator=generator)[:count].to(device)


def half_resolution_cell(pixel: Tensor, width: int, features: torch.Size) -> Tensor:
    """Find the flat cell (row // 2, column // 2) of a half-resolution map [B, C, h, w] for flat pixel indices.

    Equal to the released round((p - 0.5) / 2) for whole p.
    """
    row = (pixel // width // 2).clamp(max=features[-2] - 1)
    column = (pixel % width // 2).clamp(max=features[-1] - 1)
    return row * features[-1] + column


def gather_cells(features: Tensor, cell: Tensor) -> Tensor:
    """Take features [B, C, h, w] at flat cells [B, N]: [B, N, C]."""
    batch, chans, height, width = features.shape
    rows = features.permute(0, 2, 3, 1).reshape(-1, chans)  # no copy where channels lie together
    first = height * width * torch.arange(batch, device=cell.device)
    return rows.index_select(0, (cell + first[:, None]).flatten()).view(batch, -1, chans)


def nearest_cells(maps: Tensor, element: Tensor, pixel: Tensor, size: tuple[int, int]) -> Tensor:
    """Sample nearest upsampling of `maps` [B, C, h, w] to `size` (height, width) at single pixels: [N, C].

    `element`, `pixel`: int64 [N], batch element and flat pixel (row * width + column) of an image of `size`.
    """
    height, width = maps.shape[-2:]
    row, column = pixel // size[1] * height // size[0], pixel % size[1] * width // size[1]
    return maps.permute(0, 2, 3, 1)[element, row, column]


def sample_map(maps: Tensor, element: Tensor, pixel: Tensor, size: tuple[int, int], *, align_corners: bool) -> Tensor:
    """Sample bilinear upsampling of `maps` to `size` at single pixels, without building the large map.

    Args:
        maps: [B, C, h, w].
        element, pixel: int64 [N], batch element and flat pixel (row * width + column) of an image of `size`.
        size: (height, width) of the images. align_corners: as in `torch.nn.functional.interpolate`.

    Returns:
        [N, C].
    """
    height, width = maps.shape[-2:]
    row, column = pixel // size[1], pixel % size[1]
    top, bottom, down = _between(row, size[0], height, align_corners)
    left, right, along = _between(column, size[1], width, align_corners)
    flat = maps.flatten(2).transpose(1, 2)  # [B, h * w, C]

    def corner(y: Tensor, x: Tensor) -> Tensor:
        return flat[element, y * width + x]

    down, along = down.to(maps.dtype)[:, None], along.to(maps.dtype)[:, None]
    upper = corner(top, left) * (1 - along) + corner(top, right) * along
    lower = corner(bottom, left) * (1 - along) + corner(bottom, right) * along
    return upper * (1 - down) + lower * down


def _between(index: Tensor, large: int, small: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Locate positions on an axis of `large` cells between two neighbors of `small` cells, and the fraction between."""
    if align_corners:
        position = index.double() * ((small - 1) / (large - 1) if large > 1 else 0.0)
    else:
        position = ((index.double() + 0.5) * (small / large) - 0.5).clamp(min=0)
    before = position.floor().long().clamp(max=small - 1)
    return before, (before + 1).clamp(max=small - 1), position - before
