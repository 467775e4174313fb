"""The demo's fine-tuning for semantic segmentation, in memory (Pri3D's protocol, table 1; recipes: finetune.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import DataError
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.data.samples.sampler import sample_seed
from geo_pretrain.training.evaluation.metrics import best_class, confusion_matrix, mean_iou
from geo_pretrain.training.recipe import OptimSpec
from geo_pretrain.training.schedule import learning_rate, pri3d_bn_momentum, set_bn_momentum


@dataclass(frozen=True)
class FinetuneSpec:
    """The budget of a fine-tuning run, the same for every start."""

    steps: int = 100
    batch: int = 4
    lr: float = 0.05
    flip: bool = True  # horizontal, p 0.5


@dataclass(frozen=True)
class SegmentationResult:
    """mIoU over the classes present in the ground truth, and the confusion matrix behind it."""

    miou: float
    confusion: np.ndarray  # int64 [classes, classes], rows = truth; class 0 (unlabeled) is left out of mIoU
    losses: tuple[float, ...]


def finetune(
    network: nn.Module,
    contract: ImageContract,
    train: Sequence[Frame],
    val: Sequence[Frame],
    spec: FinetuneSpec,
    *,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> SegmentationResult:
    """Train `network` (logits [B, classes, H/2, W/2]) on labelled frames and measure it on others.

    SGD, momentum 0.9, dampening 0.1, poly schedule, BN momentum of Pri3D, cross-entropy on logits brought to label
    size (bilinear, align_corners), class 0 ignored. The seed draws batches and flips. The last state is the one
    measured (the released protocol reports the best epoch on the validation set, which flatters).
    """
    images, labels = _stack(train, contract)
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(sample_seed(seed, 0, 0))
    optim = OptimSpec(batch=spec.batch, lr=spec.lr, momentum=0.9, dampening=0.1, steps=spec.steps)
    optimizer = torch.optim.SGD(network.parameters(), lr=spec.lr, momentum=optim.momentum, dampening=optim.dampening)
    network.train()
    losses = []
    order = torch.empty(0, dtype=torch.long)
    for step in range(spec.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, spec.steps)
        set_bn_momentum(network, pri3d_bn_momentum(max(step - 1, 0)))
        while len(order) < spec.batch:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        chosen, order = order[: spec.batch], order[spec.batch :]
        x, y = images[chosen], labels[chosen]
        if spec.flip:
            flips = torch.rand(spec.batch, generator=generator) < 0.5
            x = torch.where(flips[:, None, None, None], x.flip(-1), x)
            y = torch.where(flips[:, None, None], y.flip(-1), y)
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(_logits(network, x, y.shape[-2:]), y, ignore_index=0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, losses[-1])
    confusion = evaluate(network, contract, val)
    return SegmentationResult(mean_iou(confusion), confusion, tuple(losses))


@torch.no_grad()
def evaluate(network: nn.Module, contract: ImageContract, frames: Sequence[Frame], batch: int = 16) -> np.ndarray:
    """The confusion matrix of a network over labelled frames, rows = truth: int64 [classes, classes]."""
    network.eval()
    images, labels = _stack(frames, contract)
    device = next(network.parameters()).device
    total: np.ndarray | None = None
    for start in range(0, len(images), batch):
        truth = labels[start : start + batch]
        logits = _logits(network, images[start : start + batch].to(device), truth.shape[-2:]).cpu()
        matrix = confusion_matrix(truth, best_class(logits), logits.shape[1])
        total = matrix if total is None else total + matrix
    if total is None:
        raise DataError("No labelled frame to evaluate on.")
    return total


@torch.no_grad()
def predict(network: nn.Module, contract: ImageContract, frame: Frame) -> np.ndarray:
    """Class ids of one frame at its own size: int64 [H, W]; class 0 (unlabeled) is never predicted."""
    network.eval()
    image = _stack([frame], contract)[0].to(next(network.parameters()).device)
    return best_class(_logits(network, image, frame.depth.shape))[0].cpu().numpy()


def _logits(network: nn.Module, images: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(network(images), size=tuple(size), mode="bilinear", align_corners=True)


def _stack(frames: Sequence[Frame], contract: ImageContract) -> tuple[Tensor, Tensor]:
    """Normalized images [N, 3, H, W] and labels [N, H, W] of frames of one size."""
    transform = contract.transforms(resize=False)
    labels = []
    for frame in frames:
        if frame.semantic is None:
            raise DataError(f"Frame {frame.scene}/{frame.id} has no labels; segmentation needs a labelled source.")
        labels.append(torch.from_numpy(frame.semantic.astype(np.int64)))
    return torch.stack([transform(f.color) for f in frames]), torch.stack(labels)
