"""Write frames in the layouts of recorders, byte by byte in their true formats, right and with wrong conventions."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from geo_pretrain.training.data.frame import Frame, resize_frame
from tests.training.conftest import GOLDEN, golden_views, paint

FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Twin:
    """What a recorder does otherwise than its layout says; as it is here: nothing."""

    depth: float = 1.0  # factor of stored depth
    inverted: bool = False
    flipped: bool = False  # OpenGL's axes where OpenCV's are expected, or the other way round
    millimeters: bool = False  # of poses

    def pose(self, frame: Frame) -> np.ndarray:
        """The pose that a layout with OpenCV's camera-to-world poses in meters stores."""
        pose = np.array(frame.cam_to_world, np.float64)
        pose = pose @ FLIP if self.flipped else pose
        pose = np.linalg.inv(pose) if self.inverted else pose.copy()
        pose[:3, 3] *= 1000 if self.millimeters else 1
        return pose


def golden_frames(count: int = 6, size: tuple[int, int] = (120, 160)) -> list[Frame]:
    """The golden views, real depth and poses, in colors that stick to the surfaces."""
    intrinsics = load_file(GOLDEN)["intrinsics"].astype(np.float64)
    views = [(depth, pose.astype(np.float64)) for depth, pose in golden_views()[:count]]
    return [
        resize_frame(Frame("", "", paint(depth, pose, intrinsics), depth / 1000, intrinsics, pose), size)
        for depth, pose in views
    ]


RIGHT = Twin()
WRONG = {"inverted": Twin(inverted=True), "flipped": Twin(flipped=True), "depth": Twin(depth=5.0)}


def write_plain(root: Path, frames: Sequence[Frame], twin: Twin = RIGHT, *, poses: str = "list") -> Path:
    """The plain layout; `poses`: "list" (poses.txt), "each" (pose/), "none"."""
    lines = []
    for number, frame in enumerate(frames):
        save(root / "color" / f"{number}.jpg", frame.color)
        save(root / "depth" / f"{number}.png", stored(frame, 1000 * twin.depth))
        line = " ".join(f"{value:.9g}" for value in twin.pose(frame).reshape(-1))
        lines.append(line)
        if poses == "each":
            write(root / "pose" / f"{number}.txt", line)
    if poses == "list":
        write(root / "poses.txt", "# camera to world\n" + "\n".join(lines) + "\n")
    write(root / "intrinsics.txt", " ".join(f"{value:.9g}" for value in four(frames[0])))
    return root


def write_tum(root: Path, frames: Sequence[Frame], twin: Twin = RIGHT) -> Path:
    """TUM RGB-D: times as names, 30 images a second, poses at 100 a second of which one in three is near an image."""
    lists: dict[str, list[str]] = {"rgb": [], "depth": [], "groundtruth": []}
    for number, frame in enumerate(frames):
        time = 1305031102.175304 + number / 30
        later = time + 0.015
        save(root / "rgb" / f"{time:.6f}.png", frame.color)
        save(root / "depth" / f"{later:.6f}.png", stored(frame, 5000 * twin.depth))
        lists["rgb"].append(f"{time:.6f} rgb/{time:.6f}.png")
        lists["depth"].append(f"{later:.6f} depth/{later:.6f}.png")
        pose = twin.pose(frame)
        for shift, move in ((-0.012, 0.5), (0.002, 0.0), (0.012, -0.5)):  # only the middle one is right
            numbers = [*(pose[:3, 3] + move), *quaternion(pose[:3, :3])]
            lists["groundtruth"].append(f"{later + shift:.4f} " + " ".join(f"{value:.6f}" for value in numbers))
    for name, heading in (("rgb", "color images"), ("depth", "depth maps"), ("groundtruth", "ground truth trajectory")):
        head = f"# {heading}\n# file: 'rgbd_dataset_freiburg1_xyz.bag'\n# timestamp ...\n"
        write(root / f"{name}.txt", head + "\n".join(lists[name]) + "\n")
    write(root / "intrinsics.txt", " ".join(f"{value:.9g}" for value in four(frames[0])))
    return root


def write_redwood(root: Path, frames: Sequence[Frame], twin: Twin = RIGHT) -> Path:
    """Redwood / Open3D: a .log with three numbers and a matrix for each frame, and Open3D's JSON of the camera."""
    log = ""
    for number, frame in enumerate(frames):
        save(root / "color" / f"{number:05d}.jpg", frame.color)
        save(root / "depth" / f"{number:05d}.png", stored(frame, 1000 * twin.depth))
        rows = "\n".join(" ".join(f"{value:.8f}" for value in row) for row in twin.pose(frame))
        log += f"{number} {number} {number + 1}\n{rows}\n"
    write(root / "trajectory.log", log)
    height, width = frames[0].depth.shape
    matrix = [float(value) for value in frames[0].intrinsics.T.reshape(-1)]  # column by column
    write(root / "camera_intrinsic.json", json.dumps({"width": width, "height": height, "intrinsic_matrix": matrix}))
    return root


