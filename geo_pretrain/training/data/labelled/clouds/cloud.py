"""Labelled point clouds, and the protocol of a source of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from geo_pretrain.training.data.labelled.dataset import LabelledData


@dataclass(frozen=True)
class Boxes3D:
    """Upright boxes around the objects of a cloud, in its frame (z up, m)."""

    centers: np.ndarray  # float32 [K, 3]
    sizes: np.ndarray  # float32 [K, 3]: full lengths along the box's own x, y and z
    headings: np.ndarray  # float32 [K], radians: from the cloud's x to the box's x, counter-clockwise seen from above
    classes: np.ndarray  # int64 [K], 1..C

    def __len__(self) -> int:
        return len(self.classes)


@dataclass(frozen=True)
class LabelledCloud:
    """A point cloud, with whichever labels its data set has for the task it was opened for."""

    id: str
    points: np.ndarray  # float32 [N, 3], m, z up
    colors: np.ndarray | None  # uint8 [N, 3]; None: the data set has none
    labels: np.ndarray | None  # int64 [N], 0 = unlabelled (ignored), 1..C; None: not labelled by points
    instances: np.ndarray | None = None  # int64 [N], 0 = of no object, else the object's number in this cloud
    boxes: Boxes3D | None = None
    intensity: np.ndarray | None = None  # float32 [N], remission of a laser scanner in [0, 1]
    category: int | None = None  # 1..: the class of the whole cloud (an object's), as the source's classes say

    def __len__(self) -> int:
        return len(self.points)


class CloudSource(LabelledData, Protocol):
    """One split of a data set of labelled clouds, for one task.

    Adding a data set takes one file with such a class and one row in sets.py. A source that knows of scenes without a
    labelled cloud has `scenes()`, the names of all scenes of the split.
    """

    def load(self, id: str) -> LabelledCloud:
        """Read one cloud. Raises `BadFrame` with path and reason when one of its files cannot be used."""
