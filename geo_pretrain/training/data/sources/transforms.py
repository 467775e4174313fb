"""A transforms.json of nerfstudio or Instant NGP with depth: exports of Polycam, Record3D and others end there.

The file holds "fl_x", "fl_y", "cx", "cy", "w", "h" for all frames or in each of them, or "camera_angle_x", and
"frames": [{"file_path", "depth_file_path" or "depth_path", "transform_matrix": 4x4}]. Poses are camera-to-world with
OpenGL's axes. Depth is 16-bit in millimeters as `ns-process-data` writes it, or in "integer_depth_scale" meters a unit
(Instant NGP). Poses were multiplied by "applied_scale", where it is there. Frames are ordered by the names of files.

Principal points count from the corner of the image, as nerfstudio's rays do; here they count from the center of the
first pixel. Lens distortion is not undone, and noted; only perspective cameras are accepted.
Source: https://docs.nerf.studio/quickstart/data_conventions.html, nerfstudio's nerfstudio_dataparser.py and
depth_dataset.py, Instant NGP's nerf_loader.cu (names of keys, from memory).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
    COLORS,
    Recording,
    Recordings,
    View,
    existing_folder,
    folders_with,
    json_tree,
    pose_of_words,
    readable,
    scene_name,
)

FILE = "transforms.json"
PERSPECTIVE = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "perspective")
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
DEPTH_KEYS = ("depth_file_path", "depth_path")


@dataclass(frozen=True)
class TransformsOptions(FolderOptions):
    """Options of the source."""


def open_transforms(root: Path, options: TransformsOptions) -> Recordings:
    """Open a folder with a transforms.json, or a folder of such folders."""
    existing_folder(root, FILE)
    folders = folders_with(root, lambda path, folders, names: FILE in names)
    found = readable(folders, partial(_recording, root))
    scales = {scales for _, scales, _ in found}
    if len(scales) > 1:
        raise DataError(
            f"Files {FILE} below {str(root)!r} have other scales {sorted(scales)}: open one after the other."
        )
    unit, scale = next(iter(scales), (0.001, 1.0))
    if min(unit, scale) <= 0:
        raise DataError(
            f"{root / FILE}: integer_depth_scale is {unit:g}, applied_scale {scale:g}; above 0 is accepted."
        )
    conventions = Conventions(depth_scale=1 / unit, camera_axes="opengl", pose_scale=scale)
    note = "lens distortion is not undone" if any(distorted for *_, distorted in found) else ""
    return Recordings("transforms", root, (recording for recording, *_ in found), conventions, options, note=note)


def _recording(root: Path, folder: Path) -> tuple[Recording, tuple[float, float], bool]:
    """A recording, its scales of depth and of poses, and whether its lens distorts."""
    tree = json_tree(folder / FILE, "a list of frames")
    recording = Recording(scene_name(root, folder), _views(folder, tree), [folder / FILE])
    scales = _number(tree, "integer_depth_scale", 0.001, folder), _number(tree, "applied_scale", 1.0, folder)
    parts = [tree, *tree["frames"]]
    return recording, scales, any(_number(part, key, 0.0, folder) != 0 for part in parts for key in DISTORTION)


def _views(folder: Path, tree: Mapping[str, Any]) -> dict[str, View]:
    frames = tree.get("frames")
    if not isinstance(frames, list) or not all(
        isinstance(frame, dict) and isinstance(frame.get("file_path"), str) for frame in frames
    ):
        raise BadFrame(folder / FILE, 'has no "frames", a list of objects with a "file_path"')
    if frames and not any(isinstance(frame.get(key), str) for frame in frames for key in DEPTH_KEYS):
        raise BadFrame(
            folder / FILE,
            'has no frame with a "depth_file_path": export with depth (ns-process-data polycam --use-depth ...)',
        )
    named = (frame[key] for frame in frames for key in ("file_path", *DEPTH_KEYS) if isinstance(frame.get(key), str))
    if (fault := next(filter(None, map(files.name_fault, named)), None)) is not None:
        raise BadFrame(folder / FILE, f"the name of a file {fault}")
    if any(not Path(frame["file_path"]).name for frame in frames):
        raise BadFrame(folder / FILE, "has a frame with an empty 'file_path'")
    posed = any("transform_matrix" in frame for frame in frames)
    views: dict[str, View] = {}
    for frame in sorted(frames, key=lambda frame: files.natural_order(frame["file_path"])):
        name = str(Path(frame["file_path"]).with_suffix("").as_posix()).removeprefix("./")
        depth = next((frame[key] for key in DEPTH_KEYS if isinstance(frame.get(key), str)), f"{name}.has_no_depth")
        where = f"{folder / FILE}: {frame['file_path']}"
        color = _color(folder, frame["file_path"])
        try:
            camera: Camera | BadFrame = _camera({**tree, **frame}, color, where)
        except BadFrame as bad:
            camera = bad
        views[name] = View(color, folder / depth, _pose(frame, where) if posed else None, camera)
    return views


def _color(folder: Path, name: str) -> Path:
    path = folder / name
    if path.suffix.lower() in COLORS:
        return path
    endings = (*COLORS, *map(str.upper, COLORS))
    named = (path.with_name(path.name + ending) for ending in endings)  # as in the Blender scenes of NeRF
    return next((path for path in named if path.is_file()), path)


def _pose(frame: Mapping[str, Any], where: str) -> np.ndarray | BadFrame:
    rows = frame.get("transform_matrix")
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return BadFrame(where, "has no transform_matrix of 4x4 numbers")
    return pose_of_words([str(value) for row in rows for value in row], where)


def _camera(facts: Mapping[str, Any], color: Path, where: str) -> Camera:
    model = facts.get("camera_model", "PINHOLE")
    if model not in PERSPECTIVE:
        raise BadFrame(where, f"camera_model is {model!r}; accepted are {', '.join(PERSPECTIVE)}: undistort the images")
    if "w" in facts and "h" in facts:
        width, height = _number(facts, "w", 0, where), _number(facts, "h", 0, where)
    else:
        width, height = files.image_size(color)
    if min(width, height) < 1:
        raise BadFrame(where, f"image has the size w={width:g}, h={height:g}")
    if "fl_x" in facts:
        fx = _number(facts, "fl_x", 0, where)
    elif "camera_angle_x" in facts:
        fx = width / 2 / math.tan(max(_number(facts, "camera_angle_x", 0, where), 1e-9) / 2)
    else:
        raise BadFrame(where, 'has neither "fl_x" nor "camera_angle_x"')
    fy = _number(facts, "fl_y", fx, where)
    cx, cy = _number(facts, "cx", width / 2, where), _number(facts, "cy", height / 2, where)
    return checked_camera(where, camera_matrix(fx, fy, cx - 0.5, cy - 0.5), (round(height), round(width)))


def _number(facts: Mapping[str, Any], key: str, default: float, where: object) -> float:
    value = facts.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:
        raise BadFrame(where, f"{key} is {str(value)[:60]!r}, expected a number")
    return float(value)
