"""Pixel-level SimCLR: pixels of two augmented views that show the same pixel of an image get the same feature.

Stage 1 of Janda et al., "Self-Supervised Pre-training of 3D Point Cloud Networks with Image Data" (2022); its network
teaches stage 2, `tasks.img2pc`. The paper publishes no code and few numbers: it says that positives are the augmented
pixels that come from the same original pixel, that negatives are all others, also in other images of the batch,
that the augmentation is roughly SimCLR's, that the encoder starts from ImageNet and that there are 16 outputs.
Everything else is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from geo_pretrain.backbones.architectures import ARCHITECTURES, depth_unet_arch
from geo_pretrain.backbones.timm_names import contract_for
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.checks import Count, Positive, Probability, Shares
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.sampler import Samples
from geo_pretrain.training.data.samples.two_views import TwoViewSamples, ViewConfig
from geo_pretrain.training.losses.contrastive import nt_xent
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks.base import Batch, TaskConfig, same_settings
from geo_pretrain.training.tasks.images import ImageTask


@dataclass(frozen=True)
class Config(TaskConfig):
    """Settings of the task. Colors, gray and blur are `data.augment`'s."""

    temperature: Positive = 0.1  # SimCLR's
    matches: Count = 1024  # pixels of each image, each with its twin
    channels: Count = 16  # of the features
    scale: Shares = (0.2, 1.0)  # of the crops: share of the image's area
    flip_prob: Probability = 0.5
    scope: Literal["batch", "image"] = "batch"  # negatives: pixels of all local images, or of the same image
    negatives: Literal["both", "other"] = "both"  # of both views, as SimCLR's, or of the other view alone


class PixelSimCLR(ImageTask):
    """A `ResNetDepthUNet`, whose dense features at the image's resolution are contrasted; state keys `backbone.*`."""

    find_arch = staticmethod(depth_unet_arch)
    config_type = Config
    config: Config

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__(recipe, config, out_chans=config.channels)
        self.negatives = "micro-batch" if config.scope == "batch" else "sample"
        if recipe.data.units != "frames":
            raise RecipeError(f"'data.units' is {recipe.data.units!r}, accepted here is frames: images come alone.")
        contract = ImageContract(size=recipe.data.size, mean=(0.45,) * 3, std=(0.225,) * 3, interpolation="bilinear")
        self.contract = contract_for(recipe.network2d().encoder, contract)
        self.backbone = ARCHITECTURES[self.arch].load_class()(**self.arch_args)

    def dataset(self, source: Source, pairs: list[Pair]) -> Samples:
        """Two views of each image, with matching pixels."""
        views = same_settings(ViewConfig, self.config)
        return TwoViewSamples(*self.arguments(source, pairs), views=views, matches=self.config.matches)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch of `TwoViewSamples`: {"nce": a scalar}.

        All views pass through the network in one call, as in SimCLR. The mean is over the matches, so an image with
        few common pixels counts less, and one without counts nothing.
        """
        views = torch.cat([batch["image1"], batch["image2"]])
        with self.autocast(views.device):
            features: Tensor = self.backbone(views)
        rows = features.permute(0, 2, 3, 1).flatten(0, 2)
        matches = batch["matches"]
        if not len(matches):
            return {"nce": self.zero_loss()}
        # Losses are computed in full precision.
        pixels1, pixels2 = (
            F.normalize(rows[matches[:, view] + view * (len(rows) // 2)].float(), dim=1) for view in (0, 1)
        )
        if self.config.scope == "batch":
            return {"nce": self._loss(pixels1, pixels2)}
        parts = zip(*(pixels.split(batch["matches_per_image"]) for pixels in (pixels1, pixels2)), strict=True)
        terms = [self._loss(*part) * len(part[0]) for part in parts if len(part[0])]
        return {"nce": torch.stack(terms).sum() / len(matches)}

    def _loss(self, pixels1: Tensor, pixels2: Tensor) -> Tensor:
        return nt_xent(pixels1, pixels2, temperature=self.config.temperature, negatives=self.config.negatives)
