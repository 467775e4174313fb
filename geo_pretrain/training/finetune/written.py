"""Files of what a network predicts: PLY and npy in the order of the input's points, JSON of boxes, PNG of images."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from geo_pretrain.files import atomic_write, write_text
from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D, LabelledCloud
from geo_pretrain.training.data.labelled.clouds.files import FAR
from geo_pretrain.training.data.surfaces.ply import write_ply
from geo_pretrain.training.evaluation.coco import Detections
from geo_pretrain.training.evaluation.predictions import (
    CloudClass,
    Detections3D,
    PixelLabels,
    PointInstances,
    PointLabels,
)
from geo_pretrain.training.geometry3d.boxes import EDGES, box_corners
from geo_pretrain.training.visualize.colors import class_colors

LABEL, SCORE, INSTANCE = "predicted_label", "predicted_score", "predicted_instance"  # properties of the points in a PLY
TINT = 0.5  # of a class's color over an image
SURE = 0.5  # score from which boxes and masks are drawn
Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Place:
    """Where the files of one item go: `folder`/`name`.SUFFIX. The files that were written are noted in `files`."""

    folder: Path
    name: str
    files: list[str]
    colors: Sequence[Sequence[int]] | None = None  # of the classes 1..C in pictures; None: `class_colors`

    def colored(self, labels: np.ndarray) -> np.ndarray:
        """The colors of labels, uint8 [..., 3]; 0 is black."""
        if self.colors is None:
            return class_colors(labels)
        return np.array([(0, 0, 0), *self.colors], np.uint8)[labels]

    def save_labels(self, suffix: str, labels: np.ndarray, count: int) -> None:
        """Write a PNG of labels 0..count: of 8 bits with a palette, so that viewers show colors, or of 16 bits."""
        if count > 255:
            self.save_image(suffix, labels.astype(np.uint16))
            return
        image = Image.fromarray(labels.astype(np.uint8))
        image.putpalette(self.colored(np.arange(count + 1)).astype(np.uint8).tobytes())
        with atomic_write(self.path(suffix)) as part:
            image.save(part, format="PNG", bits=8)

    def path(self, suffix: str) -> Path:
        """The path of a file, which is noted; folders of the name are made."""
        path = self.folder / f"{self.name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.files.append(path.relative_to(self.folder).as_posix())
        return path

    def save(self, suffix: str, values: np.ndarray) -> None:
        """Write an npy file."""
        with atomic_write(self.path(suffix), suffix=".part.npy") as part:
            np.save(part, values)

    def save_image(self, suffix: str, pixels: np.ndarray) -> None:
        """Write a PNG of uint8 or uint16."""
        with atomic_write(self.path(suffix)) as part:
            Image.fromarray(pixels).save(part, format="PNG")

    def save_points(self, columns: Columns) -> None:
        """Write the PLY of the item's points."""
        with atomic_write(self.path(".ply")) as part:
            write_ply(part, {"vertex": {name: _for_ply(column) for name, column in columns.items()}})


def cloud_columns(cloud: LabelledCloud) -> dict[str, np.ndarray]:
    """The columns of a cloud for a PLY: x, y, z, and where it has them colors and intensity."""
    columns = {name: cloud.points[:, k].astype(np.float32) for k, name in enumerate("xyz")}
    if cloud.colors is not None:
        columns |= {name: cloud.colors[:, k] for k, name in enumerate(("red", "green", "blue"))}
    return columns | ({} if cloud.intensity is None else {"intensity": cloud.intensity.astype(np.float32)})


@dataclass(frozen=True)
class Item:
    """Something to predict on."""

    name: str  # of its files, without suffix
    load: Callable[[], Any]  # an image uint8 [H, W, 3] or a `LabelledCloud`; may raise `BadFrame`
    columns: Callable[[LabelledCloud], Mapping[str, np.ndarray]] = cloud_columns  # of the points, for the PLY
    back: Callable[[LabelledCloud, Any], Any] = lambda cloud, found: found  # into the frame of these columns
    file: str | None = None  # path of the image's file below the folder that was given, or that of the data set
    image: int | None = None  # number of the image in its data set's own annotations in COCO's format


def file_stem(id: str) -> str:
    """A relative path for an item's files: the id, without what a file system or a parent folder would make of it."""
    parts = (re.sub(r"[^\w. +,@=-]", "_", part).strip() for part in id.split("/"))
    return "/".join(part for part in parts if part not in ("", ".", ".."))


