"""Synthia4D (Choy et al., CVPR 2019): colored clouds of a simulated street, one PLY file a frame, by lists of frames.

    SYNTHIA-SEQS-04-RAINNIGHT/point_clouds/000123.ply   vertices x, y, z (centimeters, y up), r, g, b, l
    train_cvpr19.txt, val_cvpr19.txt, test_cvpr19.txt   a line: path of the cloud, path of a file that is not used

The lists come with chrischoy/SpatioTemporalSegmentation (splits/synthia4d): 19,888 / 815 / 1,886 frames; the `raw`
ones have 29,019 / 9,343 / 7,222.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.files import expanded
from geo_pretrain.training.checks import Positive, Ranged
from geo_pretrain.training.data.files import checked_points, read_listing
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.listed import (
    Y_UP_TO_Z_UP,
    ListedCloud,
    ListedClouds,
    read_vertices,
)
from geo_pretrain.training.data.labelled.folders import need_folders
from geo_pretrain.training.data.labelled.mapping import label_map

LAYOUT = "SYNTHIA-SEQS-NN-WEATHER/point_clouds/000000.ply, from Synthia4D.tar (each sequence unpacked)"
FIELDS = ("x", "y", "z", "r", "g", "b", "l")
METERS = 0.01  # the files are in centimeters
TURNS = {"up": Y_UP_TO_Z_UP, "down": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float32)}


@dataclass(frozen=True)
class Synthia4DOptions(Ranged):
    """Options of Synthia4D; lengths in meters. How clouds are cropped is said by data.cloud."""

    section = "data.options."

    lists: str | None = None  # folder of the lists; None: the data set's own folder
    split: Literal["cvpr19", "raw"] = "cvpr19"  # cvpr19: the "clean" split of the 4D paper
    measure: Literal["test", "val"] = "test"  # the frames that validation runs on; PointContrast reports test
    grid: Positive | None = 0.075  # one point is kept in each cell of this size; None: all
    y: Literal["up", "down"] = "up"  # the released loader turns about y; which way it points is not stated


class Synthia4D(ListedClouds):
    """One split; ids such as "SYNTHIA-SEQS-04-RAINNIGHT/000123". A scene is a sequence.

    Points are turned so that z is up: (x, y, z) becomes (x, -z, y), or with `y: down` (x, z, -y); both are rotations
    about x, so that nothing is mirrored.
    """

    options: Synthia4DOptions

    def load(self, id: str) -> LabelledCloud:
        path, options = self.item(id).points, self.options
        fields = read_vertices(path, FIELDS)
        checked_points(path, np.stack([fields[axis] for axis in "xyz"], axis=1))
        points = np.stack([fields[axis] for axis in "xyz"], axis=1).astype(np.float32) * np.float32(METERS)
        labels = label_map("synthia12").apply(_integers(fields["l"], path), path, "points").astype(np.int64)
        kept = np.arange(len(points)) if options.grid is None else first_in_cells(points, options.grid)
        colors = np.stack([fields[channel] for channel in "rgb"], axis=1)[kept]
        turned = points[kept] @ TURNS[options.y].T
        return LabelledCloud(id, turned, np.clip(colors, 0, 255).astype(np.uint8), labels[kept])


def open_synthia4d(path: Path, split: str, task: str, options: Synthia4DOptions) -> Synthia4D:
    """Open the frames that the list of a split names; `DataError` when a list is missing or names no frame."""
    need_folders(path, [], LAYOUT)
    named = options.measure if split == "val" else split
    folder = path if options.lists is None else expanded(options.lists)
    listed = folder / f"{named}_{options.split}.txt"
    if not listed.is_file():
        raise DataError(
            f"No list {str(listed)!r}: {named}_{options.split}.txt of chrischoy/SpatioTemporalSegmentation, "
            "splits/synthia4d; data.options.lists names its folder."
        )
    items = {}
    for line in read_listing(listed, "list of frames"):
        if not line.split():
            continue
        cloud = path / line.split()[0].lstrip("/")
        scene = cloud.parent.parent.name if cloud.parent.name == "point_clouds" else cloud.parent.name
        items[f"{scene}/{cloud.stem}"] = ListedCloud(scene, cloud)
    if not any(item.points.is_file() for item in items.values()):
        raise DataError(
            f"None of the {len(items)} frames of {str(listed)!r} is in {str(path)!r}. Expected layout: {LAYOUT}"
        )
    source = Synthia4D("synthia4d", split, path, label_map("synthia12").classes, items, options)
    source.options = options
    return source


def first_in_cells(points: np.ndarray, size: float) -> np.ndarray:
    """Rows of the first point in each cell of a grid through the origin, in order: int64 [M] for points [N, 3]."""
    cells = np.floor(points / size).astype(np.int64)
    cells -= cells.min(axis=0)
    sides = cells.max(axis=0) + 1
    _, first = np.unique((cells[:, 0] * sides[1] + cells[:, 1]) * sides[2] + cells[:, 2], return_index=True)
    return np.sort(first)


def _integers(values: np.ndarray, path: Path) -> np.ndarray:
    """Ids that some writers store as floats, as integers."""
    ids = values.astype(np.int64)
    if (ids != values).any() or ids.min() < 0 or ids.max() >= 2**16:
        raise BadFrame(path, "labels (l) are not whole numbers from 0 to 65535")
    return ids
