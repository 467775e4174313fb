"""A contact sheet of any source: colour, depth and classes of a few frames, side by side in one PNG."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.frame import Frame, Source

_GAP = 4  # px between cells


def contact_sheet(source: Source, path: Path, *, scenes: int = 4, frames: int = 4) -> None:
    """Write a grid: one row a scene, `frames` frames evenly spaced in time, each as colour | depth | classes.

    Depth runs from near (bright yellow) to far (dark blue) between the frame's own limits, black where invalid.
    Frames that cannot be read are left out; raises `DataError` when none can.
    """
    rows = []
    for scene in source.scenes()[:scenes]:
        ids = source.frame_ids(scene)
        picks = sorted({round(x) for x in np.linspace(0, len(ids) - 1, min(frames, len(ids)))})
        cells = []
        for pick in picks:
            try:
                cells.append(frame_strip(source.load(scene, ids[pick])))
            except BadFrame:
                continue
        if cells:
            rows.append(cells)
    if not rows:
        raise DataError(
            f"Source {source.name!r} has no frame that can be shown; accepted: at least one readable frame."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_grid(rows)).save(path, format="PNG")


def frame_strip(frame: Frame) -> np.ndarray:
    """Colour, coloured depth and, where known, coloured classes beside each other: uint8 [H, k W, 3]."""
    panels = [frame.color, depth_colors(frame.depth)]
    if frame.semantic is not None:
        panels.append(class_colors(frame.semantic))
    return np.concatenate(panels, axis=1)


def depth_colors(depth: np.ndarray) -> np.ndarray:
    """Depth [H, W] metres to uint8 [H, W, 3]; invalid (0) is black."""
    valid = depth > 0
    if not valid.any():
        return np.zeros((*depth.shape, 3), np.uint8)
    low, high = np.percentile(depth[valid], [1, 99])
    x = np.clip((depth - low) / max(high - low, 1e-6), 0, 1)[..., None]
    stops = np.array([[253, 231, 110], [110, 205, 90], [35, 140, 140], [55, 90, 140], [50, 15, 75]], np.float64)
    position = x * (len(stops) - 1)
    index = np.minimum(position.astype(np.int64), len(stops) - 2)[..., 0]
    mixed = stops[index] + (stops[index + 1] - stops[index]) * (position - index[..., None])
    return np.where(valid[..., None], mixed, 0).astype(np.uint8)


def class_colors(semantic: np.ndarray) -> np.ndarray:
    """Class ids [H, W] to uint8 [H, W, 3]; a fixed colour per id, black for 0 and below."""
    count = max(int(semantic.max()) + 1, 1)
    table = np.zeros((count, 3), np.uint8)
    for index in range(1, count):
        hue = (index * 0.61803398875) % 1.0  # golden ratio: neighbours in id differ in hue
        light, strong = (0.95, 0.75, 0.55)[index % 3], (0.45, 0.75)[index % 2]
        table[index] = [round(255 * c) for c in colorsys.hsv_to_rgb(hue, strong, light)]
    return table[np.maximum(semantic, 0)]


def _grid(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Cells of one size (the first's; others are scaled) in rows, white between."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            if cell.shape[:2] != (height, width):
                cell = np.asarray(Image.fromarray(cell).resize((width, height), Image.Resampling.BILINEAR))
            top, left = r * (height + _GAP), c * (width + _GAP)
            sheet[top : top + height, left : left + width] = cell
    return sheet
