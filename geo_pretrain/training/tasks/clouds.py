"""Shared parts of tasks on pairs of clouds: settings, samples, and the network with the compared outputs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.training.checks import Count, Positive
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.clouds import CloudPairSamples, PairCloudConfig, PairCloudSettings
from geo_pretrain.training.data.samples.sampler import Samples
from geo_pretrain.training.networks3d import encode, unet_args, voxel_contract
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks.base import Batch, PretextTask, TaskConfig, same_settings


@dataclass(frozen=True)
class CloudConfig(PairCloudSettings, TaskConfig):
    """Settings of every task on pairs of clouds; each default is PointContrast's released code's."""

    temperature: Positive = 0.4
    matches: Count = 4096  # anchors of a process's batch, or of a pair where the task contrasts pair by pair


class CloudPairs(PretextTask):
    """A sparse U-Net whose normalized outputs are compared at the matches of two clouds; the loss is a subclass's."""

    config: CloudConfig
    arch = "sr_unet"
    unit = "clouds"
    terms: tuple[str, ...]  # names of the losses

    def __init__(self, recipe: Recipe, config: CloudConfig) -> None:
        super().__init__(recipe, config)
        self.spec = recipe.network3d()
        self.contract = voxel_contract(self.spec, config.features)
        self.arch_args = unet_args(self.spec, normalize=True)
        self.backbone = SRUNet(**self.arch_args, bn_momentum=self.spec.bn_momentum)

    def dataset(self, source: Source, pairs: list[Pair]) -> Samples:
        """Pairs of voxelized clouds with their matches."""
        spec = same_settings(PairCloudConfig, self.config, voxel_size=self.spec.voxel_size)
        return CloudPairSamples(source, pairs, self.recipe.data, self.recipe.seed, spec)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch of `CloudPairSamples`, scalars.

        The two views pass through the network in two calls, so that BatchNorm sees one at a time.
        """
        if not len(batch["matches"]):
            return dict.fromkeys(self.terms, self.zero_loss())
        view1, view2 = (
            encode(self.backbone, batch[f"coords{k}"], batch[f"feats{k}"], low_precision=self.low_precision)
            for k in (1, 2)
        )
        generator = torch.Generator().manual_seed(batch["seed"][0])  # one stream of draws for the whole batch
        return dict(zip(self.terms, self.losses(batch, view1, view2, generator), strict=True))

    @abstractmethod
    def losses(
        self, batch: Batch, features1: Tensor, features2: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """One scalar for each of `terms`. features1, features2: [N, C], unit rows; there is at least one match."""
