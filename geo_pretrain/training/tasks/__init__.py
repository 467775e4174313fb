"""One pretext task a file: its networks, its samples, what a batch does, and its loss."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from torch import Tensor, nn
from torch.utils.data import Dataset

from geo_pretrain.checkpoint import Pairing
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import RecipeError, unknown
from geo_pretrain.training.config import parse
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.recipe import STAGE1, Recipe

PRI3D = "geo_pretrain.training.tasks.pri3d"
POINTCONTRAST = "geo_pretrain.training.tasks.pointcontrast"
GLOBAL = "geo_pretrain.training.tasks.global_distillation"

# Task name -> module that defines `Config` (a dataclass) and `build(recipe, config) -> Task`, and the settings that
# the name stands for.
TASKS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "pri3d_view": (PRI3D, {"view": True, "geo": False}),
    "pri3d_geo": (PRI3D, {"view": False, "geo": True}),
    "pri3d_view_geo": (PRI3D, {"view": True, "geo": True}),
    "depth_prediction": (PRI3D, {"view": False, "geo": False}),
    "pointcontrast_nce": (POINTCONTRAST, {"loss": "nce"}),
    "pointcontrast_hardest": (POINTCONTRAST, {"loss": "hardest"}),
    "csc": ("geo_pretrain.training.tasks.csc", {}),
    "gsc": ("geo_pretrain.training.tasks.gsc", {}),
    "trivial_correspondence": ("geo_pretrain.training.tasks.trivial", {}),
    "moco_v2": ("geo_pretrain.training.tasks.moco", {}),
    "pixel_simclr": ("geo_pretrain.training.tasks.pixel_simclr", {}),
    "img2pc": ("geo_pretrain.training.tasks.img2pc", {}),
    "ppkt": ("geo_pretrain.training.tasks.ppkt", {}),
    "ppkd": ("geo_pretrain.training.tasks.ppkd", {}),
    "global_kd": (GLOBAL, {"loss": "kd"}),
    "gupta": (GLOBAL, {"loss": "l2"}),
    "crd": (GLOBAL, {"loss": "crd"}),
}


@dataclass(frozen=True)
class Export:
    """What a task contributes to a checkpoint folder."""

    arch: str
    arch_args: dict[str, Any]
    contract: ImageContract | VoxelContract
    weights: dict[str, dict[str, Tensor]]  # role (encoder, decoder, model, heads, teacher) -> tensors
    golden: dict[str, Tensor]  # a small input and the outputs it must give
    pairing: Pairing | None = None  # the network of the other modality, where both are in `weights`


class Task(Protocol):
    """What the engine needs; a task is also an `nn.Module` whose parameters are trained.

    Every loss of a batch must reach every parameter that is not frozen, with a gradient of 0 where there is nothing to
    learn from: processes that train together wait for each other's gradients.
    """

    unit: str  # what samples are made of, for displays: "images" or "clouds"
    views: int  # how many of them a sample holds

    def dataset(self, source: Source, pairs: list[Pair]) -> Dataset[dict[str, Any]]:
        """Samples indexed by (epoch, pair), each a function of its key and the recipe's seed alone."""

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Samples as one batch: tensors, and lists under "seed" (an integer a sample) and "skipped"."""

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The losses of a batch by name; their sum is minimized."""

    def export(self) -> Export:
        """Weights and golden values of what was learned, on the CPU, in eval mode."""


def build_task(recipe: Recipe, starts: Mapping[str, Path] = {}) -> tuple[Task, nn.Module]:
    """The task of a recipe, twice: as the engine's protocol and as the module it is.

    `starts` maps "stage1" to the folder of the first stage, for recipes that start from one.
    """
    module, config = _parsed(recipe)
    build: Callable[[Recipe, Any], nn.Module] = module.build
    named = {f.name: getattr(config, f.name) for f in fields(config)}
    config = replace(config, **{key: recipe.start_of(STAGE1, starts) for key, v in named.items() if v == STAGE1})
    if recipe.model is not None:
        recipe = replace(recipe, model=replace(recipe.model, init=recipe.start_of(recipe.model.init, starts)))
    task = build(recipe, config)
    return cast(Task, task), task


def task_settings(recipe: Recipe) -> dict[str, Any]:
    """All settings of a recipe's task, those that the recipe leaves to their defaults among them."""
    _, config = _parsed(recipe)
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _parsed(recipe: Recipe) -> tuple[ModuleType, Any]:
    """The module of a recipe's task and its `Config`."""
    settings = dict(recipe.task)
    name = settings.pop("name")
    if name not in TASKS:
        raise unknown("task", str(name), TASKS)
    where, fixed = TASKS[name]
    taken = sorted(settings.keys() & fixed.keys())
    if taken:
        raise RecipeError(f"recipe {recipe.name}: 'task.{taken[0]}' is not free; the task's name, {name!r}, sets it.")
    module = importlib.import_module(where)
    return module, parse(module.Config, {**fixed, **settings}, where=f"recipe {recipe.name}", prefix="task.")
