"""S3DIS: rooms of six areas as clouds, from its text files or from those that `data convert s3dis` makes of them.

Raw: Area_k/ROOM/Annotations/CLASS_n.txt, of Stanford3dDataset_v1.2 (which the papers read) or its aligned version.
Converted: Area_k/ROOM.ply, one point per cubic centimeter, with the raw id of its class and its object's number.
A voxel with points of several classes is ignored and of no object; with several objects of one class it is the first
point's, as in the released code.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, some
from geo_pretrain.training.checks import Accepts, Ranged
from geo_pretrain.training.data.files import checked_points, files_fingerprint, usable, visible
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.s3dis_text import MIXED, RAW_CLASSES, Room, read_room
from geo_pretrain.training.data.surfaces.ply import read_ply, write_ply

AREAS = range(1, 7)
ROOMS = (44, 40, 23, 49, 68, 48)  # of each area, 272 in all
POINTNET_ORDER = (
    "ceiling", "floor", "wall", "beam", "column", "window", "door", "table", "chair", "sofa", "bookcase", "board",
    "clutter",
)  # fmt: skip
STUFF = ("ceiling", "floor", "wall")
WHERE = (
    "Expected layout: Area_1 to Area_6 with ROOM/Annotations/*.txt, as in Stanford3dDataset_v1.2.zip (to be had on a "
    "form at buildingparser.stanford.edu/dataset.html), or the folder that `geo-pretrain data convert s3dis RAW OUT` "
    "made."
)
RGB = ("red", "green", "blue")
Area = Annotated[int, Accepts(lambda n: n in AREAS, "an area, 1 to 6")]


@dataclass(frozen=True)
class S3DISOptions(Ranged):
    """Options of the source."""

    section = "data.options."

    # The area to validate on; all others train. Papers report area 5, or six runs, one for each area, whose counts are
    # added (`geo-pretrain eval folds`).
    area: Area = 5
    stairs: Literal["ignore", "clutter"] = "ignore"  # clutter: as code that descends from PointNet
    order: Literal["alphabetical", "pointnet"] = "alphabetical"  # of the classes; published heads are alphabetical
    train_stuff: bool = True  # instances3d: walls, floors and ceilings are objects, too (13 classes, else 10)


@dataclass(frozen=True)
class S3DISConversion(Ranged):
    """Settings of `data convert s3dis`."""

    # One point is kept in a cube of this edge, as in the released code; 0 keeps all points.
    voxel_size: Annotated[float, Accepts(lambda size: size >= 0, "meters, or 0 for all points")] = 0.01


class S3DIS:
    """One split of S3DIS; ids are rooms such as "Area_5/office_1"."""

    name = "s3dis"

    def __init__(self, root: Path, split: str, task: str, options: S3DISOptions) -> None:
        self.root, self.split, self.task, self.options = root, split, task, options
        self.converted = any(root.glob("Area_*/*.ply"))
        self.classes = _class_names(options.order)
        self.stuff = STUFF if not options.train_stuff else ()  # classes whose points are of no object
        self._table = label_table(options)
        areas = [area for area in AREAS if (area == options.area) == (split == "val")]
        rooms = {area: _rooms_of(root, area, self.converted) for area in areas}
        missing = [f"Area_{area}" for area, found in rooms.items() if not found]
        if missing:
            raise DataError(f"{str(root)!r} has no room of {', '.join(missing)} for split {split!r}. {WHERE}")
        few = [f"{len(found)} of {ROOMS[area - 1]} in Area_{area}" for area, found in rooms.items()]
        if any(len(found) < ROOMS[area - 1] for area, found in rooms.items()):
            warnings.warn(f"S3DIS is not complete in {str(root)!r}; rooms there: {', '.join(few)}.", stacklevel=2)
        self._ids = [room for area in areas for room in rooms[area]]

    def ids(self) -> list[str]:
        return list(self._ids)

    def scene_of(self, id: str) -> str:
        """A room is a scene of its own."""
        return id

    def load(self, id: str) -> LabelledCloud:
        """Read a room; labels 0 are stairs (or not, see `S3DISOptions`) and voxels of several classes."""
        room = read_prepared(self.root / f"{id}.ply") if self.converted else read_room(self.root / id)[0]
        labels = self._table[room.labels]
        instances = None
        if self.task == "instances3d":
            counted = np.isin(labels, [self.classes.index(name) + 1 for name in self.stuff], invert=True) & (labels > 0)
            instances = np.where(counted, room.instances, 0).astype(np.int64)
        return LabelledCloud(id, room.points, room.colors, labels, instances)

    def fingerprint(self) -> str:
        """A digest of the options and of names, sizes and times of the rooms' files."""
        if self.converted:
            found = [self.root / f"{id}.ply" for id in self._ids]
        else:
            found = [path for id in self._ids for path in visible(self.root / id / "Annotations", "*.txt")]
        options = json.dumps([self.split, self.task, asdict(self.options)], sort_keys=True)
        return hashlib.sha256(f"{files_fingerprint(self.root, found)}\0{options}".encode()).hexdigest()


