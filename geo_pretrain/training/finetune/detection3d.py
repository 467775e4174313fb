"""Detection in point clouds with VoteNet on a sparse U-Net, measured by average precision of boxes.

Xie et al., "PointContrast", ECCV 2020 (tables 5 and 8) and Hou et al., CSC, CVPR 2021; Qi et al., "Deep Hough Voting",
ICCV 2019. Its parts: `votenet` (network), `box_coding`, `losses.voting`, `cloud_boxes` (targets),
`evaluation.detection3d`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.seeding import seeded
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D, LabelledCloud
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.data.samples.cloud_boxes import (
    aligned_boxes,
    box_rows,
    moved_boxes,
    votes_by_box,
    votes_by_instance,
)
from geo_pretrain.training.data.samples.whole_clouds import CloudSample, collate_voxels, training_sample
from geo_pretrain.training.distributed import ALONE, World
from geo_pretrain.training.evaluation.detection3d import (
    PROTOCOLS,
    THRESHOLDS,
    BoxFilter,
    CloudMatches,
    FoundBoxes,
    Precision,
    ScoredBoxes,
    average_precision,
    filter_boxes,
    match_boxes,
)
from geo_pretrain.training.evaluation.predictions import Detections3D
from geo_pretrain.training.finetune.box_coding import SIZES, TABLE_OF, decode_boxes, encode_boxes, typical_sizes
from geo_pretrain.training.finetune.clouds import CloudTask
from geo_pretrain.training.finetune.detection3d_options import VoteNetOptions, detection3d_options
from geo_pretrain.training.finetune.task import Evaluation
from geo_pretrain.training.finetune.votenet import FEATURES, Output, VoteNet, VoteNetShape, quiet_start
from geo_pretrain.training.finetune_recipe import FinetuneRecipe
from geo_pretrain.training.geometry3d.points import gather_rows
from geo_pretrain.training.losses.voting import votenet_losses
from geo_pretrain.training.networks3d import segmentation_srunet

PLACES = 64  # of boxes in a cloud, in the released code


class BoxSample(NamedTuple):
    """A training sample: voxels, boxes of the augmented cloud, and what each voxel's point votes for."""

    cloud: CloudSample
    rows: Tensor  # float32 [K, 7]
    classes: Tensor  # int64 [K], 1..C
    votes: Tensor  # float32 [M, 3, 3] m
    voting: Tensor  # bool [M]


