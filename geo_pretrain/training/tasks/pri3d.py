"""Pri3D, view-invariant: pixels of two frames that see one surface point get one feature.

Hou et al., "Pri3D: Can 3D Priors Help 2D Representation Learning?", ICCV 2021, section 3.2; defaults are those of the
released code (MIT), from which the published weights came. The paper's own numbers are options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.geometry import match_pixels
from geo_pretrain.training.initialise import initialise_encoder
from geo_pretrain.training.losses import depth_loss, info_nce
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks import Export


@dataclass(frozen=True)
class Config:
    """Settings of the task; each default is the released code's."""

    temperature: float = 0.4
    matches: int = 1024  # sampled for each image pair; the paper contrasts all
    tolerance: float = 0.05  # m; the paper: 0.02 with distance "euclidean"
    distance: Literal["depth", "euclidean"] = "depth"
    rounding: Literal["floor", "nearest"] = "floor"
    symmetric: bool = True  # the paper's eq. 1 is one-directional
    dedup: bool = False  # do not count samples of the same feature cell as negatives of each other
    depth_proxy: bool = True
    authors_exact: bool = False  # the released matcher with its defects, see geometry.match_pixels

    def __post_init__(self) -> None:
        """Ranges."""
        for key in ("temperature", "matches", "tolerance"):
            if not getattr(self, key) > 0:
                raise RecipeError(f"'task.{key}' is {getattr(self, key)!r}, accepted is a number above 0.")


class Pri3DView(nn.Module):
    """The 2D U-Net and its depth head; state keys are the released code's (`backbone.*`, `headnet.*`)."""

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__()
        self.config = config
        self.contract = ImageContract(size=recipe.data.size)
        self.arch_args = {"depth": recipe.model.depth, "width": recipe.model.width}
        self.backbone = ResNetUNet(**self.arch_args)
        self.low_precision = recipe.precision == "bf16"
        if config.depth_proxy:
            self.headnet = nn.Conv2d(self.backbone.decoder.conv0.out_channels, 1, 1)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch of pairs as `samples.PairSamples` yields them: {"view": ..., "depth": ...}, scalars.

        The two images pass through the network in two calls, so that BatchNorm sees one view at a time.
        """
        features = [self._features(batch[f"image{k}"]) for k in (1, 2)]
        losses = {"view": self._view_loss(batch, *features)}
        if self.config.depth_proxy:
            terms = [
                depth_loss(self._depth(f, batch[f"depth{k}"]), batch[f"depth{k}"]) for k, f in enumerate(features, 1)
            ]
            losses["depth"] = (terms[0] + terms[1]) / 2
        return losses

    def export(self) -> Export:
        """The U-Net in two files, the depth head in a third."""
        backbone = ResNetUNet(**self.arch_args)
        backbone.load_state_dict(self.backbone.state_dict())
        backbone.eval()
        image = torch.randn((1, 3, 64, 96), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            golden = {f"encoder.{i}": value for i, value in enumerate(backbone.encoder(image))}
            golden |= {"input": image, "decoder": backbone(image)}
        weights = {"encoder": backbone.encoder.state_dict(), "decoder": backbone.decoder.state_dict()}
        if self.config.depth_proxy:
            weights["heads"] = {k: v.cpu() for k, v in self.state_dict().items() if k.startswith("headnet.")}
        return Export("resnet_unet", dict(self.arch_args), self.contract, weights, golden)

    def _features(self, image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.low_precision):
            features: Tensor = self.backbone(image)
        return features.float()  # losses are computed in full precision

    def _depth(self, features: Tensor, target: Tensor) -> Tensor:
        return F.interpolate(self.headnet(features), size=target.shape[-2:], mode="bilinear", align_corners=True)

    def _view_loss(self, batch: Mapping[str, Any], features1: Tensor, features2: Tensor) -> Tensor:
        config = self.config
        target = match_pixels(
            *(batch[f"{name}{k}"] for name in ("depth", "intrinsics", "cam_to_world") for k in (1, 2)),
            tolerance=config.tolerance,
            distance=config.distance,
            rounding=config.rounding,
            authors_exact=config.authors_exact,
        )
        pixel1, pixel2, found = sample_matches(target, batch["seed"], config.matches)
        cell1, cell2 = (
            half_resolution_cell(pixel, batch[f"depth{k}"].shape[-1], features.shape)
            for k, pixel, features in ((1, pixel1, features1), (2, pixel2, features2))
        )
        ignore = None
        if config.dedup:
            ignore = (cell1[:, :, None] == cell1[:, None]) | (cell2[:, :, None] == cell2[:, None])
        loss = info_nce(
            gather_cells(features1, cell1),
            gather_cells(features2, cell2),
            temperature=config.temperature,
            symmetric=config.symmetric,
            ignore=ignore,
        )
        # A pair without a match contributes nothing, but still counts in the batch, as in the released code.
        return torch.where(found, loss, 0).sum() / len(found)


def sample_matches(target: Tensor, seeds: Sequence[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `count` matches of each pair uniformly: without replacement, or with it where there are fewer.

    Args:
        target: int64 [B, P] from `match_pixels`: the matched pixel of each pixel, -1 for none.
        seeds: one integer a pair; the draw of a pair depends on its seed alone, not on its batch or device.

    Returns:
        pixel1, pixel2: int64 [B, count] (all 0 for a pair without a match); found: bool [B].
    """
    pixels = target.shape[-1]
    draws = [torch.rand(pixels + count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    draw = torch.stack(draws).to(target.device)
    matched = target >= 0
    available = matched.sum(-1, keepdim=True)
    order = (draw[:, :pixels] + 2 * ~matched).argsort(-1)  # matched pixels first, in random order
    rank = torch.arange(count, device=target.device).expand(len(target), -1)
    again = (draw[:, pixels:] * available).long()
    pixel1 = order.gather(-1, torch.where(available >= count, rank, again))
    found = available[:, 0] > 0
    pixel1 = torch.where(found[:, None], pixel1, 0)
    return pixel1, target.gather(-1, pixel1).clamp(min=0), found


def half_resolution_cell(pixel: Tensor, width: int, features: torch.Size) -> Tensor:
    """Flat cell of a feature map [B, C, h, w] at half resolution for flat pixel indices: row // 2, column // 2.

    Equal to the released round((p - 0.5) / 2) for whole p.
    """
    row = (pixel // width // 2).clamp(max=features[-2] - 1)
    column = (pixel % width // 2).clamp(max=features[-1] - 1)
    return row * features[-1] + column


def gather_cells(features: Tensor, cell: Tensor) -> Tensor:
    """Features [B, C, h, w] at flat cells [B, N]: [B, N, C]."""
    flat = features.flatten(2)
    return flat.gather(2, cell[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)


def build(recipe: Recipe, config: Config) -> Pri3DView:
    """The task, its weights drawn from the recipe's seed, its encoder started as the recipe says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        task = Pri3DView(recipe, config)
    initialise_encoder(task.backbone, recipe.model)
    return task
