"""The shared part of data sets whose clouds are files below one folder: ids, scenes, digest, raw floats of scanners."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, unknown
from geo_pretrain.training.data import files
from geo_pretrain.training.data.files import checked_points
from geo_pretrain.training.data.surfaces.ply import Columns, read_ply

MOST_REMISSION = 255.0  # KITTI's are up to 1; files of others have bytes there
NEARLY_1 = 2.0  # the largest of remissions or intensities from 0 to 1, some of which may be a little above
Y_UP_TO_Z_UP = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32)  # (x, y, z) -> (x, -z, y): a turn about x


@dataclass(frozen=True)
class ListedCloud:
    """The files of one cloud."""

    scene: str
    points: Path
    labels: Path | None = None


class ListedClouds:
    """Clouds in files: what a `CloudSource` tells without reading one. A data set's class adds `load`."""

    def __init__(
        self, name: str, split: str, root: Path, classes: Sequence[str], items: Mapping[str, ListedCloud], facts: object
    ) -> None:
        """`facts`: the options that change what is read; they belong to the digest."""
        self.name, self.split, self.root, self.classes = name, split, root, tuple(classes)
        self._items, self._facts = dict(items), facts

    def ids(self) -> list[str]:
        return list(self._items)

    def scene_of(self, id: str) -> str:
        return self.item(id).scene

    def scenes(self) -> list[str]:
        return list(dict.fromkeys(item.scene for item in self._items.values()))

    def file_name(self, id: str) -> str:
        """The path of a cloud's points below the data set's folder."""
        return self.item(id).points.relative_to(self.root).as_posix()

    def fingerprint(self) -> str:
        """A digest of names, sizes and times of the files, of the classes and of the options."""
        paths = [path for item in self._items.values() for path in (item.points, item.labels)]
        found = files.files_fingerprint(self.root, [path for path in paths if path is not None and path.is_file()])
        facts = f"{found}\n{self.name}\n{self.split}\n{self.classes}\n{self._facts}\n{list(self._items)}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def item(self, id: str) -> ListedCloud:
        """The files of a cloud. Raises `UnknownName`."""
        if id not in self._items:
            raise unknown("cloud", id, self._items)
        return self._items[id]


def read_scan(path: Path) -> np.ndarray:
    """Read a scan of KITTI's laser scanner: float32 [N, 4] of x, y, z (m, z up) and remission in [0, 1].

    Where a remission is far above 1, all of the scan are divided by 255.
    """
    values = np.frombuffer(read_bytes(path, "scan"), "<f4")
    if len(values) % 4 or not len(values):
        raise BadFrame(path, f"scan has {4 * len(values)} bytes, expected 16 for each of at least one point")
    scan = values.reshape(-1, 4)
    checked_points(path, scan[:, :3])
    wrong = ~((scan[:, 3] >= 0) & (scan[:, 3] <= MOST_REMISSION))  # so written, NaN is wrong too
    if wrong.any():
        what = f"remissions of {int(wrong.sum())} points are not from 0 to {MOST_REMISSION:g}"
        raise BadFrame(path, f"{what}, such as {scan[wrong, 3][0]:g}")
    return scan if scan[:, 3].max() <= NEARLY_1 else scan / np.array([1, 1, 1, MOST_REMISSION], np.float32)


def read_bytes(path: Path, what: str, item: int = 4) -> bytes:
    """Read a file of `item`-byte values. Raises `BadFrame` if it is missing or its last value is cut off."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadFrame(path, f"{what} is missing") from None
    except OSError as error:
        raise BadFrame(path, f"{what} cannot be read ({error.strerror})") from None
    if len(data) % item:
        raise BadFrame(path, f"{what} has {len(data)} bytes, which is no multiple of {item}: it is cut off")
    return data


def read_vertices(path: Path, names: Sequence[str]) -> Columns:
    """Read properties of the vertices of a PLY file by name. Raises `BadFrame`."""
    try:
        vertices = read_ply(path, ["vertex"])["vertex"]
    except DataError as error:
        raise BadFrame(path, str(error).removeprefix(f"{path}: ").rstrip(".")) from None
    missing = [name for name in names if name not in vertices]
    if missing:
        raise BadFrame(path, f"vertices have no {', '.join(missing)}; they have {', '.join(vertices) or 'nothing'}")
    if not len(vertices[names[0]]):
        raise BadFrame(path, "no vertices")
    return vertices
