"""SemanticKITTI (Behley et al., ICCV 2019): scans of a street laser scanner with a class and an instance a point.

sequences/NN/velodyne/000000.bin   float32 x, y, z (m, z up), remission in [0, 1]
sequences/NN/labels/000000.label   uint32: class in the low 16 bits, instance in the high 16
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.checks import Count, Positive, Ranged
from geo_pretrain.training.data.files import visible
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.listed import ListedCloud, ListedClouds, read_bytes, read_scan
from geo_pretrain.training.data.labelled.folders import need_folders
from geo_pretrain.training.data.labelled.mapping import label_map

LAYOUT = "sequences/00/{velodyne/000000.bin,labels/000000.label}, from http://semantic-kitti.org and KITTI's odometry"
SPLITS = {
    "train": ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"),
    "val": ("08",),
    "test": tuple(f"{number}" for number in range(11, 22)),  # no labels
}


@dataclass(frozen=True)
class SemanticKITTIOptions(Ranged):
    """Options of SemanticKITTI.

    No paper of the zoo states a range. Here training keeps points within 50 m (nearly all of a scan; far ones only
    enlarge the grid), and validation every point, because the benchmark scores all of them.
    """

    section = "data.options."

    every: Count = 1  # training: every n-th scan of the sorted list; 100: the 1 % of SLidR
    max_range: Positive | None = 50.0  # m from the scanner, of training scans; None: all points (SLidR)
    crop_val: bool = False  # cut validation scans to max_range, too
    train: tuple[str, ...] = SPLITS["train"]  # sequences
    val: tuple[str, ...] = SPLITS["val"]


class SemanticKITTI(ListedClouds):
    """One split; ids such as "08/000123". A scene is a sequence."""

    max_range: float | None = None

    def load(self, id: str) -> LabelledCloud:
        item = self.item(id)
        scan = read_scan(item.points)
        semantic = instances = None
        if item.labels is not None:
            semantic, instances = read_labels(item.labels, len(scan))
        cloud = LabelledCloud(id, scan[:, :3].copy(), None, semantic, instances, intensity=scan[:, 3].copy())
        if self.max_range is None:
            return cloud
        near = np.linalg.norm(cloud.points, axis=1) <= self.max_range
        if not near.any():
            raise BadFrame(item.points, f"no point within {self.max_range:g} m")
        return replace(
            cloud,
            points=cloud.points[near],
            labels=None if semantic is None else semantic[near],
            instances=None if instances is None else instances[near],
            intensity=scan[near, 3],
        )


def open_semantickitti(path: Path, split: str, task: str, options: SemanticKITTIOptions) -> SemanticKITTI:
    """Open the scans of a split: "train", "val" or "test" (which has no labels).

    `path` holds `sequences`, or `dataset/sequences` as the archives do. Sequences that are not there are left out, so
    that a part of the data can be used; without any, `DataError`.
    """
    need_folders(path, [], LAYOUT)
    root = next((folder for folder in (path, path / "dataset") if (folder / "sequences").is_dir()), None)
    if root is None:
        raise DataError(f"No folder {str(path / 'sequences')!r}. Expected layout: {LAYOUT}")
    wanted = {"train": options.train, "val": options.val}.get(split, SPLITS["test"])
    items = {}
    for sequence in wanted:
        for scan in visible(root / "sequences" / sequence / "velodyne", "*.bin"):
            labels = scan.parents[1] / "labels" / f"{scan.stem}.label"
            items[f"{sequence}/{scan.stem}"] = ListedCloud(sequence, scan, None if split == "test" else labels)
    if split == "train":
        items = {id: items[id] for id in sorted(items)[:: options.every]}
    if not items:
        raise DataError(
            f"No scan of the sequences {', '.join(wanted)} in {str(root / 'sequences')!r}. Expected layout: {LAYOUT}"
        )
    classes = label_map("semantickitti19").classes
    source = SemanticKITTI("semantickitti", split, root, classes, items, options)
    if split == "train" or options.crop_val:
        source.max_range = options.max_range
    return source


def read_labels(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Read classes (0 ignored, 1..19) and instance numbers (0 none) of the `count` points of a scan: int64 [N] each."""
    raw = np.frombuffer(read_bytes(path, "label file"), "<u4")
    if len(raw) != count:
        raise BadFrame(path, f"{len(raw)} labels for {count} points")
    classes = label_map("semantickitti19").apply(raw & 0xFFFF, path, "points")
    return classes.astype(np.int64), (raw >> 16).astype(np.int64)


def submission_labels(classes: np.ndarray) -> np.ndarray:
    """Map classes 1..19 (0: unlabeled) to the raw ids of a `.label` file for the benchmark's server: uint32 [N]."""
    ids = label_map("semantickitti19").ids
    written = {0: 0}
    for raw, label in ids.items():
        written.setdefault(label, raw)  # the first id of a class: that of standing objects
    return np.array([written[label] for label in range(len(written))], np.uint32)[classes]
