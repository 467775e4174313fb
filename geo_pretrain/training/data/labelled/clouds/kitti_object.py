"""KITTI's object benchmark (Geiger et al., CVPR 2012): scans with 3D boxes of what the front camera sees.

training/{velodyne/000000.bin,label_2/000000.txt,calib/000000.txt}   and image_2/000000.png for its size
ImageSets/{train,val}.txt   frames of a split, one a line; the archives have none
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.files import expanded
from geo_pretrain.training.data.files import (
    FARTHEST,
    LONGEST,
    image_size,
    intrinsics_fault,
    pose_fault,
    read_listing,
    visible,
)
from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D, LabelledCloud
from geo_pretrain.training.data.labelled.clouds.listed import ListedCloud, ListedClouds, read_scan
from geo_pretrain.training.data.labelled.folders import need_folders

LAYOUT = "training/{velodyne/000000.bin,label_2/000000.txt,calib/000000.txt}"
CLASSES = ("Car", "Pedestrian", "Cyclist")
OTHERS = ("Van", "Truck", "Person_sitting", "Tram", "Misc", "DontCare")  # not evaluated by the benchmark
NOMINAL_SIZE = 1242, 375  # px; sizes of images differ by a few pixels


@dataclass(frozen=True)
class KITTIObjectOptions:
    """Options of KITTI's object benchmark."""

    lists: str | None = None  # folder of train.txt and val.txt; None: ImageSets in the data set's folder
    in_view: bool = True  # keep the points that the image shows; boxes are annotated nowhere else