def open_s3dis(path: Path, split: str, task: str, options: S3DISOptions) -> S3DIS:
    """Open the rooms of the test area (split "val"), or of all other areas ("train")."""
    return S3DIS(find_root(path), split, task, options)


def find_root(path: Path) -> Path:
    """Find the folder of Area_1, Area_2, ...: `path` itself, or the only one in it that has some."""
    if not path.is_dir():
        raise DataError(f"No folder {str(path)!r}. {WHERE}")
    roots = [folder for folder in (path, *sorted(path.iterdir())) if folder.is_dir() and any(folder.glob("Area_[1-6]"))]
    if not roots:
        raise DataError(f"No Area_1 to Area_6 in {str(path)!r}. {WHERE}")
    if roots[0] != path and len(roots) > 1:
        raise DataError(f"{str(path)!r} holds {some([root.name for root in roots], 5)}; name one of these folders.")
    return roots[0]


def label_table(options: S3DISOptions) -> np.ndarray:
    """Map raw ids to classes 1..13 in the order of the options, 0 = ignored: int64 [256]."""
    names = _class_names(options.order)
    table = np.zeros(256, np.int64)
    for raw, name in enumerate(RAW_CLASSES):
        shown = options.stairs if name == "stairs" else name
        table[raw] = names.index(shown) + 1 if shown in names else 0
    return table


def read_prepared(path: Path) -> Room:
    """Read a converted room. Raises `BadFrame` if the file is broken or none of ours."""
    with usable(path):
        vertex = read_ply(path, ("vertex",))["vertex"]
    columns = ("x", "y", "z", *RGB, "label", "instance")
    missing = [name for name in columns if name not in vertex]
    if missing:
        raise BadFrame(path, f"points have no {', '.join(missing)}; is it made by `geo-pretrain data convert s3dis`?")
    points, colors = np.stack([vertex[k] for k in "xyz"], 1), np.stack([vertex[k] for k in RGB], 1)
    labels, instances = vertex["label"], vertex["instance"]
    if not len(points):
        raise BadFrame(path, "the room has no points")
    points = checked_points(path, points)
    right = labels[labels != MIXED].max(initial=0) < len(RAW_CLASSES)
    if not right or labels.dtype != np.uint8 or colors.dtype != np.uint8:
        raise BadFrame(path, f"labels and colors are not uchar, or labels other than 0 to 13 and {MIXED}")
    return Room(points, colors, labels, instances)


def raw_rooms(raw: Path, options: S3DISConversion) -> list[str]:
    """List the rooms of a raw folder: "Area_1/conferenceRoom_1" and so on."""
    root = find_root(raw)
    rooms = [room for area in AREAS for room in _rooms_of(root, area, converted=False)]
    if not rooms:
        raise DataError(f"No Area_k/ROOM/Annotations in {str(root)!r}. {WHERE}")
    return rooms


def convert_room(raw: Path, room: str, options: S3DISConversion, path: Path) -> Sequence[str]:
    """Write a room as a PLY file; returns remarks on faults of its text files."""
    found, remarks = read_room(find_root(raw) / room, options.voxel_size or None)
    write_ply(path, {"vertex": _columns(found)})
    return remarks


def _columns(room: Room) -> dict[str, np.ndarray]:
    columns: dict[str, Any] = dict(zip("xyz", room.points.T, strict=True))
    return columns | dict(zip(RGB, room.colors.T, strict=True)) | {"label": room.labels, "instance": room.instances}


def _rooms_of(root: Path, area: int, converted: bool) -> list[str]:
    folder = root / f"Area_{area}"
    if converted:
        names = [path.stem for path in visible(folder, "*.ply")]
    else:
        names = [path.parent.name for path in folder.glob("*/Annotations") if path.is_dir()]
    return [f"{folder.name}/{name}" for name in sorted(names)]


def _class_names(order: str) -> tuple[str, ...]:
    return POINTNET_ORDER if order == "pointnet" else tuple(name for name in RAW_CLASSES if name != "stairs")
