"""Semantic segmentation of the clouds of labelled RGB-D frames: the network, its loss, and its confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.contract import VoxelContract
from geo_pretrain.training.data.labelled.clouds import LabelledCloud, batch_voxels, voxels_of
from geo_pretrain.training.evaluation.metrics import best_class, confusion_matrix


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


def cloud_loss(network: nn.Module, voxels: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Cross-entropy over the labelled voxels (from `voxels_of`) of several clouds together; 0 if none has a label."""
    x, labels = batch_voxels(voxels, voxels[0][1].device)
    logits: Tensor = network(x).feats.float()
    known = labels > 0  # a mean over no voxel at all would be NaN
    return F.cross_entropy(logits[known], labels[known]) if known.any() else logits.sum() * 0


@torch.no_grad()
def cloud_confusion(network: nn.Module, contract: VoxelContract, cloud: LabelledCloud) -> np.ndarray:
    """The confusion matrix over the labelled voxels of a cloud as it lies, rows = truth: int64 [1 + C, 1 + C]."""
    network.eval()
    x, truth = batch_voxels([voxels_of(cloud, contract)], next(network.parameters()).device)
    logits: Tensor = network(x).feats.float()
    return confusion_matrix(truth, best_class(logits), logits.shape[1])
