"""Pretext tasks, one per module: settings, networks, samples and losses. `TASKS` lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from geo_pretrain.errors import RecipeError, unknown
from geo_pretrain.training.config import parse
from geo_pretrain.training.recipe import STAGE1, Recipe
from geo_pretrain.training.tasks.base import PretextTask, TaskConfig

PRI3D = "geo_pretrain.training.tasks.pri3d:Pri3D"
POINTCONTRAST = "geo_pretrain.training.tasks.pointcontrast:PointContrast"
GLOBAL = "geo_pretrain.training.tasks.global_distillation:GlobalDistillation"

# Task name -> "module:class" of a `PretextTask`, and the settings that the name stands for. Adding a task is one row.
TASKS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "pri3d_view": (PRI3D, {"view": True, "geo": False}),
    "pri3d_geo": (PRI3D, {"view": False, "geo": True}),
    "pri3d_view_geo": (PRI3D, {"view": True, "geo": True}),
    "depth_prediction": (PRI3D, {"view": False, "geo": False}),
    "pointcontrast_nce": (POINTCONTRAST, {"loss": "nce"}),
    "pointcontrast_hardest": (POINTCONTRAST, {"loss": "hardest"}),
    "csc": ("geo_pretrain.training.tasks.csc:CSC", {}),
    "gsc": ("geo_pretrain.training.tasks.gsc:GSC", {}),
    "trivial_correspondence": ("geo_pretrain.training.tasks.trivial:Trivial", {}),
    "moco_v2": ("geo_pretrain.training.tasks.moco:MoCo", {}),
    "pixel_simclr": ("geo_pretrain.training.tasks.pixel_simclr:PixelSimCLR", {}),
    "img2pc": ("geo_pretrain.training.tasks.img2pc:Img2PC", {}),
    "ppkt": ("geo_pretrain.training.tasks.ppkt:PPKT", {}),
    "ppkd": ("geo_pretrain.training.tasks.ppkd:PPKD", {}),
    "global_kd": (GLOBAL, {"loss": "kd"}),
    "gupta": (GLOBAL, {"loss": "l2"}),
    "crd": (GLOBAL, {"loss": "crd"}),
}


def build_task(recipe: Recipe, starts: Mapping[str, Path] = {}) -> PretextTask:
    """Build the pretext task of a recipe: its networks with the weights that they start from.

    `starts` maps "stage1" to the folder of the first stage, for recipes that start from one.
    """
    task_class, config = _parsed(recipe)
    staged = [key for key, value in vars(config).items() if value == STAGE1]
    config = replace(config, **{key: recipe.start_of(STAGE1, starts) for key in staged})
    if recipe.model is not None:
        recipe = replace(recipe, model=replace(recipe.model, init=recipe.start_of(recipe.model.init, starts)))
    return task_class.build(recipe, config)


def task_config(recipe: Recipe) -> TaskConfig:
    """All settings of a recipe's task, also those that the recipe leaves to their defaults."""
    return _parsed(recipe)[1]


def task_settings(recipe: Recipe) -> dict[str, Any]:
    """`task_config` as a dictionary."""
    return dict(vars(task_config(recipe)))


def _parsed(recipe: Recipe) -> tuple[type[PretextTask], TaskConfig]:
    """The class of a recipe's task and its settings."""
    settings = dict(recipe.task)
    name = str(settings.pop("name"))
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    row, fixed = TASKS[name]
    taken = sorted(settings.keys() & fixed.keys())
    if taken:
        raise RecipeError(f"recipe {recipe.name}: 'task.{taken[0]}' is not free; the task's name, {name!r}, sets it.")
    task_class: type[PretextTask] = resolve_name(row)
    settings = {**fixed, **settings}
    return task_class, parse(task_class.config_type, settings, where=f"recipe {recipe.name}", prefix="task.")
