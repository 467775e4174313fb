"""Record3D's .r3d files (iPhone, iPad): a zip archive with frames of color and depth, read without unpacking it.

    metadata        JSON: "w", "h", "dw", "dh", "K" (9 numbers, column by column), "poses": [qx, qy, qz, qw, tx, ty, tz]
                    of each frame, and often "perFrameIntrinsicCoeffs": [fx, fy, cx, cy] of each
    rgbd/0.jpg      color, w x h
    rgbd/0.depth    float32 in meters, dw x dh row by row, packed by LZFSE
    rgbd/0.conf     confidence, not looked at

An unpacked archive, a folder with these names, serves as well, and the app's export "EXR + RGB": metadata.json,
rgb/0.jpg and depth/0.exr, in meters. Poses are camera-to-world in ARKit's world (y up, here turned to z), with
OpenGL's axes of the camera; intrinsics hold for color, and the principal point counts from the corner of the image.
Needs pyliblzfse, and OpenEXR for the export (extra `datasets`).
Source: nerfstudio's record3d_utils.py, and readers of .r3d by codekansas/usa and others; no file was at hand.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, first_line, require
from geo_pretrain.files import parse_json
from geo_pretrain.training.data import files
from geo_pretrain.training.data.sources.conventions import (
    Camera,
    Conventions,
    FolderOptions,
    camera_matrix,
    checked_camera,
)
from geo_pretrain.training.data.sources.recording import (
    Recording,
    Recordings,
    View,
    existing_folder,
    files_below,
    folders_with,
    pose_of_words,
    readable,
    scene_name,
)

ENDING, METADATA = ".r3d", "metadata"
EXPORTED = "metadata.json"
CORNER = 0.5  # of the first pixel, from its center
LARGEST = 1 << 28  # bytes of a member that is read
_DAMAGED = (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Record3DOptions(FolderOptions):
    """Options of the source."""


class Record3D(Recordings):
    """Recordings whose images are members of archives."""

    sizes: dict[Path, tuple[int, int]]  # of depth, by archive or folder

    def _color(self, view: View) -> np.ndarray:
        archive = view.color.parents[1]
        if archive not in self.sizes:  # an export
            return super()._color(view)
        return files.read_frame_color(view.color if archive.is_dir() else archive, member(archive, view.color.name))

    def _stored(self, view: View) -> np.ndarray:
        archive = view.depth.parents[1]
        if archive not in self.sizes:
            return super()._stored(view)
        return unpacked_depth(view.depth, member(archive, view.depth.name), self.sizes[archive])


def open_record3d(root: Path, options: Record3DOptions) -> Record3D:
    """Open a .r3d file, its unpacked folder, or a folder of them."""
    if root.is_file():
        found, base = [root], root.parent
    else:
        existing_folder(root, f"files *{ENDING}, {METADATA} and rgbd/, or {EXPORTED}, rgb/ and depth/")
        archives, base = files_below(root, f"*{ENDING}", f"*{ENDING.upper()}"), root
        found = [path for path in sorted(archives) if path.is_file()]
        found += folders_with(root, lambda path, folders, names: METADATA in names and "rgbd" in folders)
    exported = set() if root.is_file() else set(folders_with(root, _is_export))
    sizes: dict[Path, tuple[int, int]] = {}

    def read(place: Path) -> Recording:
        if place in exported:
            views = _views(place, read_metadata(place / EXPORTED), "rgb/{}.jpg", "depth/{}.exr")
            return Recording(scene_name(base, place), views, [place / EXPORTED])
        tree = read_metadata(place)
        sizes[place] = (_whole(tree, "dh", place), _whole(tree, "dw", place))
        name = place.relative_to(base).with_suffix("").as_posix() if place.is_file() else scene_name(base, place)
        listing = place if place.is_file() else place / METADATA
        return Recording(name, _views(place, tree, "rgbd/{}.jpg", "rgbd/{}.depth"), [listing])

    recordings = readable([*found, *sorted(exported)], read)
    if not recordings:
        raise DataError(
            f"No recording in {str(root)!r}: expected *{ENDING}, {METADATA} and rgbd/, or {EXPORTED}, rgb/, depth/."
        )
    conventions = Conventions(depth_scale=1.0, camera_axes="opengl", world_up="y", float_depth=True)
    source = Record3D("record3d", base, recordings, conventions, options)
    source.sizes = sizes
    return source


def read_metadata(archive: Path) -> dict[str, Any]:
    """Read the metadata of an archive, an unpacked one, or of an export (its file). Raises `BadFrame`."""
    try:
        if archive.suffix == ".json":
            data = archive.read_bytes()
        else:
            data = (archive / METADATA).read_bytes() if archive.is_dir() else _member(archive, METADATA)
        tree = parse_json(data)
    except _DAMAGED as error:
        raise BadFrame(archive, f"{METADATA} cannot be read ({first_line(error)})") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("poses"), list) or not tree["poses"]:
        raise BadFrame(archive, f'{METADATA} holds no "poses", a list of [qx, qy, qz, qw, tx, ty, tz]')
    return tree


def member(archive: Path, name: str) -> bytes:
    """The bytes of rgbd/NAME of an archive or an unpacked one. Raises `BadFrame`."""
    try:
        return (archive / "rgbd" / name).read_bytes() if archive.is_dir() else _member(archive, f"rgbd/{name}")
    except (FileNotFoundError, KeyError):
        raise BadFrame(archive / "rgbd" / name, "file is missing") from None
    except _DAMAGED as error:
        raise BadFrame(archive / "rgbd" / name, f"cannot be read ({first_line(error)})") from None


def unpacked_depth(path: Path, data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Unpack depth by LZFSE: float32 [H, W] meters. Raises `BadFrame`."""
    wanted = 4 * size[0] * size[1]
    if len(data) != wanted:  # as some exporters leave it
        lzfse: Any = require("liblzfse", "datasets")
        try:
            data = lzfse.decompress(data)
        except Exception as error:
            raise BadFrame(path, f"depth cannot be unpacked ({first_line(error)})") from None
    if len(data) != wanted:
        raise BadFrame(path, f"depth has {len(data)} bytes, expected {size[1]}x{size[0]} of 4 bytes")
    return np.frombuffer(data, "<f4").reshape(size)