@dataclass(frozen=True)
class Calibration:
    """The matrices of one frame that take points of the scanner into the left color camera's image."""

    projection: np.ndarray  # float64 [3, 4], P2: rectified camera -> homogeneous pixels
    velodyne_to_camera: np.ndarray  # float64 [4, 4], R0_rect * Tr_velo_to_cam: scanner -> rectified camera

    def pixels(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Project points [N, 3] of the scanner: uv float64 [N, 2] px, depth float64 [N] m."""
        camera = points @ self.velodyne_to_camera[:3, :3].T + self.velodyne_to_camera[:3, 3]
        image = camera @ self.projection[:, :3].T + self.projection[:, 3]
        depth = image[:, 2]
        return image[:, :2] / np.where(np.abs(depth) < 1e-6, 1e-6, depth)[:, None], depth


class KITTIObject(ListedClouds):
    """One split; ids such as "000123", each its own scene; points and boxes in the scanner's frame (z up)."""

    options: KITTIObjectOptions

    def load(self, id: str) -> LabelledCloud:
        item = self.item(id)
        scan, folder = read_scan(item.points), item.points.parents[1]
        calibration = read_calibration(folder / "calib" / f"{id}.txt")
        boxes = None if item.labels is None else read_boxes(item.labels, calibration)
        cloud = LabelledCloud(id, scan[:, :3].copy(), None, None, boxes=boxes, intensity=scan[:, 3].copy())
        if not self.options.in_view:
            return cloud
        uv, depth = calibration.pixels(scan[:, :3].astype(np.float64))
        seen = (depth > 0) & (uv >= 0).all(1) & (uv < _image_size(folder / "image_2" / f"{id}.png")).all(1)
        if not seen.any():
            raise BadFrame(item.points, "the image shows none of the points")
        return replace(cloud, points=cloud.points[seen], intensity=scan[seen, 3])


def open_kitti_object(path: Path, split: str, task: str, options: KITTIObjectOptions) -> KITTIObject:
    """Open the frames of a split: those of its list, else frames with an even number train and odd ones validate.

    "test" is the folder `testing`, which has no labels.
    """
    need_folders(path, [], LAYOUT)
    folder = path / ("testing" if split == "test" else "training")
    scans = {scan.stem: scan for scan in visible(folder / "velodyne", "*.bin")}
    if not scans:
        raise DataError(f"No scan in {str(folder / 'velodyne')!r}. Expected layout: {LAYOUT}")
    listed = (path / "ImageSets" if options.lists is None else expanded(options.lists)) / f"{split}.txt"
    if split == "test":
        names = list(scans)
    elif listed.is_file():
        names = [name for line in read_listing(listed, "list of frames") for name in line.split()]
        missing = [name for name in names if name not in scans]
        if missing or not names:
            raise DataError(f"{str(listed)!r} names {len(names)} frames; {len(missing)} are not in {str(folder)!r}.")
    elif options.lists is not None:
        raise DataError(f"No list {str(listed)!r}: the numbers of frames, one a line, such as 000123.")
    else:
        warnings.warn(f"kitti_object: no {str(listed)!r}: even frames train, odd ones validate.", stacklevel=2)
        names = [name for name in scans if name.isdecimal() and int(name) % 2 == (split == "val")]
    if not names:
        raise DataError(f"No frame for split {split!r} among {len(scans)} in {str(folder)!r}; give lists of both.")
    items = {
        name: ListedCloud(name, scans[name], None if split == "test" else folder / "label_2" / f"{name}.txt")
        for name in names
    }
    source = KITTIObject("kitti_object", split, path, CLASSES, items, options)
    source.options = options
    return source


def read_calibration(path: Path) -> Calibration:
    """Read P2, R0_rect and Tr_velo_to_cam of a frame."""
    rows = dict(_rows(path, "calibration", ":"))
    try:
        projection, rectify, velodyne = (
            np.array([float(word) for word in rows[key]]).reshape(3, -1) for key in ("P2", "R0_rect", "Tr_velo_to_cam")
        )
    except (KeyError, ValueError) as error:
        raise BadFrame(path, f"calibration lacks a matrix or a number ({error})") from None
    if (projection.shape, rectify.shape, velodyne.shape) != ((3, 4), (3, 3), (3, 4)):
        raise BadFrame(path, "calibration has matrices of other sizes than 3x4 (P2, Tr_velo_to_cam) and 3x3 (R0_rect)")
    matrix = np.eye(4)
    matrix[:3] = rectify @ velodyne
    for fault in (intrinsics_fault(projection[:, :3]), pose_fault(matrix)):
        if fault is not None:
            raise BadFrame(path, f"calibration: matrices {fault}")
    if not np.isfinite(projection).all() or np.abs(projection[:, 3]).max() > LONGEST:
        raise BadFrame(path, "calibration: the last column of P2 is not finite, or no offset in pixels")
    return Calibration(projection, matrix)


def read_boxes(path: Path, calibration: Calibration) -> Boxes3D:
    """Read the boxes of the benchmark's three classes in the scanner's frame.

    A line has the center of the box's bottom in the rectified camera (x right, y down, z forward), height, width,
    length, and the angle about y from the camera's x to the object's front. The boxes that are returned stand upright:
    the camera's tilt against the scanner (about a degree) is left out of their heading.
    """
    camera_to_velodyne = np.linalg.inv(calibration.velodyne_to_camera)
    centers, sizes, headings, classes = [], [], [], []
    for name, words in _rows(path, "label file", None):
        if name in OTHERS:
            continue
        try:
            height, width, length, x, y, z, angle = (float(word) for word in words[7:14])
            label = CLASSES.index(name)
        except ValueError:
            raise BadFrame(path, f"not an object of 15 columns and a known class: {name} {' '.join(words)}") from None
        if not np.isfinite([height, width, length, x, y, z, angle]).all() or min(height, width, length) <= 0:
            raise BadFrame(path, f"a box is not finite, or has a length of 0 or less: {name} {' '.join(words)}")
        if max(map(abs, (height, width, length, x, y, z))) > FARTHEST:
            raise BadFrame(path, f"a box is more than {FARTHEST:g} m away or long: {name} {' '.join(words)}")
        center = camera_to_velodyne @ [x, y - height / 2, z, 1.0]
        front = camera_to_velodyne[:3, :3] @ [np.cos(angle), 0.0, -np.sin(angle)]
        centers.append(center[:3])
        sizes.append([length, width, height])
        headings.append(np.arctan2(front[1], front[0]))
        classes.append(1 + label)
    return Boxes3D(
        np.array(centers, np.float32).reshape(-1, 3),
        np.array(sizes, np.float32).reshape(-1, 3),
        np.array(headings, np.float32),
        np.array(classes, np.int64),
    )


def _rows(path: Path, what: str, separator: str | None) -> list[tuple[str, list[str]]]:
    """Lines of a text file as (first word, other words)."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise BadFrame(path, f"{what} is missing") from None
    except (OSError, ValueError) as error:
        raise BadFrame(path, f"{what} cannot be read ({error})") from None
    parts = [line.strip().split(separator, 1) for line in lines if line.strip()]
    return [(first, rest[0].split() if rest else []) for first, *rest in parts]


def _image_size(path: Path) -> tuple[int, int]:
    """Width and height of a frame's image, from its header; the nominal ones where the image was not downloaded."""
    if not path.is_file():
        return NOMINAL_SIZE
    return image_size(path)
