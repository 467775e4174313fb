"""Schedules: learning rate and BatchNorm momentum as functions of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from geo_pretrain.training.recipe import OptimSpec

if TYPE_CHECKING:
    from torch import nn

BN_FLOOR = 0.001


def learning_rate(spec: OptimSpec, step: int, steps: int) -> float:
    """Learning rate at step 0 <= `step` < `steps`."""
    if spec.schedule == "cosine":
        return 0.5 * spec.lr * (1 + math.cos(math.pi * step / steps))
    if spec.schedule == "cosine_epoch" and spec.epochs is not None:
        epoch = int(step * spec.epochs / steps)
        return 0.5 * spec.lr * (1 + math.cos(math.pi * epoch / spec.epochs))
    if spec.schedule == "poly":
        return spec.lr * (1 - step / (steps + 1)) ** spec.power
    if spec.schedule == "exponential":
        extra = 1 if spec.first_decay and step > 0 else 0
        return float(spec.lr * spec.gamma ** (step // spec.every + extra))
    return spec.lr


def pri3d_bn_momentum(step: int) -> float:
    """BatchNorm momentum of Pri3D: starts at 0.5, halved every 20 optimizer steps, at least 0.001."""
    return max(0.5 * 0.5 ** (step // 20), BN_FLOOR)


def votenet_bn_momentum(epoch: int, every: int = 20) -> float:
    """BatchNorm momentum of VoteNet: 0.5, halved after every `every` epochs, at least 0.001."""
    return max(0.5 * 0.5 ** (epoch // every), BN_FLOOR)


def set_bn_momentum(module: nn.Module, momentum: float) -> None:
    """Set the momentum of every BatchNorm layer of a network."""
    from torch.nn.modules.batchnorm import _BatchNorm  # here, so that recipes can be read without torch

    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = momentum