def _member(archive: Path, name: str) -> bytes:
    with zipfile.ZipFile(archive) as file:
        if file.getinfo(name).file_size > LARGEST:
            raise ValueError(f"{name} has {file.getinfo(name).file_size} bytes; at most {LARGEST} are accepted")
        return file.read(name)


def _is_export(path: Path, folders: set[str], names: set[str]) -> bool:
    return EXPORTED in names and {"rgb", "depth"} <= folders


def _views(archive: Path, tree: Mapping[str, Any], color: str, depth: str) -> dict[str, View]:
    own = tree.get("perFrameIntrinsicCoeffs")
    each: Sequence[Any] = own if isinstance(own, list) and len(own) == len(tree["poses"]) else []
    views = {}
    for number, row in enumerate(tree["poses"]):
        where = f"{archive}: frame {number}"
        values = row if isinstance(row, list) and len(row) == 7 else []
        pose = pose_of_words([str(value) for value in (*values[4:], *values[:4])], where)
        camera = _camera(tree, each[number] if each else None, where)
        views[str(number)] = View(archive / color.format(number), archive / depth.format(number), pose, camera)
    return views


def _camera(tree: Mapping[str, Any], four: object, where: str) -> Camera | BadFrame:
    try:
        if four is None:
            matrix = np.array(tree["K"], dtype=np.float64).reshape(3, 3).T
            fx, fy, cx, cy = matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]
        else:
            fx, fy, cx, cy = np.array(four, dtype=np.float64).reshape(4)
        size = _whole(tree, "h", where), _whole(tree, "w", where)
        return checked_camera(where, camera_matrix(fx, fy, cx - CORNER, cy - CORNER), size)
    except (KeyError, TypeError, ValueError, OverflowError):
        return BadFrame(where, 'has no intrinsics: "K", 9 numbers column by column, or 4 a frame')
    except BadFrame as bad:
        return bad


def _whole(tree: Mapping[str, Any], key: str, where: object) -> int:
    value = tree.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 16:
        raise BadFrame(where, f"{METADATA} has {key}={str(value)[:60]}, expected a size in pixels")
    return value
