"""Contrastive Scene Contexts: PointContrast's loss, once for each part of the space around a point.

Hou et al., "Exploring Data-Efficient 3D Scene Understanding with Contrastive Scene Contexts", CVPR 2021; defaults are
those of the released code (MIT), from which the published weights came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from geo_pretrain.geometry import transform
from geo_pretrain.training.checks import Checks, Positive
from geo_pretrain.training.data.samples.augment import Rotation
from geo_pretrain.training.data.samples.clouds import Features
from geo_pretrain.training.losses.contrastive import partition_info_nce
from geo_pretrain.training.losses.fused import COLDEST
from geo_pretrain.training.tasks.base import Batch
from geo_pretrain.training.tasks.clouds import CloudConfig, CloudPairs
from geo_pretrain.training.tasks.matching import one_match_each


@dataclass(frozen=True)
class Config(CloudConfig):
    """Settings of the task; each default is the released code's."""

    features: Features = "rgb"
    rotation: Rotation = "upright"
    inner: Positive = 2.0  # voxels: closer rows are no negatives
    outer: Positive = 20.0  # voxels: border between near and far
    partitions: Literal[4, 8] = 4  # parts of the space around a row; the released files carry 8 or 4 in their names

    def check_settings(self, check: Checks) -> None:
        super().check_settings(check)
        accepted = f"at least {COLDEST:.4g}: below, exp(difference of cosines / temperature) may overflow float32"
        check(self.temperature >= COLDEST, "task.temperature", self.temperature, accepted)
        accepted = f"less than 'task.outer' {self.outer:g}: between the two lies the near part"
        check(self.inner < self.outer, "task.inner", self.inner, accepted)


class CSC(CloudPairs):
    """The partitioned PointInfoNCE of each pair; partitions are upright, so they are taken in world coordinates."""

    config_type = Config
    config: Config
    negatives = "sample"
    terms = ("partition",)

    def losses(
        self, batch: Batch, features1: Tensor, features2: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """The mean over the pairs of the batch that have a match."""
        config, voxel_size = self.config, self.spec.voxel_size
        losses = []
        for pair, matches in enumerate(batch["matches"].split(batch["matches_per_pair"])):
            if not len(matches):
                continue
            row1, row2 = one_match_each(matches, config.matches, generator).unbind(-1)
            world = transform(batch["points1"][row1].double(), batch["to_world1"][pair].double())
            losses.append(
                partition_info_nce(
                    features1[row1],
                    features2[row2],
                    (world - world.mean(dim=0)).float(),
                    temperature=config.temperature,
                    inner=config.inner * voxel_size,
                    outer=config.outer * voxel_size,
                    partitions=config.partitions,
                )
            )
        return (torch.stack(losses).mean(),)
