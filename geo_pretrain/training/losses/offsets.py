"""Losses of instance segmentation in 3D: each voxel points from where it is to the center of its instance.

Jiang et al., "PointGroup", CVPR 2020, as CSC's released code uses it. Written from a description. A mean over a mask
divides by its size plus 1e-6, so that a batch without instances has loss 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def center_offsets(coords: Tensor, instances: Tensor, voxel_size: float) -> Tensor:
    """The way from each voxel to its instance's center, the mean of the instance's voxels: float32 [N, 3] m.

    Args:
        coords: integers [N, 4], rows (cloud, x, y, z). instances: int64 [N], numbers above 0 that hold within a cloud;
            0 = of no instance, whose offset is 0.
        voxel_size: m.

    Example:
        >>> coords = torch.tensor([[0, 1, 0, 0], [0, 3, 0, 0], [1, 7, 0, 0], [1, 9, 9, 9]])
        >>> center_offsets(coords, torch.tensor([1, 1, 1, 0]), voxel_size=0.5)[:, 0]
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    cells = coords.long()
    keys = cells[:, 0] * (1 + int(instances.max())) + instances if len(instances) else instances
    _, number, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    totals = torch.zeros(len(counts), 3, dtype=torch.int64, device=cells.device)  # exact, whatever the order
    centers = totals.index_add(0, number, cells[:, 1:]).double() / counts[:, None]
    offsets = (centers[number] - cells[:, 1:]) * voxel_size
    return torch.where(instances[:, None] > 0, offsets, 0).float()


def offset_loss(predicted: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
    """L1 distance of predicted and true offsets, summed over x, y, z and averaged over the voxels of `mask`.

    Args:
        predicted, offsets: [N, 3] m. mask: bool [N].

    Example:
        >>> predicted, true = torch.ones(2, 3), torch.zeros(2, 3)
        >>> offset_loss(predicted, true, torch.tensor([True, False])).round(decimals=4)
        tensor(3.)
    """
    return _masked_mean((predicted - offsets).abs().sum(1), mask)


def direction_loss(predicted: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
    """The negative cosine of the angle between predicted and true offsets, averaged over the voxels of `mask`.

    Norms are those of the vectors plus 1e-8: a voxel in its instance's center counts 0.

    Args:
        predicted, offsets: [N, 3] m. mask: bool [N].

    Example:
        >>> right, back = torch.tensor([[2.0, 0, 0]]), torch.tensor([[-1.0, 0, 0]])
        >>> direction_loss(right, back, torch.tensor([True])).round(decimals=4)
        tensor(1.)
    """
    return _masked_mean(-(_unit(predicted) * _unit(offsets)).sum(1), mask)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / (vectors.norm(dim=1, keepdim=True) + 1e-8)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum() / (mask.sum() + 1e-6)
