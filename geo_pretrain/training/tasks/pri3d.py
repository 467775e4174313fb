"""Pri3D: pixels of two frames, and pixels and voxels, that show the same surface point get the same feature.

Hou et al., "Pri3D: Can 3D Priors Help 2D Representation Learning?", ICCV 2021, sections 3.2 (view-invariant) and 3.3
(geometric prior). Defaults are those of the released code (MIT), from which the published weights came, except for the
geometric matcher, whose tolerance also accepts voxels behind the surface. The paper's own numbers are options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from geo_pretrain.backbones.architectures import Arch
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.checkpoint import Pairing
from geo_pretrain.contract import VoxelContract
from geo_pretrain.geometry import match_pixels, seen_at
from geo_pretrain.training.checks import Checks, Count, Positive
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.clouds import ChunkPairSamples, Features
from geo_pretrain.training.data.samples.pairs import PairSamples
from geo_pretrain.training.data.samples.sampler import Samples, sample_seed
from geo_pretrain.training.initialize import initialize_heads
from geo_pretrain.training.losses.contrastive import info_nce
from geo_pretrain.training.networks3d import CHANNELS, encode, unet_args
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks.base import Batch, same_settings
from geo_pretrain.training.tasks.images import ImageUNetConfig, ImageUNetTask
from geo_pretrain.training.tasks.matching import gather_cells, half_resolution_cell, sample_matches

PROJECTION = 64  # channels in which pixels and voxels are compared
CAMERA = ("depth", "intrinsics", "cam_to_world")  # what a batch holds of each frame, beside its image


@dataclass(frozen=True)
class Config(ImageUNetConfig):
    """Settings of the task; each default is the released code's unless it says otherwise."""

    view: bool  # pixel to pixel; set by the task's name, as is geo
    geo: bool  # voxel to pixel
    temperature: Positive = 0.4
    matches: Count = 1024  # sampled for each image pair, and for each chunk; the paper contrasts all
    tolerance: Positive = 0.05  # m; the paper: 0.02 with distance "euclidean"
    geo_tolerance: Positive | None = None  # m; None: 0.05, under match_released_code the released 0.2
    distance: Literal["depth", "euclidean"] = "depth"
    rounding: Literal["floor", "nearest"] = "floor"
    symmetric: bool = True  # the paper's eq. 1 is one-directional
    dedup: bool = False  # view: do not count samples of the same feature cell as negatives of each other
    depth_proxy: bool = True
    features: Features = "rgb"  # of voxels; "ones" is the paper's occupancy
    frustum: bool = False  # chunks fill the view frustum's box instead of whole meters
    keep_heads: bool = False  # start the 3D network, projections and depth head from the checkpoint in model.init too
    match_released_code: bool = False  # the released matchers with their defects, see geometry.match_pixels and seen_at

    def check_settings(self, check: Checks) -> None:
        if not (self.view or self.geo or self.depth_proxy):
            text = "'task.depth_proxy' is False, accepted here is True: nothing else would be learned."
            check.note(text, "task.depth_proxy")

    def unused(self) -> dict[str, str]:
        only_geo = ("geo_tolerance", "features", "frustum")
        only_view = ("tolerance", "distance", "dedup")
        either = ("temperature", "matches", "rounding", "symmetric", "match_released_code")
        return {
            **({} if self.geo else dict.fromkeys(only_geo, "the geometric prior")),
            **({} if self.view else dict.fromkeys(only_view, "the view-invariant loss")),
            **({} if self.view or self.geo else dict.fromkeys(either, "the contrastive losses")),
        }


