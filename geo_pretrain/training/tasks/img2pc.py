"""Image to point cloud: the points of a scan get the features that a frozen image network has for their pixels.

Stage 2 of Janda et al., "Self-Supervised Pre-training of 3D Point Cloud Networks with Image Data" (2022); stage 1,
which trains the image network, is `tasks.pixel_simclr`. No code was published. The paper gives the loss, a frozen
network, single scans with their images, and augmentation of "orientation, density and color"; temperature, number of
samples and ranges are our reading. Its formula has as negatives "the feature vector of any other
point", which can be read in three ways: `negatives`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain.checkpoint import Pairing
from geo_pretrain.training.losses import anchor_nce
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks import Export
from geo_pretrain.training.tasks.clouds import draw, encode
from geo_pretrain.training.tasks.ppkt import FrameConfig, TaughtByImages, teacher_of, with_teacher
from geo_pretrain.training.tasks.teachers import Teacher, sample_map

# of `negatives`, what `anchor_nce` calls it: points are the anchors, their pixels the positives
READINGS: Mapping[str, Literal["positives", "anchors", "both"]] = {
    "pixels": "positives",
    "points": "anchors",
    "union": "both",
}


@dataclass(frozen=True)
class Config(FrameConfig):
    """Settings of the task; numbers of samples hold for each process."""

    teacher: str = "stage1"
    dense: bool = True  # the teacher gives features of pixels
    flip_prob: float = 0.0  # images are taken as they are
    resize: tuple[float, float] = (1.0, 1.0)
    scale: tuple[float, float] = (1.0, 1.0)
    elastic_prob: float = 0.0
    color_jitter: float = 0.05  # standard deviation of noise on the points' colors, of 255
    keep: tuple[float, float] = (0.5, 1.0)  # share of the points, drawn anew for each scan
    temperature: float = 0.4
    matches: int = 4096  # points of the batch, each with its pixel
    negatives: Literal["pixels", "points", "union"] = "pixels"  # of the other points: pixel features, their own, both
    interpolation: Literal["nearest", "bilinear"] = "nearest"  # of a teacher whose map is smaller than the image

    def __post_init__(self) -> None:
        """Ranges."""
        self.require_positive("temperature", "matches")


class Img2PC(TaughtByImages):
    """Points against pixels of the same frame.

    The student's outputs, as many as the teacher's, are normalized and compared as they are. Of another number
    (`unet3d.out_chans`), a linear layer `projection` brings them to the teacher's, and the length is taken after it.
    """

    def __init__(self, recipe: Recipe, config: Config, teacher: Teacher) -> None:
        width = recipe.network3d().out_chans
        self.normalize = width == teacher.out_chans
        super().__init__(recipe, config, teacher)
        self.config = config
        self.projection = None if self.normalize else nn.Linear(width, teacher.out_chans)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The loss of a batch as `FrameCloudSamples` yields it: {"nce": a scalar}."""
        generator = torch.Generator().manual_seed(batch["seed"][0])  # one stream of draws for the whole batch
        rows = draw(len(batch["pixel"]), self.config.matches, generator, batch["pixel"].device)
        voxels = encode(self.backbone, batch["coords"], batch["feats"], low_precision=self.low_precision)
        loss = anchor_nce(
            self.point_features(voxels[batch["voxel"][rows]]),
            self.pixel_features(batch, rows),
            temperature=self.config.temperature,
            negatives=READINGS[self.config.negatives],
        )
        return {"nce": loss}

    def point_features(self, voxels: Tensor) -> Tensor:
        """Outputs of the student [n, out_chans] in the teacher's space: float32 [n, C], rows of length 1."""
        return voxels if self.projection is None else F.normalize(self.projection(voxels), dim=1)

    def pixel_features(self, batch: Mapping[str, Any], rows: Tensor) -> Tensor:
        """The teacher's features of the pixels of correspondences `rows`, int64 [n]: [n, C], rows of length 1."""
        element, pixel = batch["element"][rows], batch["pixel"][rows]
        size = batch["image"].shape[-2], batch["image"].shape[-1]
        maps = self.teach(batch)
        if self.config.interpolation == "bilinear":
            return F.normalize(sample_map(maps, element, pixel, size, align_corners=False), dim=1)
        return F.normalize(nearest_cells(maps, element, pixel, size), dim=1)

    def export(self) -> Export:
        """The student, its projection where there is one, and the teacher: `load_pair` joins them."""
        export = super().export()
        if self.teacher.arch is None:
            return export
        pairing = Pairing(
            self.teacher.arch,
            self.shown(),
            role="teacher",
            point_projection=None if self.projection is None else "projection",
            interpolation=self.config.interpolation,
        )
        return with_teacher(export, self.student(), self.teacher, pairing)


def nearest_cells(maps: Tensor, element: Tensor, pixel: Tensor, size: tuple[int, int]) -> Tensor:
    """What nearest upsampling of `maps` [B, C, h, w] to `size` (height, width) would hold at single pixels: [N, C].

    `element`, `pixel`: int64 [N], batch element and flat pixel (row * width + column) of an image of `size`.
    """
    height, width = maps.shape[-2:]
    row, column = pixel // size[1] * height // size[0], pixel % size[1] * width // size[1]
    return maps.permute(0, 2, 3, 1)[element, row, column]


def build(recipe: Recipe, config: Config) -> Img2PC:
    """The task, its weights drawn from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Img2PC(recipe, config, teacher_of(recipe, config))
