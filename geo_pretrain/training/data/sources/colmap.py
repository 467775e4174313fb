"""COLMAP's reconstructions as text, with depth: cameras.txt, images.txt, images/ and depth maps.

The text files stand in the recording's folder or in sparse/, sparse/0/ or sparse-txt/ below it (`colmap model_converter
--output_type TXT`). Poses are world-to-camera, as a quaternion (w, x, y, z) and a translation. Only images without
distortion are accepted, PINHOLE and SIMPLE_PINHOLE (`colmap image_undistorter`). Principal points count from the corner
of the image; here they count from the center of the first pixel.

Depth is COLMAP's own, stereo/depth_maps/NAME.geometric.bin (or .photometric.bin): "width&height&1&" and float32 row by
row, in units of the reconstruction; or depth/ with images of equal stems, 16-bit in millimeters. A reconstruction from
images alone has no meters: with `m` meters a unit, give depth_scale and pose_scale as 1 / m.
Source: https://colmap.github.io/format.html, scripts/python/read_dense.py of colmap/colmap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data import files
from geo_pretrain.training.data.sources.conventions import (
    Camera,
    Conventions,
    FolderOptions,
    camera_matrix,
    checked_camera,
)
from geo_pretrain.training.data.sources.recording import (
    DEPTHS,
    Recording,
    Recordings,
    View,
    existing_folder,
    folders_with,
    images_in,
    pose_of_quaternion,
    read_listing,
    scene_name,
)

MODELS = ("", "sparse", "sparse/0", "sparse-txt")  # where cameras.txt and images.txt stand
MAPS = ("geometric", "photometric")
PINHOLES = {"PINHOLE": (0, 1, 2, 3), "SIMPLE_PINHOLE": (0, 0, 1, 2)}  # places of fx, fy, cx, cy among the parameters


@dataclass(frozen=True)
class ColmapOptions(FolderOptions):
    """Options of the source."""


def open_colmap(root: Path, options: ColmapOptions) -> Recordings:
    """Open a reconstruction as text with depth maps, or a folder of them."""
    existing_folder(root, "sparse/cameras.txt, sparse/images.txt, images/ and stereo/depth_maps/ or depth/")
    recordings, kinds = [], set()
    for folder in folders_with(root, lambda path, folders, names: "images" in folders and _model(path) is not None):
        if (model := _model(folder)) is not None:
            kinds.add(_maps(folder))
            recordings.append(_recording(root, folder, model))
    if len(kinds) > 1:
        raise DataError(
            f"Some reconstructions below {str(root)!r} have stereo/depth_maps/, others depth/: open each kind."
        )
    conventions = Conventions(pose_convention="world_to_camera")
    note = ""
    if True in kinds:
        conventions = Conventions(depth_scale=1.0, pose_convention="world_to_camera", float_depth=True)
        given = options.depth_scale is not None
        note = "" if given else "depth and poses are in units of the reconstruction, which may not be meters"
    return Recordings("colmap", root, recordings, conventions, options, note=note)


def _model(folder: Path) -> Path | None:
    places = (folder / place for place in MODELS)
    return next((p for p in places if (p / "cameras.txt").is_file() and (p / "images.txt").is_file()), None)


def _maps(folder: Path) -> bool:
    """Whether depth is COLMAP's own."""
    return (folder / "stereo" / "depth_maps").is_dir()


def _recording(root: Path, folder: Path, model: Path) -> Recording:
    cameras = read_cameras(model / "cameras.txt")
    views: dict[str, View] = {}
    depths = {} if _maps(folder) else images_in(folder / "depth", DEPTHS)
    for name, camera, pose in sorted(
        read_images(model / "images.txt"), key=lambda entry: files.natural_order(entry[0])
    ):
        stem = Path(name).with_suffix("").as_posix()
        if _maps(folder):
            own = [folder / "stereo" / "depth_maps" / f"{name}.{kind}.bin" for kind in MAPS]
            depth = next((path for path in own if path.is_file()), own[0])
        else:
            depth = depths.get(stem, folder / "depth" / f"{stem}.png")
        missing = BadFrame(model / "images.txt", f"image {name} has camera {camera}, which cameras.txt lacks")
        views[stem] = View(folder / "images" / name, depth, pose, cameras.get(camera, missing))
    return Recording(scene_name(root, folder), views, [model / "images.txt", model / "cameras.txt"])


def read_cameras(path: Path) -> dict[str, Camera | BadFrame]:
    """Read cameras.txt: id -> camera; one with distortion is a `BadFrame`, which is returned."""
    cameras: dict[str, Camera | BadFrame] = {}
    for number, words in read_listing(path):
        where = f"{path}:{number}"
        try:
            width, height, *parameters = (float(word) for word in words[2:])
            if words[1] not in PINHOLES:
                known = " and ".join(PINHOLES)
                cameras[words[0]] = BadFrame(
                    where, f"camera has the model {words[1][:40]}; accepted are {known}: run colmap image_undistorter"
                )
                continue
            fx, fy, cx, cy = (parameters[place] for place in PINHOLES[words[1]])
            size = round(height), round(width)
        except (ValueError, IndexError, OverflowError):
            raise BadFrame(where, "is no line 'id model width height parameters'") from None
        try:
            cameras[words[0]] = checked_camera(where, camera_matrix(fx, fy, cx - 0.5, cy - 0.5), _positive(size, where))
        except BadFrame as bad:
            cameras[words[0]] = bad
    return cameras


def read_images(path: Path) -> list[tuple[str, str, np.ndarray | BadFrame]]:
    """Read images.txt: name, camera's id and pose [4, 4], world-to-camera, of each image.

    Every image has two lines; the second, which lists points, may be empty and is not looked at.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise BadFrame(path, "is no text that can be read") from None
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if not line.startswith("#")]
    images = []
    for number, line in lines[::2]:
        where, words = f"{path}:{number}", line.split(maxsplit=9)
        if len(words) != 10:
            raise BadFrame(where, "is no line 'id qw qx qy qz tx ty tz camera name', with a line of points below")
        try:
            w, x, y, z, *position = (float(word) for word in words[1:8])
        except ValueError:
            raise BadFrame(where, "has a pose that is no numbers") from None
        name = words[9].strip()
        if (fault := files.name_fault(name)) is not None:
            raise BadFrame(where, f"the name of the image {fault}")
        images.append((name, words[8], pose_of_quaternion(position, (x, y, z, w), where)))
    return images


def _positive(size: Sequence[int], where: str) -> tuple[int, int]:
    if min(size) < 1:
        raise BadFrame(where, f"camera has the size {size[1]}x{size[0]}")
    return size[0], size[1]
