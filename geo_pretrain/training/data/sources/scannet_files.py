"""The files of a ScanNet scan: mesh, over-segmentation, objects, alignment, and the table of categories.

Every fault is a `DataError` that names the file (a missing mesh: `NoSurface`).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.errors import DataError, first_line
from geo_pretrain.files import parse_json
from geo_pretrain.training.data.files import points_fault, pose_fault
from geo_pretrain.training.data.frame import NoSurface
from geo_pretrain.training.data.surfaces.ply import Columns, read_ply

RGB = ("red", "green", "blue")
ALIGNMENT = "axisAlignment"
MOST_OBJECTS = 1 << 20  # numbers of objects in a scan are below; tables are as long as the largest


@dataclass(frozen=True)
class ScanObject:
    """An annotated object: a group of segments."""

    number: int  # its objectId, from 0
    category: str  # raw category, such as "office chair"
    segments: np.ndarray  # int64 [S], ids in the over-segmentation


def mesh_path(folder: Path) -> Path:
    """The path of the decimated mesh in a scan's folder."""
    return folder / f"{folder.name}_vh_clean_2.ply"


def segments_path(folder: Path) -> Path:
    """The path of the over-segmentation of that mesh."""
    return mesh_path(folder).with_suffix(".0.010000.segs.json")


def labels_path(folder: Path) -> Path:
    """The path of the mesh whose vertices have nyu40 ids."""
    return mesh_path(folder).with_suffix(".labels.ply")


def objects_path(folder: Path) -> Path:
    """The path of the list of objects, groups of segments of that mesh.

    The release's SCAN_vh_clean.aggregation.json is another list: its segments are those of the full mesh.
    """
    return folder / f"{folder.name}.aggregation.json"


def read_mesh(path: Path, *elements: str) -> list[Columns]:
    """Read elements of a mesh, such as "vertex" and "face". Raises `NoSurface` when there is no file."""
    if not path.is_file():
        raise NoSurface(f"No mesh {str(path)!r}; it comes with the scans ('{path.name}').")
    return list(read_ply(path, elements).values())


def positions(path: Path, vertex: Columns, *others: str) -> np.ndarray:
    """Stack x, y, z to float32 [V, 3]; vertices must have the properties `others`, too."""
    missing = [name for name in ("x", "y", "z", *others) if name not in vertex]
    if missing:
        raise DataError(f"{path}: vertices have no {', '.join(missing)}; they have {', '.join(vertex)}.")
    points = np.stack([vertex[k] for k in "xyz"], 1)
    if not len(points):
        raise DataError(f"{path}: the mesh has no vertices.")
    if (fault := points_fault(points)) is not None:
        raise DataError(f"{path}: {fault}.")
    return points.astype(np.float32)


def colored_vertices(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the vertices of a mesh, float32 [V, 3] m, and their colors, uint8 [V, 3]."""
    (vertex,) = read_mesh(path, "vertex")
    points = positions(path, vertex, *RGB)
    colors = np.stack([vertex[k] for k in RGB], 1)
    if colors.dtype != np.uint8:
        raise DataError(f"{path}: colors are {colors.dtype}, expected uchar.")
    return points, colors


def read_segments(path: Path, vertices: int) -> np.ndarray:
    """Read the segment of every one of `vertices` vertices: int64 [V]."""
    tree = _read_json(path, "segments")
    if not isinstance(tree, dict) or "segIndices" not in tree:
        raise DataError(f"{path}: has no 'segIndices', the list of the segments of the vertices.")
    ids = _whole_numbers(tree["segIndices"])
    if ids is None:
        raise DataError(f"{path}: 'segIndices' is no list of whole numbers from 0, one a vertex.")
    if len(ids) != vertices:
        raise DataError(f"{path}: has {len(ids)} segments, expected one for each of the mesh's {vertices} vertices.")
    return ids


def read_objects(path: Path) -> list[ScanObject]:
    """Read the annotated objects of a scan, in the order of the file."""
    tree = _read_json(path, "objects")
    groups = tree.get("segGroups") if isinstance(tree, dict) else None
    if not isinstance(groups, list):
        raise DataError(f"{path}: has no 'segGroups', the list of objects.")
    objects = []
    for number, group in enumerate(groups):
        entries = group if isinstance(group, dict) else {}
        index, category = entries.get("objectId"), entries.get("label")
        segments = _whole_numbers(entries.get("segments"))
        if (
            not isinstance(index, int)
            or not 0 <= index < MOST_OBJECTS
            or not isinstance(category, str)
            or segments is None
        ):
            raise DataError(f"{path}: object {number} has no whole 'objectId', text 'label' and list 'segments'.")
        objects.append(ScanObject(index, category, segments))
    return objects


def vertex_objects(segments: np.ndarray, objects: Sequence[ScanObject]) -> np.ndarray:
    """Number each vertex by its object, objectId + 1, 0 = none: int64 [V]. Later objects overwrite earlier ones."""
    names, row = np.unique(segments, return_inverse=True)
    owner = np.zeros(len(names), np.int64)
    for each in objects:
        owner[np.isin(names, each.segments)] = each.number + 1
    return owner[row]


def read_alignment(path: Path) -> np.ndarray | None:
    """Read a scan's motion to axes along its walls from SCAN.txt: float64 [4, 4]; None without one (test scans)."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}).") from None
    for line in lines:
        key, _, text = line.partition("=")
        if key.strip() == ALIGNMENT:
            try:
                matrix = np.array([float(word) for word in text.split()])
            except ValueError:
                matrix = np.zeros(0)
            if len(matrix) != 16 or not np.isfinite(matrix).all():
                raise DataError(f"{path}: {ALIGNMENT} is {text.strip()[:60]!r}, expected 16 numbers.")
            if (fault := pose_fault(matrix.reshape(4, 4))) is not None:
                raise DataError(f"{path}: {ALIGNMENT} {fault}.")
            return matrix.reshape(4, 4)
    return None


def read_categories(path: Path) -> dict[str, int]:
    """Read scannetv2-labels.combined.tsv: raw category -> nyu40 id."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        found = {row["raw_category"]: int(row["nyu40id"]) for row in rows}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise DataError(f"{path}: is no table with columns raw_category and nyu40id ({error!r}).") from None
    if not found or min(found.values()) < 0:
        raise DataError(f"{path}: has no category, or one with a nyu40id below 0.")
    return found


def _read_json(path: Path, what: str) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {what} cannot be read ({error}).") from None


def _whole_numbers(values: Any) -> np.ndarray | None:
    """A list of whole numbers from 0 up as int64 [N]; None for anything else."""
    try:
        numbers = np.array(values if isinstance(values, list) else [[]])
    except ValueError:  # a list with lists in it
        return None
    if numbers.ndim != 1 or (len(numbers) and (numbers.dtype.kind != "i" or (numbers < 0).any())):
        return None
    return numbers.astype(np.int64)
