"""ARKitScenes' raw data: what ARKit logs on an iPad, small color images with depth of equal size.

    VIDEO/lowres_wide/VIDEO_TIME.png                  color, 256x192; or below VIDEO/VIDEO_frames/, as in the 3DOD part
    VIDEO/lowres_depth/VIDEO_TIME.png                 16-bit in millimeters
    VIDEO/lowres_wide_intrinsics/VIDEO_TIME.pincam    width height fx fy cx cy
    VIDEO/lowres_wide.traj                            time, axis times angle (radians), translation: world-to-camera

Poses are logged ten times a second; a frame has that of the nearest time, within 5 ms, as the release's own tools match
them by times of three digits, and frames between have none. Principal points count from the center of the first pixel.
Confidence is not looked at. For the videos and laser scans of the release see `scenezoo`.
Source: DATA.md and threedod/benchmark_scripts of apple/ARKitScenes (names from there and from scenezoo's reader).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame
from geo_pretrain.training.checks import Positive
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
    folders_with,
    images_in,
    read_listing,
    readable,
    scene_name,
)

TRAJECTORY = "lowres_wide.traj"
INTRINSICS = "lowres_wide_intrinsics"


@dataclass(frozen=True)
class ArkitScenesOptions(FolderOptions):
    """Options of the source."""

    max_difference: Positive = 0.005  # s between the times of a frame and its pose


def open_arkitscenes(root: Path, options: ArkitScenesOptions) -> Recordings:
    """Open raw data of ARKitScenes: one video, or a folder of them."""
    existing_folder(root, f"VIDEO/lowres_wide, lowres_depth, {INTRINSICS} and {TRAJECTORY}")
    found = folders_with(root, lambda path, folders, names: {"lowres_wide", "lowres_depth"} <= folders)
    recordings = readable(found, lambda folder: _recording(root, folder, options.max_difference))
    return Recordings("arkitscenes", root, recordings, Conventions(pose_convention="world_to_camera"), options)


def _recording(root: Path, folder: Path, limit: float) -> Recording:
    trajectory = next((path for path in (folder / TRAJECTORY, folder.parent / TRAJECTORY) if path.is_file()), None)
    poses: list[tuple[float, np.ndarray]] | BadFrame | None = None
    if trajectory is not None:
        try:
            poses = read_trajectory(trajectory)
        except BadFrame as bad:
            poses = bad
    views, cameras = {}, []
    for name, color in images_in(folder / "lowres_wide", (".png",)).items():
        pose: np.ndarray | BadFrame | None = None
        if isinstance(poses, list):
            nearest = _nearest(poses, name, limit)
            if nearest is None:
                continue  # between two that are logged
            pose = nearest
        elif poses is not None:
            pose = poses
        camera = folder / INTRINSICS / f"{name}.pincam"
        cameras.append(camera)
        views[name] = View(color, folder / "lowres_depth" / f"{name}.png", pose, read_pincam(camera))
    scene = folder.parent if folder.name.endswith("_frames") and folder != root else folder
    return Recording(scene_name(root, scene), views, [*([trajectory] if trajectory else []), *cameras])


def read_trajectory(path: Path) -> list[tuple[float, np.ndarray]]:
    """Read times and world-to-camera poses [4, 4], in order of time. Raises `BadFrame`."""
    rows = []
    for number, words in read_listing(path):
        try:
            time, *values = (float(word) for word in words)
            if len(values) != 6:
                raise ValueError
        except ValueError:
            raise BadFrame(f"{path}:{number}", "is no line of time, axis times angle, translation: 7 numbers") from None
        if math.isfinite(time):
            rows.append((time, pose_of_vector(np.array(values[:3]), np.array(values[3:]))))
    return sorted(rows, key=lambda row: row[0])


def pose_of_vector(vector: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The motion [4, 4] of a rotation about `vector` by its length in radians, and a translation."""
    angle = float(np.linalg.norm(vector))
    x, y, z = vector / angle if 0 < angle < math.inf else np.zeros(3)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    pose = np.eye(4)
    if math.isfinite(angle):
        pose[:3, :3] += math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    else:
        pose[:3, :3] = math.nan
    pose[:3, 3] = shift
    return pose


def read_pincam(path: Path) -> Camera | BadFrame:
    """Read a camera from "width height fx fy cx cy"; `BadFrame`, returned, for none."""
    try:
        width, height, fx, fy, cx, cy = files.read_numbers(path, (6,), "width height fx fy cx cy").tolist()
        if not (1 <= width < 1e5 and 1 <= height < 1e5):
            raise BadFrame(path, f"camera has the size {width:g}x{height:g}")
        return checked_camera(path, camera_matrix(fx, fy, cx, cy), (round(height), round(width)))
    except BadFrame as bad:
        return bad


def _nearest(poses: list[tuple[float, np.ndarray]], name: str, limit: float) -> np.ndarray | None:
    """The pose of the time in an image's name, within the limit."""
    try:
        time = float(name.rpartition("_")[2])
    except ValueError:
        return None
    at = bisect_left(poses, time, key=lambda row: row[0])
    nearest = min(poses[max(at - 1, 0) : at + 1], key=lambda row: abs(row[0] - time), default=None)
    return None if nearest is None or abs(nearest[0] - time) > limit else nearest[1]
