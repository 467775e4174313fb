"""TUM RGB-D layout: rgb.txt, depth.txt and groundtruth.txt list images and poses with their times.

Lines are `time file` and `time tx ty tz qx qy qz qw`, camera-to-world; # begins a comment. Color and depth that are at
most 0.02 s apart belong together, the nearest first, as in the benchmark's associate.py. The pose is that of the
nearest time to the depth image's, within the same limit. Depth is 16-bit, 5000 a meter, registered to color.

Intrinsics are those that the benchmark states for its cameras (freiburg1, 2, 3 in the folder's name); other recordings
have an intrinsics.txt, see `folder`, or the option. The distortion of freiburg1 and 2 is not undone.
Source: https://cvg.cit.tum.de/data/datasets/rgbd-dataset/file_formats
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame
from geo_pretrain.training.checks import Positive
from geo_pretrain.training.data import files
from geo_pretrain.training.data.sources.conventions import Camera, Conventions, FolderOptions, camera_matrix
from geo_pretrain.training.data.sources.folder import camera_beside
from geo_pretrain.training.data.sources.recording import (
    Recording,
    Recordings,
    View,
    existing_folder,
    folders_with,
    pose_of_words,
    read_listing,
    readable,
    scene_name,
)

CAMERAS = {  # fx, fy, cx, cy of the color cameras, at 640x480
    "freiburg1": (517.3, 516.5, 318.6, 255.3),
    "freiburg2": (520.9, 521.0, 325.1, 249.7),
    "freiburg3": (535.4, 539.2, 320.1, 247.6),
}
TRAJECTORY = "groundtruth.txt"


@dataclass(frozen=True)
class TumOptions(FolderOptions):
    """Options of the source."""

    max_difference: Positive = 0.02  # s between the times of color, depth and pose of a frame


def open_tum(root: Path, options: TumOptions) -> Recordings:
    """Open a sequence of the TUM RGB-D benchmark, or a folder of them."""
    existing_folder(root, "rgb.txt, depth.txt, groundtruth.txt")
    found = folders_with(root, lambda path, folders, names: {"rgb.txt", "depth.txt"} <= names)
    recordings = readable(found, lambda folder: _recording(root, folder, options.max_difference))
    return Recordings("tum", root, recordings, Conventions(depth_scale=5000.0), options)


def _recording(root: Path, folder: Path, limit: float) -> Recording:
    colors, depths = (_images(folder / name) for name in ("rgb.txt", "depth.txt"))
    trajectory = folder / TRAJECTORY
    known = re.search("freiburg[123]", scene_name(root, folder))
    camera, camera_files = camera_beside(folder, root)
    if known and not camera_files:
        camera = Camera(camera_matrix(*CAMERAS[known.group()]), (480, 640), nominal=True)
    poses: list[tuple[float, list[str]]] | BadFrame | None
    try:
        poses = _trajectory(trajectory) if trajectory.is_file() else None
    except BadFrame as bad:
        poses = bad
    views = {}
    for i, j in associate([time for time, _ in colors], [time for time, _ in depths], limit):
        pose = _at(poses, depths[j][0], limit, trajectory) if isinstance(poses, list) else poses
        views[colors[i][1].stem] = View(colors[i][1], depths[j][1], pose, camera)
    listings = [*([trajectory] if poses is not None else []), folder / "rgb.txt", folder / "depth.txt", *camera_files]
    return Recording(scene_name(root, folder), views, listings)


def associate(first: Sequence[float], second: Sequence[float], limit: float) -> list[tuple[int, int]]:
    """Pair times less than `limit` apart, the closest first, each used once: indices, in order of the first.

    As the benchmark's associate.py does it. `second` is sorted.
    """
    near = []
    for i, time in enumerate(first):
        for j in range(bisect_left(second, time - limit), len(second)):
            if second[j] - time >= limit:
                break
            if abs(second[j] - time) < limit:
                near.append((abs(second[j] - time), i, j))
    used: tuple[set[int], set[int]] = (set(), set())
    chosen = []
    for _, i, j in sorted(near):
        if i not in used[0] and j not in used[1]:
            used[0].add(i)
            used[1].add(j)
            chosen.append((i, j))
    return sorted(chosen, key=lambda pair: (first[pair[0]], pair))


def _images(path: Path) -> list[tuple[float, Path]]:
    """Times and files of a listing, in order of time."""
    rows = []
    for number, words in read_listing(path):
        try:
            rows.append((float(words[0]), path.parent / words[1]))
            if (fault := files.name_fault(words[1])) is not None:
                raise BadFrame(f"{path}:{number}", f"the name of the file {fault}")
        except (ValueError, IndexError):
            raise BadFrame(f"{path}:{number}", f"{' '.join(words)[:60]!r} is no line 'time file'") from None
    return sorted(row for row in rows if np.isfinite(row[0]))


def _trajectory(path: Path) -> list[tuple[float, list[str]]]:
    """Times and words of poses, in order of time."""
    rows = []
    for number, words in read_listing(path):
        try:
            rows.append((float(words[0]), words[1:]))
        except ValueError:
            raise BadFrame(f"{path}:{number}", f"{words[0][:60]!r} is no time") from None
    return sorted((row for row in rows if np.isfinite(row[0])), key=lambda row: row[0])


def _at(poses: list[tuple[float, list[str]]], time: float, limit: float, path: Path) -> np.ndarray | BadFrame:
    """The pose of the nearest time, if there is one within the limit."""
    at = bisect_left(poses, time, key=lambda row: row[0])
    nearest = min(poses[max(at - 1, 0) : at + 1], key=lambda row: abs(row[0] - time), default=None)
    if nearest is None or abs(nearest[0] - time) >= limit:
        return BadFrame(f"{path}: {time:f}", f"has no pose within {limit:g} s")
    return pose_of_words(nearest[1], f"{path}: {nearest[0]:f}")
