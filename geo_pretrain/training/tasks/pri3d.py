"""Pri3D: pixels of two frames, and pixels and voxels, that belong to one surface point get one feature.

Hou et al., "Pri3D: Can 3D Priors Help 2D Representation Learning?", ICCV 2021, sections 3.2 (view-invariant) and 3.3
(geometric prior); defaults are those of the released code (MIT), from which the published weights came, but for the
geometric matcher, whose tolerance lets in what lies behind. The paper's own numbers are options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from geo_pretrain.backbones.build import golden_values
from geo_pretrain.backbones.feature_pair import FeaturePair, pair_golden
from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.catalog.entry import Arch
from geo_pretrain.checkpoint import Pairing
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.geometry import match_pixels, seen_at
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.clouds import ChunkPairSamples, Features, collate_chunks
from geo_pretrain.training.data.samples.pairs import PairSamples
from geo_pretrain.training.data.samples.sampler import collate, sample_seed
from geo_pretrain.training.initialize import initialize, initialize_heads
from geo_pretrain.training.losses import depth_loss, info_nce
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks import Export
from geo_pretrain.training.tasks.clouds import encode, unet_args, zero

PROJECTION = 64  # channels in which pixels and voxels are compared


@dataclass(frozen=True)
class Config:
    """Settings of the task; each default is the released code's unless it says otherwise."""

    view: bool  # pixel to pixel; set by the task's name, as is geo
    geo: bool  # voxel to pixel
    temperature: float = 0.4
    matches: int = 1024  # sampled for each image pair, and for each chunk; the paper contrasts all
    tolerance: float = 0.05  # m; the paper: 0.02 with distance "euclidean"
    geo_tolerance: float | None = None  # m; None: 0.05, under match_released_code the released 0.2
    distance: Literal["depth", "euclidean"] = "depth"
    rounding: Literal["floor", "nearest"] = "floor"
    symmetric: bool = True  # the paper's eq. 1 is one-directional
    dedup: bool = False  # view: do not count samples of the same feature cell as negatives of each other
    depth_proxy: bool = True
    features: Features = "rgb"  # of voxels; "ones" is the paper's occupancy
    frustum: bool = False  # chunks fill the view frustum's box instead of whole meters
    keep_heads: bool = False  # start the 3D network, projections and depth head from the checkpoint in model.init too
    match_released_code: bool = False  # the released matchers with their defects, see geometry.match_pixels and seen_at

    def __post_init__(self) -> None:
        """Ranges."""
        for key in ("temperature", "matches", "tolerance", "geo_tolerance"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise RecipeError(f"'task.{key}' is {value!r}, accepted is a number above 0.")
        if not (self.view or self.geo or self.depth_proxy):
            raise RecipeError("'task.depth_proxy' is False, accepted here is True: nothing else would be learned.")


class Pri3D(nn.Module):
    """The 2D U-Net, the 3D one, projections and depth head; state keys are the released code's.

    `backbone.*`, and as the task has them `backbone3d.*`, `w2d.*`, `w3d.*`, `headnet.*`.
    """

    unit, views = "images", 2

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__()
        model = recipe.network2d()
        self.recipe, self.config = recipe, config
        self.contract = ImageContract(size=recipe.data.size)
        self.arch_args = {"depth": model.depth, "width": model.width}
        self.backbone = ResNetUNet(**self.arch_args)
        self.low_precision = recipe.precision == "bf16"
        channels = self.backbone.out_chans
        if config.depth_proxy:
            self.headnet = nn.Conv2d(channels, 1, 1)
        if config.geo:
            spec = recipe.network3d()
            self.voxel_size = spec.voxel_size
            args = unet_args(spec, normalize=False)
            self.backbone3d = SRUNet(**args, bn_momentum=spec.bn_momentum, init="kaiming")
            self.w2d = nn.Linear(channels, PROJECTION)
            self.w3d = nn.Linear(spec.out_chans, PROJECTION)

    def dataset(self, source: Source, pairs: list[Pair]) -> Dataset[dict[str, Any]]:
        """Pairs of images; with the geometric prior also the chunk of surface around each."""
        arguments = source, pairs, self.recipe.data, self.contract, self.recipe.seed
        if not self.config.geo:
            return PairSamples(*arguments)
        return ChunkPairSamples(
            *arguments,
            voxel_size=self.voxel_size,
            features=self.config.features,
            frustum=self.config.frustum,
            match_released_code=self.config.match_released_code,
        )

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch that `forward` takes."""
        return collate_chunks(samples) if self.config.geo else collate(samples)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch of pairs as `dataset` yields them, scalars: "view", "geo", "depth" as the task has them.

        The two images, and the two chunks, pass through their network in two calls, so that BatchNorm sees one view
        at a time.
        """
        features = [self._features(batch[f"image{k}"]) for k in (1, 2)]
        losses = {}
        used = torch.ones(len(batch["seed"]), dtype=torch.bool, device=features[0].device)
        if self.config.view:
            losses["view"], found = self._view_loss(batch, *features)
            used = found if self.config.match_released_code else used  # the released loop skips the whole pair
        if self.config.geo:
            terms = [self._geo_loss(batch, k, f, used) for k, f in enumerate(features, 1)]
            losses["geo"] = (terms[0] + terms[1]) / 2
        if self.config.depth_proxy:
            terms = [
                depth_loss(self._depth(f, batch[f"depth{k}"]), batch[f"depth{k}"]) for k, f in enumerate(features, 1)
            ]
            losses["depth"] = (terms[0] + terms[1]) / 2
        return losses

    def export(self) -> Export:
        """The U-Net in two files, everything else in a third."""
        backbone = ResNetUNet(**self.arch_args)
        backbone.load_state_dict(self.backbone.state_dict())
        backbone.eval()
        weights = {"encoder": backbone.encoder.state_dict(), "decoder": backbone.decoder.state_dict()}
        heads = {k: v.cpu() for k, v in self.state_dict().items() if not k.startswith("backbone.")}
        if heads:
            weights["heads"] = heads
        golden, args = golden_values(backbone), dict(self.arch_args)
        if not self.config.geo:
            return Export("resnet_unet", args, self.contract, weights, golden)
        spec = self.recipe.network3d()
        channels = ("R", "G", "B") if self.config.features == "rgb" else ("one", "one", "one")
        pairing = Pairing(
            Arch("sr_unet", unet_args(spec, normalize=False)),
            VoxelContract(voxel_size=spec.voxel_size, channels=channels),
            role="heads",
            prefix="backbone3d.",
            image_projection="w2d",
            point_projection="w3d",
            interpolation="nearest",
        )
        backbone.contract = self.contract
        golden |= pair_golden(FeaturePair.from_states(backbone, pairing, heads, heads))
        return Export("resnet_unet", args, self.contract, weights, golden, pairing)

    def _features(self, image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.low_precision):
            features: Tensor = self.backbone(image)
        return features.float()  # losses are computed in full precision

    def _depth(self, features: Tensor, target: Tensor) -> Tensor:
        return F.interpolate(self.headnet(features), size=target.shape[-2:], mode="bilinear", align_corners=True)

    def _view_loss(self, batch: Mapping[str, Any], features1: Tensor, features2: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and which pairs have a match: bool [B]."""
        config = self.config
        target = match_pixels(
            *(batch[f"{name}{k}"] for name in ("depth", "intrinsics", "cam_to_world") for k in (1, 2)),
            tolerance=config.tolerance,
            distance=config.distance,
            rounding=config.rounding,
            match_released_code=config.match_released_code,
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
        return torch.where(found, loss, 0).sum() / len(found), found

    def _geo_loss(self, batch: Mapping[str, Any], k: int, features: Tensor, used: Tensor) -> Tensor:
        """Voxels of chunk `k` of every pair against the pixels of frame `k` that see them; a mean over the batch."""
        coords, depth, matches = batch[f"coords{k}"], batch[f"depth{k}"], self.config.matches
        if not len(coords):
            return zero(self)
        voxels = encode(self.backbone3d, coords, batch[f"feats{k}"], low_precision=self.low_precision)
        rows, pixels, elements = [], [], []
        for element, target in enumerate(self._seen_voxels(batch, k)):
            if used[element] and (target >= 0).any():
                voxel, pixel, _ = sample_matches(target[None], [sample_seed(batch["seed"][element], k, 0)], matches)
                rows.append(voxel[0] + (coords[:, 0] < element).sum())
                pixels.append(pixel[0])
                elements.append(element)
        if not elements:
            return zero(self)
        cell = half_resolution_cell(torch.stack(pixels), depth.shape[-1], features.shape)
        loss = info_nce(
            self.w2d(gather_cells(features[elements], cell)),
            self.w3d(voxels[torch.stack(rows)]),
            temperature=self.config.temperature,
            symmetric=self.config.symmetric,
        )
        return loss.sum() / len(used)

    def _seen_voxels(self, batch: Mapping[str, Any], k: int) -> list[Tensor]:
        """For each pair the pixel of frame `k` that sees each voxel of its chunk: int64 [n], -1 for none."""
        config, coords = self.config, batch[f"coords{k}"]
        # The released matcher projects a voxel's corner.
        place, tolerance = (0.0, 0.2) if config.match_released_code else (0.5, 0.05)
        points = (coords[:, 1:].double() + place) * self.voxel_size
        return [
            seen_at(
                points[coords[:, 0] == element],
                *(batch[f"{name}{k}"][element] for name in ("depth", "intrinsics", "cam_to_world")),
                tolerance=config.geo_tolerance or tolerance,
                rounding=config.rounding,
                match_released_code=config.match_released_code,
            )
            for element in range(len(batch["seed"]))
        ]


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


def build(recipe: Recipe, config: Config) -> Pri3D:
    """The task, its weights drawn from the recipe's seed, its encoder started as the recipe says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        task = Pri3D(recipe, config)
    initialize(task.backbone, recipe)
    if config.keep_heads:
        initialize_heads(task, recipe.network2d().init)
    return task