def write_transforms(root: Path, frames: Sequence[Frame], twin: Twin = RIGHT) -> Path:
    """A transforms.json as `ns-process-data polycam --use-depth` writes it: color twice as large as depth."""
    fx, fy, cx, cy = four(frames[0])
    entries = []
    for number, frame in enumerate(frames):
        large = frame.color.repeat(2, axis=0).repeat(2, axis=1)
        save(root / "images" / f"frame_{number + 1:05d}.png", large)
        save(root / "depth" / f"frame_{number + 1:05d}.png", stored(frame, 1000 * twin.depth))
        pose = Twin(inverted=twin.inverted, flipped=not twin.flipped, millimeters=twin.millimeters).pose(frame)
        entries.append(
            {
                "file_path": f"./images/frame_{number + 1:05d}.png",
                "depth_file_path": f"./depth/frame_{number + 1:05d}.png",
                "transform_matrix": pose.tolist(),
                "fl_x": fx * 2, "fl_y": fy * 2, "cx": 2 * (cx + 0.5), "cy": 2 * (cy + 0.5),
                "w": large.shape[1], "h": large.shape[0],
            }
        )  # fmt: skip
    tree = {"camera_model": "OPENCV", "orientation_override": "none", "frames": entries[::-1]}
    write(root / "transforms.json", json.dumps(tree, indent=4))
    return root


def write_colmap(root: Path, frames: Sequence[Frame], twin: Twin = RIGHT, *, binary: bool = False) -> Path:
    """A dense workspace of COLMAP: undistorted images, the model as text or binary, depth maps of its own."""
    names = [f"a/{number}.jpg" for number in range(len(frames))]
    for name, frame in zip(names, frames, strict=True):
        save(root / "images" / name, frame.color)
        values = (frame.depth * twin.depth).astype("<f4").tobytes()
        depth = root / "stereo" / "depth_maps" / f"{name}.geometric.bin"
        depth.parent.mkdir(parents=True, exist_ok=True)
        height, width = frame.depth.shape
        depth.write_bytes(f"{width}&{height}&1&".encode() + values)
    seen = [[(3.5, 4.5, -1), (7.0, 8.0, 12)] if number % 2 else [] for number in range(len(frames))]
    write_model(root / "sparse", frames, names, seen, twin, binary=binary)
    return root


def write_model(
    folder: Path,
    frames: Sequence[Frame],
    names: Sequence[str],
    seen: Sequence[Sequence[tuple[float, float, int]]],
    twin: Twin = RIGHT,
    *,
    binary: bool = False,
) -> None:
    """A model of COLMAP: one pinhole camera, and the images, the last one first; `seen`: x, y and id of points."""
    fx, fy, cx, cy = four(frames[0])
    height, width = frames[0].depth.shape
    parameters = fx, fy, cx + 0.5, cy + 0.5
    lines = "# Image list with two lines of data per image:\n#   IMAGE_ID, QW, ...\n#   POINTS2D[] ...\n"
    packed = struct.pack("<Q", len(frames))
    for number in reversed(range(len(frames))):
        pose = Twin(inverted=not twin.inverted, flipped=twin.flipped, millimeters=twin.millimeters).pose(frames[number])
        x, y, z, w = quaternion(pose[:3, :3])
        motion, name, points = (w, x, y, z, *pose[:3, 3]), names[number], seen[number]
        lines += f"{number + 1} {' '.join(f'{value:.9f}' for value in motion)} 1 {name}\n"
        lines += " ".join(f"{x} {y} {point}" for x, y, point in points) + "\n"
        packed += struct.pack("<i7di", number + 1, *motion, 1) + name.encode() + b"\0"
        packed += struct.pack("<Q", len(points)) + b"".join(struct.pack("<ddq", *point) for point in points)
    if binary:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "images.bin").write_bytes(packed)
        (folder / "cameras.bin").write_bytes(struct.pack("<QiiQQ4d", 1, 1, 1, width, height, *parameters))
        return
    write(folder / "images.txt", lines)
    camera = f"1 PINHOLE {width} {height} {' '.join(f'{value:.9g}' for value in parameters)}\n"
    write(folder / "cameras.txt", f"# Camera list with one line of data per camera:\n{camera}")


def write_sens(root: Path, frames: Sequence[Frame], twin: Twin = RIGHT, *, step: int = 25, color: int = 2) -> Path:
    """A scan of ScanNet's release, scene0000_00/scene0000_00.sens; see `sens_bytes`."""
    scan = root / "scene0000_00"
    scan.mkdir(parents=True, exist_ok=True)
    (scan / "scene0000_00.sens").write_bytes(sens_bytes(frames, twin, step=step, color=color))
    return root


