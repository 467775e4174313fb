"""Semantic segmentation of point clouds, measured by mIoU over voxels and over points.

Whole clouds as in PointContrast (tables 4, 6, 7) and CSC; the clouds of labelled RGB-D frames are measured over voxels
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.frames import cloud_of, labelled_frame
from geo_pretrain.training.data.labelled.clouds.voxels import batch_voxels, voxels_of
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.data.samples.whole_clouds import CloudSample, voxel_of_points
from geo_pretrain.training.distributed import ALONE, World
from geo_pretrain.training.evaluation.metrics import (
    best_class,
    class_accuracy,
    class_iou,
    confusion_matrix,
    mean_iou,
    pixel_accuracy,
)
from geo_pretrain.training.evaluation.predictions import PointLabels
from geo_pretrain.training.finetune.clouds import CloudTask
from geo_pretrain.training.finetune.task import Evaluation
from geo_pretrain.training.losses import lovasz_softmax
from geo_pretrain.training.networks3d import segmentation_srunet
from geo_pretrain.training.visualize.results import draw_predictions

LEVELS = ("voxel", "point")


class CloudSegmentation(CloudTask):
    """The task "segmentation3d"; see `FinetuneTask`."""

    metric = "miou"
    module: SRUNet

    def build(self, start: SRUNet, transfer: bool) -> SRUNet:
        """A U-Net with a logit for each class after the first one, which is that of unlabelled points."""
        return segmentation_srunet(start, 1 + len(self.classes), seed=self.recipe.seed, transfer=transfer)

    def load(self, source: LabelledData, id: str) -> LabelledCloud:
        """Load a cloud. Raises `BadFrame` for one without points, `RecipeError` for frames without depth."""
        if not self.recipe.on_frames():
            return super().load(source, id)
        cloud = cloud_of(labelled_frame(cast(Any, source), id, self.recipe.data.size), id)
        if not len(cloud.points):
            raise BadFrame(id, "no pixel has a valid depth")
        return cloud

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy over the labelled voxels of all clouds together, and where the recipe says so Lovasz's loss."""
        logits, labels = self.forward(batch["coords"], batch["feats"]), batch["labels"]
        if self.recipe.on_frames():
            losses = {"segmentation": labelled_loss(logits, labels)}
        else:
            losses = {"segmentation": labelled_loss(logits[:, 1:], labels, first=1)}
        if self.recipe.loss.lovasz:
            known = labels > 0
            losses["lovasz"] = self.recipe.loss.lovasz * lovasz_softmax(logits[known, 1:], labels[known] - 1)
        return losses

    @torch.no_grad()
    def logits(self, sample: CloudSample) -> Tensor:
        """The logits of each voxel of a cloud, float32 [M, 1 + C] on the CPU; the first is of no class."""
        self.module.eval()
        return self.forward(sample.coords, sample.feats).cpu()

    def predict(self, items: Sequence[LabelledCloud]) -> list[PointLabels]:
        """Predict the class of each point of clouds, whose labels are not looked at."""
        found = []
        for cloud in items:
            sample = self.evaluation_sample(cloud)
            logits = self.logits(sample)
            labels = best_class(logits)
            scores = logits[:, 1:].softmax(1).gather(1, labels[:, None] - 1)[:, 0]
            voxel = voxel_of_points(sample, cloud)
            found.append(PointLabels(labels[voxel].numpy(), scores[voxel].numpy()))
        return found

    def evaluate(self, source: LabelledData, ids: Sequence[str], world: World = ALONE) -> Evaluation:
        """Add the confusion matrices of all clouds and processes, over voxels and over points.

        The scores are those of the level that the recipe names; the other level's are beside them.
        """
        own = np.zeros((2, 1 + len(self.classes), 1 + len(self.classes)), np.int64)
        for _, confusions in self.measured(source, ids, world, self.confusions):
            own += confusions
        totals = np.sum(cast(list[np.ndarray], world.all_gather_object(own)), axis=0)
        skipped = self.all_skipped(source, ids, world)
        if not totals[0].sum():
            raise DataError(f"No labelled voxel in {len(ids)} clouds of {source.name!r}, split {source.split!r}.")
        if self.recipe.on_frames():
            return self._measured(totals[0], len(ids))
        level = LEVELS.index(self.recipe.evaluate.level.rstrip("s"))
        scores = {"macc": float(np.nanmean(class_accuracy(totals[level])))}
        for name, total in zip(LEVELS, totals, strict=True):
            scores[f"{name}_miou"] = self._mean(total)
            scores[f"{name}_macc"] = float(np.nanmean(class_accuracy(total)))
        found = self._measured(totals[level], len(ids))
        accuracy = {name: _share(v) for name, v in zip(self.classes, class_accuracy(totals[level]), strict=True)}
        details = {"level": self.recipe.evaluate.level, "other_confusion": totals[1 - level].tolist()}
        return Evaluation(
            found.scores | scores,
            found.per_class | {"accuracy": accuracy},
            found.details | details | {"skipped": skipped},
        )

    def _measured(self, total: np.ndarray, clouds: int) -> Evaluation:
        iou = {name: _share(value) for name, value in zip(self.classes, class_iou(total), strict=True)}
        scores = {"miou": self._mean(total), "accuracy": pixel_accuracy(total)}
        return Evaluation(scores, {"iou": iou}, {"confusion": total.tolist(), "images": clouds})

    def _mean(self, total: np.ndarray) -> float:
        """Mean IoU over the classes in the truth; as released, over those in truth or prediction."""
        if self.recipe.match_released_code and not self.recipe.on_frames():
            return float(np.nanmean(class_iou(total)))
        return mean_iou(total)

    def confusions(self, cloud: LabelledCloud) -> np.ndarray:
        """Count the labelled voxels and the labelled points of a cloud, rows = truth: int64 [2, 1 + C, 1 + C]."""
        sample = self.evaluation_sample(cloud)
        if sample.labels is None or cloud.labels is None:
            raise DataError(f"Cloud {cloud.id!r} has no labels of points.")
        guess, classes = best_class(self.logits(sample)), 1 + len(self.classes)
        truth = torch.from_numpy(cloud.labels)[sample.chosen]
        by_point = confusion_matrix(truth, guess[sample.inverse], classes)
        return np.stack([confusion_matrix(sample.labels, guess, classes), by_point])

    def draw(self, source: LabelledData, ids: Sequence[str], path: Path) -> None:
        """Draw one row per cloud; of frames: the image, its labels, and the predicted class of each pixel's voxel."""
        if not self.recipe.on_frames():
            super().draw(source, ids, path)
            return
        rows = []
        for name in ids:
            frame = labelled_frame(cast(Any, source), name, self.recipe.data.size)
            sample = self.evaluation_sample(cloud_of(frame, name))
            guess = np.zeros(frame.depth.shape, np.int16)
            guess[frame.depth > 0] = best_class(self.logits(sample))[sample.inverse].numpy()
            rows.append((frame.color, np.asarray(frame.semantic), [guess]))
        draw_predictions(rows, [self.recipe.network.kind], self.classes, path)

    def protocol_deviations(self) -> dict[str, str]:
        if self.recipe.on_frames():
            return {"scenes": "the cloud of one labelled frame at a time (published: whole scans)"}
        exact = self.recipe.match_released_code
        mean = "in truth or prediction (as published)" if exact else "in the truth (mended)"
        return {"mIoU": f"over {self.recipe.evaluate.level}, the mean over classes {mean}", "input": self.inputs.choice}


def _share(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def labelled_loss(logits: Tensor, labels: Tensor, first: int = 0) -> Tensor:
    """Cross-entropy of logits [N, C] over the labelled voxels; 0 without labels. `first`: the label of column 0."""
    known = labels > 0  # a mean over no voxel at all would be NaN
    return F.cross_entropy(logits[known], labels[known] - first) if known.any() else logits.sum() * 0


def cloud_loss(network: nn.Module, voxels: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Cross-entropy over all labelled voxels (from `voxels_of`) of several clouds; 0 without labels."""
    x, labels = batch_voxels(voxels, voxels[0][1].device)
    return labelled_loss(network(x).feats.float(), labels)


@torch.no_grad()
def cloud_confusion(network: nn.Module, contract: VoxelContract, cloud: LabelledCloud) -> np.ndarray:
    """The confusion matrix over the labelled voxels of an unaugmented cloud, rows = truth: int64 [1 + C, 1 + C]."""
    network.eval()
    x, truth = batch_voxels([voxels_of(cloud, contract)], next(network.parameters()).device)
    logits: Tensor = network(x).feats.float()
    return confusion_matrix(truth, best_class(logits), logits.shape[1])
