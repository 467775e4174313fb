"""KITTI: annotated depth with images and poses of the odometry benchmark, or of the raw recordings.

    train|val/DRIVE_sync/proj_depth/groundtruth/image_02/0000000005.png   data_depth_annotated: 16-bit, 256 a meter
    sequences/00/image_2/000000.png, calib.txt; poses/00.txt               odometry: color, calibration, poses
    DRIVE_sync/image_02/data/0000000000.png, oxts/data/0000000000.txt      raw data, synced and rectified
    2011_09_26/calib_cam_to_cam.txt, calib_velo_to_cam.txt, calib_imu_to_velo.txt

The parts may lie anywhere below the root. A scene is a drive that has annotated depth and images; frames are named by
their number in the drive. Images and poses of the odometry benchmark are used where a drive has them (sequence 08
begins at frame 1100 of its drive, which Pri3D's released code overlooks), else those of the raw data: its poses come
from GPS and inertia (OXTS), in a plane by Mercator's projection as in the development kit of the raw data. Poses of the
odometry benchmark are those of camera 0; camera 2 stands beside it, by the offset in P2.

Depth is sparse: accumulated laser scans, about one pixel in six. Pairs of `data.measure: source` are Pri3D's: at most
100 frames apart, overlap = matches / (valid pixels of both - matches), where a match differs by less than 0.5 m.
Source: devkits of raw data and odometry (cvlibs.net/datasets/kitti), readme of data_depth_annotated; names from memory.
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data import files
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.overlap import SparseFrame, sparse_overlap
from geo_pretrain.training.data.sources.conventions import Camera, Conventions, FolderOptions, checked_camera, z_up
from geo_pretrain.training.data.sources.recording import (
    Recording,
    Recordings,
    View,
    existing_folder,
    images_in,
    pose_of_words,
    read_listing,
    readable,
)

SEQUENCES = {  # drive: its sequence in the odometry benchmark, and the drive's frame with which it begins
    "2011_10_03_drive_0027_sync": ("00", 0),
    "2011_10_03_drive_0042_sync": ("01", 0),
    "2011_10_03_drive_0034_sync": ("02", 0),
    "2011_09_26_drive_0067_sync": ("03", 0),
    "2011_09_30_drive_0016_sync": ("04", 0),
    "2011_09_30_drive_0018_sync": ("05", 0),
    "2011_09_30_drive_0020_sync": ("06", 0),
    "2011_09_30_drive_0027_sync": ("07", 0),
    "2011_09_30_drive_0028_sync": ("08", 1100),
    "2011_09_30_drive_0033_sync": ("09", 0),
    "2011_09_30_drive_0034_sync": ("10", 0),
}
DRIVE = re.compile(r"\d{4}_\d{2}_\d{2}_drive_\d{4}_sync")
DEEPEST = 5  # levels below the root on which parts are looked for
APART = 100  # frames between those of a pair, at most
EARTH = 6378137.0  # m, its radius at the equator
LAYOUT = "annotated depth (train/DRIVE_sync/proj_depth) and odometry (sequences/, poses/) or raw (DRIVE_sync/image_02)"


@dataclass(frozen=True)
class KittiOptions(FolderOptions):
    """Options of the source."""

    odometry: bool = False  # only drives of the odometry benchmark, those that Pri3D uses
    match_released_code: bool = False  # take sequence 08 for the beginning of its drive, as Pri3D's released code


@dataclass
class _Parts:
    """Where the parts of the data set lie."""

    depth: dict[str, list[Path]] = field(default_factory=dict)  # drive -> folders with proj_depth
    raw: dict[str, Path] = field(default_factory=dict)
    sequences: dict[str, Path] = field(default_factory=dict)
    poses: dict[str, Path] = field(default_factory=dict)


class Kitti(Recordings):
    """KITTI as a source, with the pairs that Pri3D forms of it."""

    def tests(self, scene: str, ids: Sequence[str]) -> int:
        """How many pairs among frames of a drive are compared."""
        numbers = [int(id) for id in ids]
        later = np.searchsorted(numbers, np.array(numbers) + APART, side="right")
        return int((later - np.arange(len(numbers)) - 1).sum())

    def overlaps(self, scene: str, ids: Sequence[str], skips: SkippedFrames) -> Iterator[tuple[str, str, float]]:
        """Compare the frames of a drive that are at most 100 apart; see `overlap.sparse_overlap`."""
        before: deque[tuple[str, SparseFrame]] = deque()
        for id in ids:
            try:
                frame = SparseFrame.of(self.load(scene, id))
            except BadFrame as bad:
                skips.add(bad)
                continue
            while before and int(id) - int(before[0][0]) > APART:
                before.popleft()
            for other, earlier in before:
                yield other, id, sparse_overlap(earlier, frame)
            before.append((id, frame))


def open_kitti(root: Path, options: KittiOptions) -> Kitti:
    """Open a folder with annotated depth of KITTI, and images and poses of its odometry or raw data."""
    existing_folder(root, LAYOUT)
    parts = _find(root)
    drives = [drive for drive in sorted(parts.depth) if drive in SEQUENCES or not options.odometry]
    found = readable(drives, lambda drive: (drive, _odometry(drive, parts, options) or _raw(drive, parts)))
    recordings = [recording for _, recording in found if recording is not None]
    without = [drive for drive, recording in found if recording is None]
    if not recordings:
        lacks = f"images of {without[0]} and {len(without) - 1} others" if without else "annotated depth"
        raise DataError(f"{str(root)!r} has no {lacks}; expected {LAYOUT}.")
    lost = f"{len(without)} drives with annotated depth have no images here" if without else ""
    return Kitti("kitti", root, recordings, Conventions(depth_scale=256.0, world_up="-y"), options, note=lost)


def _find(root: Path) -> _Parts:
    """Find the parts of the data set below a folder; folders of images are not walked through."""
    parts = _Parts()
    for place, folders, names in os.walk(root, followlinks=True):
        path = Path(place)
        if DRIVE.fullmatch(path.name):
            if "proj_depth" in folders:
                parts.depth.setdefault(path.name, []).append(path)
            if "image_02" in folders:
                parts.raw.setdefault(path.name, path)
            folders.clear()
        elif path.name == "sequences":
            parts.sequences.update({name: path / name for name in folders})
            folders.clear()
        elif path.name == "poses":
            parts.poses.update({name[:-4]: path / name for name in names if name.endswith(".txt")})
        if len(path.relative_to(root).parts) >= DEEPEST:
            folders.clear()
        folders.sort()
    return parts


def _odometry(drive: str, parts: _Parts, options: KittiOptions) -> Recording | None:
    """A drive with images, calibration and poses of the odometry benchmark; None without them."""
    sequence, first = SEQUENCES.get(drive, ("", 0))
    folder, listing = parts.sequences.get(sequence), parts.poses.get(sequence)
    if folder is None or listing is None or not (folder / "image_2").is_dir():
        return None
    camera, from_zero = read_camera_2(folder / "calib.txt", "P2:")
    offset = 0 if options.match_released_code else first
    rows = read_listing(listing)
    views = {}
    for name, depth in _depths(drive, parts).items():
        number = int(name) - offset
        if 0 <= number < len(rows):
            line, words = rows[number]
            pose = pose_of_words(words, f"{listing}:{line}")
            color = folder / "image_2" / f"{number:06d}.png"
            views[name] = View(color, depth, pose, camera, _inverse(from_zero))
    return Recording(drive, views, [listing, folder / "calib.txt"])


def _raw(drive: str, parts: _Parts) -> Recording | None:
    """A drive with images of the raw data, and poses if there are OXTS files; None without images."""
    folder = parts.raw.get(drive)
    if folder is None:
        return None
    calibration = folder.parent / "calib_cam_to_cam.txt"
    camera, from_zero = read_camera_2(calibration, "P_rect_02:")
    views, listings = {}, [calibration]
    poses: dict[str, np.ndarray | BadFrame] | None = None
    to_inertia: np.ndarray | BadFrame | None = None
    if (folder / "oxts" / "data").is_dir():
        to_inertia = _inverse(_from_inertia(folder.parent, from_zero))
        measured = images_in(folder / "oxts" / "data", (".txt",))
        poses = {  # of a world with z up, given as odometry's are, whose y points down
            name: pose if isinstance(pose, BadFrame) else np.linalg.inv(z_up("-y")) @ pose
            for name, pose in read_oxts(measured).items()
        }
        listings += [
            *measured.values(),
            folder.parent / "calib_velo_to_cam.txt",
            folder.parent / "calib_imu_to_velo.txt",
        ]
    for name, depth in _depths(drive, parts).items():
        pose: np.ndarray | BadFrame | None = None
        if poses is not None:
            missing = BadFrame(folder / "oxts" / "data" / f"{name}.txt", "file is missing")
            pose = poses.get(name, missing)
        views[name] = View(folder / "image_02" / "data" / f"{name}.png", depth, pose, camera, to_inertia)
    return Recording(drive, views, listings)


def _depths(drive: str, parts: _Parts) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in parts.depth[drive]:
        found |= images_in(folder / "proj_depth" / "groundtruth" / "image_02", (".png",))
    return {name: found[name] for name in sorted(found) if name.isdigit()}


def read_camera_2(path: Path, key: str) -> tuple[Camera | BadFrame, np.ndarray | BadFrame]:
    """Camera 2 of a projection K [I | t], and the motion [4, 4] from the rectified camera 0 to it."""
    try:
        projection = _matrix(path, key, (3, 4))
        camera = checked_camera(path, projection[:, :3])
    except BadFrame as bad:
        return bad, bad
    return camera, _motion(np.eye(3), np.linalg.inv(projection[:, :3]) @ projection[:, 3])


def _from_inertia(folder: Path, from_zero: np.ndarray | BadFrame) -> np.ndarray | BadFrame:
    """The motion [4, 4] from the inertial unit to camera 2: by way of the laser and the rectified camera 0."""
    if isinstance(from_zero, BadFrame):
        return from_zero
    motion = from_zero
    try:
        motion = motion @ _motion(_matrix(folder / "calib_cam_to_cam.txt", "R_rect_00:", (3, 3)), np.zeros(3))
        for name in ("calib_velo_to_cam.txt", "calib_imu_to_velo.txt"):
            turn, shift = _matrix(folder / name, "R:", (3, 3)), _matrix(folder / name, "T:", (3,))
            motion = motion @ _motion(turn, shift)
    except BadFrame as bad:
        return bad
    return motion


def _inverse(motion: np.ndarray | BadFrame) -> np.ndarray | BadFrame:
    return motion if isinstance(motion, BadFrame) else np.linalg.inv(motion)


def _motion(turn: np.ndarray, shift: np.ndarray) -> np.ndarray:
    return np.vstack([np.hstack([turn, shift[:, None]]), (0, 0, 0, 1)])


def _matrix(path: Path, key: str, shape: Sequence[int]) -> np.ndarray:
    """The numbers behind a key of a calibration file. Raises `BadFrame`."""
    for number, words in read_listing(path):
        if words[0] == key:
            try:
                found = np.array([float(word) for word in words[1:]]).reshape(shape)
            except ValueError:
                raise BadFrame(f"{path}:{number}", f"{key} is not followed by {math.prod(shape)} numbers") from None
            if shape[-1] >= 3 and len(shape) == 2 and shape[1] == 3 and files.pose_fault(_motion(found, np.zeros(3))):
                raise BadFrame(f"{path}:{number}", f"{key} is no rotation")
            if not np.isfinite(found).all():
                raise BadFrame(f"{path}:{number}", f"{key} is not finite")
            return found
    raise BadFrame(path, f"has no line {key}")


def read_oxts(measured: dict[str, Path]) -> dict[str, np.ndarray | BadFrame]:
    """Poses [4, 4] of the inertial unit: x forward, y left, z up, in m from the first one."""
    poses: dict[str, np.ndarray | BadFrame] = {}
    origin: np.ndarray | None = None
    scale = 1.0
    for name, path in measured.items():
        try:
            latitude, longitude, altitude, *angles = files.read_numbers(path, (30,), "the 30 numbers of OXTS")[:6]
            if origin is None:
                scale = math.cos(math.radians(latitude))
            east = scale * EARTH * math.radians(longitude)
            north = scale * EARTH * math.log(math.tan(math.radians(90 + latitude) / 2))
            pose = _motion(_turn(*angles), np.array([east, north, altitude]))
        except BadFrame as bad:
            poses[name] = bad
            continue
        except ValueError:
            poses[name] = BadFrame(path, "states no place on earth")
            continue
        if not np.isfinite(pose).all():
            poses[name] = BadFrame(path, "states no place on earth")
            continue
        origin = np.linalg.inv(pose) if origin is None else origin
        poses[name] = origin @ pose
    return poses


def _turn(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Rz(yaw) Ry(pitch) Rx(roll) [3, 3], of angles in radians."""
    (a, b), (c, d), (e, f) = ((math.cos(angle), math.sin(angle)) for angle in (roll, pitch, yaw))
    about_x = np.array([[1, 0, 0], [0, a, -b], [0, b, a]])
    about_y = np.array([[c, 0, d], [0, 1, 0], [-d, 0, c]])
    about_z = np.array([[e, -f, 0], [f, e, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x
