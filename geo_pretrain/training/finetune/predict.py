"""Predict with a fine-tuned run on a data set or on files, and write the results; `geo-pretrain predict`."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from geo_pretrain.errors import BadFrame, DataError, RecipeError, require, some, unknown
from geo_pretrain.files import expanded, parse_json, write_text
from geo_pretrain.training.data.files import read_photo
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.files import CLOUD_SUFFIXES, CloudFields
from geo_pretrain.training.data.labelled.clouds.folder import CloudFolder
from geo_pretrain.training.data.labelled.clouds.unread import conversion, left_alone
from geo_pretrain.training.data.labelled.coco import Coco
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.data.labelled.mapping import label_map
from geo_pretrain.training.data.labelled.own_images import IMAGE_SUFFIXES
from geo_pretrain.training.data.labelled.registry import file_name, open_labelled
from geo_pretrain.training.evaluation.coco import Detections
from geo_pretrain.training.evaluation.predictions import PointInstances, PointLabels
from geo_pretrain.training.evaluation.scannet_benchmark import write_scannet_instances, write_scannet_semantic
from geo_pretrain.training.finetune.cloud_files import CloudFile, cloud_fields
from geo_pretrain.training.finetune.clouds import CloudTask
from geo_pretrain.training.finetune.coco_file import CocoFile
from geo_pretrain.training.finetune.load import finetuned_folder, load_task, read_classes, read_recipe
from geo_pretrain.training.finetune.task import FinetuneTask
from geo_pretrain.training.finetune.training import spread_ids
from geo_pretrain.training.finetune.written import Item, Place, file_stem, write_prediction
from geo_pretrain.training.finetune_recipe import POINT_KINDS, FinetuneRecipe
from geo_pretrain.training.visualize.clouds import draw_clouds
from geo_pretrain.training.visualize.labelled import draw_legend

BENCHMARK = "benchmark"
MESH = "_vh_clean_2"  # of ScanNet's scans: scene0707_00_vh_clean_2.ply
INDEX, CLASSES, PICTURE, LEGEND = "predictions.json", "classes.txt", "predictions.png", "legend.png"
DETECTIONS = "detections.json"  # all boxes and masks in COCO's format
FORMAT = 1


@dataclass(frozen=True)
class Predictions:
    """The results of a prediction: items with their files, and what could not be read."""

    folder: Path
    items: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    benchmark: str | None = None  # whose files are written, too
    colors: Sequence[Sequence[int]] | None = None  # of the classes 1..C in pictures; None: the package's


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
    batch: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> Predictions:
    """Predict with the run in folder `run` on a data set or on files, and write labels, boxes or instances into `out`.

    Args:
        out: a new folder, or one that a prediction wrote; docs/own_images.md and downstream_3d.md list its files.
        data, path, split: a data set of `list_labelled` and its folder. It needs no labels.
        options: of the data set; None: the recipe's, if it read the same. Of files (`CloudFields`): changes of these.
        files, limit: images, clouds as PLY, npy, npz, LAS, or folders of them; at most so many, evenly spaced.
        draw: clouds in the picture predictions.png and the first in predictions.html; 0: none.
        benchmark: also write files for a benchmark's server, a key of `BENCHMARKS`, into the folder `out`/benchmark.
        batch: items that go through the network together, images where they are equally large.
        progress: called with the number of items done, of all, and the name of the last one.

    Raises:
        RecipeError: neither or both of a data set and files are given.
        DataError: nothing is there, or could be read, or two files would be written under one name; nothing is written.
        CheckpointError: `run` is no finished run.
        MissingDependency: masks of images are to be written, and pycocotools is not installed.
    """
    _check_request(run, files, data, path)
    check_target(out)
    folder = finetuned_folder(run)
    recipe = _recipe(folder)  # what is asked for is looked at before the network is loaded and data are rendered
    export = None if benchmark is None else _benchmark(benchmark, recipe, read_classes(folder))
    source = None if data is None else _open(recipe, data, path, split, options)
    given = _checked_files(recipe, files, options, out) if source is None else []
    task, stated = _load(folder, device)
    items = spread_ids(given if source is None else list(_of_source(task, source)), limit)
    _check_names(items, in_3d=recipe.network.kind in POINT_KINDS)
    found, earlier = Predictions(out, benchmark=benchmark, colors=stated["data"].get("colors")), _earlier_files(out)
    detected, drawn = CocoFile(task.classes, stated["data"].get("ids")), list[tuple[Any, Any]]()
    for start in range(0, len(items), batch):
        group = items[start : start + batch]
        for item, loaded, prediction in _predict_group(task, group, found, run):
            if export is not None:
                export(out / BENCHMARK, item.name, prediction)
            if isinstance(loaded, LabelledCloud) and len(drawn) < draw:
                drawn.append((loaded, prediction))
            if isinstance(prediction, Detections):
                detected.add(item.file or f"{item.name}.png", loaded.shape, prediction, id=item.image)
        if progress is not None:
            progress(start + len(group), len(items), group[-1].name)
    draw_clouds(drawn, task.classes, out / PICTURE)
    _finish(found, task, run, detected, earlier)
    return found


def _checked_files(
    recipe: FinetuneRecipe, files: Sequence[Path], options: Mapping[str, Any] | None, out: Path
) -> list[Item]:
    """The items of files that are given, each with a name of its own; none of an earlier prediction in `out`."""
    items = list(_of_files(recipe, files, options, out))
    _check_names(items, in_3d=recipe.network.kind in POINT_KINDS)
    _check_there(files)
    return items


def _recipe(folder: Path) -> FinetuneRecipe:
    """The recipe of the run, if what it predicts can be written. Raises `MissingDependency`."""
    recipe = read_recipe(folder)
    if recipe.task == "instances":  # masks are written as COCO's run lengths
        require("pycocotools", "training")
    return recipe


def _load(folder: Path, device: str | None) -> tuple[FinetuneTask, Mapping[str, Any]]:
    """Load the task of the run and what its results state, with hints for files instead of arrays."""
    task, stated = load_task(folder, device=device)
    if isinstance(task, CloudTask):
        task.scaled_by = "--option scale={}"
    return task, stated


def _predict_group(
    task: FinetuneTask, group: Sequence[Item], found: Predictions, run: str | os.PathLike[str]
) -> Iterator[tuple[Item, Any, Any]]:
    """Predict on some items together and write their files; broken ones are noted and left out."""
    loaded: list[tuple[Item, Any]] = []
    for item in group:
        try:
            loaded.append((item, item.load()))
        except BadFrame as bad:
            found.skipped.append({"path": bad.path, "reason": bad.reason})
    for item, given, prediction in _predicted(task, loaded, found):
        if not found.items:  # not before: where nothing can be read, nothing is written
            _begin(found, task, run)
        columns = item.columns(given) if isinstance(given, LabelledCloud) else given
        place = Place(found.folder, item.name, [], found.colors)
        facts = write_prediction(item.back(given, prediction), place, columns, task.classes)
        found.items.append({"name": item.name, "files": place.files, **facts})
        yield item, given, prediction


def _predicted(
    task: FinetuneTask, loaded: Sequence[tuple[Item, Any]], found: Predictions
) -> Iterator[tuple[Item, Any, Any]]:
    """Predictions on what was loaded; where one of several cannot be used, each is tried alone."""
    if not loaded:
        return
    try:
        predictions = task.predict([given for _, given in loaded])
    except BadFrame as bad:
        if len(loaded) == 1:
            found.skipped.append({"path": bad.path, "reason": bad.reason})
        for one in loaded if len(loaded) > 1 else ():
            yield from _predicted(task, [one], found)
        return
    for (item, given), prediction in zip(loaded, predictions, strict=True):
        yield item, given, prediction


def _scannet(folder: Path, name: str, found: PointLabels | PointInstances) -> None:
    scan = Path(name).name.removesuffix(MESH)  # of a scan's mesh that was given as a file
    if isinstance(found, PointInstances):
        write_scannet_instances(folder, scan, found)
    else:
        write_scannet_semantic(folder, scan, found.labels)


# name -> table of the classes that the network must have, writer of one cloud's file
BENCHMARKS: dict[str, tuple[str, Callable[[Path, str, Any], None]]] = {"scannet": ("scannet20", _scannet)}


def _benchmark(name: str, recipe: FinetuneRecipe, trained: Sequence[str]) -> Callable[[Path, str, Any], None]:
    """The writer of a benchmark's files. Raises `UnknownName`, and `RecipeError` where the network's labels differ."""
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    classes, write = BENCHMARKS[name]
    wanted = label_map(classes).classes
    if recipe.task not in ("segmentation3d", "instances3d") or tuple(trained) != wanted:
        raise RecipeError(
            f"Benchmark {name!r} takes classes or instances of points of {len(wanted)} classes ({some(wanted)}); this "
            f"run is {recipe.task} of {len(trained)} ({some(trained)})."
        )
    return write


def _begin(found: Predictions, task: FinetuneTask, run: str | os.PathLike[str]) -> None:
    """Write what is known at the start: the index, too, so that a prediction that is cut off can be begun again."""
    found.folder.mkdir(parents=True, exist_ok=True)
    write_text(found.folder / CLASSES, "".join(f"{name}\n" for name in task.classes))
    draw_legend(task.classes, found.colors, found.folder / LEGEND)
    _write_index(found, task, run)


def _earlier_files(folder: Path) -> list[str]:
    """The files of an earlier prediction in a folder, which would pass for those of the next one."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or an index that somebody changed
        tree = parse_json((folder / INDEX).read_bytes())
        names = [DETECTIONS, PICTURE, str(Path(PICTURE).with_suffix(".html"))]
        names += [str(name) for item in tree["items"] for name in item["files"]]
        if tree.get("benchmark") is not None:
            names += [path.relative_to(folder).as_posix() for path in sorted((folder / BENCHMARK).rglob("*.txt"))]
        return names
    return []


