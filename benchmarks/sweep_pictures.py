"""Pictures of a segmentation sweep: what its fine-tuned networks predict, one column a start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.torch import load_file

from geo_pretrain.errors import DataError, RecipeError
from geo_pretrain.training.data.labelled.image import LabelledImage, LabelledSource
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.data.mining import spread_evenly
from geo_pretrain.training.finetune.folder import MODEL, PICTURE, RESULTS
from geo_pretrain.training.finetune.registry import backbone_init, build_finetune_task
from geo_pretrain.training.finetune.segmentation import Segmentation
from geo_pretrain.training.finetune.sweep import read_plan, run_recipe
from geo_pretrain.training.visualize import results
from geo_pretrain.training.visualize.curves import shown


def draw_predictions(
    images: Sequence[LabelledImage],
    predictions: Mapping[str, Sequence[np.ndarray]],
    classes: Sequence[str],
    path: Path,
) -> None:
    """Write a grid with one row per image: the image, its labels, and the prediction of each start.

    `predictions`: start -> class ids [H, W] of each image, 1.. (0: none), of any size; `classes` names 1...
    """
    for name, given in predictions.items():
        if len(given) != len(images):
            raise DataError(f"{name}: {len(given)} predictions for {len(images)} images.")
    rows = []
    for number, labelled in enumerate(images):
        if labelled.semantic is None:
            raise DataError(f"Image {labelled.id} has no labels of pixels; the picture shows them.")
        rows.append((labelled.image, labelled.semantic, [guesses[number] for guesses in predictions.values()]))
    results.draw_predictions(rows, [shown(name) for name in predictions], classes, path)


def draw_starts(
    out: Path,
    path: Path,
    *,
    fraction: float | None = None,
    seed: int | None = None,
    images: int = 4,
    sources: tuple[LabelledSource, LabelledSource] | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Draw predictions of a segmentation sweep's fine-tuned networks on evenly spaced validation images.

    `fraction` and `seed` None: the largest share, and the first seed, that is finished. `sources` and `init_kwargs` are
    those of the sweep. Raises `DataError` when there is no such finished run, `RecipeError` for other tasks.
    """
    recipe, held, runs = read_plan(out)
    if recipe.task != "segmentation":
        raise RecipeError(f"'task' is {recipe.task!r}; accepted is segmentation. Each run has its own {PICTURE}.")
    done = [run for run in runs if (run.folder / RESULTS).exists()]
    done = [run for run in done if fraction in (None, run.fraction) and seed in (None, run.seed)]
    if not done:
        raise DataError(f"{out}: no finished run of the share and seed asked for.")
    largest = max(run.fraction for run in done)
    chosen = largest, min(run.seed for run in done if run.fraction == largest)
    shown_runs = {run.label: run for run in done if (run.fraction, run.seed) == chosen}
    spec, where = recipe.data, dict(init_kwargs or {})
    opened = None if spec.path is None else Path(spec.path)
    if sources is None:
        val = open_labelled(spec.source, opened, "val", task="segmentation", options=spec.options)
    else:
        val = sources[1]
    ids = spread_evenly(val.ids(), images)
    predictions = {}
    for label in (label for label in held if label in shown_runs):
        run = shown_runs[label]
        start = backbone_init(recipe, run.backbone, where)
        task = build_finetune_task(run_recipe(recipe, *chosen), start, val.classes, start.contract())
        task.module.load_state_dict(load_file(run.folder / MODEL))
        predictions[label] = [guess.numpy() for _, _, guess in cast(Segmentation, task).predictions(val, ids)]
    draw_predictions([val.load(id) for id in ids], predictions, val.classes, path)
