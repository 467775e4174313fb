"""SUN RGB-D's own release turned into clouds with boxes, once, as VoteNet's preprocessing does (without MATLAB).

RAW is either folder:

SUNRGBD/..., SUNRGBDMeta3DBB_v2.mat, SUNRGBDtoolbox/{Metadata/SUNRGBDMeta.mat,traintestSUNRGBD/allsplit.mat}
    the release: depth images, calibration (of version 2), boxes of version 1, the official split;
depth/000001.mat, label_v1/000001.txt, train_data_idx.txt, val_data_idx.txt
    what VoteNet's MATLAB scripts make of it (its folder sunrgbd_trainval).

Each image becomes {train,val}/000001.npz with "pc" [N, 6] and "bbox" [K, 8], VoteNet's arrays. Votes are not stored:
training finds them from the boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, first_line, require, some
from geo_pretrain.training.checks import Count, Ranged
from geo_pretrain.training.data.files import intrinsics_fault, pose_fault, read_color, read_ids
from geo_pretrain.training.data.labelled.clouds.sunrgbd3d import CLASSES

V1, V2 = "SUNRGBDtoolbox/Metadata/SUNRGBDMeta.mat", "SUNRGBDMeta3DBB_v2.mat"
SPLITS = "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"
LAYOUT = (
    f"SUNRGBD/ (unzipped), {V2}, {V1} and {SPLITS} (rgbd.cs.princeton.edu), or VoteNet's sunrgbd_trainval with "
    "depth/000001.mat, label_v1/000001.txt, train_data_idx.txt and val_data_idx.txt"
)
SERVER = "/n/fs/sun3d/data/"  # where the paths in the metadata begin
FARTHEST = 8.0  # m; depth beyond it is set to it, as the toolbox does
LISTS = {"train": "train_data_idx.txt", "val": "val_data_idx.txt"}


@dataclass(frozen=True)
class SUNRGBDConversion(Ranged):
    """Settings of the conversion."""

    points: Count = 50_000  # drawn from an image's points, by its number; with repetition where it has fewer
    # The MATLAB script ends an image's list of boxes at the first whose 2D box is missing; True does the same.
    match_released_code: bool = False


def raw_images(raw: Path, options: SUNRGBDConversion) -> list[str]:
    """Names of all images, such as "train/005051". Raises `DataError` with the two layouts where neither is there."""
    if (raw / LISTS["train"]).is_file():
        return [f"{split}/{number:06d}" for split, file in LISTS.items() for number in _numbers(raw / file)]
    missing = [name for name in ("SUNRGBD", V1, V2, SPLITS) if not (raw / name).exists()]
    if missing:
        raise DataError(f"{str(raw)!r} lacks {', '.join(missing)}. Expected layout: {LAYOUT}")
    listed = _load(raw / SPLITS)
    folders = {
        split: {_below(str(path)) for path in np.ravel(listed[key])}
        for split, key in (("train", "alltrain"), ("val", "alltest"))
    }
    names, unknown = [], []
    for number, image in enumerate(_metadata(raw / V1), 1):
        folder = Path(_below(image.depthpath)).parents[1].as_posix()
        found = [split for split, known in folders.items() if folder in known]
        names += [f"{split}/{number:06d}" for split in found[:1]]
        unknown += [] if found else [folder]
    if unknown:
        raise DataError(f"{SPLITS} does not name {len(unknown)} images of {V1}: {some(unknown, 3)}.")
    return sorted(names)


def convert_image(raw: Path, name: str, options: SUNRGBDConversion, path: Path) -> list[str]:
    """Write the points and boxes of one image to `path`; returns remarks. Raises `BadFrame`."""
    number = int(name.rpartition("/")[2])
    if (raw / LISTS["train"]).is_file():
        cloud = _mat_points(raw / "depth" / f"{number:06d}.mat")
        boxes, remarks = read_label_file(raw / "label_v1" / f"{number:06d}.txt")
    else:
        second, first = _metadata(raw / V2)[number - 1], _metadata(raw / V1)[number - 1]
        cloud = image_points(raw, second)
        boxes, remarks = boxes_of_image(first, cut=options.match_released_code)
    rng = np.random.default_rng(number)
    if not len(cloud):
        raise BadFrame(name, "no pixel has a valid depth")
    chosen = rng.choice(len(cloud), options.points, replace=len(cloud) < options.points)
    with path.open("wb") as file:
        np.savez_compressed(file, pc=cloud[chosen].astype(np.float32), bbox=boxes)
    return remarks


def image_points(raw: Path, image: Any) -> np.ndarray:
    """The cloud of an image, upright: [N, 6] of x, y, z (m) and red, green, blue from 0 to 1.

    A depth image's 16 bits are rotated by three to the left; the rest is the number of mm. Pixels count from 1.
    """
    path = raw / _below(image.depthpath)
    stored = read_ids(path, bits=(16,))
    depth = ((stored >> 3) | (stored << 13) & 0xFFFF) / 1000
    color = read_color(raw / _below(image.rgbpath))
    if color.shape[:2] != depth.shape:
        raise BadFrame(path, f"depth is {depth.shape[1]}x{depth.shape[0]}, the image {color.shape[1]}x{color.shape[0]}")
    rows, columns = np.nonzero(depth)
    z = np.minimum(depth[rows, columns], FARTHEST)
    calibration, tilt = np.asarray(image.K, float), np.asarray(image.Rtilt, float)
    if calibration.shape != (3, 3) or tilt.shape != (3, 3):
        raise BadFrame(path, f"K is {calibration.shape} and Rtilt {tilt.shape}, expected 3x3 both")
    if (fault := intrinsics_fault(calibration)) is not None:
        raise BadFrame(path, f"K: intrinsics {fault}")
    turn = np.eye(4)
    turn[:3, :3] = tilt
    if (fault := pose_fault(turn)) is not None:
        raise BadFrame(path, f"Rtilt: pose {fault}")
    x = (columns + 1 - calibration[0, 2]) * z / calibration[0, 0]
    y = (rows + 1 - calibration[1, 2]) * z / calibration[1, 1]
    points = np.stack([x, z, -y], axis=1) @ tilt.T
    return np.concatenate([points, color[rows, columns] / 255], axis=1)


def boxes_of_image(image: Any, *, cut: bool) -> tuple[np.ndarray, list[str]]:
    """VoteNet's rows [K, 8] of an image's boxes, see `box_row`, and remarks on boxes that cannot be used."""
    boxes, flat = np.ravel(image.groundtruth3DBB), np.ravel(image.groundtruth2DBB)
    rows, remarks = [], []
    for number, box in enumerate(boxes):
        if cut and not (number < len(flat) and np.size(getattr(flat[number], "gtBb2D", ())) >= 4):
            remarks.append(f"{len(boxes) - number} of {len(boxes)} boxes left out: box {number} has no 2D box")
            break
        if str(box.classname) not in CLASSES:
            continue
        try:
            rows.append(box_row(str(box.classname), box.centroid, np.abs(box.coeffs), box.orientation))
        except (TypeError, ValueError) as error:
            remarks.append(f"box {number} ({box.classname}) cannot be used: {first_line(error)}")
    return np.array(rows).reshape(-1, 8), remarks


def read_label_file(path: Path) -> tuple[np.ndarray, list[str]]:
    """VoteNet's rows [K, 8] of a label file, and remarks on lines that cannot be used.

    A line is class, 2D box (4 numbers), center (3), half lengths (3) and orientation (2 or more); a file that the
    MATLAB script cut short may end within a line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise BadFrame(path, "label file is missing") from None
    except (OSError, ValueError) as error:
        raise BadFrame(path, f"label file cannot be read ({first_line(error)})") from None
    rows, remarks = [], []
    for number, words in enumerate((line.split() for line in lines), 1):
        if not words or words[0] not in CLASSES:
            continue
        try:
            values = np.array([float(word) for word in words[5:13]])
            rows.append(box_row(words[0], values[:3], values[3:6], values[6:]))
        except ValueError as error:
            remarks.append(f"line {number} of {path.name} cannot be used: {first_line(error)}")
    return np.array(rows).reshape(-1, 8), remarks


