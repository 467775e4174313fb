"""Features on images: rows are frames of a scene, columns the image and each network's features as colors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.files import atomic_write
from geo_pretrain.training.data.frame import Frame, SkippedFrames
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.data.surfaces.fusing import Surfaces
from geo_pretrain.training.evaluation.features import Features
from geo_pretrain.training.recipe import DataSpec
from geo_pretrain.training.visualize.colors import shared_pca
from geo_pretrain.training.visualize.columns import Column, find_backbone, load_columns
from geo_pretrain.training.visualize.common import (
    Progress,
    check_suffix,
    chosen_scene,
    load_frames,
    painted,
    settled,
)
from geo_pretrain.training.visualize.grids import enlarge, save_grid, shortened

SCENES = 4  # rooms that are there to choose from


def draw_features(
    backbones: Sequence[str],
    spec: DataSpec,
    out: Path,
    *,
    scene: str | None = None,
    count: int = 4,
    size: tuple[int, int] | None = None,
    level: int | None = None,
    twin: bool = True,
    seed: int = 0,
    device: str = "cpu",
    skips: SkippedFrames | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write a PNG of `count` frames of a scene and the features of each backbone there; returns the columns' titles.

    Every feature space has one color space fitted to all frames shown, so that one color is one feature in all views.
    Pixels and voxels of Pri3D's geometric prior share theirs. Colors of different networks do not compare.

    Args:
        backbones: catalog names or folders, 2D and 3D.
        scene: None: the source's first.
        size: of the frames; None: that of the first backbone's pre-training.
        level: a map inside the networks instead of their output, see `load_columns`.
        twin: also the first backbone with random weights, drawn from `seed`.

    Raises:
        RecipeError: `out` is no .png.
        UnknownName: a backbone or scene that there is not; DataError: no frame can be shown.
    """
    check_suffix(out, [".png"])
    skips = skips if skips is not None else SkippedFrames()
    found = [find_backbone(name) for name in backbones]
    spec = settled(spec, found[0], size, SCENES)
    source = open_source(spec, split="val")
    frames = load_frames(source, chosen_scene(source, scene), count, spec.size, skips)
    surfaces = Surfaces(source)
    columns = [column for one in found for column in load_columns(one, surfaces, level=level, seed=seed, device=device)]
    if twin:
        columns += load_columns(found[0], surfaces, level=level, random_init=True, seed=seed, device=device)
    rows = _described(frames, columns, skips, progress)
    panels = [[enlarge(frame.color), *map(enlarge, row)] for frame, row in _colored(rows, columns)]
    titles = ["image", *(shortened(column.title, panels[0][0].width) for column in columns)]
    captions = [[f"{frame.scene}/{frame.id}"] + [""] * len(columns) for frame, _ in rows]
    legend = "Colors: three principal components of the features, the same in all rows of a column."
    if len({column.space for column in columns}) < len(columns):
        legend = legend.replace("of a column.", "of a column, and for pixels and voxels of one checkpoint.")
    with atomic_write(out, suffix=out.suffix) as temporary:
        save_grid(panels, captions, titles, legend, temporary)
    return titles


def _described(
    frames: Sequence[Frame], columns: Sequence[Column], skips: SkippedFrames, progress: Progress | None
) -> list[tuple[Frame, list[Features]]]:
    """The features of every frame in every column; a frame without some is left out."""
    rows = []
    for number, frame in enumerate(frames):
        try:
            row = []
            for place, column in enumerate(columns):
                if progress is not None:
                    progress(number * len(columns) + place, len(frames) * len(columns))
                row.append(column.pixel_features(frame))
            rows.append((frame, row))
        except BadFrame as bad:
            skips.add(bad)
    if not rows:
        raise DataError(f"No frame of scene {frames[0].scene!r} can be shown.\n{skips.summary()}")
    return rows


def _colored(
    rows: Sequence[tuple[Frame, list[Features]]], columns: Sequence[Column]
) -> list[tuple[Frame, list[np.ndarray]]]:
    """The features as pictures uint8 [H, W, 3], one color space for all rows and all columns of a space."""
    colors: dict[tuple[int, int], np.ndarray] = {}
    for space in dict.fromkeys(column.space for column in columns):
        cells = [(r, c) for c, column in enumerate(columns) if column.space == space for r in range(len(rows))]
        colors |= zip(cells, shared_pca([rows[r][1][c].unit() for r, c in cells]), strict=True)
    return [
        (frame, [painted(colors[r, c], found.index) for c, found in enumerate(row)])
        for r, (frame, row) in enumerate(rows)
    ]
