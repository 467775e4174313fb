"""Elastic distortion of point clouds: a smooth random displacement, as CSC's loaders draw it.

From the augmentations of SparseConvNet and MinkowskiEngine's examples, which the downstream code of PointContrast and
CSC (Hou et al., CVPR 2021) shares: noise on a grid, blurred, interpolated at the points.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLURS = 2  # rounds of a 3-tap box along each axis


def elastic_grid(points: Tensor, granularity: float) -> tuple[int, int, int]:
    """Nodes of the noise grid for points [N, 3] (m) at distances of `granularity` (m): one beyond either end."""
    extent = points.amax(dim=0) - points.amin(dim=0)
    x, y, z = (torch.floor(extent.double() / granularity).long() + 3).tolist()
    return x, y, z


def elastic_distortion(points: Tensor, noise: Tensor, granularity: float, magnitude: float) -> Tensor:
    """Points [N, 3] (m), each moved by `magnitude` (m) times the blurred noise at its place.

    Args:
        noise: [X, Y, Z, 3] of `elastic_grid`'s size, standard normal. Node (1, 1, 1) lies at the lowest corner of the
            points, the next ones `granularity` (m) apart. What is blurred in from outside the grid is 0.
    """
    smooth = noise.permute(3, 0, 1, 2)[:, None]  # the three components are blurred like a batch
    for _ in range(BLURS):
        for axis in range(3):
            shape = [1, 1, 1, 1, 1]
            shape[2 + axis] = 3
            padding = [0, 0, 0]
            padding[axis] = 1
            smooth = F.conv3d(smooth, smooth.new_full(shape, 1 / 3), padding=padding)
    smooth = smooth[:, 0].permute(1, 2, 3, 0)
    place = (points - points.amin(dim=0)).to(noise.dtype) / granularity + 1
    low = place.floor().long()
    # a point at the far end may round up onto the last node
    low = torch.minimum(low, low.new_tensor(noise.shape[:3]) - 2)
    part = place - low
    moved = torch.zeros_like(place)
    for corner in range(8):
        step = low.new_tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1])
        weight = torch.where(step.bool(), part, 1 - part).prod(dim=1, keepdim=True)
        x, y, z = (low + step).unbind(1)
        moved += weight * smooth[x, y, z]
    return points + (magnitude * moved).to(points.dtype)
