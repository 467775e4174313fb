"""What tasks with a sparse 3D network share: the frame of a task on pairs of clouds, sampling of matches, export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from geo_pretrain.backbones.build import golden_values
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.augment import Rotation
from geo_pretrain.training.data.samples.clouds import CloudPairSamples, Features, PairCloudConfig, collate_clouds
from geo_pretrain.training.recipe import Recipe, UNet3DSpec
from geo_pretrain.training.tasks import Export

CHANNELS = {"ones": ("one", "one", "one"), "rgb": ("R", "G", "B")}


@dataclass(frozen=True)
class CloudConfig:
    """Settings of every task on pairs of clouds; each default is PointContrast's released code's."""

    radius: float | None = None  # m, of matches; None: 1.5 voxels
    features: Features = "ones"
    rotation: Rotation = "full"
    jitter: float = 0.01  # noise on the features
    jitter_prob: float = 0.95
    temperature: float = 0.4
    matches: int = 4096  # anchors of a process's batch, or of a pair where the task contrasts pair by pair
    match_released_code: bool = False  # a pair without matches gets a dummy one

    def __post_init__(self) -> None:
        """Ranges."""
        self.require_positive("temperature", "matches", "radius")

    def require_positive(self, *keys: str) -> None:
        """Raise `RecipeError` for a setting that is given and not above 0."""
        for key in keys:
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise RecipeError(f"'task.{key}' is {value!r}, accepted is a number above 0.")


class CloudPairs(nn.Module, ABC):
    """A sparse U-Net whose normalized outputs are compared at the matches of two clouds; the loss is a subclass's."""

    unit, views = "clouds", 2
    terms: tuple[str, ...]  # names of the losses

    def __init__(self, recipe: Recipe, config: CloudConfig) -> None:
        super().__init__()
        self.recipe, self.spec, self.clouds = recipe, recipe.network3d(), config
        self.contract = voxel_contract(self.spec, config.features)
        self.arch_args = unet_args(self.spec, normalize=True)
        self.backbone = SRUNet(**self.arch_args, bn_momentum=self.spec.bn_momentum)

    def dataset(self, source: Source, pairs: list[Pair]) -> Dataset[dict[str, Any]]:
        """Pairs of voxelized clouds with their matches."""
        config = self.clouds
        spec = PairCloudConfig(
            voxel_size=self.spec.voxel_size,
            radius=config.radius,
            features=config.features,
            rotation=config.rotation,
            jitter=config.jitter,
            jitter_prob=config.jitter_prob,
            match_released_code=config.match_released_code,
        )
        return CloudPairSamples(source, pairs, self.recipe.data, spec, self.recipe.seed)

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch that `forward` takes."""
        return collate_clouds(samples)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch as `CloudPairSamples` yields it, scalars.

        The two views pass through the network in two calls, so that BatchNorm sees one at a time.
        """
        if not len(batch["matches"]):
            return dict.fromkeys(self.terms, zero(self))
        low = self.recipe.precision == "bf16"
        view1, view2 = (
            encode(self.backbone, batch[f"coords{k}"], batch[f"feats{k}"], low_precision=low) for k in (1, 2)
        )
        generator = torch.Generator().manual_seed(batch["seed"][0])  # one stream of draws for the whole batch
        return dict(zip(self.terms, self.losses(batch, view1, view2, generator), strict=True))

    @abstractmethod
    def losses(
        self, batch: Mapping[str, Any], features1: Tensor, features2: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """One scalar for each of `terms`. features1, features2: [N, C], unit rows; there is at least one match."""

    def export(self) -> Export:
        """The network, its last layer included, with golden values on seeded random voxels."""
        network = SRUNet(**self.arch_args)
        network.load_state_dict(self.backbone.state_dict())
        network.eval()
        golden = golden_values(network, ones=self.clouds.features == "ones")
        return Export("sr_unet", dict(self.arch_args), self.contract, {"model": network.state_dict()}, golden)


def unet_args(spec: UNet3DSpec, *, normalize: bool) -> dict[str, Any]:
    """The arguments of `SRUNet` that a checkpoint folder states: those that change its outputs."""
    return {
        "variant": spec.variant,
        "width": spec.width,
        "in_chans": spec.in_chans,
        "out_chans": spec.out_chans,
        "stem_kernel": spec.stem_kernel,
        "normalize": normalize,
    }


def voxel_contract(spec: UNet3DSpec, features: Features) -> VoxelContract:
    """What a network trained on ones, or on colors in [-0.5, 0.5], expects."""
    offset = -0.5 if features == "rgb" else 0.0
    return VoxelContract(voxel_size=spec.voxel_size, channels=CHANNELS[features], scale=1.0, offset=offset)


def encode(network: nn.Module, coords: Tensor, feats: Tensor, *, low_precision: bool) -> Tensor:
    """float32 [N, C] in the order of `coords`, whose batch numbers may leave out elements without a voxel."""
    present, number = torch.unique(coords[:, 0], return_inverse=True)
    if len(present) <= int(coords[:, 0].max()):
        coords = torch.cat([number[:, None].to(coords.dtype), coords[:, 1:]], dim=1)
    with torch.autocast(coords.device.type, torch.bfloat16, enabled=low_precision):
        features: Tensor = network(SparseTensor(coords, feats)).feats
    return features.float()  # losses are computed in full precision


def zero(module: nn.Module) -> Tensor:
    """A loss of 0 that reaches every parameter, for a batch without anything to learn from."""
    return torch.stack([parameter.sum() for parameter in module.parameters()]).sum() * 0


def one_match_each(matches: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Of matches int64 [M, 2] one, drawn uniformly, for each row of view 1; of those at most `count`, uniformly too.

    `generator` lives on the CPU, so that the draw is the same on every device. Returns int64 [n, 2].
    """
    shuffled = matches[draw(len(matches), len(matches), generator, matches.device)]
    rows, group = torch.unique(shuffled[:, 0], return_inverse=True)
    position = torch.arange(len(matches), device=matches.device)
    first = torch.full_like(rows, len(matches)).scatter_reduce(0, group, position, reduce="amin")
    return shuffled[first[draw(len(rows), count, generator, matches.device)]]


def draw(total: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """At most `count` different numbers below `total`, in random order: int64 [n]."""
    return torch.randperm(total, generator=generator)[:count].to(device)
