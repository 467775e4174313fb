"""Predict with a fine-tuned run on a data set or on files, and write the results; `geo-pretrain predict`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, RecipeError, some, unknown
from geo_pretrain.files import write_text
from geo_pretrain.training.data.files import read_color
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.files import CLOUD_SUFFIXES, CloudFields
from geo_pretrain.training.data.labelled.clouds.folder import CloudFolder
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.data.labelled.mapping import label_map
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.evaluation.predictions import PointInstances, PointLabels
from geo_pretrain.training.evaluation.scannet_benchmark import write_scannet_instances, write_scannet_semantic
from geo_pretrain.training.finetune.cloud_files import CloudFile, cloud_fields
from geo_pretrain.training.finetune.load import load_finetuned
from geo_pretrain.training.finetune.task import FinetuneTask
from geo_pretrain.training.finetune.training import spread_ids
from geo_pretrain.training.finetune.written import Item, Place, file_stem, write_prediction
from geo_pretrain.training.finetune_recipe import POINT_KINDS, FinetuneRecipe
from geo_pretrain.training.visualize.clouds import draw_clouds

BENCHMARK = "benchmark"
MESH = "_vh_clean_2"  # of ScanNet's scans: scene0707_00_vh_clean_2.ply
INDEX, CLASSES, PICTURE = "predictions.json", "classes.txt", "predictions.png"
FORMAT = 1
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Predictions:
    """The results of a prediction: items with their files, and what could not be read."""

    folder: Path
    items: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)


def predict(
    run: str | os.PathLike[str],
    out: Path,
    *,
    data: str | None = None,
    path: str | None = None,
    split: str = "val",
    options: Mapping[str, Any] | None = None,
    files: Sequence[Path] = (),
    limit: int | None = None,
    draw: int = 4,
    benchmark: str | None = None,
    device: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Predictions:
    """Predict with the run in folder `run` on a data set or on files, and write labels, boxes or instances into `out`.

    Args:
        out: a new folder, or one that a prediction wrote. classes.txt names the labels 1..C line by line,
            predictions.json lists the items with their files and those that could not be read.
        data, path, split: a data set of `list_labelled` and its folder. It needs no labels.
        options: of the data set, or of cloud files (`CloudFields`); None: the recipe's, if it read the same kind.
        files: images, or point clouds as PLY, npy, npz, LAS, in place of a data set.
        limit: at most so many items of the data set, evenly spaced.
        draw: clouds in the picture predictions.png and the first in predictions.html; 0: none.
        benchmark: also write files for a benchmark's server, a key of `BENCHMARKS`, into the folder `out`/benchmark.
        progress: called with the number of items done, of all, and the name of the last one.

    Raises:
        RecipeError: neither or both of a data set and files are given.
        DataError: nothing could be read, or two files would be written under one name.
        CheckpointError: `run` is no finished run.
    """
    if bool(files) == (data is not None):
        raise RecipeError("Predict on what? Accepted: either FILES, or --data SOURCE:PATH.")
    check_target(out)
    task = load_finetuned(run, device=device)
    export = None if benchmark is None else _benchmark(benchmark, task)
    if data is not None:
        items = list(_of_source(task, _open(task.recipe, data, path, split, options), limit))
    else:
        items = list(_of_files(task.recipe, files, options))
    _check_names(items)
    found = Predictions(out)
    drawn: list[tuple[Any, Any]] = []
    _begin(found, task, run)
    for number, item in enumerate(items):
        done = _predict_one(task, item, found)
        if done is not None and export is not None:
            export(out / BENCHMARK, item.name, done[1])
        if done is not None and isinstance(done[0], LabelledCloud) and len(drawn) < draw:
            drawn.append(done)
        if progress is not None:
            progress(number + 1, len(items), item.name)
    draw_clouds(drawn, task.classes, out / PICTURE)
    _check_found(found)
    _write_index(found, task, run)
    return found


def _predict_one(task: FinetuneTask, item: Item, found: Predictions) -> tuple[Any, Any] | None:
    """Predict on one item and write its files; returns both, or None for a broken item, which is noted."""
    try:
        loaded = item.load()
        (prediction,) = task.predict([loaded])
    except BadFrame as bad:
        found.skipped.append({"path": bad.path, "reason": bad.reason})
        return None
    given = item.columns(loaded) if isinstance(loaded, LabelledCloud) else loaded
    place = Place(found.folder, item.name, [])
    facts = write_prediction(item.back(loaded, prediction), place, given, task.classes)
    found.items.append({"name": item.name, "files": place.files, **facts})
    return loaded, prediction


def _scannet(folder: Path, name: str, found: PointLabels | PointInstances) -> None:
    scan = Path(name).name.removesuffix(MESH)  # of a scan's mesh that was given as a file
    if isinstance(found, PointInstances):
        write_scannet_instances(folder, scan, found)
    else:
        write_scannet_semantic(folder, scan, found.labels)


# name -> table of the classes that the network must have, writer of one cloud's file
BENCHMARKS: dict[str, tuple[str, Callable[[Path, str, Any], None]]] = {"scannet": ("scannet20", _scannet)}


def _benchmark(name: str, task: FinetuneTask) -> Callable[[Path, str, Any], None]:
    """The writer of a benchmark's files. Raises `UnknownName`, and `RecipeError` where the network's labels differ."""
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    classes, write = BENCHMARKS[name]
    wanted = label_map(classes).classes
    if task.recipe.task not in ("segmentation3d", "instances3d") or task.classes != wanted:
        raise RecipeError(
            f"Benchmark {name!r} takes classes or instances of points of {len(wanted)} classes ({some(wanted)}); this "
            f"run is {task.recipe.task} of {len(task.classes)} ({some(task.classes)})."
        )
    return write


def _begin(found: Predictions, task: FinetuneTask, run: str | os.PathLike[str]) -> None:
    """Write what is known at the start: the index, too, so that a prediction that is cut off can be begun again."""
    found.folder.mkdir(parents=True, exist_ok=True)
    write_text(found.folder / CLASSES, "".join(f"{name}\n" for name in task.classes))
    _write_index(found, task, run)


def _check_found(found: Predictions) -> None:
    """Raise `DataError` where no item could be read."""
    if not found.items:
        reasons = some((f"{one['path']}: {one['reason']}" for one in found.skipped), 3)
        raise DataError(f"None of {len(found.skipped)} items can be read: {reasons}.")


def _write_index(found: Predictions, task: FinetuneTask, run: str | os.PathLike[str]) -> None:
    tree = {
        "format": FORMAT,
        "run": os.fspath(run),
        "task": task.recipe.task,
        "classes": list(task.classes),
        "items": found.items,
        "skipped": found.skipped,
    }
    write_text(found.folder / INDEX, json.dumps(tree, indent=1) + "\n")


def check_target(out: Path) -> None:
    """Raise `DataError` unless `out` is new, empty, or holds an earlier prediction."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / INDEX).exists())):
        raise DataError(f"{str(out)!r} exists and holds no prediction; choose another --out.")


