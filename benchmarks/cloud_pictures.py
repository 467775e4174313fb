"""Pictures of a study in 3D: what networks that were fine-tuned from several starts find in the same clouds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.finetune.clouds import CloudTask
from geo_pretrain.training.finetune.load import load_finetuned
from geo_pretrain.training.visualize.cloud_layers import save_cloud_figure
from geo_pretrain.training.visualize.clouds import class_legend, cloud_picture


def draw_starts(runs: Mapping[str, Path], ids: Sequence[str], path: Path) -> None:
    """Write a grid with a row per validation cloud: its colors, the truth, what each run found.

    `runs`: title of a column -> folder of a fine-tuned run, all of one recipe.
    """
    tasks = {title: cast(CloudTask, load_finetuned(folder).task) for title, folder in runs.items()}
    task = next(iter(tasks.values()))
    data = task.recipe.data
    source = open_labelled(data.source, None, "val", task=task.recipe.labels(), options=data.options)
    clouds = [task.load(source, id) for id in ids]
    found = {title: task.predict(clouds) for title, task in tasks.items()}
    pictures = []
    for number, cloud in enumerate(clouds):
        drawn = {title: cloud_picture(cloud, guesses[number], task.classes) for title, guesses in found.items()}
        columns = [replace(picture.layers[-1], title=title) for title, picture in drawn.items()]
        first = next(iter(drawn.values()))
        pictures.append(replace(first, layers=(*first.layers[:-1], *columns)))
    pairs = [pair for guesses in found.values() for pair in zip(clouds, guesses, strict=True)]
    save_cloud_figure(pictures, class_legend(pairs, task.classes), path)
