"""COLMAP's models, as text or binary: cameras, poses of images, and which points each image observes where.

cameras.bin: uint64 count, then of each: int32 id, int32 model, uint64 width, uint64 height, float64 parameters.
images.bin: uint64 count, then of each: int32 id, float64 qw qx qy qz tx ty tz (world-to-camera), int32 camera, the name
and a zero byte, uint64 number of points, and of each point float64 x, y, int64 id of the 3D point (-1: none). All
little-endian. images.txt: two lines an image, the same numbers in words. Principal points and observations count from
the corner of the image; here they count from the center of the first pixel. points3D.* is not read: observations tell
which images share a point.

Source: https://colmap.github.io/format.html, scripts/python/read_write_model.py and src/colmap/sensor/models.h of
colmap/colmap (the numbers of models 0 to 10 from the script; 11 and later are not pinhole cameras and are refused).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame, first_line
from geo_pretrain.training.data import files
from geo_pretrain.training.data.sources.conventions import Camera, camera_matrix, checked_camera
from geo_pretrain.training.data.sources.recording import pose_of_quaternion, read_listing

PINHOLES = {"PINHOLE": (0, 1, 2, 3), "SIMPLE_PINHOLE": (0, 0, 1, 2)}  # places of fx, fy, cx, cy among the parameters
MODELS = (  # name and number of parameters of cameras, by their number in cameras.bin
    ("SIMPLE_PINHOLE", 3), ("PINHOLE", 4), ("SIMPLE_RADIAL", 4), ("RADIAL", 5), ("OPENCV", 8), ("OPENCV_FISHEYE", 8),
    ("FULL_OPENCV", 12), ("FOV", 5), ("SIMPLE_RADIAL_FISHEYE", 4), ("RADIAL_FISHEYE", 5), ("THIN_PRISM_FISHEYE", 12),
)  # fmt: skip
POINT = np.dtype([("x", "<f8"), ("y", "<f8"), ("id", "<i8")])
CORNER = 0.5  # of the first pixel, from its center


@dataclass(frozen=True)
class ModelFiles:
    """The two files of a model that are read."""

    cameras: Path
    images: Path


@dataclass(frozen=True)
class ModelImage:
    """An image of a model: its pose, world-to-camera, and where in the file its observations stand."""

    name: str
    camera: str  # id
    pose: np.ndarray | BadFrame  # [4, 4]
    offset: int  # bytes
    size: int  # bytes


def find_model(folder: Path, places: Sequence[str]) -> ModelFiles | None:
    """The first model in one of the `places` below a folder: as text, or else binary. None without one."""
    for ending in ("txt", "bin"):
        for place in places:
            found = ModelFiles(folder / place / f"cameras.{ending}", folder / place / f"images.{ending}")
            if found.cameras.is_file() and found.images.is_file():
                return found
    return None


def read_cameras(path: Path) -> dict[str, Camera | BadFrame]:
    """Read cameras.txt or cameras.bin: id -> camera; one with distortion is a `BadFrame`, which is returned."""
    rows = _binary_cameras(path) if path.suffix == ".bin" else _text_cameras(path)
    return {name: _camera(where, model, numbers) for name, where, model, numbers in rows}


def read_images(path: Path) -> list[ModelImage]:
    """Read images.txt or images.bin, without the observations. Raises `BadFrame` for a damaged file."""
    return list(_binary_images(path) if path.suffix == ".bin" else _text_images(path))


def camera_of(image: ModelImage, cameras: dict[str, Camera | BadFrame], model: ModelFiles) -> Camera | BadFrame:
    """The camera of an image, or why it has none."""
    reason = f"image {image.name} has camera {image.camera}, which {model.cameras.name} lacks"
    return cameras.get(image.camera, BadFrame(model.images, reason))


def read_observations(path: Path, image: ModelImage) -> tuple[np.ndarray, np.ndarray]:
    """Read which 3D points an image observes, and where: ids int64 [N], ascending; (x, y) float64 [N, 2] in pixels.

    A point that is observed twice counts once, at its last place. Raises `BadFrame` for a damaged file.
    """
    try:
        with path.open("rb") as file:
            file.seek(image.offset)
            data = file.read(image.size)
        if path.suffix == ".bin":
            rows = np.frombuffer(data, POINT)
            xy, ids = np.stack([rows["x"], rows["y"]], axis=1), rows["id"].astype(np.int64)
        else:
            words = data.split()
            xy = np.array([words[0::3], words[1::3]], dtype=np.float64).T
            ids = np.array(words[2::3]).astype(np.int64)
        if len(ids) != len(xy):
            raise ValueError(f"{len(ids)} ids for {len(xy)} points")
    except (OSError, ValueError, OverflowError) as error:
        raise BadFrame(f"{path}: {image.name}", f"points cannot be read ({first_line(error)})") from None
    known = (ids >= 0) & np.isfinite(xy).all(axis=1)
    ids, xy = ids[known][::-1], xy[known][::-1]
    ids, first = np.unique(ids, return_index=True)
    return ids, xy[first] - CORNER


def _camera(where: str, model: str, numbers: Sequence[float]) -> Camera | BadFrame:
    """A camera of width, height and parameters; `BadFrame`, returned, for one that is no pinhole."""
    if model not in PINHOLES:
        known = " and ".join(PINHOLES)
        return BadFrame(where, f"camera has the model {model[:40]}; accepted are {known}: run colmap image_undistorter")
    try:
        width, height, *parameters = numbers
        fx, fy, cx, cy = (parameters[place] for place in PINHOLES[model])
        size = round(height), round(width)
    except (ValueError, IndexError, OverflowError):
        raise BadFrame(where, "is no camera 'id model width height parameters'") from None
    if min(size) < 1:
        return BadFrame(where, f"camera has the size {size[1]}x{size[0]}")
    try:
        return checked_camera(where, camera_matrix(fx, fy, cx - CORNER, cy - CORNER), size)
    except BadFrame as bad:
        return bad


def _text_cameras(path: Path) -> Iterator[tuple[str, str, str, Sequence[float]]]:
    for number, words in read_listing(path):
        where = f"{path}:{number}"
        try:
            yield words[0], where, words[1], [float(word) for word in words[2:]]
        except (ValueError, IndexError):
            raise BadFrame(where, "is no line 'id model width height parameters'") from None


def _binary_cameras(path: Path) -> Iterator[tuple[str, str, str, Sequence[float]]]:
    with _mapped(path) as data:
        try:
            (count,) = struct.unpack_from("<Q", data)
            at = 8
            for _ in range(count):
                name, model, width, height = struct.unpack_from("<iiQQ", data, at)
                if not 0 <= model < len(MODELS):
                    known = " and ".join(PINHOLES)
                    raise BadFrame(path, f"camera {name} has the model number {model}; accepted are {known}")
                title, parameters = MODELS[model]
                numbers = struct.unpack_from(f"<{parameters}d", data, at + 24)
                at += 24 + 8 * parameters
                yield str(name), f"{path}: camera {name}", title, (width, height, *numbers)
        except struct.error:
            raise BadFrame(path, f"ends within a camera; it states {_stated(data)}") from None
        _at_end(path, data, at)


def _text_images(path: Path) -> Iterator[ModelImage]:
    """Every image has two lines; the second, which lists points, may be empty."""
    try:
        data = path.read_bytes()
        data.decode()
    except (OSError, UnicodeDecodeError):
        raise BadFrame(path, "is no text that can be read") from None
    lines, at = [], 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        if not line.startswith(b"#"):
            lines.append((number, line, at))
        at += len(line)
    ends: list[tuple[int, bytes, int]] = [*lines[1:], (0, b"", at)]
    for (number, line, _), (_, points, offset) in zip(lines[::2], ends[::2], strict=False):
        where, words = f"{path}:{number}", line.decode().split(maxsplit=9)
        if len(words) != 10:
            raise BadFrame(where, "is no line 'id qw qx qy qz tx ty tz camera name', with a line of points below")
        try:
            w, x, y, z, *position = (float(word) for word in words[1:8])
        except ValueError:
            raise BadFrame(where, "has a pose that is no numbers") from None
        pose = pose_of_quaternion(position, (x, y, z, w), where)
        yield ModelImage(_checked_name(words[9].strip(), where), words[8], pose, offset, len(points))


def _binary_images(path: Path) -> Iterator[ModelImage]:
    with _mapped(path) as data:
        try:
            (count,) = struct.unpack_from("<Q", data)
            at = 8
            for _ in range(count):
                image, w, x, y, z, *position, camera = struct.unpack_from("<i7di", data, at)
                where = f"{path}: image {image}"
                end = data.find(b"\0", at + 64)
                name = data[at + 64 : max(end, at + 64)].decode()
                (points,) = struct.unpack_from("<Q", data, end + 1)
                offset = end + 9
                at = offset + points * POINT.itemsize
                if end < 0 or at > len(data):
                    raise struct.error
                pose = pose_of_quaternion(position, (x, y, z, w), where)
                yield ModelImage(_checked_name(name, where), str(camera), pose, offset, at - offset)
        except UnicodeDecodeError:
            raise BadFrame(where, "the name of the image is no text") from None
        except struct.error:
            raise BadFrame(path, f"ends within an image; it states {_stated(data)}") from None
        _at_end(path, data, at)


def _checked_name(name: str, where: str) -> str:
    if (fault := files.name_fault(name)) is not None:
        raise BadFrame(where, f"the name of the image {fault}")
    return name


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The bytes of a file, read as they are used. Raises `BadFrame` for a file that cannot be read or is empty."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise BadFrame(path, f"cannot be read ({first_line(error)})") from None
    with data:
        yield data


def _stated(data: mmap.mmap) -> str:
    return f"{struct.unpack_from('<Q', data)[0]} of them" if len(data) >= 8 else "no number of them"


def _at_end(path: Path, data: mmap.mmap, at: int) -> None:
    if at != len(data):
        raise BadFrame(path, f"has {len(data) - at} bytes behind its last entry, so it is none of COLMAP's")