def _open(
    recipe: FinetuneRecipe, data: str, path: str | None, split: str, options: Mapping[str, Any] | None
) -> LabelledData:
    if options is None:
        options = recipe.data.options if data == recipe.data.source else {}
    folder = None if path is None else Path(path)
    source: LabelledData = open_labelled(data, folder, split, task=recipe.labels(), options=options)
    return source


def _of_source(task: FinetuneTask, source: LabelledData, limit: int | None) -> Iterator[Item]:
    in_3d = task.recipe.network.kind in POINT_KINDS
    for id in spread_ids(source.ids(), limit):

        def load(id: str = id) -> Any:
            return task.load(source, id) if in_3d else source.load(id).image

        if isinstance(source, CloudFolder):
            yield CloudFile(source.item(id).points, source.options).loaded_by(id, load)
        else:
            yield Item(file_stem(id), load)


def _of_files(recipe: FinetuneRecipe, files: Sequence[Path], options: Mapping[str, Any] | None) -> Iterator[Item]:
    in_3d = recipe.network.kind in POINT_KINDS
    accepted, what = (CLOUD_SUFFIXES, "clouds") if in_3d else (IMAGE_SUFFIXES, "images")
    wrong = [path.name for path in files if path.suffix.lower() not in accepted]
    if wrong:
        raise DataError(f"{some(wrong)}: the network is for {what}; accepted: files that end in {', '.join(accepted)}.")
    fields = cloud_fields(recipe, options) if in_3d else CloudFields()
    for path in files:
        if in_3d:
            yield CloudFile(path, fields).item()
        else:
            yield Item(file_stem(path.stem), partial(read_image, path))


def read_image(path: Path) -> np.ndarray:
    """Read an image as uint8 [H, W, 3]. Raises `BadFrame` for a file that is none."""
    return read_color(path).copy()  # of its own, to be written to


def _check_names(items: Sequence[Item]) -> None:
    """Raise `DataError` where there is nothing, or two items would be written into the same files."""
    if not items:
        raise DataError("There is nothing to predict on: the data set or list of files is empty.")
    seen: set[str] = set()
    twice = {item.name for item in items if item.name in seen or seen.add(item.name)}  # type: ignore[func-returns-value]
    if twice:
        raise DataError(f"Two inputs are called {some(sorted(map(repr, twice)))}; predict on them one after the other.")
