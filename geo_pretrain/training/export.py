"""Writes the checkpoint folder of a run: weights, golden values, recipe, log, license, provenance and card."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geo_pretrain.cards import render_card
from geo_pretrain.catalog.entry import Arch
from geo_pretrain.catalog.license import License
from geo_pretrain.checkpoint import Checkpoint, write_checkpoint
from geo_pretrain.training.data.frame import Source
from geo_pretrain.training.data.sources.registry import source_note
from geo_pretrain.training.recipe import Recipe, list_recipes
from geo_pretrain.training.runs import code_version, library_versions
from geo_pretrain.training.tasks import PretextTask


def write_run(
    recipe: Recipe,
    out: Path,
    task: PretextTask,
    source: Source,
    log: Path,
    provenance: dict[str, Any],
    license: License,
    *,
    finished: bool,
    starts: Mapping[str, Path] = {},
) -> Checkpoint:
    """Write the checkpoint folder `out` atomically; seed, start weights and software versions join `provenance`.

    `license` is the result of `licenses.run_license`, called before the run, since start weights may move meanwhile.
    `starts` maps "stage1" to the folder of the first stage, as in `build_task`.
    """
    export = task.export()
    provenance = provenance | {
        "seed": recipe.seed,
        "init": "scratch" if recipe.model is None else recipe.start_of(recipe.model.init, starts),
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
