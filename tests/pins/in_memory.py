"""Fine-tuning that is called from Python, without a folder: point clouds, and the demo's segmentation.

The only module here that imports what a refactoring may move: change the imports, nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.finetune.in_memory import (
    FinetuneSpec,
    PointsSpec,
    evaluate_clouds,
    finetune_clouds,
    finetune_frames,
)
from geo_pretrain.training.networks import segmentation_unet
from geo_pretrain.training.networks3d import segmentation_srunet

PAINT = np.array([[0, 0, 0], [250, 20, 20], [20, 250, 20], [20, 20, 250]], np.uint8)


def cloud(number: int) -> LabelledCloud:
    """A box of points whose color tells their class; a part has no label."""
    generator = np.random.default_rng(number)
    points = generator.uniform(-1, 1, (400, 3)).astype(np.float32)
    labels = 1 + np.floor((points[:, 0] + 1) * 5).astype(int) % 3
    return LabelledCloud(f"cloud/{number}", points, PAINT[labels], np.where(points[:, 2] > 0.8, 0, labels))


def points() -> dict[str, Any]:
    """Losses and confusion of a short run on painted clouds."""
    contract = VoxelContract(0.1, ("R", "G", "B"), offset=-0.5)
    torch.manual_seed(5)
    network = segmentation_srunet(SRUNet("18A", width=8), 4, seed=0)
    clouds = [cloud(number) for number in range(5)]
    spec = PointsSpec(steps=6, batch=3, lr=0.02, bn_momentum=0.5)
    result = finetune_clouds(network, contract, clouds[:3], clouds[3:], spec, seed=1)
    confusion = np.asarray(evaluate_clouds(network, contract, clouds[3:]))
    return {"losses": list(result.losses), "miou": result.miou, "confusion": confusion.astype(float).tolist()}


def frame(number: int) -> Frame:
    """Colored squares on a gray ground: class 1 is the ground, 2 red, 3 green, 0 a strip without label."""
    generator = np.random.default_rng(number)
    color = generator.normal(128, 10, (48, 64, 3))
    labels = np.ones((48, 64), np.int16)
    for label, rgb in ((2, (220, 40, 40)), (3, (40, 220, 40))):
        row, column = generator.integers(0, 24), generator.integers(0, 40)
        color[row : row + 20, column : column + 20] = rgb
        labels[row : row + 20, column : column + 20] = label
    labels[:2] = 0
    depth = np.ones((48, 64), np.float32)
    return Frame("toy", str(number), color.clip(0, 255).astype(np.uint8), depth, np.eye(3), np.eye(4), labels)


def segmentation() -> dict[str, Any]:
    """Losses and mIoU of a short run on painted frames."""
    torch.manual_seed(5)
    network = segmentation_unet(ResNetUNet(18, width=8), 4, seed=0, transfer="none")
    frames = [frame(number) for number in range(8)]
    result = finetune_frames(
        network,
        ImageContract(),
        frames[:5],
        frames[5:],
        FinetuneSpec(steps=6, batch=2, lr=0.01, bn_momentum=0.5),
        seed=1,
    )
    return {"losses": list(result.losses), "miou": result.miou}
