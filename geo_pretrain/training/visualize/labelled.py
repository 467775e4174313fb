"""A picture of labelled images or clouds with their classes or objects, and a legend: what training will see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from geo_pretrain.errors import BadFrame
from geo_pretrain.files import atomic_write
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.data.labelled.image import LabelledImage
from geo_pretrain.training.visualize.cloud_layers import CloudLayer, CloudPicture, save_cloud_figure
from geo_pretrain.training.visualize.clouds import cloud_colors, label_colors
from geo_pretrain.training.visualize.colors import class_colors
from geo_pretrain.training.visualize.grids import INK, PAPER, save_grid
from geo_pretrain.training.visualize.results import picture_of, with_objects

ROWS = 4  # images of each split
HIGH = 24  # classes in a column of a legend


def draw_labelled(splits: Mapping[str, LabelledData], path: Path, *, rows: int = ROWS) -> bool:
    """Draw some images or clouds of each split beside their labels, with the classes that occur; False: there was none.

    Broken ones are left out.
    """
    classes = next((data.classes for data in splits.values()), ())
    given = list(_items(splits, rows))
    images = [(caption, item) for caption, item in given if isinstance(item, LabelledImage)]
    clouds = [(caption, item) for caption, item in given if isinstance(item, LabelledCloud) and item.labels is not None]
    if clouds:
        _draw_clouds(clouds, classes, path)
        return True
    return _draw_images(images, classes, path)


def _items(splits: Mapping[str, LabelledData], rows: int) -> Iterator[tuple[str, Any]]:
    """Some items of each split, with captions."""
    for split, data in splits.items():
        ids = data.ids()
        for k in range(min(rows, len(ids))):
            with suppress(BadFrame):
                item = data.load(ids[k * len(ids) // min(rows, len(ids))])
                yield f"{split}: {item.id}", item


def _draw_images(items: Sequence[tuple[str, LabelledImage]], classes: Sequence[str], path: Path) -> bool:
    """Draw images beside their labels; False: none has labels."""
    panels, captions, present = list[list[Image.Image]](), list[list[str]](), set[int]()
    for caption, item in items:
        if item.semantic is not None or item.instances is not None:
            panels.append([picture_of(item.image), _labels(item, present)])
            captions.append([caption, ""])
    if not panels:
        return False
    size = [max(picture.size[k] for row in panels for picture in row) for k in (0, 1)]
    padded = [[ImageOps.pad(p, (size[0], size[1]), color=PAPER, centering=(0, 1)) for p in row] for row in panels]
    save_grid(padded, captions, ["image", "labels"], _legend(classes, present), path)
    return True


def _draw_clouds(items: Sequence[tuple[str, LabelledCloud]], classes: Sequence[str], path: Path) -> None:
    """Draw clouds beside the labels of their points, from above."""
    pictures, present = list[CloudPicture](), set[int]()
    for caption, cloud in items:
        labels: Any = cloud.labels
        present |= {int(c) for c in np.unique(labels)}
        share = f"{(labels > 0).mean():.0%} of points labelled"
        layers = CloudLayer("cloud", cloud_colors(cloud)), CloudLayer("labels", label_colors(labels), share)
        pictures.append(CloudPicture(caption, cloud.points, layers))
    save_cloud_figure(pictures, _legend(classes, present), path)


def _legend(classes: Sequence[str], present: Iterable[int]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and colors of the classes that occur."""
    colors = class_colors(np.arange(len(classes) + 1)[None])[0]
    return [(classes[c - 1], tuple(int(v) for v in colors[c])) for c in sorted(present) if c > 0]


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
