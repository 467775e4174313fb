"""What a downstream task brings to the fine-tuning loop, and where its network starts.

The loop (finetune.py) knows steps, schedules, state and logs; a task knows labels, losses and metrics. Adding a task
means writing one class with the methods of `FinetuneTask` and naming it in `TASKS`.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from geo_pretrain import hub as hubs
from geo_pretrain.adapters.common import encoder_of
from geo_pretrain.backbones.build import has_decoder
from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.catalog import Entry, find
from geo_pretrain.checkpoint import Checkpoint, read_checkpoint
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import GeoPretrainError, RecipeError
from geo_pretrain.loading import load_backbone
from geo_pretrain.training.data.labelled.image import LabelledImage, LabelledSource
from geo_pretrain.training.finetune.in_memory import Transfer
from geo_pretrain.training.finetune.recipe import FinetuneRecipe
from geo_pretrain.training.initialize import initialize_encoder
from geo_pretrain.training.recipe import ModelSpec

TASKS = {  # task of a recipe -> "module:class", called with (recipe, start, classes, contract)
    "segmentation": "geo_pretrain.training.finetune.segmentation:Segmentation",
    "detection": "geo_pretrain.training.finetune.detection:Detection",
    "instances": "geo_pretrain.training.finetune.detection:Detection",
}
DONORS = {18: "pri3d_view_geo_r18", 50: "pri3d_view_geo_r50"}  # give the shape of a ResNet, without their weights
SCRATCH, IMAGENET = "scratch", "imagenet"


@dataclass(frozen=True)
class Evaluation:
    """One measurement over the validation images."""

    scores: dict[str, float]  # shares of 1, such as {"miou": 0.61}; the loop's best is by the task's `metric`
    per_class: dict[str, dict[str, float | None]] = field(default_factory=dict)  # {"iou": {"wall": 0.7}}; None: absent
    details: dict[str, Any] = field(default_factory=dict)  # JSON: whatever else results.json should keep

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"scores": self.scores, "per_class": self.per_class, "details": self.details}


class FinetuneTask(Protocol):
    """A task of one run. `sample` runs in loader processes, everything else in the training process."""

    module: nn.Module  # all that is trained and saved; the loop moves it and calls .train() before a step
    metric: str  # the score that picks the best evaluation and goes into tables: "miou", "box_ap50"
    contract: ImageContract  # what images are turned into

    def sample(self, image: LabelledImage, generator: torch.Generator) -> Any:
        """A training sample with augmentation drawn from `generator` alone. Raises `BadFrame` for one bad image."""

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        """A batch; tensors in it, in lists and in dicts too, are moved to the device by the loop."""

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Scalar losses by name; the loop minimizes their sum."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """[{"params": [...], "factor": 10.0}, ...]: learning rate of the group over that of the schedule."""

    def backbone(self) -> nn.Module:
        """The part of `module` that was transferred, for BatchNorm momentum and digests."""

    def evaluate(self, source: LabelledSource, ids: Sequence[str]) -> Evaluation:
        """Measure `module` on these images; leaves it in evaluation mode."""

    def draw(self, source: LabelledSource, ids: Sequence[str], path: Path) -> None:
        """Write a PNG: image, truth, prediction of these images."""

    def quirks(self) -> dict[str, str]:
        """Name of each accident of the released protocol -> what this run does about it, in words."""


@dataclass(frozen=True)
class Start:
    """The backbone of a run: "scratch", "imagenet", a name of the catalog or a checkpoint folder."""

    backbone: str
    depth: int
    width: int = 64
    where: Mapping[str, Any] = field(default_factory=dict)  # load_backbone's hub, revision, cache_dir, ...

    @property
    def named(self) -> bool:
        """Whether it is a checkpoint, in the catalog or a folder."""
        return self.backbone not in (SCRATCH, IMAGENET)

    def unet(self, seed: int) -> tuple[ResNetUNet, Transfer]:
        """The U-Net of Pri3D with the start's weights, and what of it is pre-trained; the rest is drawn by `seed`."""
        width = self.width
        if self.named:
            arch = self._checked().arch
            if has_decoder(arch):
                return load_backbone(self.backbone, decoder=True, **self.where), "all"
            width = arch.args.get("width", 64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = ResNetUNet(self.depth, width=width)
        if self.backbone == SCRATCH:
            return network, "none"
        network.encoder.load_state_dict(self._encoder_weights())
        return network, "encoder"

    def host(self, builder: Callable[..., Any], seed: int, **options: Any) -> Any:
        """A network of another library with the start's weights; `builder` is one of geo_pretrain.adapters."""
        if self.named:
            self._checked()
        elif self.width != 64:
            raise RecipeError(f"'network.width' is {self.width}, accepted is 64: other libraries' ResNets have it.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.named:
                return builder(self.backbone, **self.where, **options)
            network = builder(DONORS[self.depth], pretrained=False, **options)
        if self.backbone == IMAGENET:
            encoder_of(network).load_state_dict(self._encoder_weights())
        return network

    def contract(self) -> ImageContract:
        """What the backbone expects of an image."""
        return cast(ImageContract, self._checked().contract) if self.named else ImageContract()

    def _encoder_weights(self) -> dict[str, Tensor]:
        if self.named:
            return cast(nn.Module, load_backbone(self.backbone, **self.where)).state_dict()
        if self.width != 64:
            raise RecipeError(f"'network.width' is {self.width}, accepted for backbone 'imagenet' is 64.")
        with torch.random.fork_rng(devices=[]):
            network = ResNetUNet(self.depth)
        try:
            initialize_encoder(network, ModelSpec(depth=cast(Any, self.depth), init=IMAGENET))
        except GeoPretrainError as error:
            said = str(error).replace("--set model.init=scratch", "--backbone scratch")
            raise GeoPretrainError(f"Backbone 'imagenet': {said}") from error
        return network.encoder.state_dict()

    def _checked(self) -> Entry | Checkpoint:
        """The checkpoint that is named, if it is a ResNet of the recipe's depth; its weights are not fetched."""
        entry = find(self.backbone)
        found = entry or read_checkpoint(hubs.resolve(self.backbone, roles=(), **self.where))
        if not found.arch.name.startswith("resnet") or "depth" not in found.arch.args:
            raise RecipeError(f"Backbone {self.backbone!r} is {found.arch}; accepted: a ResNet or a U-Net for images.")
        if found.arch.args["depth"] != self.depth:
            raise RecipeError(
                f"Backbone {self.backbone!r} is a ResNet-{found.arch.args['depth']}, the recipe is for a "
                f"ResNet-{self.depth}: choose another, or --set network.depth={found.arch.args['depth']}."
            )
        return found


def build_finetune_task(
    recipe: FinetuneRecipe, start: Start, classes: Sequence[str], contract: ImageContract
) -> FinetuneTask:
    """The task of a recipe: its network with `start`'s weights for these classes (1.. in the labels)."""
    module, _, name = TASKS[recipe.task].partition(":")
    task = getattr(importlib.import_module(module), name)(recipe, start, tuple(classes), contract)
    return cast(FinetuneTask, task)


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """A sha256 of names, types, shapes and values: which weights a run started from."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        value = weights[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
