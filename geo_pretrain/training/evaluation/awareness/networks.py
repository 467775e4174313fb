"""The networks to measure, by name, with a name for each of their layers.

A name is a checkpoint (catalog name or folder), an encoder with its ImageNet weights ("timm/convnext_tiny" or
"resnet50"), or an encoder and where its weights come from: "resnet18=scratch", "resnet50=file:PATH",
"timm/efficientnet_lite0=package:MODULE", "resnet50=moco_v2".
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geo_pretrain.backbones.architectures import ENCODERS, encoder_arch
from geo_pretrain.backbones.base import EncoderDecoder
from geo_pretrain.backbones.build import build_encoder
from geo_pretrain.backbones.timm_names import PREFIX, contract_for, is_timm
from geo_pretrain.checkpoint import Checkpoint
from geo_pretrain.contract import Contract, ImageContract, VoxelContract
from geo_pretrain.errors import RecipeError, UnknownName, nearest, require
from geo_pretrain.seeding import seeded
from geo_pretrain.training.evaluation.features import load_network, open_checkpoint
from geo_pretrain.training.initialize import FILE, PACKAGE, check_start, initialize_encoder
from geo_pretrain.training.recipe import ModelSpec

SCRATCH, IMAGENET = "scratch", "imagenet"


@dataclass(frozen=True)
class Subject:
    """A backbone to measure, before its weights are loaded."""

    name: str  # in results
    architecture: str  # of the random weights beside it
    encoder: str = ""  # with `start`; "": a checkpoint
    start: str = ""
    checkpoint: Checkpoint | None = None
    random: bool = False  # the weights are drawn, with each seed anew

    @property
    def is_3d(self) -> bool:
        """Whether it takes voxels."""
        return self.checkpoint is not None and self.checkpoint.arch.modality == "3d"

    @property
    def kind(self) -> tuple[str, Contract]:
        """What decides how random weights score: the network, and the input that it is given."""
        if self.checkpoint is None:
            return self.architecture, _as_given(contract_for(self.encoder, ImageContract()))
        return str(self.checkpoint.arch), _as_given(self.checkpoint.contract)

    def at_random(self, like: str = "") -> Subject:
        """The same network with random weights; `like`: whose, where others have the same architecture's name."""
        title = f"{self.architecture} of {like}" if like else self.architecture
        return replace(self, name=f"{title}, random weights", start=SCRATCH, random=True)

    def load(self, seed: int = 0) -> LayeredNetwork:
        """Load the network; random weights are drawn from `seed`."""
        if self.checkpoint is not None:
            decoder: dict[str, Any] = {"decoder": True} if self.checkpoint.arch.has_decoder and not self.is_3d else {}
            network = load_network(self.checkpoint.folder, random_init=self.random, seed=seed, **decoder)
            return LayeredNetwork(network, self.checkpoint.contract)
        with seeded(seed):
            network = build_encoder(self.encoder)
        spec = ModelSpec(encoder=self.encoder, init=self.start)
        initialize_encoder(network, spec, set_start=f"{self.encoder}=")
        return LayeredNetwork(network, contract_for(self.encoder, ImageContract()))


class LayeredNetwork(nn.Module):
    """A frozen network and the names of its layers, "module /stride", as `layers_of` gives their maps."""

    def __init__(self, network: nn.Module, contract: ImageContract | VoxelContract) -> None:
        """`network`: an encoder, an encoder with its decoder, or a sparse U-Net."""
        super().__init__()
        info: Any = network.feature_info
        self.network, self.contract = network, contract
        self.names = [f"{row['module']} /{row['reduction']}" for row in info]
        if isinstance(network, EncoderDecoder):
            self.names.append("decoder")
        elif isinstance(contract, VoxelContract):
            self.names = [*self.names[::-1], "output"]
        self.eval()

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """The only (height, width) of images that the network takes; None: any."""
        encoder = getattr(self.network, "encoder", self.network)
        return getattr(encoder, "fixed_size", None)

    def check(self, size: tuple[int, int]) -> None:
        """Raise `InputError` for images of a size (height, width) that the network cannot take."""
        if isinstance(self.contract, ImageContract):
            with torch.no_grad():
                self.maps(np.zeros((*size, 3), np.uint8))

    def layers_of(self, inputs: Any) -> list[Any]:
        """The maps of all layers: images [1, C, h, w]; sparse tensors of voxels."""
        network: Any = self.network
        outputs = network.forward_intermediates(inputs)
        last, maps = outputs
        if isinstance(self.contract, VoxelContract):
            return [*maps[::-1], last]  # in the order in which a sparse U-Net computes them
        return [*maps, last] if len(maps) < len(self.names) else list(maps)

    def maps(self, image: Any) -> list[Tensor]:
        """The maps [1, C, h, w] of an image uint8 [H, W, 3], which is resized for networks of one size only."""
        contract = self.contract
        assert isinstance(contract, ImageContract)
        fixed = self.fixed_size
        sized = contract if fixed is None else replace(contract, size=fixed)
        inputs = sized.transforms(resize=fixed is not None)(image)[None]
        return [one.float() for one in self.layers_of(inputs.to(next(self.parameters()).device))]


def find_subject(name: str, encoder: str = "") -> Subject:
    """Find what a name means; `encoder` is that of weights that are given without one. Loads nothing.

    Raises the errors of `hub.open`; `RecipeError` for weights of no encoder; `UnknownName` for unknown encoders.
    """
    given, found, start = name.partition("=")
    if not (found and (is_timm(given) or given in ENCODERS)):
        given, start = ("", name)
    if name.startswith((FILE, PACKAGE)) or name in (SCRATCH, IMAGENET):
        if not encoder:
            raise RecipeError(
                f"{name!r} names weights of no encoder; accepted: ENCODER={name}, such as resnet50={name} or "
                f"timm/convnext_tiny={name}, or --encoder."
            )
        given = encoder
    elif not given and (is_timm(name) or name in ENCODERS):
        given, start = name, IMAGENET
    if not given:
        try:
            checkpoint = open_checkpoint(name)
        except UnknownName as error:
            raise UnknownName(f"{error.args[0]}{_encoders_like(name)}") from error
        return Subject(name, checkpoint.arch.title, checkpoint=checkpoint)
    encoder_arch(given)
    check_start(start, given, "start", stage1=False)
    return Subject(name, given.partition(".")[0] if is_timm(given) else given, given, start, random=start == SCRATCH)


def _encoders_like(name: str) -> str:
    known = [*ENCODERS]
    if importlib.util.find_spec("timm") is not None:
        known += [f"{PREFIX}{one}" for one in require("timm", "adapters").list_models()]
    near = sorted({*nearest(name, known, 2), *nearest(f"{PREFIX}{name}", known, 2)})
    return f" Encoders with ImageNet weights: {', '.join(near)}."


def with_random(subjects: Sequence[Subject]) -> list[Subject]:
    """Add to the subjects their networks with random weights, each kind once, before them."""
    drawn = {subject.kind for subject in subjects if subject.random}
    firsts: dict[tuple[str, Contract], Subject] = {}
    for subject in subjects:
        if subject.kind not in drawn:
            firsts.setdefault(subject.kind, subject)
    count = Counter(subject.architecture for subject in firsts.values())
    twins = [one.at_random(one.name if count[one.architecture] > 1 else "") for one in firsts.values()]
    return [*twins, *subjects]


def _as_given(contract: Contract) -> Contract:
    """The contract without the size of pre-training: frames are given in their own."""
    if not isinstance(contract, ImageContract):
        return contract
    return replace(contract, size=ImageContract.size, interpolation=ImageContract.interpolation)
