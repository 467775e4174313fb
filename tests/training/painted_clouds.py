"""Clouds of boxes whose colors tell their classes, and networks for them: what tests of 3D labels share."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.contract import VoxelContract
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud

ROOMS = {"scenes": 2, "val_scenes": 1, "frames": 3, "labelled": 2, "width": 64, "height": 64}
COLORS = VoxelContract(0.1, ("R", "G", "B"), offset=-0.5)
ONES = VoxelContract(0.1, ("one",) * 3)
PAINT = np.array([[0, 0, 0], [250, 20, 20], [20, 250, 20], [20, 20, 250]], np.uint8)


def tiny_unet(**options):
    torch.manual_seed(5)
    return SRUNet("18A", width=8, **options)


def painted(number, *, classes=(1, 2, 3), count=400):
    """A box of points whose color tells their class; a part has no label."""
    generator = np.random.default_rng(number)
    points = generator.uniform(-1, 1, (count, 3)).astype(np.float32)
    labels = np.array(classes)[(np.floor((points[:, 0] + 1) * 5).astype(int)) % len(classes)]
    colors = PAINT[labels]
    return LabelledCloud(f"cloud/{number}", points, colors, np.where(points[:, 2] > 0.8, 0, labels).astype(np.int64))


class Given(nn.Module):
    """A network that gives its input features, or with `constant` nothing but ones."""

    def __init__(self, constant=False):
        super().__init__()
        self.unused, self.constant = nn.Parameter(torch.zeros(1)), constant

    def forward(self, x):
        return x.with_feats(torch.ones_like(x.feats) if self.constant else x.feats)
