"""The plain layout of this project, for any recording: color/, depth/, poses and intrinsics.txt.

    RECORDING/color/NAME.jpg            8-bit color (.png, .tif and others too)
    RECORDING/depth/NAME.png            16-bit gray in millimeters; .tif or .npy in float where depth_scale is given
    RECORDING/poses.txt                 one camera-to-world pose a line, in the order of the names; or
    RECORDING/pose/NAME.txt             one file each; or neither, for tasks on single frames
    RECORDING/intrinsics.txt            fx fy cx cy, or a 3x3 or 4x4 matrix; here or in the root; of the depth image

Recordings may be nested as deep as they come. A pose is 16 or 12 numbers row by row, or tx ty tz qx qy qz qw; a name or
time may stand before it. Numbers in names are ordered as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.errors import BadFrame, some
from geo_pretrain.training.data.sources.conventions import Camera, Conventions, FolderOptions, read_camera
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
    scene_name,
)

INTRINSICS = ("intrinsics.txt", "intrinsics.json")
LAYOUT = "color/, depth/ (files of equal names), poses.txt or pose/, intrinsics.txt"  # for messages


@dataclass(frozen=True)
class PlainOptions(FolderOptions):
    """Options of the source."""


def open_plain(root: Path, options: PlainOptions) -> Recordings:
    """Open a folder of recordings in the plain layout."""
    existing_folder(root, LAYOUT)
    found = folders_with(root, lambda path, folders, names: {"color", "depth"} <= folders)
    return Recordings(
        "folder", root, (_recording(root, folder) for folder in found), Conventions(), options, layout=LAYOUT
    )


def _recording(root: Path, folder: Path) -> Recording:
    colors, depths = images_in(folder / "color", COLORS), images_in(folder / "depth", DEPTHS)
    camera, camera_file = camera_beside(folder, root)
    poses, listing = _poses(folder, list(colors))
    views = {
        name: View(color, depths.get(name, folder / "depth" / f"{name}.png"), pose, camera)
        for (name, color), pose in zip(colors.items(), poses, strict=True)
    }
    return Recording(scene_name(root, folder), views, [*listing, *camera_file])


def camera_beside(folder: Path, root: Path) -> tuple[Camera | BadFrame, list[Path]]:
    """The camera of a recording and its file, which stands in its folder or in one above, up to `root`."""
    for path in (place / name for place in places_above(folder, root) for name in INTRINSICS):
        if path.is_file():
            try:
                return read_camera(path), [path]
            except BadFrame as bad:
                return bad, [path]
    return BadFrame(folder / INTRINSICS[0], "file is missing"), []


def _poses(folder: Path, names: list[str]) -> tuple[list[np.ndarray | Path | BadFrame | None], list[Path]]:
    """The pose of each frame as it is stored, and the file that lists them."""
    listing = folder / "poses.txt"
    if not listing.is_file():
        one_each = folder / "pose"
        return [one_each / f"{name}.txt" if one_each.is_dir() else None for name in names], []
    try:
        rows = read_listing(listing)
    except BadFrame as bad:
        return [bad] * len(names), [listing]
    if len(rows) != len(names):
        return [BadFrame(listing, f"{len(rows)} poses for {len(names)} images in color/")] * len(names), [listing]
    poses: list[Any] = [pose_of_words(words, f"{listing}:{number}") for number, words in rows]
    known = set(names)
    named = [_name(words, known) for _, words in rows]
    if set(named) == known:
        of: dict[str | None, Any] = dict(zip(named, poses, strict=True))
        return [of[name] for name in names], [listing]
    if any(name is not None and not _is_number(words[0]) for name, (_, words) in zip(named, rows, strict=True)):
        lacking = some(sorted(map(repr, known.difference(filter(None, named)))))
        return [BadFrame(listing, f"names of images stand before poses, but not {lacking}")] * len(names), [listing]
    return poses, [listing]  # numbers and times are not looked at: they may count anything


def _name(words: list[str], known: set[str]) -> str | None:
    """The image that is named before a pose, with or without folder and suffix; None: there is no such name."""
    if len(words) not in (8, 13, 17):
        return None
    path = Path(words[0])
    return next((form for form in (words[0], path.name, path.stem) if form in known), None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
