"""A strip of columns that shows at a glance what a backbone learned; titles can be read on a phone.

A column is one picture, or two views one above the other: with lines between matches, with their features as colors,
with classes, or a cloud seen from above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from geo_pretrain.errors import DataError
from geo_pretrain.training.evaluation.matching import Matches
from geo_pretrain.training.visualize.common import paint
from geo_pretrain.training.visualize.grids import INK, PAPER
from geo_pretrain.training.visualize.results import DRAW_SCALE, RIGHT, WRONG
from geo_pretrain.training.visualize.splat import splat, turntable

VIEW = (320, 240)  # width, height of a view, px
SPACE = 10  # px between views and around them
COLUMN = (VIEW[0], 2 * VIEW[1] + SPACE)
TITLE, TITLE_SIZE = 48, 32  # px: a phone shows the strip at a third of its size
LINES = 28  # matches drawn: more hide the views
ELEVATION = math.radians(50)  # over the walls of a room
COVER = 1.5  # half the edge of a drawn point, in distances of neighbors: points drawn at random leave no holes
QUALITY = 88  # of a .jpg: a strip of three columns has about 200 kB


def save_strip(columns: Sequence[tuple[str, Image.Image]], path: Path, *, quality: int = QUALITY) -> None:
    """Write pictures of one height side by side, a title above each; `path` ends in .png or .jpg.

    `quality`: of a .jpg, 1 to 95. Raises `DataError` for pictures of different heights.
    """
    heights = {picture.height for _, picture in columns}
    if len(heights) != 1:
        raise DataError(f"Pictures of a strip have heights {sorted(heights)}; accepted: one height for all of them.")
    width = sum(picture.width + SPACE for _, picture in columns) + SPACE
    strip = Image.new("RGB", (width, TITLE + heights.pop() + SPACE), PAPER)
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(size=TITLE_SIZE)
    left = SPACE
    for title, picture in columns:
        draw.text((left + picture.width / 2, TITLE / 2), title, INK, font=font, anchor="mm")
        strip.paste(picture, (left, TITLE))
        left += picture.width + SPACE
    path.parent.mkdir(parents=True, exist_ok=True)
    strip.save(path, quality=quality, subsampling=0)


def stacked(above: np.ndarray, below: np.ndarray) -> Image.Image:
    """Two pictures [H, W, 3], one above the other, as a column."""
    column = Image.new("RGB", COLUMN, PAPER)
    for top, pixels in ((0, above), (VIEW[1] + SPACE, below)):
        column.paste(_fitted(pixels), (0, top))
    return column


def match_column(matches: Matches, threshold: float) -> Image.Image:
    """The two views of a pair with lines between matches: green where right, red where not, evenly spaced queries."""
    first, second = (frame.color for frame in matches.frames)
    column = stacked(first, second)
    canvas = column.resize((column.width * DRAW_SCALE, column.height * DRAW_SCALE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    scale = [VIEW[0] / image.shape[1] for image in (first, second)]
    shown = np.linspace(0, len(matches.query) - 1, min(LINES, len(matches.query))).round().astype(int)
    for k in sorted(shown, key=lambda k: matches.error[k] <= threshold):  # right ones on top
        color = RIGHT if matches.error[k] <= threshold else WRONG
        above = (matches.query[k] + 0.5) * scale[0]
        below = (matches.predicted[k] + 0.5) * scale[1] + (0, VIEW[1] + SPACE)
        (x1, y1), (x2, y2) = ((end * DRAW_SCALE).tolist() for end in (above, below))
        draw.line([(x1, y1), (x2, y2)], fill=color, width=2 * DRAW_SCALE)
        for x, y in ((x1, y1), (x2, y2)):
            draw.ellipse([x - 9, y - 9, x + 9, y + 9], fill=color, outline=PAPER, width=DRAW_SCALE)
    return canvas.resize(COLUMN, Image.Resampling.LANCZOS)


def cloud_column(points: np.ndarray, colors: np.ndarray, spacing: float, *, corner: int = 0) -> Image.Image:
    """A cloud from above one of its four corners, as a square.

    Args:
        points: float [N, 3] m, z is up; `colors` uint8 [N, 3].
        spacing: about the distance of neighbors, m.
    """
    cloud = torch.from_numpy(points.astype(np.float64))
    side = COLUMN[1]
    camera = turntable(cloud, 4, (side * DRAW_SCALE, side * DRAW_SCALE), ELEVATION)[corner]
    picture = paint(colors, splat(cloud, camera, COVER * spacing))
    return Image.fromarray(picture).resize((side, side), Image.Resampling.BOX)


def _fitted(pixels: np.ndarray) -> Image.Image:
    """A picture as large as a view; small ones keep their sharp cells."""
    image = Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8)))
    small = image.width < VIEW[0]
    return image.resize(VIEW, Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC)
