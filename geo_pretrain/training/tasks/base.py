"""Shared parts of pretext tasks: settings with range checks, seeded random weights, mixed precision and export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from geo_pretrain.backbones.architectures import ARCHITECTURES, Arch
from geo_pretrain.backbones.build import golden_values
from geo_pretrain.backbones.feature_pair import FeaturePair, pair_golden
from geo_pretrain.checkpoint import Pairing
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.seeding import seeded
from geo_pretrain.training.checks import Ranged
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.sampler import Samples
from geo_pretrain.training.recipe import Recipe

T = TypeVar("T")
Batch = Mapping[str, Any]  # tensors, and lists under "seed" and "skipped"


@dataclass(frozen=True)
class TaskConfig(Ranged):
    """The settings of a task, section `task` of a recipe. A subclass adds its own, with ranges in their types."""

    section = "task."

    def unused(self) -> dict[str, str]:
        """The settings that change nothing as others are set, each with what would use it."""
        return {}

    def idle(self) -> list[str]:
        """What is said of settings in `unused` that are not at their default."""
        unused = self.unused()
        defaults = {field.name: field.default for field in fields(self)}
        return [
            f"'task.{name}' is {value!r} and changes nothing here: it belongs to {by}."
            for name, by in unused.items()
            if (value := getattr(self, name)) != defaults[name]
        ]


def same_settings(kind: Callable[..., T], config: TaskConfig, *first: Any, **more: Any) -> T:
    """Build the dataclass `kind` from the settings of a task that have the names of its fields.

    `first` are its first arguments; `more` are added to the settings, or replace them.
    """
    names = {field.name for field in fields(kind)} & vars(config).keys()  # type: ignore[arg-type]
    return kind(*first, **{name: getattr(config, name) for name in names} | more)


@dataclass(frozen=True)
class Export:
    """A task's contribution to a checkpoint folder."""

    arch: Arch
    contract: ImageContract | VoxelContract
    weights: dict[str, dict[str, Tensor]]  # role (encoder, decoder, model, heads, teacher) -> tensors
    golden: dict[str, Tensor]  # a small input and the outputs it must give
    pairing: Pairing | None = None  # the network of the other modality, where both are in `weights`


class PretextTask(nn.Module, ABC):
    """A pretext task: the networks that it trains, the samples they see, and the losses of a batch.

    Every loss must reach every parameter that is not frozen, with a gradient of 0 where there is nothing to learn:
    processes that train together wait for each other's gradients.
    """

    config_type: type[TaskConfig]
    config: TaskConfig
    arch: str  # of the network `backbone` that a run is for, a name in backbones.architectures
    arch_args: dict[str, Any]  # its arguments, as a checkpoint folder states them
    backbone: Any
    contract: ImageContract | VoxelContract
    unit = "images"  # what a sample is made of, for displays: "images" or "clouds"
    views = 2  # how many of them a sample holds
    negatives = ""  # where an anchor's negatives come from: "sample", "micro-batch", "queue"; "" without any
    parts_batchnorm = False  # whether it rests on BatchNorm statistics of parts of a batch, as Shuffle-BN does
    same_in_any_world = True  # whether equal micro-batches give equal gradients in any number of processes

    def __init__(self, recipe: Recipe, config: TaskConfig) -> None:
        super().__init__()
        self.recipe, self.config = recipe, config
        self.low_precision = recipe.precision == "bf16"

    @classmethod
    def build(cls, recipe: Recipe, config: TaskConfig) -> Self:
        """Build the task: random weights drawn from the recipe's seed, then the start weights that the recipe names."""
        with seeded(recipe.seed):
            task = cls(recipe, config)
        task.load_start_weights()
        return task

    def load_start_weights(self) -> None:
        """Replace random weights by the start weights that the recipe names; by default none."""

    @abstractmethod
    def dataset(self, source: Source, pairs: list[Pair]) -> Samples:
        """Samples indexed by (epoch, pair), each a function of this key and the recipe's seed alone."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch by name, scalars; their sum is minimized."""

    def export(self) -> Export:
        """Export the trained weights and golden values, on the CPU, in evaluation mode."""
        network = type(self.backbone)(**self.arch_args)
        network.load_state_dict(self.backbone.state_dict())
        network.eval()
        roles = ARCHITECTURES[self.arch].roles
        parts = {role: network if len(roles) == 1 else network.get_submodule(role) for role in roles}
        weights = {role: part.state_dict() for role, part in parts.items()} | self.other_weights()
        ones = isinstance(self.contract, VoxelContract) and not self.contract.given_channels
        golden, pairing = golden_values(network, ones=ones), self.pairing()
        if pairing is not None:
            network.contract = self.contract
            pair = FeaturePair.from_states(network, pairing, weights[pairing.role], weights.get("heads", {}))
            golden |= pair_golden(pair)
        return Export(Arch(self.arch, self.arch_args), self.contract, weights, golden, pairing)

    def pairing(self) -> Pairing | None:
        """How a checkpoint folder pairs the network with one of the other modality; by default not at all."""
        return None

    def other_weights(self) -> dict[str, dict[str, Tensor]]:
        """The weights beside the network's own, by role: "heads", if there are any."""
        heads = self.heads()
        return {"heads": heads} if heads else {}

    def heads(self) -> dict[str, Tensor]:
        """The state beside `backbone.*`, on the CPU: projections, heads and partner networks."""
        return {key: value.cpu() for key, value in self.state_dict().items() if not key.startswith("backbone.")}

    def autocast(self, device: torch.device) -> torch.autocast:
        """Run networks in the precision of the recipe; losses are computed in float32."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.low_precision)

    def zero_loss(self) -> Tensor:
        """A loss of 0 that reaches every parameter, for a batch with nothing to learn from."""
        return torch.stack([parameter.sum() for parameter in self.parameters()]).sum() * 0
