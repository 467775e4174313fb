"""The plan of a benchmark: one recipe per task, one budget for all, and the dependencies between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from geo_pretrain.errors import RecipeError, unknown
from geo_pretrain.training.checks import Checks, Count, Positive, Ranged, check_key
from geo_pretrain.training.pretrain import needs_stage1
from geo_pretrain.training.recipe import STAGE1, DataSpec, Recipe, list_recipes, load_recipe, load_stage1
from geo_pretrain.training.tasks import TASKS

Kind = Literal["2D", "3D"]
BASE = "pri3d_view_r18.rooms"  # whose rooms and image size all tasks get
# Geometric Set Consistency trains one network in two stages: 5 epochs of Pri3D and 2 of its own in the paper.
SHARE = 5 / 7
# Keys that no override may set, and what sets each.
FIXED = {
    "optim.batch": "Give --batch.",
    "optim.steps": "Give --steps.",
    "optim.epochs": "Give --steps.",
    "seed": "Give --seed.",
    "data.source": "It compares on rooms.",
    "stage1.optim.steps": "Give --steps.",
}


@dataclass(frozen=True)
class BenchSpec(Ranged):
    """The budget, the same for every task and both initializations. The defaults are those of `--toy`."""

    toy: bool = True
    steps: Count = 80  # of pre-training
    batch: Count = 4  # samples a step: pairs of frames, or frames
    finetune_steps: Count = 40
    finetune_batch: Count = 4  # images or clouds
    finetune_lr: Positive = 0.05  # 2D; of the demo
    finetune_lr_points: Positive = 0.3  # 3D
    pairs: Count = 40  # held out, for matching
    val_scenes: Count = 8
    labelled: Count = 2  # labelled frames of each training scene
    pixels: Count = 10_000  # labelled pixels or voxels for fitting a linear probe
    overrides: tuple[str, ...] = ()  # key=value in every recipe

    def check_settings(self, check: Checks) -> None:
        for override in self.overrides:
            if (key := override.partition("=")[0]) in FIXED:
                check.note(f"Override {override!r}: the benchmark sets '{key}' for all tasks. {FIXED[key]}")


# Real networks at real size. Needs a GPU: a day of one for all tasks and seeds.
FULL = BenchSpec(
    toy=False,
    steps=2000,
    batch=32,
    finetune_steps=1000,
    finetune_batch=16,
    finetune_lr_points=0.1,
    pairs=100,
    val_scenes=32,
    pixels=20_000,
)


@dataclass(frozen=True)
class Row:
    """One row of the table: a task and its recipe."""

    task: str
    recipe: str | None  # None: not available
    kind: Kind | None
    why: str = ""  # the reason why it is not available


@dataclass(frozen=True)
class Training:
    """One run of a recipe. `key` names its checkpoint folder and covers everything that determines the weights."""

    key: str
    recipe: Recipe
    stage1: Training | None = None
    continued: bool = False  # True: stage1 trains the same network; False: stage1 trains a teacher


def rows(tasks: Sequence[str] = ()) -> list[Row]:
    """List the rows of the requested tasks (none: all) in the registry's order. Raises for an unknown name."""
    for task in tasks:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
    by_task = _recipes_by_task()
    return [_row(task, by_task.get(task, [])) for task in TASKS if not tasks or task in tasks]


def plan(row: Row, spec: BenchSpec, seed: int) -> Training:
    """Plan the training of a row with one seed.

    Every recipe gets the same rooms, image size, steps and batch. Where one network learns in two stages they share
    the steps; a teacher is trained for as many steps beside them. Raises `RecipeError` when the budget does not fit.
    """
    if row.recipe is None:
        raise RecipeError(f"Task {row.task!r} is not available: {row.why}.")
    data = base_data(spec)
    rooms = ["data.source=rooms", f"data.size={list(data.size)}", f"data.options={json.dumps(data.options)}"]
    common = [*rooms, *spec.overrides, f"optim.batch={spec.batch}", f"seed={seed}"]
    recipe = _load(row.recipe, spec.steps, common, toy=spec.toy)
    if not needs_stage1(recipe) or recipe.stage1 is None:
        return Training(_key(recipe, None), recipe)
    continued = recipe.model is not None and recipe.model.init == STAGE1
    first = max(1, round(spec.steps * SHARE)) if continued else spec.steps
    stage1 = load_stage1(recipe, _budget(first, common), toy=spec.toy)
    if continued:
        recipe = _load(row.recipe, max(1, spec.steps - first), common, toy=spec.toy)
    start = Training(_key(stage1, None), stage1)
    return Training(_key(recipe, start), recipe, start, continued)


@lru_cache(maxsize=8)
def base_data(spec: BenchSpec) -> DataSpec:
    """The data section of the rooms that all tasks train on."""
    data = load_recipe(BASE, spec.overrides, toy=spec.toy).data
    split = data.options.get("split", "train")
    check_key(split == "train", "data.options.split", split, "train: the rooms of val are measured on")
    return data


def _row(task: str, recipes: list[Recipe]) -> Row:
    if not recipes:
        return Row(task, None, None, "no recipe")
    best = min(recipes, key=_preference)
    return Row(task, best.name, "3D" if best.model is None else "2D")


def _preference(recipe: Recipe) -> tuple[Any, ...]:
    """Sort key of recipes: rooms before data sets, small before large, plain names before variants."""
    rooms, _, tag = recipe.name.partition(".")
    small = recipe.model is None or recipe.model.encoder == "resnet18"
    return tag != "rooms", not small, tag != "", len(rooms), rooms


@lru_cache(maxsize=1)
def _recipes_by_task() -> dict[str, list[Recipe]]:
    found: dict[str, list[Recipe]] = {}
    for name in list_recipes():
        recipe = replace(load_recipe(name), name=name)
        found.setdefault(recipe.task["name"], []).append(recipe)
    return found


def _load(name: str, steps: int, common: Sequence[str], *, toy: bool) -> Recipe:
    """Load a recipe with the budget; an epoch-based schedule becomes its per-step equivalent."""
    epochwise = load_recipe(name, toy=toy).optim.schedule == "cosine_epoch"
    schedule = ["optim.schedule=cosine"] if epochwise else []
    return load_recipe(name, _budget(steps, [*schedule, *common]), toy=toy)


def _budget(steps: int, overrides: Iterable[str]) -> list[str]:
    return [*overrides, f"optim.steps={steps}", "optim.epochs=null"]


def _key(recipe: Recipe, stage1: Training | None) -> str:
    text = recipe.to_yaml() + ("" if stage1 is None else stage1.key)
    return f"{recipe.name}-s{recipe.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