@singledispatch
def write_prediction(found: object, place: Place, item: Any, classes: Sequence[str]) -> dict[str, Any]:
    """Write what was found in an item; returns facts for the index of all, in plain JSON types.

    `item` is what was predicted on: the columns of a cloud's points, in the input's order and frame, or an image
    uint8 [H, W, 3]. Labels are 1..C, the names of `classes`.
    """
    raise NotImplementedError(f"No files are known for a {type(found).__name__}.")


@write_prediction.register
def _(found: PointLabels, place: Place, item: Columns, classes: Sequence[str]) -> dict[str, Any]:
    """NAME.labels.npy int64 [N], NAME.scores.npy float32 [N], NAME.ply."""
    place.save(".labels.npy", found.labels.astype(np.int64))
    place.save(".scores.npy", found.scores.astype(np.float32))
    place.save_points({**item, **_of_points(found)})
    return {"points": len(found.labels), "labels": _counts(found.labels, classes)}


@write_prediction.register
def _(found: PointInstances, place: Place, item: Columns, classes: Sequence[str]) -> dict[str, Any]:
    """NAME.instances.npy int64 [N], NAME.masks.npz (masks, classes, scores), NAME.ply, and labels where there are."""
    numbers = found.numbers()
    place.save(".instances.npy", numbers)
    with atomic_write(place.path(".masks.npz"), suffix=".part.npz") as part:
        np.savez_compressed(part, masks=found.masks, classes=found.classes, scores=found.scores)
    columns = {**item, INSTANCE: numbers}
    if found.labels is None:
        columns[LABEL] = np.concatenate([[0], found.classes])[numbers]
    else:
        place.save(".labels.npy", found.labels.labels.astype(np.int64))
        columns |= _of_points(found.labels)
    place.save_points(columns)
    objects = [
        {"number": k + 1, "class": classes[c - 1], "score": float(s), "points": int(mask.sum())}
        for k, (c, s, mask) in enumerate(zip(found.classes, found.scores, found.masks, strict=True))
    ]
    return {"points": len(numbers), "objects": objects}


@write_prediction.register
def _(found: Detections3D, place: Place, item: Columns, classes: Sequence[str]) -> dict[str, Any]:
    """NAME.boxes.npy [K, 9], NAME.boxes.json, NAME.boxes.ply (edges), NAME.ply (points)."""
    boxes, extra = found.boxes, np.stack([found.boxes.classes, found.scores], axis=1)
    place.save(".boxes.npy", np.concatenate([_rows(boxes), extra], axis=1).astype(_exact(boxes)))
    objects = [
        {
            "class": classes[boxes.classes[k] - 1],
            "score": float(found.scores[k]),
            "center": boxes.centers[k].tolist(),
            "size": boxes.sizes[k].tolist(),
            "heading": float(boxes.headings[k]),
        }
        for k in range(len(found))
    ]
    write_text(place.path(".boxes.json"), json.dumps(objects, indent=1) + "\n")
    with atomic_write(place.path(".boxes.ply")) as part:
        write_ply(part, wireframes(boxes))
    place.save_points(item)
    return {"objects": len(found)}


@write_prediction.register
def _(found: CloudClass, place: Place, item: Columns, classes: Sequence[str]) -> dict[str, Any]:
    """NAME.scores.npy float32 [C]; the class stands in the index."""
    place.save(".scores.npy", found.scores.astype(np.float32))
    return {"class": classes[found.label - 1], "label": found.label, "score": float(found.scores[found.label - 1])}


