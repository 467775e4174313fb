"""One reader for files of point clouds: PLY, npy, npz, LAS and LAZ, with the fields that a user names.

`file_columns` gives what a file holds, `read_cloud` makes a `LabelledCloud` of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, first_line, nearest, require, some
from geo_pretrain.training.checks import Positive, Ranged
from geo_pretrain.training.data.files import checked_points, loaded_arrays, points_fault
from geo_pretrain.training.data.labelled.clouds.classes import FileClasses
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.listed import NEARLY_1
from geo_pretrain.training.data.surfaces.ply import Columns, read_ply

# Names that are tried in this order where none is given; also with CloudCompare's prefix "scalar_", in any case.
POINTS = (("x", "y", "z"), "points", "point", "xyz", "coords", "coord", "positions", "position", "pos")
COLORS = (
    ("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue"),
    "colors", "color", "rgb",
)  # fmt: skip
LABELS = ("label", "labels", "class", "classification", "semantic", "semantics", "semantic_label", "sem", "gt")
INSTANCES = ("instance", "instances", "instance_id", "instance_label", "object", "object_id")
INTENSITIES = ("intensity", "remission", "reflectance", "reflectivity")
# Columns of a plain array [N, K] where the option `columns` does not name them.
PLAIN = {
    3: ("x", "y", "z"),
    4: ("x", "y", "z", "label"),
    6: ("x", "y", "z", "red", "green", "blue"),
    7: ("x", "y", "z", "red", "green", "blue", "label"),
    8: ("x", "y", "z", "red", "green", "blue", "label", "instance"),
}
COARSE = 0.005  # m; coarser steps move points to other voxels
FAR = 10_000.0  # m; beyond it float32 would not hold a millimeter
MOST, LARGEST = 2**63 - 1, 2**31  # of whole numbers; of those of objects, which are multiplied with labels
_FARTHEST = 1e9  # m; beyond it float64 would not hold a micrometer
Names = Sequence[str | tuple[str, ...]]


@dataclass(frozen=True)
class CloudFields(Ranged):
    """Names of the fields of cloud files; None: the usual names are tried. Fields may also be arrays [N, 3]."""

    section = "data.options."

    label: str | None = None
    instance: str | None = None
    color: str | None = None  # one name of an array [N, 3], three with commas, or none: colors are not read
    intensity: str | None = None
    columns: tuple[str, ...] = ()  # of plain arrays [N, K] in npy files, such as [x, y, z, _, label]
    scale: Positive = 1.0  # meters per unit of the coordinates
    # What intensities are multiplied with to be from 0 to 1; None: see `_File.intensity`.
    intensity_scale: Positive | None = None
    no_instance: int = 0  # the instance number that means none; -1 where objects are numbered from 0


def read_cloud(
    path: Path,
    fields: CloudFields = CloudFields(),
    classes: FileClasses | None = None,
    *,
    need: Collection[str] = ("label",),
    id: str | None = None,
) -> LabelledCloud:
    """Read a file of points: meters, z up as the file has it, in the file's order.

    Coordinates beyond 10 km are moved to near the origin, by whole units, before they become float32.

    Args:
        classes: the classes of the labels; None: neither labels nor instances are read.
        need: which of "label" and "instance" the file must have.
        id: of the cloud; None: the file's name without its suffix.

    Raises:
        BadFrame: the file is missing, cut off or empty, its coordinates are not finite, a field is missing, or a label
            is none of `classes`; with path and reason.
        MissingDependency: LAS without the library laspy.
    """
    return cloud_of_columns(path, file_columns(path, fields), fields, classes, need=need, id=id)


def cloud_of_columns(
    path: Path,
    columns: Columns,
    fields: CloudFields = CloudFields(),
    classes: FileClasses | None = None,
    *,
    need: Collection[str] = (),
    id: str | None = None,
) -> LabelledCloud:
    """Make a cloud of the columns of a file, or of arrays by name; see `read_cloud`. `path` names it in errors."""
    file = _File(Path(path), columns)
    points = file.points(fields.scale) * fields.scale
    if (fault := points_fault(points, _FARTHEST)) is not None:
        raise BadFrame(file.path, fault)
    labels = instances = None
    if classes is not None:
        labels = file.whole("label", fields.label, LABELS, needed="label" in need)
        instances = file.whole("instance", fields.instance, INSTANCES, needed="instance" in need)
        labels = None if labels is None else classes.apply(labels, path)
        if instances is not None:
            instances = np.where(instances == fields.no_instance, 0, instances + (fields.no_instance < 0)).clip(0)
            instances = _ranks(instances) if instances.max(initial=0) > LARGEST else instances
    return LabelledCloud(
        file.path.stem if id is None else id,
        checked_points(file.path, near_origin(points)),
        file.colors(fields.color),
        labels,
        instances,
        intensity=file.intensity(fields),
    )


def read_labels(path: Path, fields: CloudFields = CloudFields()) -> np.ndarray:
    """Read the labels of a file's points as they are, int64 [N]. Raises `BadFrame`, also where there are none."""
    file = _File(Path(path), file_columns(path, fields))
    file.points()
    found = file.whole("label", fields.label, LABELS, needed=True)
    assert found is not None
    return found


