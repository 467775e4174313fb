"""The sparse U-Nets that training builds: arguments and contract, pre-trained or random weights, a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from geo_pretrain import hub
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.catalog import find
from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.loading import load_backbone
from geo_pretrain.seeding import seeded
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.cloud_recipe import CloudSpec
from geo_pretrain.training.data.samples.clouds import Features
from geo_pretrain.training.data.surfaces.fusing import cubic_voxel_size
from geo_pretrain.training.networks import IMAGENET, SCRATCH, fetch_start
from geo_pretrain.training.recipe import UNet3DSpec

CHANNELS = {"ones": ("one", "one", "one"), "rgb": ("R", "G", "B")}
FEATURES = {  # data.cloud.features -> channels, offset
    "rgb": (("R", "G", "B"), -0.5),
    "gray": (("intensity", "intensity", "intensity"), -0.5),
    "mean": (("intensity",), -0.5),
    "intensity": (("intensity",), 1.0),
}


@dataclass(frozen=True)
class PretrainedInit3D:
    """Where the 3D backbone of a run comes from: "scratch", a name of the catalog or a checkpoint folder."""

    backbone: str
    spec: UNet3DSpec = field(default_factory=UNet3DSpec)  # the network for "scratch"; a checkpoint brings its own
    where: Mapping[str, Any] = field(default_factory=dict)  # load_backbone's hub, revision, cache_dir, ...
    frames: bool = True  # only voxels are accepted that RGB-D frames can be made into

    @property
    def named(self) -> bool:
        """Whether it is a checkpoint, in the catalog or a folder."""
        return self.backbone != SCRATCH

    def contract(self) -> VoxelContract:
        """The backbone's input contract for points: for "scratch" colors in [-0.5, 0.5].

        Raises `RecipeError` for an image network, and with `frames` for voxels that RGB-D frames cannot be made into.
        """
        if not self.named:
            return voxel_contract(self.spec, "rgb")
        if self.backbone == IMAGENET:
            raise RecipeError(
                "Backbone 'imagenet' is a ResNet for images, the recipe is for points; accepted: scratch, a 3D "
                "backbone of the catalog or its folder."
            )
        checkpoint = find(self.backbone) or hub.open(self.backbone, **self.where)
        if checkpoint.arch.modality != "3d":
            raise RecipeError(
                f"Backbone {self.backbone!r} is {checkpoint.arch}, a network for images; accepted: a 3D backbone, or "
                "a 2D recipe."
            )
        contract = cast(VoxelContract, checkpoint.contract)
        if self.frames:
            cubic_voxel_size(contract)
        return contract

    def fetch(self) -> None:
        """Bring the weights here, before any other work. Raises as `unet` does."""
        if self.named:
            fetch_start(self.backbone, self.where, "-b scratch")

    def unet(self, seed: int, in_chans: int | None = None) -> tuple[SRUNet, bool]:
        """The network, and whether its weights are pre-trained; random ones are drawn by `seed`.

        `in_chans`: input channels other than its own, see `load_backbone`.
        """
        if self.named:
            self.contract()  # a wrong kind is named before anything is fetched
            return cast(SRUNet, load_backbone(self.backbone, in_chans=in_chans, **self.where)), True
        with seeded(seed):
            return SRUNet(**unet_args(self.spec) | ({} if in_chans is None else {"in_chans": in_chans})), False


@dataclass(frozen=True)
class CloudInput:
    """The input of a 3D task: what points are turned into, and how that differs from the backbone's pre-training."""

    contract: VoxelContract
    in_chans: int | None  # input channels of the network; None: its own
    choice: str  # what was chosen, in words
    differs: bool  # whether features are not those of the pre-training


