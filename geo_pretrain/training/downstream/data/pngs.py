"""Label images: reading ids without loss, and the objects in an image of instance ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from geo_pretrain.errors import BadFrame
from geo_pretrain.training.downstream.data.labelled import Instances
from geo_pretrain.training.downstream.data.mapping import LabelMap

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3  # colour types of PNG whose pixels are one number


def read_ids(path: Path, shape: Sequence[int] | None = None, *, bits: Sequence[int] = (8,)) -> np.ndarray:
    """A PNG of ids as int32 [H, W]; `bits` are the depths the data set may have, `shape` (H, W) the image's size.

    The depth is read from the file's header: Pillow stretches grey images of 1, 2 and 4 bits to 0..255, which would
    turn one class into another.
    """
    wanted = " or ".join(map(str, bits))
    try:
        with path.open("rb") as file:
            header = file.read(26)
        if not header.startswith(_SIGNATURE) or len(header) < 26:
            raise BadFrame(path, f"not a PNG; labels are {wanted}-bit PNGs (other formats change ids)")
        depth, kind = header[24], header[25]
        if kind not in (_GREY, _PALETTE):
            raise BadFrame(path, f"a PNG in colour, expected {wanted}-bit grey ids")
        if kind == _GREY and depth not in bits:
            raise BadFrame(path, f"{depth}-bit grey, expected {wanted}-bit ids")
        with Image.open(path) as image:
            ids = np.asarray(image).astype(np.int32)
    except FileNotFoundError:
        raise BadFrame(path, "annotation is missing") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise BadFrame(path, f"annotation cannot be read ({str(error).partition(chr(10))[0]})") from None
    if shape is not None and ids.shape != tuple(shape[:2]):
        given, expected = (f"{size[1]}x{size[0]}" for size in (ids.shape, shape))
        raise BadFrame(path, f"annotation is {given}, the image {expected}")
    return ids


def instances_from_ids(
    ids: np.ndarray, labels: LabelMap, path: object, *, min_pixels: int, unnumbered: bool = False
) -> Instances:
    """The objects in an image of label * 1000 + instance, by ascending id; ids [H, W].

    Objects of ignored labels and of fewer than `min_pixels` pixels are left out. Instance 0 means that the pixels
    belong to no object, unless `unnumbered`: then they are one.
    """
    values, counts = np.unique(ids, return_counts=True)
    given = values // 1000
    outside = labels.table[np.minimum(given, len(labels.table) - 1)] < 0  # no map has the last id
    if outside.any():
        value = int(values[outside][0])
        raise BadFrame(path, f"instance id {value} has label {value // 1000}; {labels.accepted()}")
    classes = labels.table[given]
    kept = (classes > 0) & (counts >= min_pixels) & ((values % 1000 > 0) | unnumbered)
    return instances_from_masks(ids[None] == values[kept][:, None, None], classes[kept])


def instances_from_masks(masks: np.ndarray, classes: np.ndarray) -> Instances:
    """Objects of masks [N, H, W], none of them empty, with their tight boxes; no crowds."""
    boxes = np.array([_box(mask) for mask in masks], np.float32).reshape(-1, 4)
    return Instances(boxes, classes.astype(np.int64), masks, np.zeros(len(masks), bool))


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
