"""Classification of single objects, measured by accuracy, also over the rarest categories.

ShapeNetCore as in PointContrast (table 2), of which no code is released.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.checks import Momentum, NaturalNumber, Ranged
from geo_pretrain.training.config import parse
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.data.labelled.registry import Subset
from geo_pretrain.training.data.samples.whole_clouds import CloudSample
from geo_pretrain.training.distributed import ALONE, World
from geo_pretrain.training.evaluation.objects import accuracy, class_accuracy, rarest
from geo_pretrain.training.evaluation.predictions import CloudClass
from geo_pretrain.training.finetune.classification_network import ClassifierSRUNet, classifier_srunet
from geo_pretrain.training.finetune.objects import ObjectTask
from geo_pretrain.training.finetune.task import Evaluation
from geo_pretrain.training.finetune_recipe import FinetuneRecipe

TAILS = (10, 30)  # numbers of rarest categories whose accuracy PointContrast reports


@dataclass(frozen=True)
class ClassifierSettings(Ranged):
    """`network.options` of a recipe for classification3d."""

    section = "network.options."

    hidden: NaturalNumber = 0  # channels of two layers before the last one; 0: none
    dropout: Momentum = 0.5  # before the last layer


class Classification3D(ObjectTask):
    """The task "classification3d"; see `FinetuneTask`.

    Scores: accuracy over all objects, macc (the mean over categories), and tail10 and tail30: accuracy over the objects
    of the categories that are rarest among all training objects, whichever share of these is trained on.
    """

    metric = "accuracy"
    module: ClassifierSRUNet

    @classmethod
    def check(cls, recipe: FinetuneRecipe) -> None:
        """Check `network.options`."""
        _settings(recipe)

    def build(self, start: SRUNet, transfer: bool) -> ClassifierSRUNet:
        """The way down of `start`, pooled, with a new head."""
        settings = _settings(self.recipe)
        self.tails: dict[str, list[int]] = {}
        return classifier_srunet(
            start, len(self.classes), seed=self.recipe.seed, hidden=settings.hidden, dropout=settings.dropout
        )

    def prepare(self, train: LabelledData) -> None:
        """Find the rarest categories of the whole training split."""
        whole = train.source if isinstance(train, Subset) else train
        if hasattr(whole, "category_of"):
            numbers = Counter(whole.category_of(id) for id in whole.ids())
            names = {count: f"tail{count}" for count in TAILS if count < len(numbers)}
            self.tails = {name: rarest(numbers.elements(), count) for count, name in names.items()}

    def sample(self, item: LabelledCloud, generator: torch.Generator) -> tuple[CloudSample, int]:
        """Draw, augment and voxelize an object; with its category from 0."""
        return super().sample(item, generator), cast(int, item.category) - 1

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        """Join objects to a batch within the limit of voxels, with "categories" int64 [B]."""
        batch = super().collate([sample for sample, _ in samples])
        kept = len(batch["counts"])  # the first ones
        return batch | {"categories": torch.tensor([category for _, category in samples[:kept]])}

    def classify(self, batch: dict[str, Any]) -> Tensor:
        """Logits of the objects of a batch on the module's device: float32 [B, C]."""
        device = next(self.module.parameters()).device
        logits: Tensor = self.module(SparseTensor(batch["coords"].to(device), batch["feats"].to(device)))
        return logits.float()

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy over the objects."""
        return {"category": F.cross_entropy(self.classify(batch), batch["categories"])}

    @torch.no_grad()
    def logits(self, clouds: Sequence[LabelledCloud]) -> Tensor:
        """Logits of objects, float32 [B, C] on the CPU."""
        self.module.eval()
        return self.classify(self.voxelized(clouds)[1]).cpu()

    def evaluate(self, source: LabelledData, ids: Sequence[str], world: World = ALONE) -> Evaluation:
        """Count which category each object is given, and sum over all processes."""
        own = np.zeros((1 + len(self.classes),) * 2, np.int64)
        for objects in self.shared_batches(source, ids, world):
            clouds = [cloud for _, cloud in objects]
            for cloud, found in zip(clouds, 1 + self.logits(clouds).argmax(1), strict=True):
                own[cast(int, cloud.category), int(found)] += 1
        total = np.sum(cast(list[np.ndarray], world.all_gather_object(own)), axis=0)
        skipped = self.all_skipped(source, ids, world)
        each = class_accuracy(total)
        scores = {"accuracy": accuracy(total), "macc": _mean(each.values())}
        scores |= {name: accuracy(total, categories) for name, categories in self.tails.items()}
        return Evaluation(
            {name: value for name, value in scores.items() if value is not None},  # a tail may have no object
            {"accuracy": {self.classes[category - 1]: value for category, value in each.items()}},
            {"confusion": total.tolist(), "images": len(ids), "skipped": skipped},
        )

    def predict(self, items: Sequence[LabelledCloud]) -> list[CloudClass]:
        """Predict the category of objects, whose own is not looked at."""
        found = []
        for clouds in self.in_batches(items):
            for row in self.logits(clouds).softmax(1).numpy():
                found.append(CloudClass(1 + int(row.argmax()), row))
        return found

    def backbone(self) -> nn.Module:
        return self.module.unet

    def facts(self) -> dict[str, Any]:
        """The input that was chosen, and which categories are the rarest."""
        tails = {name: [self.classes[k - 1] for k in categories] for name, categories in self.tails.items()}
        return {**super().facts(), **({"tails": tails} if tails else {})}

    def protocol_deviations(self) -> dict[str, str]:
        points = self.cloud.points
        return {
            "head": "maximum and mean of the deepest map, dropout, a linear layer (not published)",
            "points": "all of an object's" if points is None else f"{points} of an object, drawn by its name",
            "input": self.inputs.choice,
        }


def _settings(recipe: FinetuneRecipe) -> ClassifierSettings:
    return parse(ClassifierSettings, recipe.network.options, where="", prefix="network.options.")


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
