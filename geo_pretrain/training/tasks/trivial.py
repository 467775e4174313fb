"""Trivial correspondences: equal pixels of two color augmentations of one frame get one feature.

The baseline of Pri3D (Hou et al., ICCV 2021, table 1) that has its network, its loss and its pixels, and no 3D: what is
learned from a second look at the same frame. Colors are changed as `data.augment` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from geo_pretrain.backbones.build import golden_values
from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.sampler import collate
from geo_pretrain.training.data.samples.single_images import TwoColorViews
from geo_pretrain.training.initialize import initialize
from geo_pretrain.training.losses import depth_loss, info_nce
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks import Export
from geo_pretrain.training.tasks.pri3d import gather_cells, half_resolution_cell, sample_matches


@dataclass(frozen=True)
class Config:
    """Settings of the task; each default is the released code's."""

    temperature: float = 0.4
    matches: int = 1024  # pixels sampled for each frame
    symmetric: bool = True
    dedup: bool = False  # do not count samples of the same feature cell as negatives of each other
    blur_taps: int | None = 25  # of the Gaussian, its sigma in data.augment.blur_radius; null: Pillow's blur
    depth_proxy: bool = False  # the baseline knows no depth; true: with Pri3D's second loss

    def __post_init__(self) -> None:
        """Ranges."""
        for key in ("temperature", "matches"):
            if not getattr(self, key) > 0:
                raise RecipeError(f"'task.{key}' is {getattr(self, key)!r}, accepted is a number above 0.")
        if self.blur_taps is not None and (self.blur_taps < 1 or self.blur_taps % 2 == 0):
            raise RecipeError(f"'task.blur_taps' is {self.blur_taps}, accepted is an odd number from 1 up, or null.")


class Trivial(nn.Module):
    """The 2D U-Net, and the depth head where there is one; state keys are Pri3D's."""

    unit, views = "images", 2

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__()
        model = recipe.network2d()
        self.recipe, self.config = recipe, config
        self.contract = ImageContract(size=recipe.data.size)
        self.arch_args = {"depth": model.depth, "width": model.width}
        self.backbone = ResNetUNet(**self.arch_args)
        if config.depth_proxy:
            self.headnet = nn.Conv2d(self.backbone.out_chans, 1, 1)

    def dataset(self, source: Source, pairs: list[Pair]) -> Dataset[dict[str, Any]]:
        """Single frames, each augmented twice."""
        arguments = source, pairs, self.recipe.data, self.contract, self.recipe.seed
        return TwoColorViews(*arguments, blur_taps=self.config.blur_taps)

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch that `forward` takes."""
        return collate(samples)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch as `dataset` yields it, scalars: "trivial", and "depth" with the depth proxy.

        The two images pass through the network in two calls, so that BatchNorm sees one view at a time.
        """
        config, depth = self.config, batch["depth"]
        features1, features2 = (self._features(batch[f"image{k}"]) for k in (1, 2))
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
            losses["depth"] = (self._depth_loss(features1, depth) + self._depth_loss(features2, depth)) / 2
        return losses

    def export(self) -> Export:
        """The U-Net in two files, its depth head in a third."""
        backbone = ResNetUNet(**self.arch_args)
        backbone.load_state_dict(self.backbone.state_dict())
        backbone.eval()
        weights = {"encoder": backbone.encoder.state_dict(), "decoder": backbone.decoder.state_dict()}
        if self.config.depth_proxy:
            weights["heads"] = {f"headnet.{key}": value.cpu() for key, value in self.headnet.state_dict().items()}
        return Export("resnet_unet", dict(self.arch_args), self.contract, weights, golden_values(backbone))

    def _features(self, image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            features: Tensor = self.backbone(image)
        return features.float()  # losses are computed in full precision

    def _depth_loss(self, features: Tensor, depth: Tensor) -> Tensor:
        size = depth.shape[-2:]
        prediction = F.interpolate(self.headnet(features), size=size, mode="bilinear", align_corners=True)
        return depth_loss(prediction, depth)


def build(recipe: Recipe, config: Config) -> Trivial:
    """The task, its weights drawn from the recipe's seed, its encoder started as the recipe says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        task = Trivial(recipe, config)
    initialize(task.backbone, recipe)
    return task
