"""Helpers of all pictures: which scenes and frames they show, and how a grid of them is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from geo_pretrain.devices import device_fault
from geo_pretrain.errors import BadFrame, DataError, RecipeError, unknown
from geo_pretrain.targets import file_fault
from geo_pretrain.training.data.frame import Frame, SkippedFrames, Source, resize_frame
from geo_pretrain.training.data.mining import spread_evenly
from geo_pretrain.training.data.sources.registry import open_on_disk
from geo_pretrain.training.evaluation.features import pretraining_size
from geo_pretrain.training.evaluation.progress import Progress
from geo_pretrain.training.recipe import DataSpec, recipe_of
from geo_pretrain.training.visualize.columns import Opened

NOTHING = (234, 236, 239)  # where there is no feature: no depth, no point
SCENES = 4  # rooms that are there to choose from
ROOMS_FRAMES = 12  # of a room, where the recipe does not say

Item = TypeVar("Item")
ColumnKind = TypeVar("ColumnKind")
Cell = TypeVar("Cell")


def check_file(path: Path, accepted: Sequence[str]) -> None:
    """Raise `RecipeError` for a file of another kind, or in a place that is not there, before anything is computed."""
    if (fault := file_fault(path, accepted)) is not None:
        raise RecipeError(fault)


def check_place(out: Path, accepted: Sequence[str], device: str) -> None:
    """Raise `RecipeError` for a file that cannot be written, or a device that is not there."""
    check_file(out, accepted)
    if (fault := device_fault(device)) is not None:
        raise RecipeError(fault)


def prepare(out: Path, accepted: Sequence[str], spec: DataSpec, device: str) -> Source | None:
    """Check the file to write and the device, and open a source of files: before a backbone is fetched.

    Returns None for rooms. Raises `RecipeError`, and what opening a source raises.
    """
    check_place(out, accepted, device)
    return open_on_disk(spec, split="val")


def drawing_spec(spec: DataSpec, opened: Opened, size: tuple[int, int] | None, scenes: int = SCENES) -> DataSpec:
    """Set the size of frames in `spec` (`size`, or else pre-training's) and render `scenes` rooms as in pre-training.

    Rooms that the user described (`data.options`) stay as they are.
    """
    spec = replace(spec, size=size or pretraining_size(opened.checkpoint, spec.size))
    if spec.source != "rooms" or spec.options:
        return spec
    recipe = recipe_of(opened.checkpoint)
    options = recipe.data.options if recipe and recipe.data.source == "rooms" else {"frames": ROOMS_FRAMES}
    return replace(spec, options={**options, "scenes": scenes})


def pick_scene(source: Source, scene: str | None) -> str:
    """Return the scene asked for, or the first. Raises `UnknownName`, naming the nearest ones."""
    scenes = source.scenes()
    if scene is None:
        return scenes[0]
    if scene not in scenes:
        raise unknown("scene", scene, scenes)
    return scene


def load_frames(
    source: Source, scene: str, count: int | None, size: tuple[int, int], skips: SkippedFrames
) -> list[Frame]:
    """Load at most `count` (None: all) frames of a scene, evenly spaced, at `size`; unreadable ones go to `skips`.

    Raises `DataError` when none can be read.
    """
    frames = []
    for frame_id in spread_evenly(source.frame_ids(scene), count):
        try:
            frames.append(resize_frame(source.load(scene, frame_id), size))
        except BadFrame as bad:
            skips.add(bad)
    if not frames:
        raise DataError(f"Scene {scene!r} of source {source.name!r} has no frame to show.\n{skips.summary()}".rstrip())
    return frames


def paint(colors: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Look up colors uint8 [M, 3] by `index` [H, W]: uint8 [H, W, 3], pale gray where it is -1."""
    table = np.concatenate([colors, np.array([NOTHING], np.uint8)])
    return table[index]


def fill_rows(
    items: Sequence[Item],
    columns: Sequence[ColumnKind],
    cell: Callable[[int, Item, ColumnKind], Cell],
    *,
    what: str,
    skips: SkippedFrames,
    progress: Progress | None,
) -> list[tuple[Item, list[Cell]]]:
    """Compute `cell(number, item, column)` for every item and column; items that raise `BadFrame` go to `skips`.

    Raises `DataError` when none is left; `what` names them.
    """
    rows = []
    for number, item in enumerate(items):
        row = []
        try:
            for done, column in enumerate(columns, start=number * len(columns)):
                if progress is not None:
                    progress(done, len(items) * len(columns))
                row.append(cell(number, item, column))
        except BadFrame as bad:
            skips.add(bad)
        else:
            rows.append((item, row))
    if not rows:
        raise DataError(f"No {what} can be shown.\n{skips.summary()}")
    return rows
