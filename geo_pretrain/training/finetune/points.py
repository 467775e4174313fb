"""Fine-tuning of 3D semantic segmentation on the clouds of labelled RGB-D frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import DataError
from geo_pretrain.training.data.labelled.clouds import LabelledCloud, batch_voxels, voxels_of
from geo_pretrain.training.data.samples.sampler import sample_seed
from geo_pretrain.training.evaluation.metrics import best_class, confusion_matrix, mean_iou
from geo_pretrain.training.finetune.in_memory import SegmentationResult
from geo_pretrain.training.recipe import OptimSpec
from geo_pretrain.training.schedule import learning_rate, set_bn_momentum


@dataclass(frozen=True)
class PointsSpec:
    """The budget of a 3D fine-tuning run, the same for every start; SGD as in PointContrast's segmentation."""

    steps: int = 100
    batch: int = 4  # clouds
    lr: float = 0.1
    momentum: float = 0.9
    dampening: float = 0.1
    weight_decay: float = 1e-4
    bn_momentum: float = 0.1  # the released 0.02 forgets the start's statistics in hundreds of steps only


def segmentation_srunet(start: SRUNet, classes: int, *, seed: int, transfer: bool = True) -> SRUNet:
    """A U-Net shaped like `start` whose last layer gives `classes` logits.

    All other weights are those of `start` or, without `transfer`, drawn by `seed`, like the last layer: the same ones
    whatever is transferred.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SRUNet(
            start.variant,
            in_chans=start.in_chans,
            out_chans=classes,
            width=start.width,
            stem_kernel=start.conv0p1s1.kernel_size,
            planes=start.planes,
            layers=start.layers,
        )
    if transfer:
        kept = {key: value for key, value in start.state_dict().items() if not key.startswith("final.")}
        network.load_state_dict(network.state_dict() | kept)
    return network


def finetune_points(
    network: nn.Module,
    contract: VoxelContract,
    train: Sequence[LabelledCloud],
    val: Sequence[LabelledCloud],
    spec: PointsSpec = PointsSpec(),
    *,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> SegmentationResult:
    """Train `network` (logits [N, 1 + C] of voxels) on labelled clouds and measure it on others, as they lie.

    SGD, poly schedule, cross-entropy over the labelled voxels of a batch, the last state measured. In training every
    cloud is turned upright about its centroid (any angle about z, +-pi/64 about x and y). The seed draws order and
    turns.
    """
    if not train:
        raise DataError("No labelled cloud to train on.")
    generator = torch.Generator().manual_seed(sample_seed(seed, 0, 0))
    optim = OptimSpec(batch=spec.batch, lr=spec.lr, steps=spec.steps)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=spec.lr,
        momentum=spec.momentum,
        dampening=spec.dampening,
        weight_decay=spec.weight_decay,
    )
    device = next(network.parameters()).device
    network.train()
    set_bn_momentum(network, spec.bn_momentum)
    losses = []
    order = torch.empty(0, dtype=torch.long)
    for step in range(spec.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, spec.steps)
        while len(order) < spec.batch:
            order = torch.cat([order, torch.randperm(len(train), generator=generator)])
        chosen, order = order[: spec.batch].tolist(), order[spec.batch :]
        x, y = batch_voxels([voxels_of(train[k], contract, generator) for k in chosen], device)
        optimizer.zero_grad(set_to_none=True)
        logits: Tensor = network(x).feats.float()
        known = y > 0  # a mean over no voxel at all would be NaN
        loss = F.cross_entropy(logits[known], y[known]) if known.any() else logits.sum() * 0
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, losses[-1])
    confusion = evaluate_points(network, contract, val)
    return SegmentationResult(mean_iou(confusion), confusion, tuple(losses))


@torch.no_grad()
def evaluate_points(network: nn.Module, contract: VoxelContract, clouds: Sequence[LabelledCloud]) -> np.ndarray:
    """The confusion matrix of a network over the labelled voxels of clouds as they lie: int64 [1 + C, 1 + C]."""
    network.eval()
    device = next(network.parameters()).device
    total: np.ndarray | None = None
    for cloud in clouds:
        x, truth = batch_voxels([voxels_of(cloud, contract)], device)
        logits: Tensor = network(x).feats.float()
        matrix = confusion_matrix(truth, best_class(logits), logits.shape[1])
        total = matrix if total is None else total + matrix
    if total is None or not total.sum():
        raise DataError("No labelled cloud to evaluate on.")
    return total
