"""Shared parts of tasks with a sparse 3D network: its contract, a forward pass over a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geo_pretrain.contract import VoxelContract
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.samples.clouds import Features
from geo_pretrain.training.recipe import UNet3DSpec

CHANNELS = {"ones": ("one", "one", "one"), "rgb": ("R", "G", "B")}


def voxel_contract(spec: UNet3DSpec, features: Features) -> VoxelContract:
    """The input contract of a network trained on ones, or on colors in [-0.5, 0.5]."""
    offset = -0.5 if features == "rgb" else 0.0
    return VoxelContract(voxel_size=spec.voxel_size, channels=CHANNELS[features], scale=1.0, offset=offset)


def encode(network: nn.Module, coords: Tensor, feats: Tensor, *, low_precision: bool) -> Tensor:
    """Run a sparse network over a batch: float32 [N, C], row by row of `coords` [N, 4].

    Batch elements without a voxel may be missing from the batch numbers in `coords`.
    """
    present, number = torch.unique(coords[:, 0], return_inverse=True)
    if len(present) <= int(coords[:, 0].max()):
        coords = torch.cat([number[:, None].to(coords.dtype), coords[:, 1:]], dim=1)
    with torch.autocast(coords.device.type, torch.bfloat16, enabled=low_precision):
        features: Tensor = network(SparseTensor(coords, feats)).feats
    return features.float()  # losses are computed in full precision
