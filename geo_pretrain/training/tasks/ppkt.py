"""PPKT: points get the features that a frozen image network has for their pixels.

Liu et al., "Learning from 2D: Contrastive Pixel-to-Point Knowledge Transfer for 3D Pretraining", 2021, section 3
(PPNCE, equation 3 and algorithm 1; the upsampling feature projection layer). Its code was not published; numbers that
the paper leaves open are those of its re-implementation in SLidR (Sautier et al., CVPR 2022) unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from geo_pretrain.checkpoint import Pairing
from geo_pretrain.training.checks import Count, Positive
from geo_pretrain.training.losses.contrastive import info_nce
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks.base import Batch
from geo_pretrain.training.tasks.matching import draw, sample_map
from geo_pretrain.training.tasks.taught import TaughtByImages, TaughtConfig, draw_points


@dataclass(frozen=True)
class Config(TaughtConfig):
    """Settings of the task; numbers of samples hold for each process."""

    temperature: Positive = 0.04  # SLidR: 0.07
    matches: Count = 4096  # anchors of the batch or of each image:
    matches_of: Literal["batch", "image"] = "batch"
    # algorithm 1 flattens the points of all images; "image": points of one image at a time, `matches` of each
    negatives: Literal["batch", "image"] = "batch"
    align_corners: bool = True  # of the upsampling, as SLidR has it


class PPKT(TaughtByImages):
    """PPNCE between voxels and the upsampled, projected features of their pixels."""

    config_type = Config
    config: Config

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__(recipe, config)
        self.negatives = "micro-batch" if config.negatives == "batch" else "sample"
        self.projection = nn.Conv2d(self.teacher.out_chans, self.spec.out_chans, kernel_size=1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch of `FrameCloudSamples`: {"ppnce": a scalar}."""
        groups = self.draw_groups(batch)
        sizes, rows = [len(group) for group in groups], torch.cat(groups)
        points = self.student_rows(batch)[batch["voxel"][rows]]
        pixels = self.pixel_features(batch, rows)
        losses = [
            info_nce(point, pixel, temperature=self.config.temperature, symmetric=False)
            for point, pixel in zip(points.split(sizes), pixels.split(sizes), strict=True)
        ]
        return {"ppnce": torch.stack(losses).mean()}

    def pixel_features(self, batch: Batch, rows: Tensor) -> Tensor:
        """Projected features of the pixels of points `rows`, int64 [n]: float32 [n, out_chans], not normalized.

        Projection and upsampling are linear, so they are exchanged, and upsampling is done for these pixels alone.
        """
        maps = self.projection(self.teacher_maps(batch))
        element, pixel = batch["element"][rows], batch["pixel"][rows]
        return sample_map(maps, element, pixel, batch["image"].shape[-2:], align_corners=self.config.align_corners)

    def draw_groups(self, batch: Batch) -> list[Tensor]:
        """Draw the points that are contrasted with each other: one group for the batch, or one for each image."""
        element, together = batch["element"], self.config.negatives == "batch"
        if together and self.config.matches_of == "batch":
            return [draw_points(batch, self.config.matches)]
        images = [(element == number).nonzero()[:, 0] for number in range(len(batch["seed"]))]
        drawn = [
            points[draw(len(points), self.config.matches, torch.Generator().manual_seed(seed), element.device)]
            for points, seed in zip(images, batch["seed"], strict=True)
        ]
        return [torch.cat(drawn)] if together else drawn

    def pairing(self) -> Pairing | None:
        """Pixels are projected, upsampled and compared with points."""
        interpolation = "corners" if self.config.align_corners else "bilinear"
        return self.pair_with_teacher(image_projection="projection", interpolation=interpolation)
