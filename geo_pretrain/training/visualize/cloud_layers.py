"""Pictures of clouds: the same points in several colors, with boxes of objects; as a PNG, and as a page that turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from geo_pretrain.files import atomic_write
from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D
from geo_pretrain.training.data.samples.cloud_boxes import box_rows
from geo_pretrain.training.geometry3d.boxes import EDGES, box_corners
from geo_pretrain.training.visualize.colors import class_colors
from geo_pretrain.training.visualize.common import paint
from geo_pretrain.training.visualize.grids import save_grid, shorten
from geo_pretrain.training.visualize.splat import Camera, splat, turntable
from geo_pretrain.training.visualize.viewer import viewer_page

POINTS, PAGE_POINTS = 250_000, 120_000  # drawn at most, in a page of 3 MB; the others are thinned at random
PANEL = (300, 400)  # px, height and width
DRAWN_LARGER = 2  # pictures are reduced by it: soft edges
ELEVATION = math.radians(52)  # over the walls of a room
ROOM, CEILING_CELL, CEILING_SHARE, TOP = 2.1, 0.25, 0.5, 0.8  # m, m, of the cells, of the height: see `shown_height`
OUTLIERS, FAR = 98.0, 1.6  # percentile of distance, and how much farther a point may be to be fitted into the picture
LINE = 2  # px of a box's edges in the picture


@dataclass(frozen=True)
class CloudLayer:
    """One way to see a cloud: colors of its points, and boxes drawn as wireframes."""

    title: str
    colors: np.ndarray  # uint8 [N, 3]
    caption: str = ""
    boxes: Boxes3D | None = None  # drawn in the colors of their classes


@dataclass(frozen=True)
class CloudPicture:
    """A cloud in several layers."""

    title: str
    points: np.ndarray  # float32 [N, 3], m, z is up
    layers: tuple[CloudLayer, ...]


def shown_height(points: np.ndarray) -> float:
    """The height (z) above which a picture from above leaves points out: a ceiling's, else infinity.

    A cloud at least as high as a room has a ceiling if half of the cells of its ground plan have a point in the upper
    fifth of the height.
    """
    low, high = float(points[:, 2].min()), float(points[:, 2].max())
    cut = low + TOP * (high - low)
    if high - low < ROOM:
        return math.inf
    cells = np.floor(points[:, :2] / CEILING_CELL).astype(np.int64)
    covered = len(np.unique(cells[points[:, 2] > cut], axis=0)) / len(np.unique(cells, axis=0))
    return cut if covered >= CEILING_SHARE else math.inf


def spacing(points: np.ndarray) -> float:
    """Estimate the distance between neighbors, as on a square lattice with as many points in an occupied cell."""
    extent = float(np.ptp(points, axis=0).max())
    cell = max(min(0.1, extent / 40), 1e-6)  # 10 cm in a room, less for a small object
    cells = np.unique(np.floor(points / cell).astype(np.int64), axis=0)
    return cell / max(len(points) / len(cells), 1.0) ** 0.5


def save_cloud_figure(
    pictures: Sequence[CloudPicture], legend: Sequence[tuple[str, tuple[int, ...]]], path: Path
) -> None:
    """Write a PNG: a row per cloud, a column per layer, all layers of a cloud from the same side."""
    panels = [_panels(picture) for picture in pictures]
    captions = [
        [shorten(text, PANEL[1], 13) for text in (picture.title, *(layer.caption for layer in picture.layers[1:]))]
        for picture in pictures
    ]
    save_grid(panels, captions, [layer.title for layer in pictures[0].layers], list(legend) or " ", path)


def write_cloud_page(picture: CloudPicture, path: Path, *, note: str = "") -> None:
    """Write an HTML page that shows a cloud and turns it; buttons choose the layer, first the last is shown."""
    chosen, layers = _drawn(picture.points, PAGE_POINTS), picture.layers[::-1]
    points = picture.points[chosen].astype(np.float64)
    size = 2.2 * spacing(points)
    top = TOP if math.isfinite(shown_height(points)) else 1.0
    note = note or f"{len(points):,} of {len(picture.points):,} points."
    page = viewer_page(
        points,
        [(layer.title, layer.colors[chosen]) for layer in layers],
        title=picture.title,
        note=note,
        size=size,
        top=top,
        edges=[_edge_points(layer, size) for layer in layers],
    )
    with atomic_write(path, suffix=path.suffix) as part:
        part.write_text(page, encoding="utf-8")


def _drawn(points: np.ndarray, most: int) -> np.ndarray:
    """The rows that are drawn, rising."""
    if len(points) <= most:
        return np.arange(len(points))
    return np.sort(np.random.default_rng(0).choice(len(points), most, replace=False))


def _panels(picture: CloudPicture) -> list[Image.Image]:
    """Render a cloud once, and paint its layers."""
    chosen = _drawn(picture.points, POINTS)
    chosen = chosen[picture.points[chosen, 2] <= shown_height(picture.points[chosen])]
    points = torch.from_numpy(picture.points[chosen].astype(np.float64))
    large = (PANEL[0] * DRAWN_LARGER, PANEL[1] * DRAWN_LARGER)
    camera = _camera(points, [layer.boxes for layer in picture.layers if layer.boxes is not None], large)
    seen = splat(points, camera, 1.1 * spacing(points.numpy()))
    panels = []
    for layer in picture.layers:
        panel = Image.fromarray(paint(layer.colors[chosen], seen))
        if layer.boxes is not None:
            _draw_boxes(panel, layer.boxes, camera)
        panels.append(panel.resize(PANEL[::-1], Image.Resampling.BOX))
    return panels


def _camera(points: Tensor, boxes: Sequence[Boxes3D], size: tuple[int, int]) -> Camera:
    """A camera above the cloud and beside it that sees all boxes and all points but the far outliers of a scanner."""
    center = points.median(dim=0).values
    distance = (points - center).norm(dim=1)
    reach = FAR * float(np.percentile(distance.numpy(), OUTLIERS))
    corners = [_corners(some).reshape(-1, 3) for some in boxes]
    return turntable(torch.cat([points[distance <= max(reach, 1e-6)], *corners]), 4, size, ELEVATION)[0]


def _corners(boxes: Boxes3D) -> Tensor:
    """Corners float64 [K, 8, 3] of boxes, joined by `EDGES`."""
    return box_corners(box_rows(boxes).double())


def _draw_boxes(panel: Image.Image, boxes: Boxes3D, camera: Camera) -> None:
    """Draw the edges of boxes, also those behind other points."""
    draw = ImageDraw.Draw(panel)
    for corners, color in zip(_corners(boxes), class_colors(boxes.classes), strict=True):
        uv, z = camera.project(corners)
        if float(z.min()) <= 0:  # behind the camera
            continue
        for start, end in EDGES:
            line = [tuple(uv[start].tolist()), tuple(uv[end].tolist())]
            draw.line(line, fill=tuple(int(v) for v in color), width=LINE * DRAWN_LARGER)


def _edge_points(layer: CloudLayer, size: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Points along the edges of a layer's boxes, half of `size` apart, with colors uint8; browsers draw thin lines."""
    if layer.boxes is None or not len(layer.boxes):
        return None
    places, colors = [], []
    for corners, color in zip(_corners(layer.boxes).numpy(), class_colors(layer.boxes.classes), strict=True):
        for start, end in EDGES:
            length = float(np.linalg.norm(corners[end] - corners[start]))
            share = np.linspace(0, 1, min(max(round(2 * length / size), 1), 2000) + 1)[:, None]
            places.append(corners[start] + share * (corners[end] - corners[start]))
            colors.append(np.broadcast_to(color, places[-1].shape))
    return np.concatenate(places), np.concatenate(colors).astype(np.uint8)
