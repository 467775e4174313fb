"""Redwood's and Open3D's layout: color/, depth/ and a trajectory in a .log file.

The trajectory holds for each pose a line of three numbers, the first of which is the position of its frame from 0, and
a 4x4 matrix, camera-to-world. Depth is 16-bit in millimeters, registered to color. Color may also be called image/ or
rgb/; of both folders the images with equal names belong together, or, where names hold times, those of equal position.

Intrinsics are a JSON file as Open3D writes it (camera_intrinsic.json, intrinsic.json or others with "intrinsic" in the
name) or an intrinsics.txt; without one those of the PrimeSense that Redwood's recordings and Open3D take (525, 525,
319.5, 239.5 at 640x480). Source: http://redwood-data.org/indoor/fileformat.html, open3d.io.PinholeCameraTrajectory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame
from geo_pretrain.training.data.files import visible
from geo_pretrain.training.data.sources.conventions import (
    Camera,
    Conventions,
    FolderOptions,
    camera_matrix,
    read_camera,
)
from geo_pretrain.training.data.sources.folder import camera_beside
from geo_pretrain.training.data.sources.recording import (
    COLORS,
    DEPTHS,
    Recording,
    Recordings,
    View,
    existing_folder,
    folders_with,
    images_in,
    places_above,
    pose_of_words,
    read_listing,
    readable,
    scene_name,
)

PRIMESENSE = Camera(camera_matrix(525.0, 525.0, 319.5, 239.5), (480, 640), nominal=True)
COLOR_FOLDERS = ("color", "image", "rgb")


@dataclass(frozen=True)
class RedwoodOptions(FolderOptions):
    """Options of the source."""

    trajectory: str | None = None  # the file's name in the recording's folder; None: trajectory.log, or the only .log


def open_redwood(root: Path, options: RedwoodOptions) -> Recordings:
    """Open a recording in Redwood's or Open3D's layout, or a folder of them."""
    existing_folder(root, "color/, depth/ and a trajectory .log")
    found = folders_with(
        root, lambda path, folders, names: "depth" in folders and not folders.isdisjoint(COLOR_FOLDERS)
    )
    recordings = readable(found, lambda folder: _recording(root, folder, options.trajectory))
    return Recordings("redwood", root, recordings, Conventions(), options)


def _recording(root: Path, folder: Path, trajectory: str | None) -> Recording:
    colors = images_in(next(folder / name for name in COLOR_FOLDERS if (folder / name).is_dir()), COLORS)
    depths = images_in(folder / "depth", DEPTHS)
    numbered = all(map(str.isdecimal, [*colors, *depths]))
    by_name = numbered and not colors.keys().isdisjoint(depths)
    if colors.keys() != depths.keys() and len(colors) == len(depths) and not by_name:
        depths = dict(zip(colors, depths.values(), strict=True))
    order = "depth by name" if by_name and colors.keys() != depths.keys() else ""
    camera, listings = _camera(folder, root)
    poses: dict[int, np.ndarray | BadFrame] | BadFrame
    try:
        path = _trajectory_file(folder, trajectory)
        found = read_log(path)
        poses = _by_position(path, found, list(colors))
        order += " poses by number" if poses is not found else ""
        listings.insert(0, path)
    except BadFrame as bad:
        poses = bad
    views = {}
    for number, (name, color) in enumerate(colors.items()):
        none = BadFrame(color, "has no pose in the trajectory")
        pose = poses if isinstance(poses, BadFrame) else poses.get(number, none)
        views[name] = View(color, depths.get(name, folder / "depth" / f"{name}.png"), pose, camera)
    return Recording(scene_name(root, folder), views, listings, order)


def _by_position(
    path: Path, poses: dict[int, np.ndarray | BadFrame], names: list[str]
) -> dict[int, np.ndarray | BadFrame]:
    """The poses by the position of their image. Raises `BadFrame` where the log may count positions or names.

    Where numbers of images have gaps, as in a part of a recording, a log of the whole counts these numbers.
    """
    gaps = all(map(str.isdecimal, names)) and [int(name) - int(names[0]) for name in names] != list(range(len(names)))
    if not gaps or poses.keys() == set(range(len(names))):
        if poses and max(poses) >= len(names):
            raise BadFrame(path, f"has a pose of frame {max(poses)}, counted from 0; there are {len(names)} images")
        return poses
    numbers = {int(name): position for position, name in enumerate(names)}
    if poses.keys() >= numbers.keys():
        return {position: poses[number] for number, position in numbers.items()}
    raise BadFrame(
        path,
        f"has poses of {len(poses)} frames, and the numbers of the {len(names)} images have gaps: poses of frames 0 to "
        f"{len(names) - 1} are accepted, in the order of the images, or one of the number of each image",
    )


def read_log(path: Path) -> dict[int, np.ndarray | BadFrame]:
    """Read a trajectory: position of the frame -> pose [4, 4], camera-to-world. Raises `BadFrame`."""
    rows = read_listing(path)
    poses: dict[int, np.ndarray | BadFrame] = {}
    for at in range(0, len(rows), 5):
        (number, head), body = rows[at], rows[at + 1 : at + 5]
        if len(head) != 3 or len(body) != 4 or any(len(words) != 4 for _, words in body):
            raise BadFrame(f"{path}:{number}", "expected three numbers and, below them, a 4x4 matrix")
        try:
            frame = int(head[0])
        except ValueError:
            raise BadFrame(f"{path}:{number}", f"{head[0][:60]!r} is no number of a frame") from None
        if frame < 0 or frame in poses:
            raise BadFrame(f"{path}:{number}", f"frame {frame} is there twice" if frame >= 0 else f"frame is {frame}")
        poses[frame] = pose_of_words([word for _, words in body for word in words], f"{path}:{number}")
    return poses


def _trajectory_file(folder: Path, name: str | None) -> Path:
    if name is not None:
        return folder / name
    logs = visible(folder, "*.log") or visible(folder, "scene/*.log")
    named = [path for path in logs if path.name == "trajectory.log"]
    if len(named or logs) != 1:
        which = ", ".join(path.name for path in logs) or "none"
        raise BadFrame(
            folder, f"has no trajectory.log and not just one other .log ({which}): give data.options.trajectory"
        )
    return (named or logs)[0]


def _camera(folder: Path, root: Path) -> tuple[Camera | BadFrame, list[Path]]:
    own = [path for place in places_above(folder, root) for path in visible(place, "*intrinsic*.json")]
    if own:
        try:
            return read_camera(own[0]), own[:1]
        except BadFrame as bad:
            return bad, own[:1]
    camera, listing = camera_beside(folder, root)
    return (camera, listing) if listing else (PRIMESENSE, [])
