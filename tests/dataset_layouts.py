"""Write frames in the layouts of KITTI and MegaDepth, byte by byte in their true formats."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from geo_pretrain.training.data.frame import Frame
from tests.recording_layouts import LAYOUTS, RIGHT, Twin, four, save, stored, write, write_model

REASON = "needs pip install 'geo_pretrain[datasets]'"
UNDEFINED = struct.pack("<Q", (1 << 64) - 1)
TO_CAMERA_2 = np.eye(4)  # KITTI: from the rectified camera 0
TO_CAMERA_2[:3, 3] = (0.0598, -0.0011, 0.0038)
SMALLEST_DEPTH = 100 * 1024  # bytes of a file of MegaDepth that holds depth


def write_kitti(root: Path, frames: Sequence[Frame], twin: Twin = RIGHT) -> Path:
    """KITTI's annotated depth and odometry: frames 1105, 1106, ... of drive 0028, the 6th, ... of sequence 08."""
    drive, sequence = "2011_09_30_drive_0028_sync", root / "odometry" / "data_odometry_color" / "dataset" / "sequences"
    lines = ["1 0 0 9 0 1 0 9 0 0 1 9"] * 5
    for number, frame in enumerate(frames):
        save(annotated(root, drive, 1105 + number), stored(frame, 256 * twin.depth))
        save(sequence / "08" / "image_2" / f"{number + 5:06d}.png", frame.color)
        of_zero = replace(frame, cam_to_world=frame.cam_to_world @ TO_CAMERA_2)
        lines.append(" ".join(f"{value:.9e}" for value in twin.pose(of_zero)[:3].reshape(-1)))
    write(root / "odometry" / "dataset" / "poses" / "08.txt", "\n".join([*lines, lines[0]]) + "\n")
    write(sequence / "08" / "calib.txt", projections(frames[0], "P{}:", (0, 1, 2, 3)))
    return root


def annotated(root: Path, drive: str, number: int) -> Path:
    return root / "depth" / "train" / drive / "proj_depth" / "groundtruth" / "image_02" / f"{number:010d}.png"


def projections(frame: Frame, key: str, cameras: Sequence[int]) -> str:
    fx, fy, cx, cy = four(frame)
    matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    text = ""
    for camera in cameras:
        shift = matrix @ TO_CAMERA_2[:3, 3] if camera == 2 else np.zeros(3)
        numbers = " ".join(f"{value:.12e}" for value in np.hstack([matrix, shift[:, None]]).reshape(-1))
        text += f"{key.format(camera)} {numbers}\n"
    return text


def write_kitti_raw(root: Path, frames: Sequence[Frame]) -> Path:
    """KITTI's annotated depth and raw data: drive 0001 of 2011_09_26, its poses as latitude, longitude and angles.

    The world's axes of the frames are taken for east, north and up at 49 degrees of latitude.
    """
    day, drive = root / "raw" / "2011_09_26", "2011_09_26_drive_0001_sync"
    turn = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])  # of the laser's axes to those of a camera
    to_rectified = np.array([[1, 0.02, 0], [-0.02, 1, 0], [0, 0, 1]]) / np.array([[1.0002], [1.0002], [1]])
    to_rectified = np.linalg.qr(to_rectified)[0] * np.sign(np.diag(np.linalg.qr(to_rectified)[1]))
    chain = TO_CAMERA_2 @ motion(to_rectified, np.zeros(3)) @ motion(turn, np.array([-0.004, -0.07, -0.27]))
    chain = chain @ motion(np.eye(3), np.array([-0.81, 0.32, -0.8]))  # camera 2 <- inertial unit
    scale, radius = math.cos(math.radians(49)), 6378137.0
    north = scale * radius * math.log(math.tan(math.pi / 4 + math.radians(49) / 2))
    first = None
    for number, frame in enumerate(frames):
        save(annotated(root, drive, number + 5), stored(frame, 256))
        save(day / drive / "image_02" / "data" / f"{number + 5:010d}.png", frame.color)
        pose = frame.cam_to_world @ chain
        first = pose if first is None else first
        x, y, z = pose[:3, 3] - first[:3, 3]
        r = pose[:3, :3]
        latitude = math.degrees(2 * math.atan(math.exp((north + y) / (scale * radius))) - math.pi / 2)
        angles = math.atan2(r[2, 1], r[2, 2]), math.asin(-r[2, 0]), math.atan2(r[1, 0], r[0, 0])
        numbers = [latitude, 8.4 + math.degrees(x / (scale * radius)), 100 + z, *angles, *[0.0] * 24]
        oxts = day / drive / "oxts" / "data" / f"{number + 5:010d}.txt"
        write(oxts, " ".join(f"{value:.14f}" for value in numbers))
    spread = " ".join(f"{value:.12e}" for value in to_rectified.reshape(-1))
    calibration = f"calib_time: 09-Jan-2012 13:57:47\nR_rect_00: {spread}\n"
    write(day / "calib_cam_to_cam.txt", calibration + projections(frames[0], "P_rect_0{}:", (0, 2)))
    write(day / "calib_velo_to_cam.txt", "calib_time: 15-Mar-2012\nR: 0 -1 0 0 0 -1 1 0 0\nT: -0.004 -0.07 -0.27\n")
    write(day / "calib_imu_to_velo.txt", "calib_time: 25-May-2012\nR: 1 0 0 0 1 0 0 0 1\nT: -0.81 0.32 -0.8\n")
    return root