def sens_bytes(
    frames: Sequence[Frame],
    twin: Twin = RIGHT,
    *,
    step: int = 25,
    color: int = 2,
    scale: int = 1,
    imu: int | None = None,
) -> bytes:
    """A .sens file: every `step`-th frame is one of `frames`, those between are empty and without a pose.

    `color`: the codec, 0 raw, 1 PNG, 2 JPEG. `scale`: the color camera's pixels for each of the depth camera's. `imu`:
    so many readings after the frames, as in the release; None: the file ends with the frames.
    """
    height, width = frames[0].depth.shape
    matrix, colored = np.eye(4, dtype="<f4"), np.eye(4, dtype="<f4")
    matrix[:3, :3] = frames[0].intrinsics
    colored[:2, :3] = matrix[:2, :3] * scale
    colored[:2, 2] += (scale - 1) / 2
    name = b"StructureSensor"
    head = struct.pack("<IQ", 4, len(name)) + name
    head += b"".join(each.tobytes() for each in (colored, np.eye(4, dtype="<f4"), matrix, np.eye(4, dtype="<f4")))
    count = step * (len(frames) - 1) + 1
    head += struct.pack("<iiIIIIfQ", color, 1, width * scale, height * scale, width, height, 1000.0, count)
    body = []
    for number in range(count):
        pose, images = np.full((4, 4), -np.inf), (b"?", b"")
        if number % step == 0:
            frame = frames[number // step]
            pose = twin.pose(frame)
            large = np.ascontiguousarray(frame.color.repeat(scale, axis=0).repeat(scale, axis=1))
            raw = large.tobytes() if color == 0 else encoded(large, {1: "PNG", 2: "JPEG"}[color])
            images = raw, zlib.compress(stored(frame, 1000 * twin.depth).astype("<u2").tobytes())
        body.append(pose.astype("<f4").tobytes() + struct.pack("<QQ", number, number))
        body.append(struct.pack("<QQ", *map(len, images)) + b"".join(images))
    if imu is not None:
        reading = struct.pack("<15dQ", *range(15), 0)  # rotation, acceleration, magnetic field, attitude, gravity; time
        body.append(struct.pack("<Q", imu) + reading * imu)
    return head + b"".join(body)


# By the name of the source that reads them; a second word tells layouts of one source apart.
def write_tars(root: Path, frames: Sequence[Frame], twin: Twin = RIGHT) -> Path:
    """Shards in webdataset's layout: two tar files, samples of one scene, with the names of their frames as keys."""
    root.mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate((range(0, 2), range(2, len(frames)))):
        data = b""
        for number in part:
            frame = frames[number]
            depth = BytesIO()
            Image.fromarray(stored(frame, 1000 * twin.depth)).save(depth, "PNG")
            facts = {"intrinsics": frame.intrinsics.tolist(), "cam_to_world": twin.pose(frame).tolist()}
            data += tar_member(f"desk/{number:04d}.color.jpg", encoded(frame.color, "JPEG"))
            data += tar_member(f"desk/{number:04d}.depth.png", depth.getvalue())
            data += tar_member(f"desk/{number:04d}.json", json.dumps(facts).encode())
        (root / f"desk-{shard:06d}.tar").write_bytes(data + bytes(1024))
    return root


def tar_member(name: str, data: bytes) -> bytes:
    """A regular file of a tar (POSIX ustar): a header of 512 bytes, and the content filled up to as many."""
    fields = [name.encode().ljust(100, b"\0"), b"0000644\0", b"0001750\0", b"0001750\0"]
    fields += [b"%011o\0" % len(data), b"%011o\0" % 1700000000, b" " * 8, b"0", bytes(100), b"ustar\0", b"00"]
    header = b"".join(fields).ljust(512, b"\0")
    header = header[:148] + b"%06o\0 " % sum(header) + header[156:]
    return header + data + bytes(-len(data) % 512)


LAYOUTS: dict[str, Callable[[Path, Sequence[Frame], Twin], Path]] = {
    "colmap": write_colmap,
    "colmap binary": partial(write_colmap, binary=True),
    "folder": write_plain,
    "redwood": write_redwood,
    "scannet": write_sens,
    "shards": write_tars,
    "transforms": write_transforms,
    "tum": write_tum,
}


def stored(frame: Frame, scale: float) -> np.ndarray:
    return np.round(frame.depth * scale).astype(np.uint16)


def four(frame: Frame) -> tuple[float, float, float, float]:
    matrix = frame.intrinsics
    return float(matrix[0, 0]), float(matrix[1, 1]), float(matrix[0, 2]), float(matrix[1, 2])


def quaternion(rotation: np.ndarray) -> list[float]:
    """x, y, z, w of a rotation matrix, as the eigenvector of Bar-Itzhack's symmetric matrix."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    symmetric = np.array(
        [[a - e - i, b + d, c + g, h - f], [b + d, e - a - i, f + h, c - g],
         [c + g, f + h, i - a - e, d - b], [h - f, c - g, d - b, a + e + i]]
    )  # fmt: skip
    return [float(value) for value in np.linalg.eigh(symmetric)[1][:, -1]]


def encoded(image: np.ndarray, kind: str) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, kind, quality=95, subsampling=0)
    return buffer.getvalue()


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95, subsampling=0)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
