"""Segmentation of single objects into parts, measured by the IoU of the parts of each object's category.

ShapeNetPart as in PointContrast (table 3), of which no code is released; the evaluation is that of PointNet++.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.data.samples.whole_clouds import CloudSample, voxel_of_points
from geo_pretrain.training.distributed import ALONE, World
from geo_pretrain.training.evaluation.objects import (
    best_parts,
    likeliest_category,
    mean_shape_iou,
    part_table,
    shape_iou,
)
from geo_pretrain.training.evaluation.predictions import PointLabels
from geo_pretrain.training.finetune.objects import ObjectTask
from geo_pretrain.training.finetune.segmentation3d import labelled_loss
from geo_pretrain.training.finetune.task import Evaluation
from geo_pretrain.training.networks3d import segmentation_srunet


class Parts3D(ObjectTask):
    """The task "parts3d"; see `FinetuneTask`. Classes are named "category/part".

    Scores: instance_miou, the mean over all objects, which picks the best and goes into tables; category_miou, the mean
    over categories. PointContrast does not say which of them it reports; its numbers are at the level of the first.
    An object's category is part of the input: only its parts are predicted. The points that are measured are those
    that `data.cloud.points` draws, each with the answer of its voxel.
    """

    metric = "instance_miou"
    module: SRUNet

    def build(self, start: SRUNet, transfer: bool) -> SRUNet:
        """A U-Net with a logit for each part of all categories."""
        self.table = part_table(self.classes)
        return segmentation_srunet(start, len(self.classes), seed=self.recipe.seed, transfer=transfer)

    def load(self, source: LabelledData, id: str) -> LabelledCloud:
        """Load an object. Raises `BadFrame` if it is unusable, of no category, or no part of it is labelled."""
        cloud = super().load(source, id)
        if cloud.labels is None or not (cloud.labels > 0).any():
            raise BadFrame(id, "no point of the object is labelled with a part")
        return cloud

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy over the labelled voxels of all objects together, among the parts of all categories."""
        return {"parts": labelled_loss(self.forward(batch["coords"], batch["feats"]), batch["labels"], first=1)}

    @torch.no_grad()
    def logits(self, clouds: Sequence[LabelledCloud]) -> list[tuple[CloudSample, Tensor]]:
        """The voxels of each object, and their logits of all parts, float32 [M, P] on the CPU."""
        self.module.eval()
        samples, batch = self.voxelized(clouds)
        rows = self.forward(batch["coords"], batch["feats"]).cpu().split(batch["counts"])
        return list(zip(samples, rows, strict=True))

    def evaluate(self, source: LabelledData, ids: Sequence[str], world: World = ALONE) -> Evaluation:
        """Measure the IoU of each object, and average over objects and over categories."""
        own: dict[str, tuple[int, float]] = {}
        for objects in self.shared_batches(source, ids, world):
            answers = self.logits([cloud for _, cloud in objects])
            for (id, cloud), (sample, logits) in zip(objects, answers, strict=True):
                own[id] = cast(int, cloud.category), self.iou(cloud, sample, logits)
        gathered = cast(list[dict[str, tuple[int, float]]], world.all_gather_object(own))
        skipped = self.all_skipped(source, ids, world)
        measured = {id: value for part in gathered for id, value in part.items()}
        mean, of_category = mean_shape_iou([measured[id] for id in ids if id in measured], self.table)
        present = [value for value in of_category.values() if value is not None]
        scores = {"instance_miou": mean, "category_miou": float(np.mean(present))}
        details = {"objects": len(measured), "images": len(ids), "skipped": skipped}
        return Evaluation(scores, {"iou": of_category}, details)

    def iou(self, cloud: LabelledCloud, sample: CloudSample, logits: Tensor) -> float:
        """The mean IoU of the parts of an object's category over the points of its sample."""
        if cloud.labels is None or cloud.category is None:
            raise DataError(f"Object {cloud.id!r} has no labels of parts.")
        parts = self.table.of(cloud.category)
        found = best_parts(logits, parts)[sample.inverse]
        return shape_iou(cloud.labels[sample.chosen.numpy()], found.numpy(), parts)

    def predict(self, items: Sequence[LabelledCloud]) -> list[PointLabels]:
        """Predict the part of each point of objects, whose labels are not looked at.

        An object without a category is taken for one of that whose parts are likeliest over all of its voxels.
        """
        found = []
        for clouds in self.in_batches(items):
            for cloud, (sample, logits) in zip(clouds, self.logits(clouds), strict=True):
                category = cloud.category or likeliest_category(logits, self.table)
                parts = self.table.of(category)
                labels = best_parts(logits, parts)
                columns = torch.tensor(parts) - 1
                scores = logits[:, columns].softmax(1).amax(1)
                voxel = voxel_of_points(sample, cloud)
                found.append(PointLabels(labels[voxel].numpy(), scores[voxel].numpy()))
        return found

    def protocol_deviations(self) -> dict[str, str]:
        points = self.cloud.points
        return {
            "parts": "among those of the object's true category (as published)",
            "mIoU": "the mean over objects; that over categories is beside it",
            "points": "all of an object" if points is None else f"{points} of an object, drawn by its name",
            "input": self.inputs.choice,
        }
