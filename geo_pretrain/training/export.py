"""From a run to its checkpoint folder: weights, golden values, recipe, log, license and provenance."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geo_pretrain import hub
from geo_pretrain.cards import render_card
from geo_pretrain.catalog import find
from geo_pretrain.catalog.entry import Arch
from geo_pretrain.catalog.license import License, strictest
from geo_pretrain.catalog.moco import IMAGENET_STARTS
from geo_pretrain.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from geo_pretrain.errors import GeoPretrainError
from geo_pretrain.training.data.frame import Source
from geo_pretrain.training.data.sources.registry import data_license, source_note
from geo_pretrain.training.recipe import STAGE1, Recipe, list_recipes
from geo_pretrain.training.runs import code_version, library_versions
from geo_pretrain.training.tasks import Task, task_settings

IMAGENET_TERMS = "LicenseRef-ImageNet-terms"
UNKNOWN_TERMS = "LicenseRef-unknown"


def write_run(
    recipe: Recipe,
    out: Path,
    task: Task,
    source: Source,
    log: Path,
    provenance: dict[str, Any],
    license: License,
    *,
    finished: bool,
) -> Checkpoint:
    """Write the checkpoint folder `out` of a run, atomically; `provenance` is completed with versions and notes.

    `license` is `run_license` of the recipe, from before the run: what it started from may have moved since.
    """
    export = task.export()
    provenance = provenance | {
        "seed": recipe.seed,
        "init": "scratch" if recipe.model is None else recipe.start_of(recipe.model.init),
        "notes": source_note(source),
        "code": code_version(),
        "python": platform.python_version(),
        "libraries": library_versions(),
    }
    arch = Arch(export.arch, export.arch_args)
    made_by = recipe.name if recipe.name in list_recipes() else "recipe.yaml"  # a changed recipe is in the folder
    card = render_card(recipe.name, arch, export.contract, license, provenance, recipe=made_by, finished=finished)
    return write_checkpoint(
        out,
        name=recipe.name,
        arch=arch,
        contract=export.contract,
        weights=export.weights,
        golden=export.golden,
        license=license,
        provenance=provenance,
        recipe_yaml=recipe.to_yaml(),
        log=log,
        card=card,
        finished=finished,
        pairing=export.pairing,
    )


def run_license(recipe: Recipe) -> License:
    """The license chain of weights made by a recipe: the strictest terms of its data, start weights and teacher.

    3D networks always start from random weights. Raises `GeoPretrainError` when weights that are named cannot be found,
    `RecipeError` for settings that the task has not.
    """
    dataset, terms = data_license(recipe.data)
    task = task_settings(recipe)  # a teacher that the recipe does not name teaches too
    spec, teacher = recipe.model, task.get("teacher")
    start = Origin() if spec is None else _origin(_weights(recipe, spec.init), spec.depth)
    teaching = Origin() if teacher is None else _origin(_weights(recipe, teacher), task.get("teacher_depth", 50))
    base = f"random weights; teacher: {teaching.name}" if teaching.name else "none (random weights)"
    mixed = (("ImageNet", IMAGENET_TERMS),) if task.get("mix", "none") != "none" else ()
    datasets = dict([(dataset, terms), *mixed, *start.datasets, *teaching.datasets])
    weights = strictest(terms, *(more for _, more in mixed), start.terms or terms, teaching.terms or terms)
    return License(code="MIT", weights=weights, datasets=tuple(datasets.items()), base_model=start.name or base)


@dataclass(frozen=True)
class Origin:
    """Weights that a run builds on; all empty for a random start."""

    name: str = ""
    terms: str = ""  # of the weights
    datasets: tuple[tuple[str, str], ...] = ()  # behind them, with their terms


def _weights(recipe: Recipe, value: str) -> str:
    """What a setting names; a first stage that is not trained yet by its recipe's name, for its terms are known."""
    untrained = value == STAGE1 and recipe.stage1 is not None and "folder" not in recipe.stage1
    return str(recipe.stage1["recipe"]) if untrained and recipe.stage1 else recipe.start_of(value)


def _origin(weights: str, depth: int) -> Origin:
    if weights == "scratch":
        return Origin()
    terms = IMAGENET_TERMS
    if weights == "imagenet":
        name = f"torchvision ResNet-{depth} IMAGENET1K_V1 (BSD-3-Clause; ImageNet terms: non-commercial research)"
        return Origin(name, terms, (("ImageNet", terms),))
    if weights in IMAGENET_STARTS:
        name = "MoCo v2 ResNet-50 without labels (CC-BY-NC-4.0; ImageNet terms: non-commercial research)"
        return Origin(name, strictest("CC-BY-NC-4.0", terms), (("ImageNet", terms),))
    if weights == "ade20k":
        terms = "LicenseRef-ADE20K-terms"
        return Origin(f"fully convolutional ResNet of ADE20K ({terms})", terms, (("ADE20K", terms),))
    if (Path(weights) / "results.json").is_file():
        return _finetuned(Path(weights))
    entry = None if Path(weights).is_dir() else find(weights)
    found = entry or read_checkpoint(hub.resolve(weights, roles=()))
    name, license = weights if entry else found.name, found.license
    return Origin(f"{name} ({license.weights})", license.weights, license.datasets)


def _finetuned(folder: Path) -> Origin:
    """Weights of a fine-tuning run: what its backbone and its labelled images allow.

    A backbone that cannot be found any more has unknown terms, which are strict.
    """
    from geo_pretrain.training.finetune_recipe import load_finetune_recipe

    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    backbone, source = results["backbone"]["name"], results["data"]["source"]
    labels = results["data"].get("licence") or ("MIT" if source == "rooms" else "LicenseRef-data-owner")
    try:
        start = _origin(backbone, load_finetune_recipe(str(folder / "recipe.yaml")).network.depth)
    except GeoPretrainError:
        start = Origin(backbone, UNKNOWN_TERMS, ((f"what {backbone} learned from", UNKNOWN_TERMS),))
    terms = strictest(labels, start.terms or labels)
    name = f"{results['recipe']} fine-tuned from {backbone} ({terms})"
    return Origin(name, terms, ((source, labels), *start.datasets))
