"""Extracting objects from images of instance ids."""

from __future__ import annotations

import numpy as np

from geo_pretrain.errors import BadFrame
from geo_pretrain.training.data.labelled.image import Instances
from geo_pretrain.training.data.labelled.mapping import LabelMap


def instances_from_ids(
    ids: np.ndarray, labels: LabelMap, path: object, *, min_pixels: int, unnumbered: bool = False
) -> Instances:
    """Extract the objects from an image of label * 1000 + instance, ids [H, W], in ascending order of id.

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
    """Make objects from non-empty masks [N, H, W] with their tight boxes; none is a crowd."""
    boxes = np.array([_box(mask) for mask in masks], np.float32).reshape(-1, 4)
    return Instances(boxes, classes.astype(np.int64), masks, np.zeros(len(masks), bool))


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