def motion(turn: np.ndarray, shift: np.ndarray) -> np.ndarray:
    return np.vstack([np.hstack([turn, shift[:, None]]), (0, 0, 0, 1)])


def write_megadepth(root: Path, frames: Sequence[Frame], twin: Twin = RIGHT, *, binary: bool = True) -> Path:
    """MegaDepth's scene 0022: depth as HDF5 and a model of COLMAP, with one image whose depth is but a mask.

    Image k observes the points 10 k .. 10 k + 19, at x = 4 + id % 20 and y = 8 + id % 10 from the image's corner.
    """
    names = [f"{number}_{'o' if number % 2 else 'b'}.jpg" for number in range(len(frames) + 1)]
    depths, place = root / "MegaDepth_v1" / "0022" / "dense0" / "depths", root / "Undistorted_SfM" / "0022"
    depths.mkdir(parents=True)
    for name, frame in zip(names, [*frames, frames[0]], strict=True):
        save(place / "images" / name, frame.color)
        mask = name == names[-1]
        least = 0 if mask else SMALLEST_DEPTH
        depth = np.full((4, 4), -1, np.float32) if mask else frame.depth * np.float32(twin.depth)
        (depths / f"{Path(name).stem}.h5").write_bytes(hdf5(depth, least))
    seen = [[(4.0 + id % 20, 8.0 + id % 10, id) for id in range(10 * k, 10 * k + 20)] for k in range(len(names))]
    seen[0].append((1.0, 1.0, -1))
    write_model(place / ("sparse" if binary else "sparse-txt"), [*frames, frames[0]], names, seen, twin, binary=binary)
    return root


def hdf5(depth: np.ndarray, least: int = 0) -> bytes:
    """An HDF5 file with the data set "depth", float32 in one piece, of at least so many bytes.

    Superblock of version 0, a group of the old kind, by the HDF5 File Format Specification.
    """
    root, tree, heap, names, node, dataset, values = 96, 136, 680, 712, 728, 1056, 1200
    data = depth.astype("<f4").tobytes()
    end = max(values + len(data), least)
    entry = struct.pack("<QQI4xQQ", 0, root, 1, tree, heap)
    superblock = b"\x89HDF\r\n\x1a\n" + bytes([0, 0, 0, 0, 0, 8, 8, 0]) + struct.pack("<HHIQ", 4, 16, 0, 0)
    superblock += UNDEFINED + struct.pack("<Q", end) + UNDEFINED + entry
    parts = {
        0: superblock,
        root: header([(0x11, struct.pack("<QQ", tree, heap))]),
        tree: b"TREE" + struct.pack("<BBH", 0, 0, 1) + 2 * UNDEFINED + struct.pack("<QQQ", 0, node, 8),
        heap: b"HEAP" + struct.pack("<IQQQ", 0, 16, 1, names),
        names: bytes(8) + b"depth\0\0\0",
        node: b"SNOD" + struct.pack("<BBHQQI4x16x", 1, 0, 1, 8, dataset, 0),
        dataset: header(
            [
                (0x01, struct.pack("<BBB5xQQ", 1, 2, 0, *depth.shape)),
                (0x03, struct.pack("<BBBBIHHBBBBI4x", 0x11, 0x20, 31, 0, 4, 0, 32, 23, 8, 0, 23, 127)),
                (0x08, struct.pack("<BBQQ6x", 3, 1, values, len(data))),
            ]
        ),
        values: data,
    }
    file = bytearray(end)
    for place, part in parts.items():
        file[place : place + len(part)] = part
    return bytes(file)


def header(messages: Sequence[tuple[int, bytes]]) -> bytes:
    body = b"".join(struct.pack("<HHB3x", kind, len(data), 0) + data for kind, data in messages)
    return struct.pack("<BxHII4x", 1, len(messages), 1, len(body)) + body


ALL_LAYOUTS: dict[str, Callable[[Path, Sequence[Frame], Twin], Path]] = {
    **LAYOUTS,
    "kitti": write_kitti,
    "megadepth": write_megadepth,
}
# For parametrize: layouts whose library is not installed are skipped.
NEEDS = {"megadepth": "h5py"}
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(library is not None and find_spec(library) is None, reason=REASON))
    for name in ALL_LAYOUTS
    for library in [NEEDS.get(name)]
]
