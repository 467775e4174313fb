"""Predictions for ScanNet's scans as files of its benchmark's submissions: classes and instances of mesh vertices.

Written from the format's description (kaldir.vc.in.tum.de/scannet_benchmark/documentation). A submission is an archive
of such a folder, with the files of all scans of the split.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from geo_pretrain.errors import DataError
from geo_pretrain.files import atomic_write, write_text
from geo_pretrain.training.data.labelled.mapping import label_map
from geo_pretrain.training.evaluation.predictions import PointInstances

MASKS = "predicted_masks"
STUFF = 2  # classes 1 and 2, wall and floor, have no instances in the benchmark


def nyu40_ids() -> np.ndarray:
    """The nyu40 ids of ScanNet's 20 classes: int64 [21], row 0 (no class) is 0."""
    classes = label_map("scannet20")
    ids = np.zeros(1 + len(classes.classes), np.int64)
    for given, label in classes.ids.items():
        if label:
            ids[label] = given
    return ids


def write_scannet_semantic(folder: Path, scan: str, labels: np.ndarray) -> Path:
    """Write FOLDER/SCAN.txt: the nyu40 id of each vertex, in the mesh's order, one a line.

    `labels` [N]: classes 1..20 of segmentation3d. Raises `DataError` for others.
    """
    ids = nyu40_ids()
    if labels.ndim != 1 or not len(labels) or not 1 <= labels.min() <= labels.max() < len(ids):
        raise DataError(f"Scan {scan!r}: the benchmark takes a class from 1 to {len(ids) - 1} for each vertex.")
    path = folder / f"{scan}.txt"
    write_text(path, "".join(f"{id}\n" for id in ids[labels].tolist()))
    return path


def write_scannet_instances(folder: Path, scan: str, found: PointInstances) -> Path:
    """Write FOLDER/SCAN.txt: mask file, nyu40 id and confidence, one instance a line.

    A mask file, FOLDER/predicted_masks/SCAN_k.txt, has 0 or 1 for each vertex, in the mesh's order. Classes are of
    segmentation3d, 3..20. Raises `DataError` for others. Masks of an earlier call are replaced.
    """
    ids = nyu40_ids()
    if len(found) and not STUFF < found.classes.min() <= found.classes.max() < len(ids):
        raise DataError(f"Scan {scan!r}: the benchmark takes instances of classes {STUFF + 1} to {len(ids) - 1}.")
    masks = re.compile(rf"{re.escape(scan)}_\d+\.txt")  # not those of a scan whose name begins with this one's
    for old in (folder / MASKS).glob("*.txt"):
        if masks.fullmatch(old.name):
            old.unlink()
    lines = []
    for number, (mask, label, score) in enumerate(zip(found.masks, found.classes, found.scores, strict=True)):
        name = f"{MASKS}/{scan}_{number:03d}.txt"
        with atomic_write(folder / name) as part:
            digits = np.full((len(mask), 2), ord("\n"), np.uint8)
            digits[:, 0] = ord("0") + mask.astype(np.uint8)
            part.write_bytes(digits.tobytes())
        lines.append(f"{name} {ids[label]} {score:.6f}\n")
    path = folder / f"{scan}.txt"
    write_text(path, "".join(lines))
    return path
