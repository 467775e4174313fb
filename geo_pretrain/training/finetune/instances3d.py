"""Instance segmentation of point clouds, measured by ScanNet's average precision over voxels and over points.

CSC's released pipeline (Hou et al., CVPR 2021, downstream/insseg): voxels are moved by their predicted offsets and
grouped by distance and class. Written from a description.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.errors import DataError, RecipeError
from geo_pretrain.training.checks import Checks, Count, Mistakes, Ranged
from geo_pretrain.training.config import parse
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.data.samples.whole_clouds import CloudSample, voxel_of_points
from geo_pretrain.training.distributed import ALONE, World
from geo_pretrain.training.evaluation.grouping import RELEASED_NEIGHBORS, Grouping, Proposals, group, joined
from geo_pretrain.training.evaluation.instances3d import (
    InstancePrecision,
    InstanceRules,
    Overlaps,
    instance_precision,
    overlaps_of,
)
from geo_pretrain.training.evaluation.metrics import (
    best_class,
    class_iou,
    confusion_matrix,
    mean_iou,
    pixel_accuracy,
)
from geo_pretrain.training.evaluation.predictions import PointInstances, PointLabels
from geo_pretrain.training.finetune.clouds import CloudTask
from geo_pretrain.training.finetune.instance_network import InstanceSRUNet, instance_srunet, split_output
from geo_pretrain.training.finetune.segmentation3d import LEVELS, labelled_loss
from geo_pretrain.training.finetune.task import Evaluation
from geo_pretrain.training.finetune_recipe import FinetuneRecipe
from geo_pretrain.training.losses import center_offsets, direction_loss, offset_loss

MINIMUM = (10, 100)  # voxels, points: the smallest instance that counts in CSC's evaluation, in ScanNet's benchmark


@dataclass(frozen=True)
class InstanceSettings(Ranged):
    """`network.options` of a recipe for instances3d. Classes are named; lengths of groupings are in voxels."""

    section = "network.options."
    stuff: tuple[str, ...] = ()  # classes that are no objects, such as wall and floor: labelled, but not grouped
    # voxels: the released training and test. points: the released benchmark, which moves each point by the offset of
    # its voxel (radius 1, score median, proposal 250 are its settings of 2 cm voxels).
    group: Literal["voxels", "points"] = "voxels"
    grouping: Grouping = field(default_factory=Grouping)  # neighbors None: as match_released_code says
    unshifted: tuple[str, ...] = ()  # classes that are grouped without their offsets, by `unshifted_grouping`
    unshifted_grouping: Grouping = field(default_factory=lambda: Grouping(radius=2.5, proposal=250))
    minimum: Count | None = None  # of points or voxels of an instance that counts; None: 10 voxels, 100 points
    # Classes that have no AP with match_released_code. Its rule that the ids of instances are 1000 times the class and
    # a number, and ids below 1000 none, leaves out the class with raw id 0: clutter of S3DIS.
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Found:
    """What the network says of one cloud."""

    sample: CloudSample
    logits: Tensor  # float32 [M, 1 + C] of voxels
    of_voxels: Proposals
    of_points: Proposals  # of the sample's points


@dataclass(frozen=True)
class _Measured:
    """One cloud's share of an evaluation, over voxels and over points."""

    confusions: tuple[np.ndarray, ...]  # int64 [1 + C, 1 + C]
    overlaps: tuple[Overlaps, ...]


