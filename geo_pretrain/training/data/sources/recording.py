"""Recordings on disk as a source of frames: a layout lists views, this module reads them.

A layout is one function that finds recordings in a folder and says of each view where its color, depth, pose and
intrinsics stand. Conventions of depth and poses are in `conventions`.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, first_line, some
from geo_pretrain.files import parse_json
from geo_pretrain.training.data import files
from geo_pretrain.training.data.files import natural_order
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.data.sources.conventions import Assembly, Camera, Conventions, FolderOptions, stated, z_up

P = TypeVar("P")
T = TypeVar("T")
COLORS = (".jpg", ".png", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")  # in capitals too
DEPTHS = (".png", ".tif", ".tiff", ".npy", ".exr")
LISTING_BYTES = 1 << 29  # of a text file with one line a frame
FAR = 10_000.0  # m; beyond it float32 does not hold a millimeter
QUATERNION_LENGTH = 0.01  # by which the length of a quaternion may differ from 1


@dataclass(frozen=True)
class View:
    """Where one frame stands on disk."""

    color: Path
    depth: Path
    pose: np.ndarray | Path | BadFrame | None  # [4, 4] as stored, its file, why there is none; None: no poses at all
    camera: Camera | BadFrame
    mount: np.ndarray | BadFrame | None = None  # [4, 4], m: from the camera to what the pose is of, such as a rig


@dataclass(frozen=True)
class Recording:
    """One scene: its views by name in order of time, and the files that list them."""

    name: str
    views: Mapping[str, View]
    listings: Sequence[Path] = field(default=())  # trajectories, intrinsics: for messages and the fingerprint
    order: str = ""  # how poses or depth were dealt out where it is not by position: for the fingerprint


class Recordings:
    """A folder of recordings as a source of frames."""

    def __init__(
        self,
        name: str,
        root: Path,
        recordings: Iterable[Recording],
        conventions: Conventions,
        options: FolderOptions,
        *,
        note: str = "",
        layout: str = "",  # what is expected in a folder, for the message where nothing is found
    ) -> None:
        self.name, self.root, self.config = name, root, options
        self.assembly = Assembly(conventions, options)
        self.conventions = self.assembly.conventions
        self._recordings = {recording.name: recording for recording in recordings if recording.views}
        self._note = note
        self._origins: dict[str, np.ndarray] = {}
        if not self._recordings:
            expected = f": expected {layout}, in it or in folders below" if layout else ""
            raise DataError(f"No frame in {str(root)!r}{expected}.{hint(root, name)}")
        self._refuse_unusable()

    @property
    def note(self) -> str:
        """What is unusual in these frames, for the provenance of checkpoints."""
        bare = self.unposed()
        lost = f"{len(bare)} of {len(self._recordings)} scenes have no poses" if bare else ""
        return "; ".join(part for part in (self.assembly.note(), self._note, lost) if part)

    def scenes(self) -> list[str]:
        return list(self._recordings)

    def frame_ids(self, scene: str) -> list[str]:
        return list(self._recordings[scene].views)

    def load(self, scene: str, frame_id: str) -> Frame:
        """Read a frame. Places beyond 10 km, as of maps, are counted from a place near the scene's first frame."""
        view = self._recordings[scene].views[frame_id]
        camera, pose = self._camera(view), self._cam_to_world(view)
        if view.pose is not None:
            pose[:3, 3] -= self._origin(scene)
        color, depth = self._color(view), self.conventions.meters(self._stored(view), view.depth)
        color, depth, matrix, pose = self.assembly.images(color, depth, camera, pose, view.color, view.depth)
        return Frame(scene, frame_id, color, depth, matrix, pose, posed=view.pose is not None)

    def raw_depth(self, scene: str, frame_id: str) -> np.ndarray:
        """Read the values of a depth image as they are stored: [H, W]."""
        return self._stored(self._recordings[scene].views[frame_id])

    def _color(self, view: View) -> np.ndarray:
        return files.read_frame_color(view.color)

    def _stored(self, view: View) -> np.ndarray:
        return files.read_raw_depth(view.depth)

    def unposed(self) -> list[str]:
        return [
            name for name, each in self._recordings.items() if all(view.pose is None for view in each.views.values())
        ]

    def fingerprint(self) -> str:
        """A digest of names, sizes and times of all files of frames, of the options, and of how the world is turned."""
        of_files = files.files_fingerprint(self.root, (path for path in self._files() if path.is_file()))
        options = json.dumps(stated(self.config), sort_keys=True)
        options += "" if self.conventions.world_up == "z" else f"\0{self.conventions.world_up}"  # surfaces are kept
        for scene, recording in self._recordings.items():
            origin = self._origin(scene)
            options += f"\0{scene}: {origin.tolist()}" if origin.any() else ""
            options += f"\0{scene}: poses {recording.order}" if recording.order else ""
        return hashlib.sha256(f"{self.assembly.digest(of_files)}\0{options}".encode()).hexdigest()

    def content(self) -> str:
        """A digest of the bytes of some files, see `files.sampled_digest`."""
        return files.sampled_digest(self.root, self._files())

    def _files(self) -> set[Path]:
        found: set[Path] = set()
        for recording in self._recordings.values():
            found.update(recording.listings)
            for view in recording.views.values():
                found.update((view.color, view.depth, *([view.pose] if isinstance(view.pose, Path) else [])))
        return found

    def _camera(self, view: View) -> Camera:
        if self.assembly.camera is not None:
            return self.assembly.camera
        if isinstance(view.camera, BadFrame):
            raise view.camera
        return view.camera

    def _cam_to_world(self, view: View) -> np.ndarray:
        """The pose of a view, camera-to-world in the recording's own world."""
        pose = z_up("-y") if view.pose is None else self._pose(view, view.pose)  # as its camera was held
        if isinstance(view.mount, BadFrame):
            raise view.mount
        return pose if view.mount is None else pose @ view.mount

    def _origin(self, scene: str) -> np.ndarray:
        """What is subtracted from all places of a scene, whole meters [3]: points are in float32, see `FAR`."""
        if scene not in self._origins:  # threads that meet here find the same, and none an unfinished one
            self._origins[scene] = next(self._origins_of(scene), np.zeros(3))
        return self._origins[scene]

    def _origins_of(self, scene: str) -> Iterator[np.ndarray]:
        for view in self._recordings[scene].views.values():
            with suppress(BadFrame):
                if view.pose is not None:
                    place = self._cam_to_world(view)[:3, 3]
                    yield np.where(np.abs(place) > FAR, np.floor(place), 0.0)

    def _pose(self, view: View, pose: np.ndarray | Path | BadFrame) -> np.ndarray:
        if isinstance(pose, BadFrame):
            raise pose
        if isinstance(pose, Path):
            return self.conventions.cam_to_world(read_pose_file(pose), pose)
        return self.conventions.cam_to_world(pose, view.color)  # of its own, so that each is counted

    def _refuse_unusable(self) -> None:
        """Raise `DataError` where no frame of any recording has a camera, or none that has poses a usable one."""
        views = [view for recording in self._recordings.values() for view in recording.views.values()]
        cameras = [view.camera for view in views if isinstance(view.camera, BadFrame)]
        if self.assembly.camera is None and len(cameras) == len(views):
            raise DataError(
                f"No frame in {str(self.root)!r} has intrinsics: {cameras[0]}. Give them: "
                "--set data.options='{intrinsics: FILE}' or {intrinsics: [fx, fy, cx, cy]}, in pixels."
            )
        poses = [view.pose for view in views if isinstance(view.pose, BadFrame)]
        if len(poses) == len(views):
            raise DataError(f"No frame in {str(self.root)!r} has a pose: {poses[0]}.")


