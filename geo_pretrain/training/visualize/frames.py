"""Features on images: rows are frames of a scene, columns the image and each network's features as colors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from geo_pretrain.errors import DataError
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
    drawing_spec,
    fill_rows,
    load_frames,
    paint,
    pick_scene,
)
from geo_pretrain.training.visualize.grids import enlarge, save_grid, shorten

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
    baseline: bool = True,
    seed: int = 0,
    device: str = "cpu",
    skips: SkippedFrames | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Draw the features of backbones on `count` frames of a scene as a PNG; returns the columns' titles.

    Every feature space has one color space fitted to all frames shown, so that one color is one feature in all views.
    Pixels and voxels of Pri3D's geometric prior share theirs. Colors of different networks do not compare.

    Args:
        backbones: catalog names or folders, 2D and 3D.
        scene: None: the source's first.
        size: of the frames; None: that of the first backbone's pre-training.
        level: a map inside the networks instead of their output, see `load_columns`.
        baseline: also the first backbone with random weights, drawn from `seed`.

    Raises:
        RecipeError: `out` is not a .png.
        UnknownName: no such backbone or scene; DataError: no frame can be shown.
    """
    check_suffix(out, [".png"])
    skips = skips if skips is not None else SkippedFrames()
    opened = [find_backbone(name) for name in backbones]
    spec = drawing_spec(spec, opened[0], size, SCENES)
    source = open_source(spec, split="val")
    frames = load_frames(source, pick_scene(source, scene), count, spec.size, skips)
    surfaces = Surfaces(source)
    columns = [
        c for backbone in opened for c in load_columns(backbone, surfaces, level=level, seed=seed, device=device)
    ]
    if baseline:
        columns += load_columns(opened[0], surfaces, level=level, random_init=True, seed=seed, device=device)
    rows = _extract_rows(frames, columns, skips, progress)
    panels = [[enlarge(frame.color), *map(enlarge, row)] for frame, row in _paint_rows(rows, columns)]
    titles = ["image", *(shorten(column.title, panels[0][0].width) for column in columns)]
    captions = [[f"{frame.scene}/{frame.id}"] + [""] * len(columns) for frame, _ in rows]
    legend = "Colors: three principal components of the features, the same in all rows of a column."
    if len({column.space for column in columns}) < len(columns):
        legend = legend.replace("of a column.", "of a column, and for pixels and voxels of one checkpoint.")
    with atomic_write(out, suffix=out.suffix) as temporary:
        save_grid(panels, captions, titles, legend, temporary)
    return titles


def _extract_rows(
    frames: Sequence[Frame], columns: Sequence[Column], skips: SkippedFrames, progress: Progress | None
) -> list[tuple[Frame, list[Features]]]:
    """Extract the features of every frame in every column; a frame that lacks some is left out."""

    def extract(number: int, frame: Frame, column: Column) -> Features:
        return column.pixel_features(frame)

    rows = fill_rows(frames, columns, extract, skips=skips, progress=progress)
    if not rows:
        raise DataError(f"No frame of scene {frames[0].scene!r} can be shown.\n{skips.summary()}")
    return rows


def _paint_rows(
    rows: Sequence[tuple[Frame, list[Features]]], columns: Sequence[Column]
) -> list[tuple[Frame, list[np.ndarray]]]:
    """Color features as pictures uint8 [H, W, 3], with one color space for all rows and columns of a feature space."""
    colors: dict[tuple[int, int], np.ndarray] = {}
    for space in dict.fromkeys(column.space for column in columns):
        cells = [(r, c) for c, column in enumerate(columns) if column.space == space for r in range(len(rows))]
        colors |= zip(cells, shared_pca([rows[r][1][c].unit() for r, c in cells]), strict=True)
    return [
        (frame, [paint(colors[r, c], features.index) for c, features in enumerate(row)])
        for r, (frame, row) in enumerate(rows)
    ]