class Instances3D(CloudTask):
    """The task "instances3d"; see `FinetuneTask`.

    Scores: ap, ap50, ap25 and miou of the level that `evaluate.level` names; beside them both levels' own, such as
    voxel_ap50 and point_ap50. Best is the highest ap50.
    """

    metric = "ap50"
    module: InstanceSRUNet

    @classmethod
    def check(cls, recipe: FinetuneRecipe) -> None:
        """Check `network.options`, and settings that do not go together."""
        _settings(recipe)

    def build(self, start: SRUNet, transfer: bool) -> InstanceSRUNet:
        """A U-Net with a logit for each class after the first one, which is that of unlabelled points, and offsets."""
        if isinstance(self.contract.voxel_size, tuple):
            raise RecipeError(f"Instances need cubic voxels, to measure offsets in; the input is {self.contract}.")
        self.voxel_size = self.contract.voxel_size
        self.settings = _settings(self.recipe)
        named = {name: getattr(self.settings, name) for name in ("stuff", "unshifted", "uncounted")}
        check = Checks()
        for name, classes in named.items():
            known = set(classes) <= set(self.classes)
            check(known, f"network.options.{name}", list(classes), f"some of {', '.join(self.classes)}")
        check.done()
        self.stuff, self.unshifted, self.uncounted = (
            np.array([self.classes.index(one) + 1 for one in classes], np.int64) for classes in named.values()
        )
        network = instance_srunet(start, 1 + len(self.classes), seed=self.recipe.seed, transfer=transfer)
        if self.recipe.optim.backbone_bn_momentum is not None:  # as released, where it reaches the head's norm
            network.bntr_offset.bn.momentum = self.recipe.optim.backbone_bn_momentum
        return network

    def backbone(self) -> nn.Module:
        return self.module.unet

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy of the labelled voxels; L1 distance and direction of the offsets of voxels on objects."""
        if "labels" not in batch or "instances" not in batch:
            raise DataError(f"Data set {self.recipe.data.source!r} has clouds without labels or instances.")
        logits, moves = split_output(self.forward(batch["coords"], batch["feats"]))
        labels = batch["labels"]
        stuff = torch.from_numpy(self.stuff).to(labels.device)
        instances = torch.where((labels > 0) & ~torch.isin(labels, stuff), batch["instances"], 0)
        offsets = center_offsets(batch["coords"].to(labels.device), instances, self.voxel_size)
        return {
            "segmentation": labelled_loss(logits[:, 1:], labels, first=1),
            "offset": offset_loss(moves, offsets, instances > 0),
            "direction": direction_loss(moves, offsets, instances > 0),
        }

    @torch.no_grad()
    def find(self, cloud: LabelledCloud) -> _Found:
        """Run the network over a cloud and group what it says; labels are not looked at."""
        self.module.eval()
        sample = self.evaluation_sample(cloud)
        logits, moves = (part.cpu() for part in split_output(self.forward(sample.coords, sample.feats)))
        classes, scores = best_class(logits).numpy(), logits.numpy()
        classes = np.where(np.isin(classes, self.stuff), 0, classes)
        cells, shifts = sample.coords[:, 1:].numpy().astype(np.float64), moves.numpy() / self.voxel_size
        inverse = sample.inverse.numpy()
        if self.settings.group == "voxels":
            of_voxels = self._grouped(cells, shifts, scores, classes)
            return _Found(sample, logits, of_voxels, of_voxels.of_points(inverse))
        cells = sample.points.numpy().astype(np.float64) / self.voxel_size
        of_points = self._grouped(cells, shifts[inverse], scores[inverse], classes[inverse])
        return _Found(sample, logits, _of_voxels(of_points, sample), of_points)

    def _grouped(self, places: np.ndarray, shifts: np.ndarray, logits: np.ndarray, classes: np.ndarray) -> Proposals:
        """Group points or voxels at `places` [N, 3], moved by `shifts`; both in voxels."""
        apart = np.isin(classes, self.unshifted)
        found = group(places + shifts, logits, np.where(apart, 0, classes), self._limited(self.settings.grouping))
        if not apart.any():
            return found
        settings = self._limited(self.settings.unshifted_grouping)
        return joined(found, group(places, logits, np.where(apart, classes, 0), settings))

    def _limited(self, settings: Grouping) -> Grouping:
        if settings.neighbors is None and self.recipe.match_released_code:
            return replace(settings, neighbors=RELEASED_NEIGHBORS)
        return settings

    def predict(self, items: Sequence[LabelledCloud]) -> list[PointInstances]:
        """Predict objects in clouds as sets of their own points, and the class of each point."""
        predictions = []
        for cloud in items:
            found = self.find(cloud)
            voxel = voxel_of_points(found.sample, cloud).numpy()
            classes = best_class(found.logits)
            certain = found.logits[:, 1:].softmax(1).gather(1, classes[:, None] - 1)[:, 0]
            labels = PointLabels(classes.numpy()[voxel], certain.numpy()[voxel])
            proposals = found.of_points if self.settings.group == "points" else found.of_voxels.of_points(voxel)
            proposals = proposals.ranked()
            scores = proposals.scores.astype(np.float32)
            predictions.append(PointInstances(proposals.masks(len(cloud)), proposals.classes, scores, labels))
        return predictions

    def evaluate(self, source: LabelledData, ids: Sequence[str], world: World = ALONE) -> Evaluation:
        """Measure average precision and mean IoU over voxels and points of all clouds and processes."""
        place = {id: k for k, id in enumerate(ids)}
        own = [(place[id], found) for id, found in self.measured(source, ids, world, self.measure)]
        gathered = cast(list[list[tuple[int, _Measured]]], world.all_gather_object(own))
        skipped = self.all_skipped(source, ids, world)
        clouds = [one for _, one in sorted((pair for part in gathered for pair in part), key=lambda pair: pair[0])]
        totals = [np.sum([one.confusions[k] for one in clouds], axis=0) for k in (0, 1)]
        precisions = [self._precision([one.overlaps[k] for one in clouds], k) for k in (0, 1)]
        chosen = LEVELS.index(self.recipe.evaluate.level.rstrip("s"))
        try:
            scores = precisions[chosen].means() | {"miou": self._miou(totals[chosen])}
        except DataError as error:
            raise DataError(
                f"{len(ids)} clouds of {source.name!r}, split {source.split!r}: {error} Instances count from "
                f"{self._minimum(chosen)} {LEVELS[chosen]}s up; network.options.minimum changes that."
            ) from None
        scores["accuracy"] = pixel_accuracy(totals[chosen])
        for level, total, precision in zip(LEVELS, totals, precisions, strict=True):
            known = not np.isnan(precision.values).all()
            means = precision.means() if known else {}
            scores |= {f"{level}_{name}": value for name, value in means.items()} | {f"{level}_miou": self._miou(total)}
        values = precisions[chosen].per_class() | {"iou": class_iou(totals[chosen])}
        per_class = {name: dict(zip(self.classes, map(_share, row), strict=True)) for name, row in values.items()}
        details = {
            "level": self.recipe.evaluate.level,
            "minimum": self._minimum(chosen),
            "confusion": totals[chosen].tolist(),
            "images": len(ids),
            "skipped": skipped,
        }
        return Evaluation(scores, per_class, details)

    def measure(self, cloud: LabelledCloud) -> _Measured:
        """Compare what is found in a cloud with its labels and instances."""
        if cloud.labels is None or cloud.instances is None:
            raise DataError(f"Cloud {cloud.id!r} has no labels or no instances of points.")
        found = self.find(cloud)
        sample, guess = found.sample, best_class(found.logits)
        labels, instances = (torch.from_numpy(values)[sample.chosen] for values in (cloud.labels, cloud.instances))
        levels = (
            (cast(Tensor, sample.labels), cast(Tensor, sample.instances), guess, found.of_voxels),
            (labels, instances, guess[sample.inverse], found.of_points),
        )
        confusions, overlaps = [], []
        for labels, instances, classes, proposals in levels:
            confusions.append(confusion_matrix(labels, classes, 1 + len(self.classes)))
            objects = np.where(np.isin(labels.numpy(), self.stuff), 0, labels.numpy())
            overlaps.append(overlaps_of(objects, instances.numpy(), proposals))
        return _Measured(tuple(confusions), tuple(overlaps))

    def _precision(self, clouds: Sequence[Overlaps], level: int) -> InstancePrecision:
        left_out = self.uncounted.tolist() if self.recipe.match_released_code else ()
        rules = InstanceRules(self._minimum(level), frozenset(left_out))
        return instance_precision(clouds, len(self.classes), rules)

    def _minimum(self, level: int) -> int:
        return self.settings.minimum or MINIMUM[level]

    def _miou(self, total: np.ndarray) -> float:
        """Mean IoU over the classes in the truth; as released, over those in truth or prediction."""
        return float(np.nanmean(class_iou(total))) if self.recipe.match_released_code else mean_iou(total)

    def protocol_deviations(self) -> dict[str, str]:
        exact, level = self.recipe.match_released_code, self.recipe.evaluate.level
        minimum = self._minimum(LEVELS.index(level.rstrip("s")))
        limit = self._limited(self.settings.grouping).neighbors
        uncounted = ", ".join(self.settings.uncounted)
        deviations = {
            "AP": f"over {level}, of instances from {minimum} up (released: 10 voxels; benchmark: 100 vertices)",
            "neighbors": f"{'all' if limit is None else f'the first {limit}'} are followed in grouping (released: "
            f"{RELEASED_NEIGHBORS}, which cuts large instances)",
            "input": self.inputs.choice,
        }
        if uncounted:
            deviations["classes"] = f"{uncounted} {'has no AP (as published)' if exact else 'has AP (mended)'}"
        return deviations


def _of_voxels(of_points: Proposals, sample: CloudSample) -> Proposals:
    """The proposals in voxels: a voxel belongs to those that its first point belongs to."""
    voxel = np.full(len(sample.points), -1)
    voxel[sample.index.numpy()] = np.arange(len(sample))
    members = [voxel[rows][voxel[rows] >= 0] for rows in of_points.members]
    return Proposals.of(members, of_points.classes.tolist(), of_points.scores.tolist())


def _share(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _settings(recipe: FinetuneRecipe) -> InstanceSettings:
    """Parse `network.options`, and refuse settings that do not go together."""
    check, cloud = Checks(), recipe.clouds()
    settings = InstanceSettings()
    try:
        settings = parse(InstanceSettings, recipe.network.options, where="", prefix="network.options.")
    except Mistakes as error:
        check.problems += error.problems
    given = {"data.cloud.points": cloud.points, "data.cloud.bounds": cloud.bounds}
    for key, value in given.items():
        whole = value is None or settings.group == "voxels"
        check(whole, key, value, "none with network.options.group=points", given=["network.options.group"])
    check.done()
    return settings
