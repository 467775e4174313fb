"""Polycam's raw data (developer mode, LiDAR): keyframes of an iPhone or iPad with depth, a JSON of each camera.

    keyframes/images/TIME.jpg               color, landscape
    keyframes/cameras/TIME.json             "width", "height", "fx", "fy", "cx", "cy", "t_00" .. "t_23", "blur_score"
    keyframes/corrected_images/, corrected_cameras/    the same after the app's bundle adjustment, where it was done
    keyframes/depth/TIME.png                16-bit in millimeters, 256x192

t_00 .. t_23 are the rows of camera-to-world in ARKit's world (y up, here turned to z), with OpenGL's axes of the
camera. Corrected cameras are used where there are any. Principal points count from the corner of the image, as
nerfstudio takes them.
Confidence is not looked at. A recording is a folder with keyframes/, or keyframes itself.
Source: nerfstudio's polycam_utils.py (`ns-process-data polycam`); no recording was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.errors import BadFrame
from geo_pretrain.training.checks import NotNegative
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
    images_in,
    json_tree,
    pose_of_words,
    readable,
    scene_name,
)

POSE = [f"t_{row}{column}" for row in range(3) for column in range(4)]
CORNER = 0.5  # of the first pixel, from its center


@dataclass(frozen=True)
class PolycamOptions(FolderOptions):
    """Options of the source."""

    corrected: bool = True  # use the cameras of the app's bundle adjustment where there are any
    min_blur_score: NotNegative = 0.0  # leave out frames that are blurred more: the app's score grows with sharpness


def open_polycam(root: Path, options: PolycamOptions) -> Recordings:
    """Open raw data of Polycam, or a folder of recordings."""
    existing_folder(root, "keyframes/images, keyframes/cameras and keyframes/depth")
    found = folders_with(root, lambda path, folders, names: {"images", "cameras", "depth"} <= folders)
    recordings = readable(found, lambda folder: _recording(root, folder, options))
    return Recordings("polycam", root, recordings, Conventions(camera_axes="opengl", world_up="y"), options)


def _recording(root: Path, folder: Path, options: PolycamOptions) -> Recording:
    images, cameras = folder / "images", folder / "cameras"
    if options.corrected and (folder / "corrected_cameras").is_dir() and (folder / "corrected_images").is_dir():
        images, cameras = folder / "corrected_images", folder / "corrected_cameras"
    views = {}
    for name, color in images_in(images, COLORS).items():
        path = cameras / f"{name}.json"
        camera: Camera | BadFrame
        pose: np.ndarray | BadFrame
        try:
            facts = json_tree(path, "a camera")
            if _number(facts, "blur_score", path, 1e9) < options.min_blur_score:
                continue
            camera, pose = _camera(facts, path), pose_of_words([str(facts.get(key)) for key in POSE], path)
        except BadFrame as bad:
            camera = pose = bad
        views[name] = View(color, folder / "depth" / f"{name}.png", pose, camera)
    name = scene_name(root, folder.parent if folder.name == "keyframes" and folder != root else folder)
    return Recording(name, views, [cameras / f"{name}.json" for name in views])


def _camera(facts: Mapping[str, Any], path: Path) -> Camera:
    fx, fy, cx, cy, width, height = (_number(facts, key, path) for key in ("fx", "fy", "cx", "cy", "width", "height"))
    if min(width, height) < 1:
        raise BadFrame(path, f"image has the size width={width:g}, height={height:g}")
    return checked_camera(path, camera_matrix(fx, fy, cx - CORNER, cy - CORNER), (round(height), round(width)))


def _number(facts: Mapping[str, Any], key: str, path: Path, default: float | None = None) -> float:
    value = facts.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:
        raise BadFrame(path, f"{key} is {str(value)[:60]!r}, expected a number")
    return float(value)
