"""Semantic segmentation of the point clouds of labelled RGB-D frames, measured by mIoU over labelled voxels.

The papers' protocols (PointContrast, tables 4 and 7) segment whole scans; a frame's cloud is what a labelled RGB-D
source offers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import BadFrame
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.frames import cloud_of, labelled_frame
from geo_pretrain.training.data.labelled.clouds.voxels import batch_voxels, voxels_of
from geo_pretrain.training.data.labelled.image import LabelledSource
from geo_pretrain.training.evaluation.metrics import best_class, confusion_matrix
from geo_pretrain.training.finetune.task import SegmentationTask
from geo_pretrain.training.finetune_recipe import FinetuneRecipe
from geo_pretrain.training.networks3d import PretrainedInit3D, segmentation_srunet
from geo_pretrain.training.visualize.results import draw_predictions


class CloudSegmentation(SegmentationTask):
    """The task "segmentation3d"; see `FinetuneTask`."""

    counted = "voxel", "clouds"
    module: SRUNet
    contract: VoxelContract

    def __init__(
        self, recipe: FinetuneRecipe, start: PretrainedInit3D, classes: Sequence[str], contract: VoxelContract
    ) -> None:
        self.recipe, self.classes, self.contract = recipe, tuple(classes), contract
        network, transfer = start.unet(recipe.seed)
        self.module = segmentation_srunet(network, 1 + len(classes), seed=recipe.seed, transfer=transfer)

    def load(self, source: LabelledSource, id: str) -> LabelledCloud:
        """Load the cloud of one frame. Raises `BadFrame` for one without depth, `RecipeError` if no frame has any."""
        cloud = cloud_of(labelled_frame(source, id, self.recipe.data.size), id)
        if not len(cloud.points):
            raise BadFrame(id, "no pixel has a valid depth")
        return cloud

    def sample(self, item: LabelledCloud, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates, features and labels of the voxels, after an upright rotation."""
        return voxels_of(item, self.contract, generator)

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        return {"clouds": samples}

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy over the labelled voxels of all clouds together."""
        return {"segmentation": cloud_loss(self.module, batch["clouds"])}

    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        """All layers but the last."""
        return (p for name, p in self.module.named_parameters() if not name.startswith("final."))

    def backbone(self) -> nn.Module:
        return self.module

    def confusion(self, source: LabelledSource, ids: Sequence[str]) -> np.ndarray:
        """Count the labelled voxels of these frames' unaugmented clouds by true and predicted class."""
        found = [cloud_confusion(self.module, self.contract, self.load(source, name)) for name in ids]
        return np.sum(found, axis=0)

    @torch.no_grad()
    def draw(self, source: LabelledSource, ids: Sequence[str], path: Path) -> None:
        """Draw one row per frame: its image, its labels, and the predicted class of each pixel's voxel."""
        self.module.eval()
        rows = []
        for name in ids:
            frame = labelled_frame(source, name, self.recipe.data.size)
            cloud = cloud_of(frame, name)
            points = torch.from_numpy(cloud.points)
            colors = torch.from_numpy(cloud.colors) if self.contract.given_channels else None
            inverse = self.contract.transforms()(points, colors).inverse
            x, _ = batch_voxels([voxels_of(cloud, self.contract)], next(self.module.parameters()).device)
            guess = np.zeros(frame.depth.shape, np.int16)
            guess[frame.depth > 0] = best_class(self.module(x).feats.float()).cpu()[inverse].numpy()
            rows.append((frame.color, np.asarray(frame.semantic), [guess]))
        draw_predictions(rows, [self.recipe.network.kind], self.classes, path)

    def protocol_deviations(self) -> dict[str, str]:
        return {"scenes": "the cloud of one labelled frame at a time (published: whole scans)"}


def cloud_loss(network: nn.Module, voxels: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Cross-entropy over all labelled voxels (from `voxels_of`) of several clouds; 0 without labels."""
    x, labels = batch_voxels(voxels, voxels[0][1].device)
    logits: Tensor = network(x).feats.float()
    known = labels > 0  # a mean over no voxel at all would be NaN
    return F.cross_entropy(logits[known], labels[known]) if known.any() else logits.sum() * 0


@torch.no_grad()
def cloud_confusion(network: nn.Module, contract: VoxelContract, cloud: LabelledCloud) -> np.ndarray:
    """The confusion matrix over the labelled voxels of an unaugmented cloud, rows = truth: int64 [1 + C, 1 + C]."""
    network.eval()
    x, truth = batch_voxels([voxels_of(cloud, contract)], next(network.parameters()).device)
    logits: Tensor = network(x).feats.float()
    return confusion_matrix(truth, best_class(logits), logits.shape[1])