def _remove_earlier(found: Predictions, earlier: Sequence[str]) -> None:
    """Remove the files of the earlier prediction that this one has not written."""
    own = {name for item in found.items for name in item["files"]}
    begun = (found.folder / INDEX).stat().st_mtime_ns
    for path in (found.folder / name for name in earlier if name not in own):
        inside = path.is_file() and path.resolve().is_relative_to(found.folder.resolve())
        if inside and path.stat().st_mtime_ns < begun:
            path.unlink()


def _finish(
    found: Predictions,
    task: FinetuneTask,
    run: str | os.PathLike[str],
    detected: CocoFile,
    earlier: Sequence[str],
) -> None:
    """Write what is known at the end. Raises `DataError` where no item could be read."""
    if not found.items:
        reasons = some((f"{one['path']}: {one['reason']}" for one in found.skipped), 3)
        raise DataError(f"None of {len(found.skipped)} items can be read: {reasons}.")
    _remove_earlier(found, earlier)
    if detected.images:
        write_text(found.folder / DETECTIONS, json.dumps(detected.tree()) + "\n")
    _write_index(found, task, run)


def _write_index(found: Predictions, task: FinetuneTask, run: str | os.PathLike[str]) -> None:
    tree = {
        "format": FORMAT,
        "run": os.fspath(run),
        "task": task.recipe.task,
        "classes": list(task.classes),
        "items": found.items,
        "skipped": found.skipped,
        **({} if found.benchmark is None else {"benchmark": found.benchmark}),
    }
    write_text(found.folder / INDEX, json.dumps(tree, indent=1) + "\n")