def cloud_input(spec: CloudSpec, contract: VoxelContract, backbone: str) -> CloudInput:
    """Reconcile the input that a recipe asks for with a backbone's `contract`.

    Raises `RecipeError` where the number of channels differs, with the ways out.
    """
    wanted = contract
    if spec.voxel_size is not None:
        wanted = replace(wanted, voxel_size=spec.voxel_size, coordinates="cartesian")
    if spec.cylindrical is not None:
        wanted = replace(wanted, voxel_size=spec.cylindrical, coordinates="cylindrical")
    have, scratch = len(contract.channels), backbone == SCRATCH
    if spec.features == "ones":
        wanted = replace(wanted, channels=("one",) * have, scale=1.0, offset=0.0)
    elif spec.features != "contract":
        channels, offset = FEATURES[spec.features]
        wanted = replace(wanted, channels=channels, scale=1.0, offset=offset)
        if len(channels) != have and not scratch and spec.features != "mean":
            ways = [name for name, (given, _) in FEATURES.items() if len(given) == have]
            raise RecipeError(
                f"'data.cloud.features' is {spec.features!r}, {len(channels)} channels; backbone {backbone!r} takes "
                f"{have} ({', '.join(contract.channels)}). Accepted for it: {', '.join(['contract', 'ones', *ways])}"
                f"{', mean (adds the weights of its channels)' if have > 1 else ''}; or another backbone, or scratch."
            )
    # Random weights take any number: also where `contract` is that of an earlier run's choice.
    chans = len(wanted.channels) if scratch or len(wanted.channels) != have else None
    same = (wanted.channels, wanted.scale, wanted.offset) == (contract.channels, contract.scale, contract.offset)
    if scratch:
        return CloudInput(wanted, chans, f"{wanted} (random weights expect nothing)", False)
    if same:
        return CloudInput(wanted, chans, f"{wanted}: the features of the backbone's pre-training are kept", False)
    choice = f"{wanted}, by data.cloud.features={spec.features}; the backbone was pre-trained on {contract}"
    return CloudInput(wanted, chans, choice, True)


def unet_args(spec: UNet3DSpec, *, normalize: bool = False) -> dict[str, Any]:
    """The arguments of `SRUNet` that a checkpoint folder states: those that change its outputs."""
    stated = ("variant", "width", "in_chans", "out_chans", "stem_kernel")
    return {name: getattr(spec, name) for name in stated} | {"normalize": normalize}


def srunet_shape(network: SRUNet) -> dict[str, Any]:
    """The arguments of `SRUNet` that its shapes depend on, in plain JSON types."""
    return {
        "variant": network.variant,
        "in_chans": network.in_chans,
        "out_chans": network.out_chans,
        "width": network.width,
        "stem_kernel": network.conv0p1s1.kernel_size,
        "planes": list(network.planes),
        "layers": list(network.layers),
    }


def segmentation_srunet(start: SRUNet, classes: int, *, seed: int, transfer: bool = True) -> SRUNet:
    """A U-Net shaped like `start` whose last layer gives `classes` logits.

    All other weights are those of `start` or, without `transfer`, drawn by `seed`, like the last layer: the same ones
    whatever is transferred.
    """
    with seeded(seed):
        network = SRUNet(
            start.variant,
            in_chans=start.in_chans,
            out_chans=classes,
            width=start.width,
            stem_kernel=start.conv0p1s1.kernel_size,
            planes=start.planes,
            layers=start.layers,
        )
    if transfer:
        kept = {key: value for key, value in start.state_dict().items() if not key.startswith("final.")}
        network.load_state_dict(network.state_dict() | kept)
    return network


def voxel_contract(spec: UNet3DSpec, features: Features) -> VoxelContract:
    """The input contract of a network trained on ones, or on colors in [-0.5, 0.5]."""
    offset = -0.5 if features == "rgb" else 0.0
    return VoxelContract(voxel_size=spec.voxel_size, channels=CHANNELS[features], scale=1.0, offset=offset)


def encode(network: nn.Module, coords: Tensor, feats: Tensor, *, low_precision: bool) -> Tensor:
    """Run a sparse network over a batch: float32 [N, C], row by row of `coords` [N, 4].

    Batch elements without a voxel may be missing from the batch numbers in `coords`.
    """
    present, number = torch.unique(coords[:, 0], return_inverse=True)
    if len(present) <= int(coords[:, 0].max()):
        coords = torch.cat([number[:, None].to(coords.dtype), coords[:, 1:]], dim=1)
    with torch.autocast(coords.device.type, torch.bfloat16, enabled=low_precision):
        features: Tensor = network(SparseTensor(coords, feats)).feats
    return features.float()  # losses are computed in full precision
