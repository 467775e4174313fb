"""Indoor data sets that the library scenezoo reads: ScanNet++, ARKitScenes, Matterport3D, 3RScan, MultiScan and others.

`data.options.dataset` names the set, `camera` one of its cameras (None: the set's own choice). Every camera with depth
serves: pinhole cameras as they are, and Aria Synthetic Environments' fisheye camera, whose images are resampled to a
pinhole camera of the same size and focal length. Color is brought onto the grid of depth by the two cameras'
intrinsics. Frames are not turned upright. Needs scenezoo (extra `datasets`).
Source: scenezoo 0.3.1 (https://github.com/eamonn-zh/scenezoo); FISHEYE624: Project Aria's camera models.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from geo_pretrain.errors import BadFrame, DataError, RecipeError, first_line, require, unknown
from geo_pretrain.training.checks import Count
from geo_pretrain.training.data import files
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.data.sources.recording import existing_folder

PINHOLES = (None, "PINHOLE", "SIMPLE_PINHOLE")
CAMERAS = ("world_to_camera", "depth_intrinsics")
IMAGES = ("rgb", "depth", "rgb_intrinsics", *CAMERAS)
LEVELS = 3  # of folders below the root in which scenes are looked for
UNREADABLE = "unreadable"  # the only frame of a scene that cannot be listed


@dataclass(frozen=True)
class SceneZooOptions:
    """Options of the source."""

    dataset: str | None = None  # its name in scenezoo
    camera: str | None = None  # one of the data set's frame sources
    subset: str | None = None  # an official split; None: all scenes
    scenes: tuple[str, ...] | None = None  # names of scenes, in place of those of the subset
    every: Count = 1  # use every n-th frame


class SceneZoo:
    """Frames that scenezoo reads."""

    name = "scenezoo"

    def __init__(self, root: Path, dataset: Any, options: SceneZooOptions, rooms: bool) -> None:
        self.root, self.dataset, self.config, self._rooms = root, dataset, options, rooms
        self._scenes = self._list_scenes()
        if not self._scenes:
            raise DataError(f"No scene of {options.dataset} in {str(root)!r}.")
        self._listed = lru_cache(maxsize=64)(self._list_frames)

    def scenes(self) -> list[str]:
        return list(self._scenes)

    def frame_ids(self, scene: str) -> list[str]:
        """Names of the frames that have a camera; of a scene that cannot be listed one, which says why when loaded."""
        listed = self._listed(scene)
        return [UNREADABLE] if isinstance(listed, BadFrame) else [f"{index:06d}" for index in listed]

    def load(self, scene: str, frame_id: str) -> Frame:
        if isinstance(listed := self._listed(scene), BadFrame):
            raise listed
        batch = self._read(scene, IMAGES, indices=[int(frame_id)])
        if batch.depth is None or batch.rgb is None or not len(batch):
            raise BadFrame(f"{scene}/{frame_id}", "has no depth or no color")
        return frame_of(batch, scene, frame_id)

    def fingerprint(self) -> str:
        """A digest of the options, the scenes, and names, sizes and times of what lies at most two levels deep."""
        near = [path for level in ("*", "*/*") for path in self.root.glob(level)]
        facts = [json.dumps(asdict(self.config)), *self._scenes, files.files_fingerprint(self.root, near)]
        return hashlib.sha256("\0".join(facts).encode()).hexdigest()

    def _read(self, scene: str, items: tuple[str, ...], **chosen: Any) -> Any:
        """Frames of a scene as scenezoo's `FrameBatch`. Raises `BadFrame`."""
        name, _, room = scene.rpartition("/") if self._rooms else (scene, "", "")
        if self._rooms:
            chosen["room_id"] = room
        if self.config.camera is not None:
            chosen["source"] = self.config.camera
        return called(scene, lambda: self.dataset.get_frames(name, items=items, rotate_to_up=False, **chosen))

    def _list_frames(self, scene: str) -> list[int] | BadFrame:
        try:
            batch = self._read(scene, CAMERAS, step=self.config.every)
        except BadFrame as bad:
            return bad
        return [int(index) for index in batch.indices]

    def _list_scenes(self) -> list[str]:
        """The scenes asked for, else those of the subset whose names occur on the disk (all, if none does)."""
        options = self.config
        if options.scenes is not None:
            return list(options.scenes)
        try:
            named = called(self.root, lambda: self.dataset.get_ids(options.subset))
        except BadFrame as bad:
            raise DataError(
                f"The scenes of {options.dataset} cannot be listed: {bad}. Give their names: "
                "--set data.options.scenes='[SCENE, ...]'."
            ) from None
        here = names_below(self.root, LEVELS)
        ids = [str(id) for id in named]
        ids = [id for id in ids if id.rpartition("/")[2] in here] or ids
        if not self._rooms:
            return ids
        rooms = []
        for id in ids:
            try:
                rooms += [f"{id}/{room}" for room in called(id, partial(self.dataset.get_room_ids, id))]
            except BadFrame:
                continue  # not on this disk
        return rooms


