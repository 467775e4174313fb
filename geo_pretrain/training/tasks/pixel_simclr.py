"""Pixel-level SimCLR: pixels of two augmented views of one image that show one pixel of it get one feature.

Stage 1 of Janda et al., "Self-Supervised Pre-training of 3D Point Cloud Networks with Image Data" (2022); its network
teaches stage 2, `tasks.img2pc`. The paper publishes no code and few numbers: it says that positives are the augmented
pixels that come from the same original pixel, that negatives are all others, those of other images of the batch
included, that the augmentation is roughly SimCLR's, that the encoder starts from ImageNet and that there are 16
outputs. Everything else is our reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from geo_pretrain.backbones.build import golden_values
from geo_pretrain.backbones.depth_unet import ResNetDepthUNet
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.two_views import TwoViewSamples, ViewConfig, collate_views
from geo_pretrain.training.initialize import initialize_encoder
from geo_pretrain.training.losses import nt_xent
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks import Export
from geo_pretrain.training.tasks.clouds import zero


@dataclass(frozen=True)
class Config:
    """Settings of the task. Colors, gray and blur are `data.augment`'s."""

    temperature: float = 0.1  # SimCLR's
    matches: int = 1024  # pixels of each image, each with its twin
    channels: int = 16  # of the features
    scale: tuple[float, float] = (0.2, 1.0)  # of the crops: share of the image's area
    flip_prob: float = 0.5
    scope: Literal["batch", "image"] = "batch"  # negatives: pixels of all images of the local batch, or of the own
    negatives: Literal["both", "other"] = "both"  # of both views, as SimCLR's, or of the other view alone

    def __post_init__(self) -> None:
        """Ranges."""
        for key in ("temperature", "matches", "channels"):
            if not getattr(self, key) > 0:
                raise RecipeError(f"'task.{key}' is {getattr(self, key)!r}, accepted is a number above 0.")
        if not 0 <= self.flip_prob <= 1:
            raise RecipeError(f"'task.flip_prob' is {self.flip_prob!r}, accepted is a probability, 0 to 1.")
        self.views()

    def views(self) -> ViewConfig:
        """How views are cut."""
        return ViewConfig(scale=self.scale, flip_prob=self.flip_prob)


class PixelSimCLR(nn.Module):
    """A `ResNetDepthUNet`, whose dense features at the image's resolution are contrasted; state keys `backbone.*`."""

    unit, views = "images", 2

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__()
        if recipe.data.units != "frames":
            raise RecipeError(f"'data.units' is {recipe.data.units!r}, accepted here is frames: images come alone.")
        model = recipe.network2d()
        self.recipe, self.config = recipe, config
        self.contract = ImageContract(
            size=recipe.data.size, mean=(0.45,) * 3, std=(0.225,) * 3, interpolation="bilinear"
        )
        self.arch_args = {"depth": model.depth, "width": model.width, "out_chans": config.channels}
        self.backbone = ResNetDepthUNet(**self.arch_args)

    def dataset(self, source: Source, pairs: list[Pair]) -> Dataset[dict[str, Any]]:
        """Two views of each image, with matching pixels."""
        return TwoViewSamples(
            source,
            pairs,
            self.recipe.data,
            self.contract,
            self.recipe.seed,
            views=self.config.views(),
            matches=self.config.matches,
        )

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch that `forward` takes."""
        return collate_views(samples)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The loss of a batch as `TwoViewSamples` yields it: "nce", a scalar.

        All views pass through the network in one call, as in SimCLR. The mean is over the matches, so an image with
        few common pixels counts less, and one without counts nothing.
        """
        views = torch.cat([batch["image1"], batch["image2"]])
        with torch.autocast(views.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            features: Tensor = self.backbone(views)
        rows = features.permute(0, 2, 3, 1).flatten(0, 2)
        matches = batch["matches"]
        if not len(matches):
            return {"nce": zero(self)}
        # Losses are computed in full precision.
        pixels1, pixels2 = (
            F.normalize(rows[matches[:, view] + view * (len(rows) // 2)].float(), dim=1) for view in (0, 1)
        )
        if self.config.scope == "batch":
            return {"nce": self._loss(pixels1, pixels2)}
        parts = zip(*(pixels.split(batch["matches_per_image"]) for pixels in (pixels1, pixels2)), strict=True)
        terms = [self._loss(*part) * len(part[0]) for part in parts if len(part[0])]
        return {"nce": torch.stack(terms).sum() / len(matches)}

    def export(self) -> Export:
        """The network in two files."""
        network = ResNetDepthUNet(**self.arch_args)
        network.load_state_dict(self.backbone.state_dict())
        network.eval()
        weights = {"encoder": network.encoder.state_dict(), "decoder": network.decoder.state_dict()}
        return Export("resnet_depth_unet", dict(self.arch_args), self.contract, weights, golden_values(network))

    def _loss(self, pixels1: Tensor, pixels2: Tensor) -> Tensor:
        return nt_xent(pixels1, pixels2, temperature=self.config.temperature, negatives=self.config.negatives)


def build(recipe: Recipe, config: Config) -> PixelSimCLR:
    """The task, its weights drawn from the recipe's seed, its encoder started as the recipe says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        task = PixelSimCLR(recipe, config)
    initialize_encoder(task.backbone, recipe.network2d())
    return task
