"""From a run to its checkpoint folder: weights, golden values, recipe, log, licence and provenance."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import geo_pretrain
from geo_pretrain.cards import render_card
from geo_pretrain.catalog.entry import Arch
from geo_pretrain.catalog.licence import Licence, strictest
from geo_pretrain.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from geo_pretrain.training.data.frame import Source
from geo_pretrain.training.data.sources import data_licence, source_note
from geo_pretrain.training.recipe import ModelSpec, Recipe, list_recipes
from geo_pretrain.training.tasks import Task

LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "safetensors")


def write_run(
    recipe: Recipe, out: Path, task: Task, source: Source, log: Path, provenance: dict[str, Any], *, finished: bool
) -> Checkpoint:
    """Write the checkpoint folder `out` of a run, atomically; `provenance` is completed with versions and notes."""
    export = task.export()
    licence = run_licence(recipe)
    provenance = provenance | {
        "seed": recipe.seed,
        "init": "scratch" if recipe.model is None else recipe.model.init,
        "notes": source_note(source),
        "code": code_version(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    arch = Arch(export.arch, export.arch_args)
    made_by = recipe.name if recipe.name in list_recipes() else "recipe.yaml"  # a changed recipe is in the folder
    card = render_card(recipe.name, arch, export.contract, licence, provenance, recipe=made_by, finished=finished)
    return write_checkpoint(
        out,
        name=recipe.name,
        arch=arch,
        contract=export.contract,
        weights=export.weights,
        golden=export.golden,
        licence=licence,
        provenance=provenance,
        recipe_yaml=recipe.to_yaml(),
        log=log,
        card=card,
        finished=finished,
    )


def run_licence(recipe: Recipe) -> Licence:
    """The licence chain of weights made by a recipe: the strictest of its data's and its start weights' terms."""
    dataset, terms = data_licence(recipe.data)
    base, base_terms, base_data = _base_model(recipe.model)
    datasets = ((dataset, terms), *(item for item in base_data if item[0] != dataset))
    weights = strictest(terms, base_terms or terms)
    return Licence(code="MIT", weights=weights, datasets=datasets, base_model=base)


def _base_model(spec: ModelSpec | None) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """What training starts from, the terms of those weights ("" for none), and the data sets behind them.

    3D networks always start from random weights, so what the 2D network starts from decides.
    """
    if spec is None or spec.init == "scratch":
        return "none (random weights)", "", ()
    if spec.init == "imagenet":
        terms = "LicenseRef-ImageNet-terms"
        name = f"torchvision ResNet-{spec.depth} IMAGENET1K_V1 (BSD-3-Clause; ImageNet terms: non-commercial research)"
        return name, terms, (("ImageNet", terms),)
    if Path(spec.init).is_dir():
        checkpoint = read_checkpoint(Path(spec.init))
        name, licence = checkpoint.name, checkpoint.licence
    else:
        name, licence = spec.init, geo_pretrain.backbone_info(spec.init).licence
    return f"{name} ({licence.weights})", licence.weights, licence.datasets


def code_version() -> str:
    """The package version, with the commit when it runs from a git checkout."""
    root = Path(geo_pretrain.__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    if not (root / ".git").exists():
        return geo_pretrain.__version__
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return geo_pretrain.__version__
    return f"{geo_pretrain.__version__}+{commit}"