def near_origin(points: np.ndarray) -> np.ndarray:
    """Move coordinates [N, 3] beyond 10 km, as of maps, axis by axis to begin within a unit of 0."""
    return points - np.where(np.abs(points).max(axis=0) > FAR, np.floor(points.min(axis=0)), 0.0)


def placed_columns(path: Path, fields: CloudFields = CloudFields()) -> tuple[list[np.ndarray], Columns]:
    """Read the columns x, y and z of a file, whatever it calls them, and all others that have a row for each point.

    Everything is as it is in the file. Raises `BadFrame`, `DataError`.
    """
    file = _File(Path(path), file_columns(path, fields))
    rows, used = len(file.points()), file.found(POINTS, 3) or []
    wide = used[0] if len(used) == 1 else None  # an array [N, K], whose columns behind the third are others
    others: Columns = {}
    for name, column in file.columns.items():
        if column is wide:
            others |= {f"{name}_{k}": wide[:, k] for k in range(3, wide.shape[1])}
        elif column.shape[:1] == (rows,) and not any(column is one for one in used):
            others[name] = column
    return used if wide is None else list(wide[:, :3].T), others


def file_columns(path: Path, fields: CloudFields = CloudFields()) -> Columns:
    """Read all columns of a file as they are, [N] or [N, K] each. Raises `BadFrame`, `DataError`."""
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: accepted are files of points that end in {', '.join(CLOUD_SUFFIXES)}.")
    if not path.is_file():
        raise BadFrame(path, "file is missing")
    return reader(path, fields)


def _ply_columns(path: Path, fields: CloudFields) -> Columns:
    try:
        return read_ply(path, ["vertex"])["vertex"]
    except DataError as error:
        raise BadFrame(path, str(error).removeprefix(f"{path}: ").rstrip(".")) from None


def _npy_columns(path: Path, fields: CloudFields) -> Columns:
    with loaded_arrays(path) as array:
        if not isinstance(array, np.ndarray):
            raise BadFrame(path, "is an archive of arrays; its name ends in .npz")
    return array_columns(path, array, fields)


def array_columns(path: Path, array: np.ndarray, fields: CloudFields = CloudFields()) -> Columns:
    """The columns of an array: named ones, or [N, K] by the option `columns` or their usual meaning (`PLAIN`)."""
    if array.dtype.names:
        return {name: array[name] for name in array.dtype.names}
    if array.ndim != 2:
        raise BadFrame(path, f"an array of shape {list(array.shape)}; accepted: [N, K], or named columns [N]")
    names = fields.columns or PLAIN.get(array.shape[1], ())
    if twice := sorted({name for name in names if name != "_" and names.count(name) > 1}):
        raise BadFrame(path, f"data.options.columns has {twice[0]!r} twice; accepted: each name once, _ for the rest")
    if len(names) != array.shape[1]:
        given = f"{len(names)} are named" if fields.columns else "their meaning is not known"
        raise BadFrame(
            path, f"{array.shape[1]} columns, but {given}; accepted: data.options.columns with a name for each"
        )
    return {name: array[:, k] for k, name in enumerate(names)}


def _npz_columns(path: Path, fields: CloudFields) -> Columns:
    with loaded_arrays(path) as arrays:
        if isinstance(arrays, np.ndarray):
            raise BadFrame(path, "is one array; its name ends in .npy")
        found = {name: arrays[name] for name in arrays.files}
    return {name: array for name, array in found.items() if array.ndim in (1, 2)}


def _las_columns(path: Path, fields: CloudFields) -> Columns:
    laspy: Any = require("laspy", "las")
    if path.suffix.lower() == ".laz" and not laspy.LazBackend.detect_available():
        require("lazrs", "las")
    try:
        las = laspy.read(path)
        names = [name for name in las.point_format.dimension_names if name not in ("X", "Y", "Z")]
        columns = {name: np.asarray(las[name]) for name in ("x", "y", "z", *names)}
    except (OSError, ValueError, RuntimeError, laspy.errors.LaspyException) as error:
        raise BadFrame(path, f"cannot be read ({first_line(error)})") from None
    if len(columns["x"]) != las.header.point_count:
        raise BadFrame(path, f"has {len(columns['x'])} of {las.header.point_count} points: it is cut off")
    return columns


