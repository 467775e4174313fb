"""Shared parts of tasks on images: a 2D U-Net, Pri3D's depth proxy, and their export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain.backbones.architectures import ARCHITECTURES, Arch, encoder_arch, unet_arch
from geo_pretrain.backbones.timm_names import contract_for
from geo_pretrain.contract import ImageContract
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.initialize import initialize_encoder
from geo_pretrain.training.losses.depth import depth_loss
from geo_pretrain.training.recipe import DataSpec, Recipe
from geo_pretrain.training.tasks.base import PretextTask, TaskConfig


class ImageTask(PretextTask):
    """A task on images: the architecture of its network, by default an encoder, its arguments and start weights."""

    contract: ImageContract
    find_arch: ClassVar[Callable[..., Arch]] = staticmethod(encoder_arch)  # of an encoder's name and width

    def __init__(self, recipe: Recipe, config: TaskConfig, **args: Any) -> None:
        super().__init__(recipe, config)
        model = recipe.network2d()
        self.contract = contract_for(model.encoder, ImageContract(size=recipe.data.size))
        arch = self.find_arch(model.encoder, width=model.width)
        self.arch, self.arch_args = arch.name, {**arch.args, **args}

    def load_start_weights(self) -> None:
        initialize_encoder(self.backbone, self.recipe.network2d())

    def arguments(self, source: Source, pairs: list[Pair]) -> tuple[Source, list[Pair], DataSpec, int, ImageContract]:
        """The first arguments of all image samples: source, pairs, data section, seed and contract."""
        return source, pairs, self.recipe.data, self.recipe.seed, self.contract


@dataclass(frozen=True, kw_only=True)
class ImageUNetConfig(TaskConfig):
    """The settings that all tasks on pairs of views with a 2D U-Net share."""

    joint: bool = False  # both views in one batch, BatchNorm over both; Pri3D's code passes one after the other


class ImageUNetTask(ImageTask):
    """Pri3D's 2D U-Net `backbone.*` and, with `depth_proxy`, its depth head `headnet.*`; the loss is a subclass's."""

    find_arch = staticmethod(unet_arch)

    def __init__(self, recipe: Recipe, config: ImageUNetConfig, *, depth_proxy: bool) -> None:
        super().__init__(recipe, config)
        self.backbone = ARCHITECTURES[self.arch].load_class()(**self.arch_args)
        if depth_proxy:
            self.headnet = nn.Conv2d(self.backbone.out_chans, 1, 1)

    def features(self, images: Tensor) -> Tensor:
        """Features of images [B, 3, H, W] at half resolution: float32 [B, C, h, w]."""
        (features,) = self.features_of(images)
        return features

    def features_of(self, *views: Tensor) -> list[Tensor]:
        """The features of each of several views [B, 3, H, W], see `features`.

        Views are passed one after the other, so that BatchNorm sees one view at a time; weights are cast once for all.
        With `joint` in one call, which is quicker where views are small, and BatchNorm sees all of them.
        """
        with self.autocast(views[0].device):
            if isinstance(self.config, ImageUNetConfig) and self.config.joint:
                maps = self.backbone(torch.cat(views)).chunk(len(views))
            else:
                maps = [self.backbone(images) for images in views]
        return [features.float() for features in maps]

    def depth_proxy_loss(self, features: Sequence[Tensor], depths: Sequence[Tensor]) -> Tensor:
        """The mean of Pri3D's depth loss over the two views of a batch."""
        view1, view2 = (depth_loss(self.predict_depth(*view), view[1]) for view in zip(features, depths, strict=True))
        return (view1 + view2) / 2

    def predict_depth(self, features: Tensor, target: Tensor) -> Tensor:
        """Depth [B, 1, H, W] predicted from features [B, C, h, w], as large as `target` [B, H, W]."""
        return F.interpolate(self.headnet(features), size=target.shape[-2:], mode="bilinear", align_corners=True)
