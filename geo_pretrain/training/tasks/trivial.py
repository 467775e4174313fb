"""Trivial correspondences: equal pixels of two color augmentations of one frame get the same feature.

The baseline of Pri3D (Hou et al., ICCV 2021, table 1) with its network, its loss and its pixels, but no 3D: what is
learned from a second look at the same frame. Colors are changed as `data.augment` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geo_pretrain.training.checks import Count, Odd, Positive
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.sampler import Samples
from geo_pretrain.training.data.samples.single_images import TwoColorViews
from geo_pretrain.training.losses.contrastive import info_nce
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks.base import Batch
from geo_pretrain.training.tasks.images import ImageUNetConfig, ImageUNetTask
from geo_pretrain.training.tasks.matching import gather_cells, half_resolution_cell, sample_matches


@dataclass(frozen=True)
class Config(ImageUNetConfig):
    """Settings of the task; each default is the released code's."""

    temperature: Positive = 0.4
    matches: Count = 1024  # pixels sampled for each frame
    symmetric: bool = True
    dedup: bool = False  # do not count samples of the same feature cell as negatives of each other
    blur_taps: Odd | None = 25  # of the Gaussian, its sigma in data.augment.blur_radius; null: Pillow's blur
    depth_proxy: bool = False  # the baseline knows no depth; true: with Pri3D's second loss


class Trivial(ImageUNetTask):
    """The 2D U-Net, and the depth head where there is one; state keys are Pri3D's."""

    config_type = Config
    config: Config
    negatives = "sample"

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__(recipe, config, depth_proxy=config.depth_proxy)

    def dataset(self, source: Source, pairs: list[Pair]) -> Samples:
        """Single frames, each augmented twice."""
        return TwoColorViews(*self.arguments(source, pairs), blur_taps=self.config.blur_taps)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch of `TwoColorViews`, scalars: "trivial", and "depth" with the depth proxy."""
        config, depth = self.config, batch["depth"]
        features1, features2 = self.features_of(batch["image1"], batch["image2"])
        itself = torch.arange(depth[0].numel(), device=depth.device).expand(len(depth), -1)
        pixel, _, _ = sample_matches(itself, batch["seed"], config.matches)
        cell = half_resolution_cell(pixel, depth.shape[-1], features1.shape)
        loss = info_nce(
            gather_cells(features1, cell),
            gather_cells(features2, cell),
            temperature=config.temperature,
            symmetric=config.symmetric,
            ignore=cell[:, :, None] == cell[:, None] if config.dedup else None,
        )
        losses = {"trivial": loss.mean()}
        if config.depth_proxy:
            losses["depth"] = self.depth_proxy_loss((features1, features2), (depth, depth))
        return losses
