"""One pretext task a file: its networks, what a batch does, and its loss."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor, nn

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import unknown
from geo_pretrain.training.recipe import Recipe, parse

# Task name -> module that defines `Config` (a dataclass) and `build(recipe, config) -> Task`.
TASKS = {"pri3d_view": "geo_pretrain.training.tasks.pri3d"}


@dataclass(frozen=True)
class Export:
    """What a task contributes to a checkpoint folder."""

    arch: str
    arch_args: dict[str, Any]
    contract: ImageContract
    weights: dict[str, dict[str, Tensor]]  # role (encoder, decoder, heads) -> tensors
    golden: dict[str, Tensor]  # a small input and the outputs it must give


class Task(Protocol):
    """What the engine needs; a task is also an `nn.Module` whose parameters are trained."""

    contract: ImageContract

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The losses of a batch by name; their sum is minimised."""

    def export(self) -> Export:
        """Weights and golden values of what was learned, on the CPU, in eval mode."""


def build_task(recipe: Recipe) -> tuple[Task, nn.Module]:
    """The task of a recipe, twice: as the engine's protocol and as the module it is."""
    settings = dict(recipe.task)
    name = settings.pop("name")
    if name not in TASKS:
        raise unknown("task", str(name), TASKS)
    module = importlib.import_module(TASKS[name])
    config = parse(module.Config, settings, where=f"recipe {recipe.name}", prefix="task.")
    build: Callable[[Recipe, Any], nn.Module] = module.build
    task = build(recipe, config)
    return cast(Task, task), task