class Detection3D(CloudTask):
    """The task "detection3d"; see `FinetuneTask`.

    Scores: ap25, ap50 (average precision at an overlap of 0.25 and 0.5), ar25, ar50 (largest recall), by the first of
    `network.options.protocols`; the others' have their name in front.
    """

    module: VoteNet

    @classmethod
    def check(cls, recipe: FinetuneRecipe) -> None:
        """Check `network.options`, and refuse augmentation that boxes cannot follow."""
        detection3d_options(recipe)

    def build(self, start: SRUNet, transfer: bool) -> VoteNet:
        """VoteNet around the U-Net, whose last layer gives 256 features and is always new."""
        self.options: VoteNetOptions = detection3d_options(self.recipe)
        self.metric = self.options.metric
        shape = VoteNetShape(
            classes=len(self.classes),
            skip_near_origin=self.recipe.match_released_code,
            **{name: getattr(self.options, name) for name in SHAPED},
        )
        unet = segmentation_srunet(start, FEATURES, seed=self.recipe.seed, transfer=transfer)
        with seeded(self.recipe.seed):
            network = VoteNet(unet, shape)
        if self.options.start == "quiet":
            quiet_start(network)
        if self.options.sizes == "published":
            sizes = SIZES[TABLE_OF[self.recipe.data.source]]
            if len(sizes) != len(self.classes):
                raise DataError(f"{len(self.classes)} classes; there are published sizes of {len(sizes)}.")
            network.mean_sizes.copy_(torch.tensor(sizes))
        return network

    def prepare(self, train: LabelledData) -> None:
        """Take the size templates from the training boxes, unless published ones are wanted; weights hold them."""
        if self.options.sizes == "published":
            return
        boxes = []
        for id in train.ids():
            try:
                found = boxes_of(self.load(train, id))
            except BadFrame:  # training skips and counts it
                continue
            boxes.append((found.sizes, found.classes))
        sizes = typical_sizes(boxes, self.classes, mean=self.options.sizes == "mean")
        self.module.mean_sizes.copy_(sizes)

    def sample(self, item: LabelledCloud, generator: torch.Generator) -> BoxSample:
        """Draw, augment and voxelize a cloud; boxes follow, and points vote for the objects they are of."""
        sample = training_sample(item, self.cloud, self.contract, generator)
        boxes = boxes_of(item)
        rows = moved_boxes(box_rows(boxes), sample.motion)
        by_box = item.instances is None if self.options.votes == "auto" else self.options.votes == "boxes"
        if by_box:
            votes, voting = votes_by_box(sample.points, rows)
        elif item.instances is None:
            raise DataError(f"Cloud {item.id!r} has no instances to vote by; accepted: network.options.votes=boxes.")
        else:
            labels = None if item.labels is None else torch.from_numpy(item.labels)[sample.chosen]
            instances = torch.from_numpy(item.instances)[sample.chosen]
            votes, voting = votes_by_instance(sample.points, instances, labels)
        if self.options.heading_bins == 1:
            rows = aligned_boxes(rows)
        place = sample.index
        return BoxSample(sample, rows, torch.from_numpy(boxes.classes), votes[place], voting[place])

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        """Join samples to a batch within the limit of voxels; "boxes" are padded to the same number M in each cloud."""
        batch = collate_voxels([one.cloud for one in samples], self.cloud.limit)
        kept: list[BoxSample] = samples[: len(batch["counts"])]
        most = max(1, *(len(one.rows) for one in kept))
        places = max(PLACES, most) if self.recipe.match_released_code else most
        rows, classes = torch.zeros(len(kept), places, 7), torch.zeros(len(kept), places, dtype=torch.int64)
        for number, one in enumerate(kept):
            rows[number, : len(one.rows)], classes[number, : len(one.rows)] = one.rows, one.classes
        return batch | {
            "positions": torch.cat([one.cloud.points[one.cloud.index] for one in kept]),
            "votes": torch.cat([one.votes for one in kept]),
            "voting": torch.cat([one.voting for one in kept]),
            "boxes": rows,
            "classes": classes,
        }

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """All terms of VoteNet's loss, weighted."""
        counts = batch["counts"]
        found = self.detect(batch["coords"], batch["feats"], batch["positions"], counts)
        truths, voting = (
            gather_rows(pad_sequence(list(values.split(counts)), batch_first=True), found.seed_voxels)
            for values in (batch["votes"].flatten(1), batch["voting"][:, None])
        )
        classes = batch["classes"]
        bins = self.options.heading_bins
        targets = encode_boxes(batch["boxes"], classes, classes > 0, self.module.mean_sizes, bins)
        votes = found.votes, truths.unflatten(2, (3, 3)), voting[..., 0]
        origin = self.recipe.match_released_code
        return votenet_losses(votes, found.proposals, targets, padding_at_origin=origin)

    def detect(self, coords: Tensor, feats: Tensor, positions: Tensor, counts: list[int]) -> Output:
        """Run the network over voxels [N] of clouds with `counts` voxels each."""
        device = next(self.module.parameters()).device
        voxels = SparseTensor(coords.to(device), feats.to(device))
        output: Output = self.module(voxels, positions.to(device), counts)
        return output

    @torch.no_grad()
    def proposals(self, sample: CloudSample) -> ScoredBoxes:
        """All boxes that the network proposes for one cloud, in evaluation mode, on the CPU."""
        self.module.eval()
        with seeded(self.recipe.seed):  # of randomly chosen proposals
            found = self.detect(sample.coords, sample.feats, sample.points[sample.index], [len(sample)]).proposals
        rows = decode_boxes(found, self.module.mean_sizes)[0].cpu()
        objects, classes = (logits[0].float().softmax(1).cpu() for logits in (found.objectness, found.classes))
        return ScoredBoxes(rows, objects[:, 1], classes)

    def found_boxes(self, cloud: LabelledCloud, rules: Sequence[BoxFilter]) -> list[FoundBoxes]:
        """The boxes found in a cloud by each of several rules, in the cloud's frame; its labels are not looked at."""
        sample = self.evaluation_sample(cloud)
        proposals = self.proposals(sample)
        return [filter_boxes(proposals, sample.points, one) for one in rules]

    def predict(self, items: Sequence[LabelledCloud]) -> list[Detections3D]:
        """Find the objects of clouds, whose labels are not looked at: each box once, with its likeliest class."""
        rules = self.options.rules(per_class=False)
        return [detections(self.found_boxes(cloud, [rules])[0]) for cloud in items]

    def evaluate(self, source: LabelledData, ids: Sequence[str], world: World = ALONE) -> Evaluation:
        """Compare the boxes found in all clouds with the true ones, by each protocol."""
        names, count = self.options.protocols, len(self.classes)

        def measure(cloud: LabelledCloud) -> list[CloudMatches]:
            boxes = boxes_of(cloud)
            rows, classes = box_rows(boxes), torch.from_numpy(boxes.classes)
            found = self.found_boxes(cloud, [PROTOCOLS[name] for name in names])
            return [match_boxes(one, rows, classes, count) for one in found]

        own = dict(self.measured(source, ids, world, measure))
        matches: dict[str, list[CloudMatches]] = {}
        for part in cast(list[dict[str, list[CloudMatches]]], world.all_gather_object(own)):
            matches |= part
        skipped = self.all_skipped(source, ids, world)
        ordered = [matches[id] for id in ids if id in matches]
        boxes_of_class = np.sum([one[0].truths for one in ordered], axis=0)
        if not boxes_of_class.sum():
            raise DataError(f"No box in {len(ids)} clouds of {source.name!r}, split {source.split!r}.")
        scores: dict[str, float] = {}
        per_class: dict[str, dict[str, float | None]] = {}
        for place, name in enumerate(names):
            prefix = f"{name}_" if place else ""
            for number, threshold in enumerate(THRESHOLDS):
                precision, percent = average_precision([one[place] for one in ordered], number), f"{100 * threshold:g}"
                scores |= {f"{prefix}ap{percent}": precision.mean_ap, f"{prefix}ar{percent}": precision.mean_recall}
                per_class |= self._by_class(precision, prefix, percent)
        counted = dict(zip(self.classes, boxes_of_class.tolist(), strict=True))
        details = {"images": len(ids), "boxes": counted, "protocols": list(names), "skipped": skipped}
        return Evaluation(scores, per_class, details)

    def _by_class(self, precision: Precision, prefix: str, percent: str) -> dict[str, dict[str, float | None]]:
        values = {"ap": precision.ap, "ar": precision.recall}
        return {
            f"{prefix}{kind}{percent}": {
                name: None if np.isnan(value) else float(value) for name, value in zip(self.classes, row, strict=True)
            }
            for kind, row in values.items()
        }

    def backbone(self) -> SRUNet:
        return self.module.unet

    def facts(self) -> dict[str, Any]:
        """The input that was chosen, in words, and the size templates (m)."""
        sizes = [[round(length, 6) for length in row] for row in self.module.mean_sizes.tolist()]
        return super().facts() | {"sizes": dict(zip(self.classes, sizes, strict=True))}

    def protocol_deviations(self) -> dict[str, str]:
        exact = self.recipe.match_released_code
        return {
            "padded boxes": "take part as boxes at the origin (as published)" if exact else "take no part (mended)",
            "points near the origin": "are never seeds or proposals (as published)" if exact else "may be (mended)",
            "evaluated points": "drawn by the cloud's name (published: anew in each evaluation)",
            "classes without a true box": "are left out of the mean (published: the mean is not a number)",
            "protocol": ", ".join(self.options.protocols),
            "input": self.inputs.choice,
        }


SHAPED = "heading_bins", "seeds", "proposals", "vote_factor", "radius", "group", "sampling"


def boxes_of(cloud: LabelledCloud) -> Boxes3D:
    """The boxes of a cloud. Raises `DataError` if its data set has none."""
    if cloud.boxes is None:
        raise DataError(f"Cloud {cloud.id!r} has no boxes; open the data set's labelled split for detection3d.")
    return cloud.boxes


def detections(found: FoundBoxes) -> Detections3D:
    """Found boxes in falling order of their scores."""
    order = found.scores.argsort(descending=True, stable=True)
    rows, classes = found.rows[order].numpy(), found.classes[order].numpy()
    return Detections3D(Boxes3D(rows[:, :3], rows[:, 3:6], rows[:, 6], classes), found.scores[order].float().numpy())