READERS: Mapping[str, Callable[[Path, CloudFields], Columns]] = {
    ".ply": _ply_columns,
    ".npy": _npy_columns,
    ".npz": _npz_columns,
    ".las": _las_columns,
    ".laz": _las_columns,
}
CLOUD_SUFFIXES = tuple(READERS)


class _File:
    """The columns of a file, found by name and checked; whatever is wrong is a `BadFrame` with the file's path."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self.path, self.columns = path, columns
        self._known = {_plain(name): column for name, column in reversed(columns.items())} | columns

    def _find(self, names: Names, width: int) -> np.ndarray | None:
        """Find the first of `names` that the file has: [N] for width 1, else [N, width], of one column or several."""
        columns = self.found(names, width)
        if columns is None or width == 1:
            return None if columns is None else columns[0]
        return np.stack(columns, axis=1) if len(columns) == width else columns[0][:, :width]

    def found(self, names: Names, width: int) -> list[np.ndarray] | None:
        """The columns of the first of `names` that the file has: `width` of [N], or one [N, K] where it is above 1."""
        for name in names:
            parts = (name,) if isinstance(name, str) else name
            found = [self._known.get(part, self._known.get(_plain(part))) for part in parts]
            columns = [_flat(column) for column in found if column is not None and column.dtype != object]
            if len(columns) < len(parts):
                continue
            if len(parts) == width and all(column.ndim == 1 for column in columns):
                lengths = {len(column) for column in columns}
                if len(lengths) > 1:
                    raise BadFrame(self.path, f"fields {', '.join(parts)} have {sorted(lengths)} rows")
                return columns
            if len(parts) == 1 < width and columns[0].ndim == 2 and columns[0].shape[1] >= width:
                return columns
        return None

    def points(self, scale: float = 1.0) -> np.ndarray:
        """Coordinates as float64 [N, 3], finite; at least one point. `scale`: meters per unit."""
        found = self._find(POINTS, 3)
        if found is None:
            raise BadFrame(self.path, f"no coordinates x y z or points [N, 3]; it has {self._names()}")
        self.rows = len(found)
        if not self.rows:
            raise BadFrame(self.path, "the cloud has no point")
        if found.dtype.kind not in "iuf" or found.dtype.itemsize > 8:
            raise BadFrame(
                self.path, f"coordinates are {found.dtype}; accepted: whole numbers, or floats up to float64"
            )
        points = found.astype(np.float64)
        if found.dtype.kind == "f" and (step := scale * float(np.spacing(np.abs(found).max()))) > COARSE:
            warnings.warn(  # without the file's name, so that it is told once
                f"Coordinates are {found.dtype}, which has steps of {step:.2g} m where they lie: points have moved. "
                "Save them as float64.",
                stacklevel=2,
            )
        if (fault := points_fault(points, np.inf)) is not None:
            raise BadFrame(self.path, fault + self._without_them())
        return points

    def _without_them(self) -> str:
        """How to drop points that are not finite, behind a semicolon: the line for an array and for arrays by name."""
        file, suffix = repr(str(self.path)), self.path.suffix.lower()
        whole = [name for name in POINTS if isinstance(name, str) and name in self.columns]
        if suffix == ".npy" and set(self.columns) >= set("xyz"):
            line = f"cloud = numpy.load({file}); numpy.save({file}, cloud[numpy.isfinite(cloud).all(1)])"
        elif suffix == ".npz" and whole:
            line = (
                f"a = dict(numpy.load({file})); good = numpy.isfinite(a[{whole[0]!r}]).all(1); "
                f"numpy.savez({file}, **{{k: v[good] for k, v in a.items()}})"
            )
        else:
            return "; drop those rows"
        return f"; this drops them: {line}"

    def field(
        self, what: str, given: str | None, usual: Names, *, needed: bool = False, width: int = 1
    ) -> np.ndarray | None:
        """The field of a meaning by its given or usual names; one that is given or `needed` must be there."""
        names: Names = usual
        if given is not None:
            parts = tuple(part.strip() for part in given.split(","))
            names = parts if len(parts) == 1 else (parts,)
        found = self._find(names, width)
        if found is None and (needed or given is not None):
            shown = [name if isinstance(name, str) else " ".join(name) for name in names]
            near = f"; nearest {nearest(given, self.columns, 1)[0]!r}" if given is not None else ""
            raise BadFrame(
                self.path,
                f"no field {' or '.join(shown)} (data.options.{what}); it has {self._names()}{near}",
            )
        if found is not None and len(found) != self.rows:
            raise BadFrame(self.path, f"{what} has {len(found)} rows, the points have {self.rows}")
        return found

    def whole(self, what: str, given: str | None, usual: Names, *, needed: bool) -> np.ndarray | None:
        """A field of whole numbers: int64 [N]; numbers with a point are accepted where they are whole."""
        found = self.field(what, given, usual, needed=needed)
        if found is None:
            return None
        if found.dtype.kind not in "iu":
            if found.dtype.kind != "f":
                raise BadFrame(self.path, f"{what} is {found.dtype}; accepted: whole numbers")
            wrong = ~(np.isfinite(found) & (found == np.round(found)))
            if wrong.any():
                raise BadFrame(self.path, f"{what} of {int(wrong.sum())} points is no whole number: {found[wrong][0]}")
        if found.dtype in (np.uint32, np.uint64):
            none = found == np.iinfo(found.dtype).max  # -1, as it was before it lost its sign
            if what != "instance" and found[~none].max(initial=0) > MOST:
                raise BadFrame(self.path, f"{what} goes up to {found[~none].max()}; accepted: up to {MOST}")
            known = _ranks(np.where(none, 0, found)) if found[~none].max(initial=0) > MOST else found.astype(np.int64)
            return np.where(none, -1, known)
        return found.astype(np.int64)

    def colors(self, given: str | None) -> np.ndarray | None:
        """Colors uint8 [N, 3]; None: the file has none.

        Whole numbers are from 0 to 255, or from 0 to 65535 where one is above 255 (as LAS has it); numbers with a point
        from 0 to 255, or from 0 to 1 where none is above 1.
        """
        found = None if given == "none" else self.field("color", given, COLORS, width=3)
        if found is None or found.dtype == np.uint8:
            return found
        values = found.astype(np.float64)
        largest = values.max(initial=0)
        limit = 65535 if found.dtype.kind in "iu" else 255
        if not np.isfinite(values).all() or values.min(initial=0) < 0 or largest > limit:
            raise BadFrame(
                self.path, f"colors are from {values.min():g} to {largest:g}; accepted: 0 to {limit}, finite"
            )
        if found.dtype.kind == "f" and largest <= 1:
            values = values * 255
        elif largest > 255:
            values = values // 256
        return values.round().astype(np.uint8)

    def intensity(self, fields: CloudFields) -> np.ndarray | None:
        """Intensities from 0 to 1: float32 [N]; None: the file has none.

        Without a scale uint8 and uint16 have their type's range; others the first of 1 (only numbers with a point), 255
        and 65535 that fits, which is told.
        """
        found = self.field("intensity", fields.intensity, INTENSITIES)
        if found is None:
            return None
        values = found.astype(np.float64)
        if not np.isfinite(values).all():
            raise BadFrame(self.path, "intensities are not finite")
        scale = fields.intensity_scale
        if scale is None and found.dtype in (np.uint8, np.uint16):
            scale = 1 / np.iinfo(found.dtype).max
        elif scale is None:
            scale = _likely_scale(values, found.dtype.kind == "f")
        return None if scale is None else (values * scale).clip(0, 1).astype(np.float32)

    def _names(self) -> str:
        return some(self.columns, 30)


def _likely_scale(values: np.ndarray, floats: bool) -> float | None:
    """What intensities are multiplied with to be from 0 to 1; None: nothing known. A warning tells of a guess, once."""
    largest = values.max(initial=0)
    if floats and largest <= NEARLY_1:
        return 1.0
    limit = next((limit for limit in (255, 65535) if largest <= limit), None)
    taken = "are not read" if limit is None else f"are divided by {limit}"
    warnings.warn(
        f"Intensities above 1 in neither 8 nor 16 bits {taken}; data.options.intensity_scale says otherwise.",
        stacklevel=2,
    )
    return None if limit is None else 1 / limit


def _flat(column: np.ndarray) -> np.ndarray:
    """A column [N, 1] as [N]."""
    return column[:, 0] if column.ndim == 2 and column.shape[1] == 1 else column


def _ranks(numbers: np.ndarray) -> np.ndarray:
    """Numbers in their order from 1 on, int64; 0 stays 0. Hashes serve as numbers of objects, and would overflow."""
    known, ranks = np.unique(numbers, return_inverse=True)
    return ranks.astype(np.int64) + int(known[0] > 0)


def _plain(name: str) -> str:
    """A field's name in lower case without CloudCompare's prefix."""
    return name.lower().removeprefix("scalar_")