class Pri3D(ImageUNetTask):
    """The 2D U-Net with depth head and, for the geometric prior, a 3D U-Net; state keys are the released code's.

    `backbone.*`, and as the task has them `headnet.*`, `backbone3d.*`, `w2d.*`, `w3d.*`.
    """

    config_type = Config
    config: Config

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__(recipe, config, depth_proxy=config.depth_proxy)
        self.negatives = "sample" if config.view or config.geo else ""
        if config.geo:
            spec = recipe.network3d()
            self.voxel_size = spec.voxel_size
            self.arch_args3d = unet_args(spec)
            self.backbone3d = SRUNet(**self.arch_args3d, bn_momentum=spec.bn_momentum, init="kaiming")
            self.w2d = nn.Linear(self.backbone.out_chans, PROJECTION)
            self.w3d = nn.Linear(spec.out_chans, PROJECTION)

    def load_start_weights(self) -> None:
        """The U-Net's start weights, and with `keep_heads` everything else's too."""
        super().load_start_weights()
        if self.config.keep_heads:
            initialize_heads(self, self.recipe.network2d().init)

    def dataset(self, source: Source, pairs: list[Pair]) -> Samples:
        """Pairs of images; with the geometric prior also the chunk of surface around each."""
        first = self.arguments(source, pairs)
        if not self.config.geo:
            return PairSamples(*first)
        return same_settings(ChunkPairSamples, self.config, *first, voxel_size=self.voxel_size)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch of pairs, scalars: "view", "geo", "depth" as the task has them."""
        features1, features2 = self.features_of(batch["image1"], batch["image2"])
        losses = {}
        used = torch.ones(len(batch["seed"]), dtype=torch.bool, device=features1.device)
        if self.config.view:
            losses["view"], matched = self.view_loss(batch, features1, features2)
            used = matched if self.config.match_released_code else used  # the released loop skips the whole pair
        if self.config.geo:
            losses["geo"] = (self.geo_loss(batch, 1, features1, used) + self.geo_loss(batch, 2, features2, used)) / 2
        if self.config.depth_proxy:
            losses["depth"] = self.depth_proxy_loss((features1, features2), (batch["depth1"], batch["depth2"]))
        return losses

    def view_loss(self, batch: Batch, features1: Tensor, features2: Tensor) -> tuple[Tensor, Tensor]:
        """The pixel-to-pixel loss, a scalar, and which pairs have a match: bool [B]."""
        config = self.config
        target = match_pixels(
            *(batch[f"{name}{k}"] for name in CAMERA for k in (1, 2)),
            tolerance=config.tolerance,
            distance=config.distance,
            rounding=config.rounding,
            match_released_code=config.match_released_code,
        )
        pixel1, pixel2, matched = sample_matches(target, batch["seed"], config.matches)
        cell1 = half_resolution_cell(pixel1, batch["depth1"].shape[-1], features1.shape)
        cell2 = half_resolution_cell(pixel2, batch["depth2"].shape[-1], features2.shape)
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
        return torch.where(matched, loss, 0).sum() / len(matched), matched

    def geo_loss(self, batch: Batch, k: int, features: Tensor, used: Tensor) -> Tensor:
        """The loss of the voxels of chunk `k` against the pixels of frame `k` that see them; a mean over the batch."""
        coords, depth = batch[f"coords{k}"], batch[f"depth{k}"]
        if not len(coords):
            return self.zero_loss()
        voxels = encode(self.backbone3d, coords, batch[f"feats{k}"], low_precision=self.low_precision)
        rows, pixels, elements = [], [], []
        for element, target in enumerate(seen_voxels(batch, k, self.voxel_size, self.config)):
            if used[element] and (target >= 0).any():
                seed = sample_seed(batch["seed"][element], k, 0)
                voxel, pixel, _ = sample_matches(target[None], [seed], self.config.matches)
                rows.append(voxel[0] + (coords[:, 0] < element).sum())
                pixels.append(pixel[0])
                elements.append(element)
        if not elements:
            return self.zero_loss()
        cell = half_resolution_cell(torch.stack(pixels), depth.shape[-1], features.shape)
        loss = info_nce(
            self.w2d(gather_cells(features[elements], cell)),
            self.w3d(voxels[torch.stack(rows)]),
            temperature=self.config.temperature,
            symmetric=self.config.symmetric,
        )
        return loss.sum() / len(used)

    def pairing(self) -> Pairing | None:
        """How a checkpoint folder finds the 3D network and the projections among the heads."""
        if not self.config.geo:
            return None
        channels = CHANNELS[self.config.features]
        return Pairing(
            Arch("sr_unet", self.arch_args3d),
            VoxelContract(voxel_size=self.voxel_size, channels=channels),
            role="heads",
            prefix="backbone3d.",
            image_projection="w2d",
            point_projection="w3d",
            interpolation="nearest",
        )


def seen_voxels(batch: Batch, k: int, voxel_size: float, config: Config) -> list[Tensor]:
    """For each pair the pixel of frame `k` that sees each voxel of its chunk: int64 [n], -1 for none."""
    coords = batch[f"coords{k}"]
    # The released matcher projects a voxel's corner instead of its center.
    offset, tolerance = (0.0, 0.2) if config.match_released_code else (0.5, 0.05)
    points = (coords[:, 1:].double() + offset) * voxel_size
    return [
        seen_at(
            points[coords[:, 0] == element],
            *(batch[f"{name}{k}"][element] for name in CAMERA),
            tolerance=config.geo_tolerance or tolerance,
            rounding=config.rounding,
            match_released_code=config.match_released_code,
        )
        for element in range(len(batch["seed"]))
    ]
