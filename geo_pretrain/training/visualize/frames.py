"""Features on images: rows are frames of a scene, columns the image and each network's features as colors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from geo_pretrain.files import atomic_write
from geo_pretrain.targets import GRIDS
from geo_pretrain.training.data.frame import Frame, SkippedFrames
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.data.surfaces.fusing import Surfaces
from geo_pretrain.training.evaluation.features import Features
from geo_pretrain.training.evaluation.progress import Progress
from geo_pretrain.training.recipe import DataSpec
from geo_pretrain.training.visualize.columns import Column, find_backbone, load_beside_random, shared_colors
from geo_pretrain.training.visualize.common import drawing_spec, fill_rows, load_frames, paint, pick_scene, prepare
from geo_pretrain.training.visualize.grids import enlarge, save_grid, shorten


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
    source = prepare(out, GRIDS, spec, device)
    skips = skips if skips is not None else SkippedFrames()
    opened = [find_backbone(name) for name in backbones]
    spec = drawing_spec(spec, opened[0], size)
    source = source or open_source(spec, split="val")
    frames = load_frames(source, pick_scene(source, scene), count, spec.size, skips)
    columns = load_beside_random(opened, Surfaces(source), baseline=baseline, level=level, seed=seed, device=device)

    def extract(number: int, frame: Frame, column: Column) -> Features:
        return column.pixel_features(frame)

    what = f"frame of scene {frames[0].scene!r}"
    rows = fill_rows(frames, columns, extract, what=what, skips=skips, progress=progress)
    colors = shared_colors(columns, [[features.unit() for features in row] for _, row in rows])
    panels = [
        [enlarge(frame.color), *(enlarge(paint(c, f.index)) for c, f in zip(painted, row, strict=True))]
        for (frame, row), painted in zip(rows, colors, strict=True)
    ]
    titles = ["image", *(shorten(column.title, panels[0][0].width) for column in columns)]
    captions = [[f"{frame.scene}/{frame.id}"] + [""] * len(columns) for frame, _ in rows]
    legend = "Colors: three principal components of the features, the same in all rows of a column."
    if len({column.space for column in columns}) < len(columns):
        legend = legend.replace("of a column.", "of a column, and for pixels and voxels of one checkpoint.")
    with atomic_write(out, suffix=out.suffix) as temporary:
        save_grid(panels, captions, titles, legend, temporary)
    return titles
