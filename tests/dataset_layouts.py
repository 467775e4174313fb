"""Write frames in the layouts of KITTI, MegaDepth and recorders of phones, byte by byte in their true formats."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from geo_pretrain.training.data.frame import Frame
from tests.recording_layouts import LAYOUTS, RIGHT, Twin, encoded, four, quaternion, save, stored, write, write_model

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


def write_polycam(root: Path, frames: Sequence[Frame], twin: Twin = RIGHT) -> Path:
    """Polycam's raw data: color four times as large as depth; cameras of ARKit and corrected ones, which are right."""
    fx, fy, cx, cy = (4 * value for value in four(frames[0]))
    for number, frame in enumerate(frames):
        time, large = 163862170000 + 10 * number, frame.color.repeat(4, axis=0).repeat(4, axis=1)
        pose = Twin(inverted=twin.inverted, flipped=not twin.flipped, millimeters=twin.millimeters).pose(frame)
        for kind, shift in (("", 0.2), ("corrected_", 0.0)):
            save(root / "keyframes" / f"{kind}images" / f"{time}.jpg", large)
            values = {f"t_{row}{column}": pose[row, column] for row in range(3) for column in range(4)}
            values["t_03"] += shift
            size = {"width": large.shape[1], "height": large.shape[0]}
            camera = {"fx": fx, "fy": fy, "cx": cx + 2, "cy": cy + 2, **size, "blur_score": 40.0 + number, **values}
            tree = {**camera, "neighbors": [], "center_depth": 1.2, "timestamp": time}
            write(root / "keyframes" / f"{kind}cameras" / f"{time}.json", json.dumps(tree))
        save(root / "keyframes" / "depth" / f"{time}.png", stored(frame, 1000 * twin.depth))
    return root


def write_arkitscenes(root: Path, frames: Sequence[Frame], twin: Twin = RIGHT) -> Path:
    """ARKitScenes' raw data: images 60 a second, of which every sixth has a pose within 5 ms."""
    lines = []
    for number, frame in enumerate(frames):
        inverse = Twin(inverted=not twin.inverted, flipped=twin.flipped, millimeters=twin.millimeters).pose(frame)
        logged = 6432.1 + 0.1 * number
        lines.append(" ".join(f"{value:.9f}" for value in (logged, *vector(inverse[:3, :3]), *inverse[:3, 3])))
        for shift in (-1 / 60, 0.002):
            name = f"41048190_{logged + shift:.3f}"
            save(root / "lowres_wide" / f"{name}.png", frame.color)
            save(root / "lowres_depth" / f"{name}.png", stored(frame, 1000 * twin.depth))
            height, width = frame.depth.shape
            camera = " ".join(f"{value:.9g}" for value in (width, height, *four(frame)))
            write(root / "lowres_wide_intrinsics" / f"{name}.pincam", camera)
    write(root / "lowres_wide.traj", "\n".join(lines) + "\n")
    return root


def vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle of a rotation matrix."""
    x, y, z, w = np.array(quaternion(rotation))
    length = math.sqrt(x * x + y * y + z * z)
    return np.array([x, y, z]) / length * 2 * math.atan2(length, w)


def write_record3d(root: Path, frames: Sequence[Frame], twin: Twin = RIGHT, *, packed: bool = True) -> Path:
    """A .r3d archive of Record3D: color three times as large as depth, which is packed by LZFSE."""
    height, width = frames[0].depth.shape
    own = [3 * value for value in four(frames[0])]
    four_each = [own[0], own[1], own[2] + 1.5, own[3] + 1.5]
    poses = []
    root.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / "room.r3d", "w") as archive:
        for number, frame in enumerate(frames):
            pose = Twin(inverted=twin.inverted, flipped=not twin.flipped, millimeters=twin.millimeters).pose(frame)
            poses.append([*quaternion(pose[:3, :3]), *pose[:3, 3].tolist()])
            large = frame.color.repeat(3, axis=0).repeat(3, axis=1)
            archive.writestr(f"rgbd/{number}.jpg", encoded(large, "JPEG"))
            depth = np.where(frame.depth > 0, frame.depth * twin.depth, np.nan).astype("<f4").tobytes()
            archive.writestr(f"rgbd/{number}.depth", lzfse(depth) if packed else depth)
            archive.writestr(f"rgbd/{number}.conf", lzfse(bytes(height * width)))
        size = {"w": 3 * width, "h": 3 * height, "dw": width, "dh": height}
        matrix = [four_each[0], 0, 0, 0, four_each[1], 0, four_each[2], four_each[3], 1]
        tree = {**size, "K": matrix, "fps": 60, "poses": poses, "perFrameIntrinsicCoeffs": [four_each] * len(frames)}
        archive.writestr("metadata", json.dumps(tree))
    return root


def write_record3d_export(root: Path, frames: Sequence[Frame], twin: Twin = RIGHT) -> Path:
    """Record3D's export "EXR + RGB" of the same frames."""
    archive = write_record3d(root / "archive", frames, twin, packed=False) / "room.r3d"
    with zipfile.ZipFile(archive) as file:
        write(root / "metadata.json", file.read("metadata").decode())
        for number, frame in enumerate(frames):
            for name, data in (
                (f"rgb/{number}.jpg", file.read(f"rgbd/{number}.jpg")),
                (f"depth/{number}.exr", exr(np.where(frame.depth > 0, frame.depth * twin.depth, np.nan))),
            ):
                (root / name).parent.mkdir(exist_ok=True)
                (root / name).write_bytes(data)
    archive.unlink()
    return root


def exr(depth: np.ndarray) -> bytes:
    """An OpenEXR image with the channel R in float32, uncompressed, line by line; by the format's specification."""

    def attribute(name: str, kind: str, data: bytes) -> bytes:
        return name.encode() + b"\0" + kind.encode() + b"\0" + struct.pack("<I", len(data)) + data

    height, width = depth.shape
    window = struct.pack("<4i", 0, 0, width - 1, height - 1)
    head = struct.pack("<II", 20000630, 2)
    head += attribute("channels", "chlist", b"R\0" + struct.pack("<iB3xii", 2, 0, 1, 1) + b"\0")
    head += attribute("compression", "compression", b"\0")
    head += attribute("dataWindow", "box2i", window) + attribute("displayWindow", "box2i", window)
    head += attribute("lineOrder", "lineOrder", b"\0") + attribute("pixelAspectRatio", "float", struct.pack("<f", 1))
    head += attribute("screenWindowCenter", "v2f", bytes(8)) + attribute("screenWindowWidth", "float", b"\0\0\x80?")
    head += b"\0"
    size = 8 + 4 * width
    table = b"".join(struct.pack("<Q", len(head) + 8 * height + line * size) for line in range(height))
    rows = depth.astype("<f4")
    return head + table + b"".join(struct.pack("<ii", k, 4 * width) + rows[k].tobytes() for k in range(height))


def lzfse(data: bytes) -> bytes:
    """A stream of LZFSE with one block that is not compressed."""
    return b"bvx-" + struct.pack("<I", len(data)) + data + b"bvx$"


ALL_LAYOUTS: dict[str, Callable[[Path, Sequence[Frame], Twin], Path]] = {
    **LAYOUTS,
    "arkitscenes": write_arkitscenes,
    "kitti": write_kitti,
    "megadepth": write_megadepth,
    "polycam": write_polycam,
    "record3d": write_record3d,
    "record3d export": write_record3d_export,
}
# For parametrize: layouts whose library is not installed are skipped.
NEEDS = {"megadepth": "h5py", "record3d": "liblzfse", "record3d export": "OpenEXR"}
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(library is not None and find_spec(library) is None, reason=REASON))
    for name in ALL_LAYOUTS
    for library in [NEEDS.get(name)]
]
