"""Slow twins of the sparse engine, and what its tests share: golden values, random voxels, comparison by coordinate."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from geo_pretrain.sparse import SparseTensor

DATA = Path(__file__).resolve().parents[1] / "data"
Cell = tuple[int, ...]


def golden_file() -> dict[str, Tensor]:
    """Single operations of MinkowskiEngine 0.5.4."""
    return load_file(DATA / "me_ops.safetensors")


def within(limit: float, value: Tensor, expected: Tensor) -> None:
    """Differences up to `limit` times the largest magnitude, the golden file's own measure."""
    assert value.shape == expected.shape
    torch.testing.assert_close(value, expected, rtol=0, atol=limit * max(float(expected.detach().abs().max()), 1e-30))


def cells(coords: Tensor) -> list[Cell]:
    return [tuple(row) for row in coords.tolist()]


def rows_at(x: SparseTensor, coords: Tensor) -> Tensor:
    """The features of `x` in the order of `coords`, which must be exactly its voxels."""
    place = {cell: row for row, cell in enumerate(cells(x.coords))}
    wanted = cells(coords)
    assert len(place) == len(x) == len(wanted), "voxels occur twice or differ in number"
    return x.feats[torch.tensor([place[cell] for cell in wanted], device=x.coords.device)]


def random_cloud(
    seed: int, sizes: tuple[int, ...] = (40, 25), reach: int = 5, *, stride: int = 1, channels: int = 3
) -> tuple[Tensor, Tensor]:
    """Different, unsorted voxels of both signs, several batch elements mixed, float64 features."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for batch, size in enumerate(sizes):
        places = torch.randperm((2 * reach) ** 3, generator=generator)[:size]
        xyz = torch.stack([places // (4 * reach * reach), places // (2 * reach) % (2 * reach), places % (2 * reach)], 1)
        parts.append(torch.cat([torch.full((len(xyz), 1), batch), (xyz - reach) * stride], dim=1))
    coords = torch.cat(parts).int()
    coords = coords[torch.randperm(len(coords), generator=generator)]
    return coords, torch.randn(len(coords), channels, generator=generator, dtype=torch.float64)


def random_kernel(seed: int, kernel_size: int, in_chans: int = 3, out_chans: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(kernel_size**3, in_chans, out_chans, generator=generator, dtype=torch.float64)


def on_coarse(x: SparseTensor, stride: int, coords: Tensor, feats: Tensor) -> SparseTensor:
    """Features on the voxels of `x` at another stride, given in the order of `coords`."""
    level = x.coordinate_manager.coarsen(x.stride, stride // x.stride)
    place = {cell: row for row, cell in enumerate(cells(coords))}
    return x.with_sorted_feats(feats[[place[cell] for cell in cells(level.coords)]], stride=stride)


def coarse_cells(coords: Tensor, span: int) -> Tensor:
    """Python's own floor division, unique, in order of first occurrence."""
    found = {(b, *(value // span * span for value in xyz)): None for b, *xyz in coords.tolist()}
    return torch.tensor(list(found), dtype=torch.int32)


def steps(kernel_size: int) -> range:
    """The offsets along one axis: 0, 1 for kernel 2; -1, 0, 1 for kernel 3."""
    return range(-(kernel_size - 1) // 2, kernel_size // 2 + 1) if kernel_size % 2 else range(kernel_size)


def _into_dense(coords: Tensor, feats: Tensor, low: Tensor, shape: list[int], stride: int) -> Tensor:
    """[B, C, X, Y, Z] with zeros where nothing is."""
    place = (coords[:, 1:].long() - low) // stride
    dense = feats.new_zeros(int(coords[:, 0].max()) + 1, feats.shape[1], *shape)
    return dense.index_put((coords[:, 0].long()[:, None], torch.arange(feats.shape[1]), *place.t()[:, :, None]), feats)


def dense_convolution(coords: Tensor, feats: Tensor, kernel: Tensor, stride: int, dilation: int) -> Tensor:
    """torch's conv3d on the bounding box, rows at `coarse_cells(coords, stride)`; tensor stride 1."""
    size = round(len(kernel) ** (1 / 3))
    weight = kernel.reshape(size, size, size, *kernel.shape[1:]).permute(4, 3, 2, 1, 0)  # [z, y, x, in, out] reversed
    outputs = coarse_cells(coords, stride)
    low = coords[:, 1:].amin(dim=0).long() // stride * stride
    shape = (coords[:, 1:].amax(dim=0).long() - low + 1).tolist()
    before = -min(steps(size)) * dilation
    reach = dilation * size + stride
    dense = F.pad(_into_dense(coords, feats, low, shape, 1), (before, reach) * 3)
    result = F.conv3d(dense, weight, stride=stride, dilation=dilation)
    x, y, z = ((outputs[:, 1:] - low) // stride).long().t()
    return result[outputs[:, 0].long(), :, x, y, z]


def dense_transposed(coarse: Tensor, feats: Tensor, kernel: Tensor, stride: int, fine: Tensor) -> Tensor:
    """torch's conv_transpose3d from coordinates of tensor stride `stride`, read at the `fine` ones."""
    size = round(len(kernel) ** (1 / 3))
    weight = kernel.reshape(size, size, size, *kernel.shape[1:]).permute(3, 4, 2, 1, 0)
    low = coarse[:, 1:].amin(dim=0).long() - stride * size
    shape = ((coarse[:, 1:].amax(dim=0).long() - low) // stride + 1 + size).tolist()
    result = F.conv_transpose3d(_into_dense(coarse, feats, low, shape, stride), weight, stride=stride)
    x, y, z = (fine[:, 1:].long() - low - min(steps(size))).t()
    return result[fine[:, 0].long(), :, x, y, z]


def windows(coords: Tensor, outputs: Tensor, kernel_size: int, step: int = 1) -> list[list[int]]:
    """For each output the rows of the occupied voxels in its window; offsets are multiples of `step`."""
    place = {cell: row for row, cell in enumerate(cells(coords))}
    found = []
    for b, x, y, z in outputs.tolist():
        moved = ((b, x + i * step, y + j * step, z + k * step) for i, j, k in product(steps(kernel_size), repeat=3))
        found.append([place[cell] for cell in moved if cell in place])
    return found


def slow_pool(
    coords: Tensor, feats: Tensor, kernel_size: int, stride: int, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """`reduce` [n, C] -> [C] over the occupied voxels of each window, zeros where it is empty."""
    outputs = windows(coords, coarse_cells(coords, stride), kernel_size)
    return torch.stack([reduce(feats[rows]) if rows else feats[:0].sum(dim=0) for rows in outputs])


def slow_interpolation(coords: Tensor, feats: Tensor, stride: int, points: Tensor) -> Tensor:
    """Every voxel's tent function, 1 - distance / stride along each axis, summed over all voxels."""
    distance = (points[:, None, 1:] - coords[None, :, 1:]).abs() / stride
    weight = (1 - distance).clamp(min=0).prod(dim=2) * (points[:, None, 0] == coords[None, :, 0])
    return weight @ feats
