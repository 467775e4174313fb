"""SUN RGB-D's clouds with oriented boxes of ten classes (Song et al., CVPR 2015), as VoteNet prepares them.

sunrgbd_pc_bbox_votes_50k_v1_{train,val}/{000001_pc.npz,000001_bbox.npy}   what VoteNet's preprocessing leaves, or
{train,val}/000001.npz                                                     what `geo-pretrain data convert` writes

Boxes are the data set's version 1. Clouds stand upright: x right, y away from the camera, z up.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, unknown
from geo_pretrain.training.data import files
from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D, LabelledCloud
from geo_pretrain.training.data.labelled.folders import need_folders

CLASSES = ("bed", "table", "sofa", "chair", "toilet", "desk", "dresser", "night_stand", "bookshelf", "bathtub")
PREPARED = "sunrgbd_pc_bbox_votes_50k_v1_"
LAYOUT = (
    f"{PREPARED}{{train,val}}/{{000001_pc.npz,000001_bbox.npy}} (VoteNet's preprocessing), or "
    "{train,val}/000001.npz (geo-pretrain data convert sunrgbd3d RAW OUT)"
)
MOST_TURN = 8 * np.pi  # of a heading; a full turn is 2 pi
_NAME = re.compile(r"(\d{6})_pc\.npz")


class SUNRGBD3D:
    """One split as a `CloudSource`; ids such as "000017", each image its own scene. No point has a class."""

    name, classes = "sunrgbd3d", CLASSES

    def __init__(self, root: Path, split: str, images: Mapping[str, tuple[Path, Path]]) -> None:
        """`images`: the file of points and that of boxes by id; one file may hold both."""
        self.root, self.split, self._images = root, split, dict(images)

    def ids(self) -> list[str]:
        return list(self._images)

    def scene_of(self, id: str) -> str:
        return id

    def file_name(self, id: str) -> str:
        """The path of an image's points below the data set's folder."""
        return self._files(id)[0].relative_to(self.root).as_posix()

    def load(self, id: str) -> LabelledCloud:
        """Read a cloud with its boxes. Raises `BadFrame` for a file that is missing or damaged."""
        points, boxes = self._files(id)
        cloud = _array(points, "pc")
        if cloud.ndim != 2 or cloud.shape[1] not in (3, 6) or not len(cloud):
            raise BadFrame(points, f"'pc' is {cloud.shape}, expected [N, 6]: x, y, z (m) and red, green, blue in 0..1")
        if not np.isfinite(cloud).all():
            raise BadFrame(points, f"{int((~np.isfinite(cloud)).any(1).sum())} points are not finite")
        placed = files.checked_points(points, cloud[:, :3])
        colors = None
        if cloud.shape[1] == 6:
            colors = np.round(255 * cloud[:, 3:].clip(0, 1)).astype(np.uint8)
        rows = read_boxes(boxes, _array(boxes, "bbox"))
        return LabelledCloud(id, np.ascontiguousarray(placed), colors, None, boxes=rows)

    def fingerprint(self) -> str:
        """A digest of names, sizes and times of the files."""
        found = files.files_fingerprint(self.root, {path for pair in self._images.values() for path in pair})
        return hashlib.sha256(f"{self.name}\n{self.split}\n{found}".encode()).hexdigest()

    def _files(self, id: str) -> tuple[Path, Path]:
        if id not in self._images:
            raise unknown("cloud", id, self._images)
        return self._images[id]


def open_sunrgbd3d(path: Path, split: str) -> SUNRGBD3D:
    """Open the images of a split. Raises `DataError` with the two layouts where neither is there."""
    need_folders(path, [], LAYOUT)
    prepared, converted = path / f"{PREPARED}{split}", path / split
    images: dict[str, tuple[Path, Path]] = {}
    if prepared.is_dir():
        for points in sorted(prepared.glob("*_pc.npz")):
            name = _NAME.fullmatch(points.name)
            if name is not None:
                images[name[1]] = points, prepared / f"{name[1]}_bbox.npy"
        missing = [id for id, (_, boxes) in images.items() if not boxes.is_file()]
        if missing:
            raise DataError(f"{str(prepared)!r} lacks {len(missing)} files of boxes, first {missing[0]}_bbox.npy.")
    elif converted.is_dir():
        images = {file.stem: (file, file) for file in sorted(converted.glob("[0-9]" * 6 + ".npz"))}
    if not images:
        raise DataError(f"No cloud of split {split!r} in {str(path)!r}. Expected layout: {LAYOUT}")
    return SUNRGBD3D(path, split, images)


def read_boxes(path: Path, rows: np.ndarray) -> Boxes3D:
    """Turn VoteNet's rows [K, 8] into boxes; `path` is named in the `BadFrame` for rows that cannot be meant.

    A row is center, half lengths along the box's own axes, heading (clockwise from x, seen from above), class 0..9.
    """
    rows = rows.reshape(-1, 8) if rows.size == 0 else rows
    if rows.ndim != 2 or rows.shape[1] != 8:
        raise BadFrame(path, f"boxes are {rows.shape}, expected [K, 8]: center, half lengths, heading, class")
    classes = rows[:, 7].astype(np.int64)
    if not np.isfinite(rows).all() or (rows[:, 3:6] <= 0).any():
        raise BadFrame(path, "a box has a number that is not finite, or a length of 0 or less")
    if np.abs(rows[:, :6]).max(initial=0) > files.FARTHEST:
        raise BadFrame(path, f"a box is more than {files.FARTHEST:g} m away or long")
    if np.abs(rows[:, 6]).max(initial=0) > MOST_TURN:
        raise BadFrame(path, f"a box has the heading {rows[np.abs(rows[:, 6]).argmax(), 6]:g}; accepted are radians")
    if (classes != rows[:, 7]).any() or (classes < 0).any() or (classes >= len(CLASSES)).any():
        raise BadFrame(path, f"a box has a class other than 0 to {len(CLASSES) - 1}")
    return Boxes3D(
        rows[:, :3].astype(np.float32), 2 * rows[:, 3:6].astype(np.float32), -rows[:, 6].astype(np.float32), 1 + classes
    )


def _array(path: Path, key: str) -> np.ndarray:
    """Read an array of numbers from a .npy file, or under `key` from a .npz file."""
    with files.loaded_arrays(path, key) as found:
        return np.asarray(found if isinstance(found, np.ndarray) else found[key], np.float64)