@write_prediction.register
def _(found: PixelLabels, place: Place, item: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """NAME.labels.png (labels 1..C, 8 bit with a palette or 16 bit), NAME.png (classes in colors over the image)."""
    place.save_labels(".labels.png", found.labels, len(classes))
    place.save_image(".png", _tinted(item, place.colored(found.labels)))
    return {"labels": _counts(found.labels, classes)}


@write_prediction.register
def _(found: Detections, place: Place, item: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """NAME.boxes.json, NAME.png (of score `SURE` and more), with masks NAME.instances.png (numbers from 1, 16 bit)."""
    objects = [
        {"class": classes[c - 1], "score": float(s), "box": box.tolist()}
        for c, s, box in zip(found.classes, found.scores, found.boxes, strict=True)
    ]
    write_text(place.path(".boxes.json"), json.dumps(objects, indent=1) + "\n")
    picture = item
    if found.masks is not None:
        numbers = np.zeros(item.shape[:2], np.uint16)
        for k in range(len(found) - 1, -1, -1):  # of several, the best
            numbers[found.masks[k]] = k + 1
        place.save_image(".instances.png", numbers)
        ids = np.concatenate([[0], np.where(found.scores >= SURE, found.classes, 0)])[numbers]
        picture = np.where(ids[..., None] > 0, _tinted(item, place.colored(ids)), item)
    place.save_image(".png", _boxed(picture, found, place.colored(found.classes), classes))
    return {"objects": len(found)}


def _boxed(image: np.ndarray, found: Detections, colors: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """The image with the boxes of the detections of score `SURE` and more, and their names; the best on top."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    pen = ImageDraw.Draw(picture)
    line = max(1, round(min(picture.size) / 240))
    for k in range(len(found) - 1, -1, -1):
        x0, y0, x1, y1 = found.boxes[k].tolist()
        if found.scores[k] < SURE or x1 <= x0 or y1 <= y0:
            continue
        color = tuple(colors[k].tolist())
        pen.rectangle((x0, y0, x1, y1), outline=color, width=line)
        text = f"{classes[found.classes[k] - 1]} {found.scores[k]:.2f}"
        left, top, right, bottom = pen.textbbox((x0 + line, y0 + line), text)
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=color)
        dark = sum(color) > 3 * 128
        pen.text((x0 + line, y0 + line), text, fill=(0, 0, 0) if dark else (255, 255, 255))
    return np.asarray(picture)


def wireframes(boxes: Boxes3D) -> dict[str, dict[str, np.ndarray]]:
    """The elements of a PLY of boxes: 8 vertices and 12 edges each, in the colors of their classes."""
    corners: np.ndarray = box_corners(torch.from_numpy(_rows(boxes))).reshape(-1, 3).numpy().astype(_exact(boxes))
    colors = np.repeat(class_colors(boxes.classes), 8, axis=0).reshape(-1, 3)
    first = 8 * np.arange(len(boxes), dtype=np.int32)[:, None]
    pairs = torch.tensor(EDGES, dtype=torch.int32).numpy()
    vertices = {name: corners[:, k] for k, name in enumerate("xyz")}
    vertices |= {name: colors[:, k].astype(np.uint8) for k, name in enumerate(("red", "green", "blue"))}
    edges = {f"vertex{end + 1}": (first + pairs[:, end]).reshape(-1) for end in (0, 1)}
    return {"vertex": vertices, "edge": edges}


def _rows(boxes: Boxes3D) -> np.ndarray:
    """Boxes as rows: float64 [K, 7]."""
    return np.concatenate([boxes.centers, boxes.sizes, boxes.headings[:, None]], axis=1).astype(np.float64)


def _exact(boxes: Boxes3D) -> type:
    """float32, or float64 for coordinates of maps, of which float32 holds half meters only."""
    return np.float64 if np.abs(boxes.centers).max(initial=0) > FAR else np.float32


def _of_points(found: PointLabels) -> dict[str, np.ndarray]:
    return {LABEL: found.labels, SCORE: found.scores.astype(np.float32)}


def _counts(labels: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    counts = np.bincount(labels.reshape(-1), minlength=len(classes) + 1)
    return {name: int(count) for name, count in zip(classes, counts[1:], strict=True) if count}


def _tinted(image: np.ndarray, colors: np.ndarray) -> np.ndarray:
    return ((1 - TINT) * image + TINT * colors).round().astype(np.uint8)


def _for_ply(column: np.ndarray) -> np.ndarray:
    """A column in a type that PLY has: 64-bit integers become 32, or double where they are larger, bool 8 bit."""
    if column.dtype == bool:
        return column.astype(np.uint8)
    if column.dtype.kind in "iu" and column.dtype.itemsize == 8:
        fits = not len(column) or (column.min() >= -(1 << 31) and column.max() < 1 << 31)
        return column.astype(np.int32 if fits else np.float64)
    return column.astype(np.float32) if column.dtype == np.float16 else column