def box_row(name: str, center: np.ndarray, halves: np.ndarray, orientation: np.ndarray) -> list[float]:
    """A box as VoteNet stores it: center, half lengths along its x, y and z, heading (clockwise), class from 0.

    `halves` begin with the one across: the box's x is the direction of `orientation`, along the second of them.
    """
    numbers = [np.ravel(np.asarray(part, float)) for part in (center, halves, orientation)]
    sizes = tuple(len(part) for part in numbers)
    if sizes[:2] != (3, 3) or sizes[2] < 2:
        raise ValueError(f"{sizes} numbers of center, half lengths and orientation, expected 3, 3 and 2")
    if not all(np.isfinite(part).all() for part in numbers) or (numbers[1] <= 0).any():
        raise ValueError("a number is not finite, or a half length 0")
    across, along, up = numbers[1]
    return [*numbers[0], along, across, up, -np.arctan2(numbers[2][1], numbers[2][0]), CLASSES.index(name)]


def _numbers(path: Path) -> list[int]:
    try:
        return [int(word) for word in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no list of image numbers, one a line ({first_line(error)}).") from None


def _mat_points(path: Path) -> np.ndarray:
    """The array "instance" [N, 6] that VoteNet's MATLAB script saved for an image."""
    try:
        points = np.asarray(_load(path)["instance"], float)
    except KeyError:
        raise BadFrame(path, "has no array 'instance'") from None
    except DataError as error:
        raise BadFrame(path, str(error).removeprefix(f"{path}: ")) from None
    if points.ndim != 2 or points.shape[1] != 6 or not np.isfinite(points).all():
        raise BadFrame(path, f"'instance' is {points.shape}, expected finite numbers [N, 6]")
    return points


@cache
def _metadata(path: Path) -> Sequence[Any]:
    """The images of a metadata file; read once a process, since that takes a minute."""
    found = _load(path)
    if "SUNRGBDMeta" not in found:
        raise DataError(f"{path}: has no variable SUNRGBDMeta.")
    return list(np.ravel(found["SUNRGBDMeta"]))


def _load(path: Path) -> Mapping[str, Any]:
    """Read a .mat file (not of version 7.3); its structs have attributes."""
    scipy = require("scipy.io", "training")
    if not path.is_file():
        raise DataError(f"{path}: is missing")
    try:
        found: Mapping[str, Any] = scipy.loadmat(path, squeeze_me=True, struct_as_record=False)
        return found
    except Exception as error:  # scipy raises what it meets: a truncated file may be any error
        raise DataError(f"{path}: cannot be read as MATLAB's ({first_line(error)})") from None


def _below(path: str) -> str:
    """A path of the metadata below RAW: SUNRGBD/kv2/..."""
    return path.removeprefix(SERVER).strip("/")
