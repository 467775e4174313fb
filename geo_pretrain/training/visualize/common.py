"""What all pictures share: which scenes and frames are shown, rooms as in pre-training, files that appear whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, RecipeError, unknown
from geo_pretrain.training.data.frame import Frame, SkippedFrames, Source, resize_frame
from geo_pretrain.training.evaluation.features import pretraining_size
from geo_pretrain.training.evaluation.matching import spread_evenly
from geo_pretrain.training.evaluation.progress import Progress as Progress
from geo_pretrain.training.recipe import DataSpec, recipe_of
from geo_pretrain.training.visualize.columns import Opened
from geo_pretrain.training.visualize.grids import magnification

NOTHING = (234, 236, 239)  # where there is no feature: no depth, no point
ROOMS_FRAMES = 12  # of a room, where the recipe does not say


def check_suffix(path: Path, accepted: Sequence[str]) -> None:
    """Raises `RecipeError` for a file of another kind; better known before anything is computed."""
    if path.suffix.lower() not in accepted:
        raise RecipeError(f"The file to write is {path.name!r}; accepted: names that end in {', '.join(accepted)}.")


def settled(spec: DataSpec, opened: Opened, size: tuple[int, int] | None, scenes: int) -> DataSpec:
    """`spec` with the size of frames: `size`, or else that of pre-training; and with `scenes` rooms as in pre-training.

    Rooms that the user described (`data.options`) stay as they are.
    """
    spec = replace(spec, size=size or pretraining_size(opened.checkpoint, spec.size))
    if spec.source != "rooms" or spec.options:
        return spec
    recipe = recipe_of(opened.checkpoint)
    own = recipe is not None and recipe.data.source == "rooms"
    options = recipe.data.options if recipe is not None and own else {"frames": ROOMS_FRAMES}
    return replace(spec, options={**options, "scenes": scenes})


def chosen_scene(source: Source, scene: str | None) -> str:
    """The scene asked for, or the first. Raises `UnknownName`, naming the nearest ones."""
    scenes = source.scenes()
    if scene is None:
        return scenes[0]
    if scene not in scenes:
        raise unknown("scene", scene, scenes)
    return scene


def chosen_frame(source: Source, scene: str, frame: str) -> str:
    """The frame asked for. Raises `UnknownName`, naming the nearest ones."""
    ids = source.frame_ids(scene)
    if frame not in ids:
        raise unknown("frame", frame, ids)
    return frame


def load_frames(
    source: Source, scene: str, count: int | None, size: tuple[int, int], skips: SkippedFrames
) -> list[Frame]:
    """At most `count` (None: all) frames of a scene, evenly spaced among those that can be read, at `size`.

    Raises `DataError` when none can be read.
    """
    ids = source.frame_ids(scene)
    wanted = ids if count is None else spread_evenly(ids, count)
    frames = []
    for frame_id in wanted:
        try:
            frames.append(resize_frame(source.load(scene, frame_id), size))
        except BadFrame as bad:
            skips.add(bad)
    if not frames:
        raise DataError(f"Scene {scene!r} of source {source.name!r} has no frame to show.\n{skips.summary()}".rstrip())
    return frames


def painted(colors: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Colors uint8 [M, 3] at `index` [H, W]: uint8 [H, W, 3], a pale gray where it is -1."""
    table = np.concatenate([colors, np.array([NOTHING], np.uint8)])
    return table[index]


def picture_size(frame: Frame) -> tuple[int, int]:
    """The size (height, width) of a picture beside a frame: its own, enlarged as whole pixels to about 256."""
    factor = magnification(frame.depth.shape[1])
    return frame.depth.shape[0] * factor, frame.depth.shape[1] * factor
