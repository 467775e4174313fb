"""What a downstream task brings to the fine-tuning loop, and where its network starts.

The loop (finetune.py) knows steps, schedules, state and logs; a task knows labels, losses and metrics. Adding a task
means writing one class with the methods of `FinetuneTask` and naming it in `TASKS`.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from geo_pretrain.contract import ImageContract
from geo_pretrain.training.data.labelled.image import LabelledImage, LabelledSource
from geo_pretrain.training.distributed import ALONE, World
from geo_pretrain.training.finetune_recipe import FinetuneRecipe
from geo_pretrain.training.networks import PretrainedInit

T = TypeVar("T")

TASKS = {  # task of a recipe -> "module:class", called with (recipe, start, classes, contract)
    "segmentation": "geo_pretrain.training.finetune.segmentation:Segmentation",
    "detection": "geo_pretrain.training.finetune.detection:Detection",
    "instances": "geo_pretrain.training.finetune.detection:Detection",
}


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

    def evaluate(self, source: LabelledSource, ids: Sequence[str], world: World = ALONE) -> Evaluation:
        """Measure `module` on these images, each process of `world` on its share; leaves it in evaluation mode.

        Every process gets the same result, which does not depend on their number.
        """

    def draw(self, source: LabelledSource, ids: Sequence[str], path: Path) -> None:
        """Write a PNG: image, truth, prediction of these images."""

    def quirks(self) -> dict[str, str]:
        """Name of each accident of the released protocol -> what this run does about it, in words."""


def build_finetune_task(
    recipe: FinetuneRecipe, start: PretrainedInit, classes: Sequence[str], contract: ImageContract
) -> FinetuneTask:
    """The task of a recipe: its network with `start`'s weights for these classes (1.. in the labels)."""
    module, _, name = TASKS[recipe.task].partition(":")
    task = getattr(importlib.import_module(module), name)(recipe, start, tuple(classes), contract)
    return cast(FinetuneTask, task)


def share_of(items: Sequence[T], batch: int, world: World) -> list[list[T]]:
    """The batches that this process measures: every `world.size`-th one, so that no batch depends on their number."""
    batches = [list(items[start : start + batch]) for start in range(0, len(items), batch)]
    return batches[world.rank :: world.size]


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """A sha256 of names, types, shapes and values: which weights a run started from."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        value = weights[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
