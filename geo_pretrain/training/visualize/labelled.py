"""A picture of labelled images with their classes or objects, and a legend: what training will see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from geo_pretrain.errors import BadFrame
from geo_pretrain.files import atomic_write
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.data.labelled.image import LabelledImage
from geo_pretrain.training.visualize.colors import class_colors
from geo_pretrain.training.visualize.grids import INK, PAPER, save_grid
from geo_pretrain.training.visualize.results import picture_of, with_objects

ROWS = 4  # images of each split
HIGH = 24  # classes in a column of a legend


def draw_labelled(splits: Mapping[str, LabelledData], path: Path, *, rows: int = ROWS) -> bool:
    """Draw some images of each split beside their labels, with the classes that occur; False: nothing could be drawn.

    Broken images are left out, and clouds are not drawn.
    """
    panels, captions = list[list[Image.Image]](), list[list[str]]()
    present, classes = set[int](), tuple[str, ...]()
    for split, data in splits.items():
        ids, classes = data.ids(), data.classes
        for k in range(min(rows, len(ids))):
            try:
                item = data.load(ids[k * len(ids) // min(rows, len(ids))])
            except BadFrame:
                continue
            if not isinstance(item, LabelledImage) or (item.semantic is None and item.instances is None):
                continue
            panels.append([picture_of(item.image), _labels(item, present)])
            captions.append([f"{split}: {item.id}", ""])
    if not panels:
        return False
    size = [max(picture.size[k] for row in panels for picture in row) for k in (0, 1)]
    padded = [[ImageOps.pad(p, (size[0], size[1]), color=PAPER, centering=(0, 1)) for p in row] for row in panels]
    colors = class_colors(np.arange(len(classes) + 1)[None])[0]
    legend = [(classes[c - 1], tuple(int(v) for v in colors[c])) for c in sorted(present) if c > 0]
    save_grid(padded, captions, ["image", "labels"], legend, path)
    return True


def draw_legend(classes: Sequence[str], colors: Sequence[Sequence[int]] | None, path: Path) -> None:
    """Write a picture of the classes 1..C with their colors (None: those of `class_colors`), 24 below each other."""
    shades = class_colors(np.arange(1, len(classes) + 1)) if colors is None else np.asarray(colors)
    font = ImageFont.load_default(size=14)
    texts = [f"{number} {name}" for number, name in enumerate(classes, 1)]
    columns = [range(start, min(start + HIGH, len(texts))) for start in range(0, len(texts), HIGH)]
    widths = [44 + int(max(font.getlength(texts[k]) for k in column)) for column in columns]
    sheet = Image.new("RGB", (sum(widths) + 10, 24 * len(columns[0]) + 16), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, left in zip(columns, accumulate(widths, initial=10), strict=False):
        for row, k in enumerate(column):
            top = 8 + 24 * row
            draw.rectangle([left, top + 2, left + 20, top + 20], fill=tuple(int(v) for v in shades[k]), outline=INK)
            draw.text((left + 28, top + 2), texts[k], INK, font=font)
    with atomic_write(path) as part:
        sheet.save(part, format="PNG")


def _labels(item: LabelledImage, present: set[int]) -> Image.Image:
    """The labels of an image in colors; black is no class. The classes are noted in `present`."""
    objects: Any = item.instances
    if item.semantic is not None:
        present |= {int(c) for c in np.unique(item.semantic)}
        return picture_of(class_colors(item.semantic), Image.Resampling.NEAREST)
    present |= {int(c) for c in objects.classes}
    return with_objects(item.image, objects.boxes, class_colors(objects.classes), objects.masks)