def open_scenezoo(root: Path, options: SceneZooOptions) -> SceneZoo:
    """Open a data set by scenezoo. Raises `UnknownName` and `RecipeError` for names that it does not have."""
    zoo: Any = require("scenezoo", "datasets")
    usable = {name: spec for name in zoo.list_datasets() if (spec := zoo.get_dataset_info(name).spec).frame_sources}
    if options.dataset is None:
        raise RecipeError(
            f"'data.options.dataset' is missing; accepted are {', '.join(usable)}: --set data.options.dataset=NAME."
        )
    known = {alias: zoo.get_dataset_info(alias).name for alias in zoo.list_datasets(include_aliases=True)}
    name = known.get(options.dataset.lower())
    if name not in usable:
        raise unknown("data set of scenezoo with frames", options.dataset, usable)
    cameras = {camera.name: camera for camera in usable[name].frame_sources if "depth" in camera.items}
    camera = cameras.get(options.camera or next(iter(cameras)))
    if camera is None:
        raise unknown(f"camera of {name} with depth", str(options.camera), cameras)
    existing_folder(root, f"the data set {name}")
    dataset = called(root, lambda: zoo.get_dataset(name, root))
    return SceneZoo(root, dataset, options, rooms="room_id" in camera.requires)


def called(where: object, call: Callable[[], Any]) -> Any:
    """What a call of scenezoo returns; what it raises becomes a `BadFrame`, for it parses files of many makers."""
    try:
        return call()
    except Exception as error:
        raise BadFrame(where, f"scenezoo: {first_line(error)}") from None


def names_below(root: Path, levels: int) -> set[str]:
    """Names, without endings, of files and folders down to so many levels."""
    names: set[str] = set()
    folders: Iterable[Path] = [root]
    for _ in range(levels):
        entries = [entry for folder in folders for entry in os.scandir(folder)]
        names.update(part for entry in entries for part in (entry.name, entry.name.partition(".")[0]))
        folders = [Path(entry.path) for entry in entries if entry.is_dir()]
    return names


def frame_of(batch: Any, scene: str, frame_id: str) -> Frame:
    """The first frame of a `FrameBatch`, at the size of its depth and through a pinhole camera. Raises `BadFrame`."""
    where = f"{scene}/{frame_id}"
    color, depth = np.asarray(batch.rgb[0]), np.asarray(batch.depth[0], dtype=np.float32)
    given = [batch.rgb_intrinsics, batch.depth_intrinsics, batch.world_to_camera]
    if any(value is None for value in given):
        raise BadFrame(where, "has no intrinsics or no pose")
    color_matrix, matrix, world_to_camera = (np.array(value[0], dtype=np.float64) for value in given)
    faults = [files.intrinsics_fault(each) for each in (matrix, color_matrix)]
    if (fault := faults[0] or faults[1]) is not None:
        raise BadFrame(where, f"intrinsics {fault}")
    if (fault := files.pose_fault(world_to_camera)) is not None:
        raise BadFrame(where, f"pose {fault}")
    if batch.camera_model == "FISHEYE624" and batch.distortion is not None:
        color, depth = pinhole_of(color, depth, matrix, np.asarray(batch.distortion[0], np.float64))
        color_matrix = matrix
    elif batch.camera_model not in PINHOLES:
        raise BadFrame(where, f"camera is {batch.camera_model}, no pinhole camera; choose data.options.camera")
    if batch.depth_mode == "ray_distance":
        depth = depth / np.linalg.norm(rays(matrix, depth.shape), axis=-1).astype(np.float32)
    color, depth = color_at(color, color_matrix, depth, matrix)
    if not depth.any():
        raise BadFrame(where, "no pixel has a valid depth")
    return Frame(scene, frame_id, color, depth, matrix, np.linalg.inv(world_to_camera))


