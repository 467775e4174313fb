"""The plain layout of this project, for any recording: color/, depth/, poses and intrinsics.txt.

    RECORDING/color/NAME.jpg            8-bit color (.png, .tif and others too)
    RECORDING/depth/NAME.png            16-bit gray in millimeters; .tif or .npy in float where depth_scale is given
    RECORDING/poses.txt                 one camera-to-world pose a line, in the order of the names; or
    RECORDING/pose/NAME.txt             one file each (or poses/); or neither, for tasks on single frames
    RECORDING/intrinsics.txt            fx fy cx cy, or a 3x3 or 4x4 matrix; here or in the root; of the depth image

Recordings may be nested as deep as they come. A pose is 16 or 12 numbers row by row, or tx ty tz qx qy qz qw; a name or
time may stand before it. Numbers in names are ordered as numbers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
    readable,
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
    return Recordings("folder", root, readable(found, partial(_recording, root)), Conventions(), options, layout=LAYOUT)


def _recording(root: Path, folder: Path) -> Recording:
    colors, depths = images_in(folder / "color", COLORS), images_in(folder / "depth", DEPTHS)
    camera, camera_file = camera_beside(folder, root)
    poses, listing, order = _poses(folder, list(colors))
    views = {
        name: View(color, depths.get(name, folder / "depth" / f"{name}.png"), pose, camera)
        for (name, color), pose in zip(colors.items(), poses, strict=True)
    }
    return Recording(scene_name(root, folder), views, [*listing, *camera_file], order)


def camera_beside(folder: Path, root: Path) -> tuple[Camera | BadFrame, list[Path]]:
    """The camera of a recording and its file, which stands in its folder or in one above, up to `root`."""
    for path in (place / name for place in places_above(folder, root) for name in INTRINSICS):
        if path.is_file():
            try:
                return read_camera(path), [path]
            except BadFrame as bad:
                return bad, [path]
    return BadFrame(folder / INTRINSICS[0], "file is missing"), []


def _poses(folder: Path, names: list[str]) -> tuple[list[np.ndarray | Path | BadFrame | None], list[Path], str]:
    """The pose of each frame as it is stored, the file that lists them, and "by name" where that differs from order."""
    listing = folder / "poses.txt"
    if not listing.is_file():
        one_each = _pose_folder(folder, names)
        return [None if one_each is None else one_each / f"{name}.txt" for name in names], [], ""
    try:
        rows = read_listing(listing)
    except BadFrame as bad:
        return [bad] * len(names), [listing], ""
    poses: list[Any] = [pose_of_words(words, f"{listing}:{number}") for number, words in rows]
    known, before = set(names), [words[0] for _, words in rows]
    named = [_name(words, known) for _, words in rows]
    fault = None
    if any(named) and set(named) != known and all(map(_is_number, before)):
        # Numbers may be names, times, or count from another one than the names do.
        counted = all(map(str.isdecimal, before))
        if not counted or (len(rows) == len(names) and _gapless(names) and _gapless(before)):
            named = []
        elif not any(len(word) > 1 and word.startswith("0") for word in before):
            lacking = some(sorted(map(repr, known.difference(filter(None, named)))))
            fault = f"numbers before poses are names of some images, and there is none for {lacking}: name each image"
    if not any(named) and len(rows) != len(names):
        fault = f"{len(rows)} poses for {len(names)} images in color/"
    if fault is not None or not any(named):
        return poses if fault is None else [BadFrame(listing, fault)] * len(names), [listing], ""
    of = {name: BadFrame(f"{listing}: {name}", "image has no pose") for name in names}
    of |= {name: pose for name, pose in zip(named, poses, strict=True) if name is not None}
    twice = {name for name, count in Counter(filter(None, named)).items() if count > 1}
    of |= {name: BadFrame(f"{listing}: {name}", "image has several poses") for name in twice}
    return [of[name] for name in names], [listing], "" if set(named) == known else "by name"


def _pose_folder(folder: Path, names: list[str]) -> Path | None:
    """The folder of one file for each pose: pose/, or poses/ if some image's is there; None without one."""
    if (folder / "pose").is_dir():
        return folder / "pose"
    other = folder / "poses"
    return other if any((other / f"{name}.txt").is_file() for name in names) else None


def _name(words: list[str], known: set[str]) -> str | None:
    """The image that is named before a pose, with or without folder and suffix; None: there is no such name."""
    if len(words) not in (8, 13, 17):
        return None
    path = Path(words[0])
    forms = (words[0], path.name) if path.suffix[1:].isdecimal() else (words[0], path.name, path.stem)  # 3.5: a time
    return next((form for form in forms if form in known), None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _gapless(numbers: Sequence[str]) -> bool:
    """Whether each is the number after the one before."""
    return all(map(str.isdecimal, numbers)) and all(int(b) == int(a) + 1 for a, b in itertools.pairwise(numbers))