def folders_with(root: Path, is_recording: Callable[[Path, set[str], set[str]], bool]) -> Iterator[Path]:
    """Folders under `root`, itself included, for which `is_recording(path, subfolders, files)`; not those inside one.

    Files of a recording are never walked through: there may be a hundred thousand.
    """
    for place, folders, names in walked(root):
        if is_recording(place, set(folders), set(names)):
            folders.clear()
            yield place


def readable(places: Iterable[P], read: Callable[[P], T]) -> list[T]:
    """`read(place)` of every recording; broken ones are left out, of which a warning tells.

    Raises the `BadFrame` of the first where all are broken.
    """
    found, broken = [], list[BadFrame]()
    for place in places:
        try:
            found.append(read(place))
        except BadFrame as bad:
            broken.append(bad)
    if broken and not found:
        raise broken[0]
    if broken and parent_process() is None:  # told once
        count = len(broken) + len(found)
        warnings.warn(f"{len(broken)} of {count} recordings are left out: {some(map(str, broken))}.", stacklevel=2)
    return found


def walked(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` in order of names, through links too, but not into one that leads back to a folder above."""
    above: dict[Path, frozenset[tuple[int, int]]] = {}
    for where, folders, names in os.walk(root, followlinks=True):
        place = Path(where)
        stat = place.stat()
        known, own = above.get(place.parent, frozenset()), (stat.st_dev, stat.st_ino)
        if own in known:
            folders.clear()
            continue
        above[place] = known | {own}
        folders.sort()
        yield place, folders, sorted(names)


def files_below(root: Path, *patterns: str) -> Iterator[Path]:
    """The files below a folder whose names match one of the patterns of `fnmatch`; through links, each folder once.

    Hidden files are left out, such as the ._NAME that macOS leaves beside each NAME.
    A folder that lies there is found where it lies, not where a link to it does.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        tops, waiting = waiting, []
        for where, folders, names in (found for top in tops for found in os.walk(top)):
            place = Path(where)
            stat = place.stat()
            if (stat.st_dev, stat.st_ino) in seen:
                folders.clear()
                continue
            seen.add((stat.st_dev, stat.st_ino))
            waiting += [place / name for name in sorted(folders) if (place / name).is_symlink()]
            shown = (name for name in names if not name.startswith("."))
            yield from (place / name for name in shown if any(fnmatchcase(name, pattern) for pattern in patterns))


def places_above(folder: Path, root: Path) -> list[Path]:
    """A recording's folder and those above it up to `root`, where what belongs to several recordings lies."""
    return [folder, *(parent for parent in folder.parents if parent == root or root in parent.parents)]


def scene_name(root: Path, folder: Path) -> str:
    """A recording's name: its path below the root, or the root's own name."""
    return folder.relative_to(root).as_posix() if folder != root else root.resolve().name


def images_in(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    """Images of a folder by stem, in natural order; of several with one stem, the one with the first ending.

    Raises `BadFrame` where all its files have other endings.
    """
    there = files.visible(folder, "*")
    of_ending = {ending: [path for path in there if path.suffix.lower() == ending] for ending in reversed(endings)}
    found = {path.stem: path for paths in of_ending.values() for path in paths}
    if not found and (others := {path.suffix for path in there if path.suffix and path.is_file()}):
        raise BadFrame(folder, f"holds files {some(sorted(others))}; accepted are {', '.join(endings)}")
    return {stem: found[stem] for stem in sorted(found, key=natural_order)}


def read_listing(path: Path) -> list[tuple[int, list[str]]]:
    """Read a text file of one entry a line: (line number, words), without empty lines and comments (#).

    Raises `BadFrame`.
    """
    try:
        if path.stat().st_size > LISTING_BYTES:
            raise BadFrame(path, f"has {path.stat().st_size} bytes; at most {LISTING_BYTES} are accepted")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadFrame(path, "file is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadFrame(path, f"is no text ({first_line(error)})") from None
    rows = ((number, line.replace(",", " ").split()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, words) for number, words in rows if words and not words[0].startswith("#")]


def pose_of_words(words: Sequence[str], where: object) -> np.ndarray | BadFrame:
    """A pose [4, 4] of 16 or 12 numbers row by row, or of 7: tx ty tz qx qy qz qw. Else `BadFrame`, which is returned.

    Of 8, 13 and 17 words the first is a name or a time. NaN is kept: tracking was lost there.
    """
    words = words[1:] if len(words) in (8, 13, 17) else words
    try:
        numbers = np.array([float(word) for word in words])
    except ValueError:
        return BadFrame(where, f"{' '.join(words)[:60]!r} is no pose of numbers")
    if len(numbers) == 7:
        return pose_of_quaternion(numbers[:3].tolist(), numbers[3:].tolist(), where)
    if len(numbers) not in (12, 16):
        return BadFrame(where, f"{len(numbers)} numbers; a pose has 16, 12, or 7 (tx ty tz qx qy qz qw)")
    return np.vstack([numbers[:12].reshape(3, 4), numbers[12:] if len(numbers) == 16 else (0, 0, 0, 1)])


def pose_of_quaternion(position: Sequence[float], xyzw: Sequence[float], where: object) -> np.ndarray | BadFrame:
    """The motion [4, 4] of a translation and a unit quaternion (x, y, z, w); `BadFrame`, returned, for none."""
    quaternion = np.array(xyzw, dtype=np.float64)
    length = float(np.linalg.norm(quaternion))
    if not np.isfinite(length) or abs(length - 1) > QUATERNION_LENGTH:
        return BadFrame(where, f"pose has a quaternion of the length {length:.3g}, expected 1")
    x, y, z, w = quaternion / length
    pose = np.eye(4)
    pose[:3, :3] = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    pose[:3, 3] = position
    return pose


def read_pose_file(path: Path) -> np.ndarray:
    """Read the pose of one frame from its own file: 16, 12 or 7 numbers, see `pose_of_words`. Raises `BadFrame`."""
    numbers = files.read_numbers(path, (16, 12, 7), "a pose of 16, 12 or 7 numbers (tx ty tz qx qy qz qw)")
    pose = pose_of_words([repr(float(number)) for number in numbers], path)
    if isinstance(pose, BadFrame):
        raise pose
    return pose


# What tells a layout from others: a file or folder in the root, or one level below it.
SIGNS = {
    "tum": ("rgb.txt", "*/rgb.txt"),
    "transforms": ("transforms.json", "*/transforms.json"),
    "polycam": ("keyframes/cameras", "*/keyframes/cameras"),
    "arkitscenes": ("*/lowres_wide.traj", "*/*/lowres_wide.traj"),
    "record3d": ("*.r3d", "rgbd/0.jpg", "depth/0.exr", "*/depth/0.exr"),
    "colmap": tuple(f"{place}cameras.{end}" for place in ("", "sparse/", "*/sparse/") for end in ("txt", "bin")),
    "scannet": ("scene*/pose", "scene*/*.sens"),
    "seven_scenes": ("frame-*.pose.txt", "*/frame-*.pose.txt", "*/*/frame-*.pose.txt"),
    "redwood": ("*.log", "*/*.log"),
    "shards": ("*.tar", "*/*.tar"),
    "folder": ("color", "*/color"),
}


def hint(root: Path, name: str) -> str:
    """A sentence on the layouts that a folder looks like, other than `name`; "" if like none."""
    likely = [
        other
        for other, signs in SIGNS.items()
        if other != name and any(next(root.glob(sign), None) is not None for sign in signs)
    ]
    return f" It looks like {some((f'{other}:{root}' for other in likely), 2)}." if likely else ""


def existing_folder(root: Path, layout: str) -> None:
    """Raise `DataError` unless there is a folder; `layout` says what is expected in it."""
    if not root.is_dir():
        raise DataError(f"No folder {str(root)!r}: expected one with {layout}.")


def json_tree(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object, `BadFrame` with the path where there is none."""
    try:
        tree = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadFrame(path, f"{what} cannot be read ({first_line(error)})") from None
    if not isinstance(tree, dict):
        raise BadFrame(path, f"holds {type(tree).__name__}, expected {what}, a JSON object")
    return tree