def color_at(
    color: np.ndarray, color_matrix: np.ndarray, depth: np.ndarray, matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sample color [H, W, 3] at the pixels of depth [h, w]; depth is invalid where color does not reach.

    The two cameras stand at one place and differ in their intrinsics alone.
    """
    image, whole = Image.fromarray(color), Image.new("L", (color.shape[1], color.shape[0]), 255)
    scale = color_matrix[[0, 1], [0, 1]] / matrix[[0, 1], [0, 1]]
    shift = color_matrix[:2, 2] - scale * matrix[:2, 2]
    by = max(1, int(min(scale) + 0.01))
    if by > 1:  # the mean of the pixels that fall into one
        image, whole = image.reduce(by), whole.reduce(by)
        scale, shift = scale / by, (shift + 0.5) / by - 0.5
    (x, y), (dx, dy) = scale, shift + 0.5 - 0.5 * scale  # of Pillow, whose first pixel has its corner at 0
    size, affine = depth.shape[::-1], (x, 0, dx, 0, y, dy)
    if size == image.size and np.allclose(affine, (1, 0, 0, 0, 1, 0), atol=1e-3):
        return np.asarray(image), depth
    sampled = image.transform(size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    inside = whole.transform(size, Image.Transform.AFFINE, affine, Image.Resampling.NEAREST)
    return np.asarray(sampled), np.where(np.asarray(inside) > 0, depth, 0).astype(np.float32)


def rays(matrix: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Directions (x, y, 1) of the pixels of a pinhole camera: float64 [H, W, 3]."""
    rows, columns = np.indices((size[0], size[1]))
    return np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(matrix).T


def pinhole_of(
    color: np.ndarray, depth: np.ndarray, matrix: np.ndarray, distortion: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Resample a fisheye image and its depth, at the nearest pixels, to a pinhole camera with the same matrix."""
    position = fisheye624(rays(matrix, depth.shape), distortion) @ matrix[:2, :2].T + matrix[:2, 2]
    column, row = np.round(position).astype(int).transpose(2, 0, 1)
    inside = (column >= 0) & (row >= 0) & (column < depth.shape[1]) & (row < depth.shape[0])
    column, row = np.where(inside, column, 0), np.where(inside, row, 0)
    return np.where(inside[..., None], color[row, column], 0), np.where(inside, depth[row, column], 0)


def fisheye624(directions: np.ndarray, distortion: np.ndarray) -> np.ndarray:
    """Project directions (x, y, 1) [..., 3] to a fisheye image of focal length 1: [..., 2].

    Args:
        distortion: k0 .. k5 of the angle's odd powers, p0, p1 (tangential), s0 .. s3 (thin prism).
    """
    k, (p0, p1), (s0, s1, s2, s3) = distortion[:6], distortion[6:8], distortion[8:12]
    radius = np.linalg.norm(directions[..., :2], axis=-1).clip(1e-12)
    angle = np.arctan(radius)
    bent = angle * (1 + sum(k[i] * angle ** (2 * i + 2) for i in range(6)))
    x, y = (directions[..., axis] * bent / radius for axis in (0, 1))
    square = x * x + y * y
    twice = 2 * (x * p0 + y * p1)
    return np.stack(
        [
            x + twice * x + square * p0 + s0 * square + s1 * square**2,
            y + twice * y + square * p1 + s2 * square + s3 * square**2,
        ],
        axis=-1,
    )
