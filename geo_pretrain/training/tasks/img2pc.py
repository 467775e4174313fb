"""Image to point cloud: the points of a scan get the features that a frozen image network has for their pixels.

Stage 2 of Janda et al., "Self-Supervised Pre-training of 3D Point Cloud Networks with Image Data" (2022); stage 1,
which trains the image network, is `tasks.pixel_simclr`. No code was published. The paper gives the loss, a frozen
network, single scans with their images, and augmentation of "orientation, density and color"; temperature, number of
samples and ranges are our reading. The negatives in its formula, "the feature vector of any other point", can be read
in three ways: `negatives`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain.checkpoint import Pairing
from geo_pretrain.training.checks import Count, NotNegative, Positive, PositiveRange, Probability, Shares
from geo_pretrain.training.losses.contrastive import anchor_nce
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks.base import Batch
from geo_pretrain.training.tasks.matching import nearest_cells, sample_map
from geo_pretrain.training.tasks.taught import TaughtByImages, TaughtConfig, draw_points

# `negatives` as `anchor_nce` names them: points are the anchors, their pixels the positives
READINGS: Mapping[str, Literal["positives", "anchors", "both"]] = {
    "pixels": "positives",
    "points": "anchors",
    "union": "both",
}


@dataclass(frozen=True)
class Config(TaughtConfig):
    """Settings of the task; numbers of samples hold for each process."""

    teacher: str = "stage1"
    dense: bool = True  # the teacher gives features of pixels
    flip_prob: Probability = 0.0  # images are taken as they are
    resize: PositiveRange = (1.0, 1.0)
    scale: PositiveRange = (1.0, 1.0)
    elastic_prob: Probability = 0.0
    color_jitter: NotNegative = 0.05  # standard deviation of noise on the points' colors, of 255
    keep: Shares = (0.5, 1.0)  # share of the points, drawn anew for each scan
    temperature: Positive = 0.4
    matches: Count = 4096  # points of the batch, each with its pixel
    negatives: Literal["pixels", "points", "union"] = "pixels"  # of the other points: pixel features, their own, both
    interpolation: Literal["nearest", "bilinear"] = "nearest"  # of a teacher whose map is smaller than the image


class Img2PC(TaughtByImages):
    """Points against pixels of the same frame.

    If the student has as many outputs as the teacher, they are normalized and compared as they are. With another number
    (`unet3d.out_chans`) a linear layer `projection` maps them to the teacher's, and they are normalized after it.
    """

    config_type = Config
    config: Config
    negatives = "micro-batch"

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__(recipe, config)
        self.projection = None if self.normalizes() else nn.Linear(self.spec.out_chans, self.teacher.out_chans)

    def normalizes(self) -> bool:
        """Whether the student's outputs are compared as they are, and not projected first."""
        return self.spec.out_chans == self.teacher.out_chans

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch of `FrameCloudSamples`: {"nce": a scalar}."""
        rows = draw_points(batch, self.config.matches)
        loss = anchor_nce(
            self.point_features(self.student_rows(batch)[batch["voxel"][rows]]),
            self.pixel_features(batch, rows),
            temperature=self.config.temperature,
            negatives=READINGS[self.config.negatives],
        )
        return {"nce": loss}

    def point_features(self, voxels: Tensor) -> Tensor:
        """Outputs of the student [n, out_chans] in the teacher's space: float32 [n, C], rows of length 1."""
        return voxels if self.projection is None else F.normalize(self.projection(voxels), dim=1)

    def pixel_features(self, batch: Batch, rows: Tensor) -> Tensor:
        """The teacher's features of the pixels of points `rows`, int64 [n]: [n, C], rows of length 1."""
        maps, element, pixel = self.teacher_maps(batch), batch["element"][rows], batch["pixel"][rows]
        if self.config.interpolation == "bilinear":
            return F.normalize(sample_map(maps, element, pixel, batch["image"].shape[-2:], align_corners=False), dim=1)
        return F.normalize(nearest_cells(maps, element, pixel, batch["image"].shape[-2:]), dim=1)

    def pairing(self) -> Pairing | None:
        """Points, projected where they have to be, are compared with upsampled pixels."""
        projection = None if self.projection is None else "projection"
        return self.pair_with_teacher(point_projection=projection, interpolation=self.config.interpolation)