def check_target(out: Path) -> None:
    """Raise `DataError` unless `out` is new, empty, or holds an earlier prediction."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / INDEX).exists())):
        raise DataError(f"{str(out)!r} exists and holds no prediction; choose another --out.")


def _check_request(run: str | os.PathLike[str], files: Sequence[Path], data: str | None, path: str | None) -> None:
    """Raise `RecipeError` for files and data, `DataError` where nothing is there, before a network is downloaded."""
    if bool(files) == (data is not None):
        raise RecipeError("Predict on what? Accepted: either FILES, or --data SOURCE:PATH.")
    if Path(run).is_dir():
        return  # nothing is downloaded
    named = [*files, *([] if path is None else [expanded(path)])]
    _check_there(named)


def _check_there(paths: Sequence[Path]) -> None:
    """Raise `DataError` where none of some paths is there; one of several is told as an item that was skipped."""
    missing = [repr(str(one)) for one in paths if not one.exists()]
    if len(missing) == len(paths) > 0:
        raise DataError(f"Nothing to predict on: there is no {some(missing)} here ({str(Path.cwd())!r}).")


def _open(
    recipe: FinetuneRecipe, data: str, path: str | None, split: str, options: Mapping[str, Any] | None
) -> LabelledData:
    if options is None:
        options = recipe.data.options if data == recipe.data.source else {}
    folder = None if path is None else Path(path)
    source: LabelledData = open_labelled(data, folder, split, task=recipe.labels(), options=options)
    return source


def _of_source(task: FinetuneTask, source: LabelledData) -> Iterator[Item]:
    in_3d = task.recipe.network.kind in POINT_KINDS
    for id in source.ids():

        def load(id: str = id) -> Any:
            return task.load(source, id) if in_3d else source.load(id).image

        if isinstance(source, CloudFolder):
            yield CloudFile(source.item(id).points, source.options).loaded_by(id, load)
        else:
            image = int(id) if isinstance(source, Coco) and id.isdecimal() else None
            yield Item(file_stem(id), load, file=file_name(source, id), image=image)


def _of_files(
    recipe: FinetuneRecipe, files: Sequence[Path], options: Mapping[str, Any] | None, out: Path
) -> Iterator[Item]:
    in_3d = recipe.network.kind in POINT_KINDS
    accepted, what = (CLOUD_SUFFIXES, "clouds") if in_3d else (IMAGE_SUFFIXES, "images")
    if options is not None and not in_3d:
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        raise RecipeError(
            f"Options of files are {given!r}; accepted of images: none. Leave out --option; it goes with --data, and "
            "with files of clouds."
        )
    wrong = [path for path in files if not path.is_dir() and path.suffix.lower() not in accepted]
    kinds = (*CLOUD_SUFFIXES, *IMAGE_SUFFIXES)  # with one of these, that it is the other kind is what is wrong
    missing = [repr(str(path)) for path in files if path.suffix.lower() not in kinds and not path.exists()]
    if missing:
        ways = f"accepted: {what} ({', '.join(accepted)}) and folders of them"
        raise DataError(f"{some(missing)} {'does' if len(missing) == 1 else 'do'} not exist; {ways}.")
    if wrong:
        raise DataError(
            f"{some(path.name for path in wrong)}: the network is for {what}; accepted: files that end in "
            f"{', '.join(accepted)}.{conversion(wrong) if in_3d else ''}"
        )
    fields = cloud_fields(recipe, options) if in_3d else CloudFields()
    for path, below in _named(files, accepted, what, out):
        id = below.with_suffix("").as_posix()
        if in_3d:
            cloud = CloudFile(path, fields)
            yield cloud.loaded_by(id, cloud.load)
        else:
            yield Item(file_stem(id), partial(read_photo, path), file=below.as_posix())


def _named(files: Sequence[Path], suffixes: Sequence[str], what: str, out: Path) -> Iterator[tuple[Path, Path]]:
    """Each file with the path that names its results: below a folder that was given that there, else its name."""
    results = out.resolve()
    for path in files:
        if not path.is_dir():
            yield path, Path(path.name)
            continue
        there = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        of_kind = [p for p in there if p.suffix.lower() in suffixes]
        inside = [p for p in of_kind if not p.resolve().is_relative_to(results)]
        if of_kind and not inside:
            raise DataError(f"All {what} in {str(path)!r} lie in {str(out)!r}, where results go; choose another --out.")
        others = left_alone(path, suffixes)
        hint = conversion(others) if what == "clouds" else ""
        if not inside:
            raise DataError(f"No {what} ({', '.join(suffixes)}) in {str(path)!r}.{hint}")
        if others:
            names = some(p.name for p in others)
            left = f"{path}: left alone, because only {', '.join(suffixes)} are read: {names}.{hint}"
            warnings.warn(left, stacklevel=2)
        for one in inside:
            yield one, one.relative_to(path)


def _check_names(items: Sequence[Item], *, in_3d: bool) -> None:
    """Raise `DataError` where there is nothing, or two items would be written into the same files."""
    if not items:
        raise DataError("There is nothing to predict on: the data set or list of files is empty.")
    seen: set[str] = set()
    twice = {item.name for item in items if item.name in seen or seen.add(item.name)}  # type: ignore[func-returns-value]
    if twice:
        raise DataError(f"Two inputs are called {some(sorted(map(repr, twice)))}; predict on them one after the other.")
    ends, alone = ((".boxes",), set()) if in_3d else ((".labels", ".instances"), {Path(LEGEND).stem})
    others = [one for one in seen for end in ends if one.endswith(end) and one.removesuffix(end) in seen]
    if taken := sorted({*others, *(seen & alone)}):
        raise DataError(f"Files of {some(map(repr, taken))} would have names of others of this prediction; rename it.")
