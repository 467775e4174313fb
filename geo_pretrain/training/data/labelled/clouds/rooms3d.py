"""Rooms as labelled whole scans, the embedded cloud data set: no path, no download.

A scan is what a camera saw of a room on its way: its depth frames fused to one colored point per occupied voxel, with
the class and the object of each. Boxes are those of the rooms' own geometry, whole even where the scan is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from geo_pretrain.errors import unknown
from geo_pretrain.hub.cache import default_cache
from geo_pretrain.progress import already
from geo_pretrain.rooms import CLASSES, RoomsConfig
from geo_pretrain.training.checks import Count, Meters, Ranged
from geo_pretrain.training.data.cache import cached_arrays
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D, LabelledCloud
from geo_pretrain.training.data.labelled.clouds.room_objects import ObjectsConfig, RoomObjects
from geo_pretrain.training.data.labelled.dataset import Progress
from geo_pretrain.training.data.labelled.rooms import STUFF
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.data.surfaces.fusing import fuse_labelled

VERSION = "1"  # changes whenever the same rooms would give other scans
# Classes of detection3d: ten, as in SUN RGB-D, large enough for the boxes of a scan of some cm.
DETECTED = ("bed", "sofa", "chair", "table", "desk", "cabinet", "shelf", "lamp", "plant", "stool")
OBJECT_TASKS = ("classification3d", "parts3d")
_OBJECTS = 1 << 16  # more than a room has: a label of fusion is class * _OBJECTS + object


@dataclass(frozen=True)
class Rooms3DOptions(Ranged):
    """Options of rooms as scans: how many, from which frames; and of their objects, for tasks on single objects.

    A scan or an object does not depend on how many there are.
    """

    section = "data.options."

    seed: int = 0
    scenes: int = 24  # of the training split
    val_scenes: int = 8
    frames: int = 24  # fused to a scan
    width: int = 160
    height: int = 120
    difficulty: str = "medium"
    depth_noise: bool = False  # Kinect-like noise and holes
    renderer: str = "torch"  # see `RoomsConfig`
    spacing: Meters = 0.02  # edge of the voxels that pixels are fused in
    min_points: Count = 50  # of an object in a scan, for it to be one in detection
    objects: Count = 240  # single objects of the training split, for classification3d and parts3d
    val_objects: Count = 120
    object_points: Count = 2048  # of each


class Rooms3D:
    """Scans of rooms as a `CloudSource`; ids are names of rooms, such as "rooms_train_0000"."""

    name = "rooms3d"

    def __init__(
        self, rooms: Rooms, task: str, *, spacing: float = 0.02, min_points: int = 50, cache_dir: Path | None = None
    ) -> None:
        self.rooms, self.split, self.task = rooms, rooms.config.split, task
        self.spacing, self.min_points = spacing, min_points
        self.stuff = () if task == "detection3d" else STUFF  # classes that no object belongs to
        self.classes = DETECTED if task == "detection3d" else CLASSES[1:]
        self._class_of = np.array([self.classes.index(name) + 1 if name in self.classes else 0 for name in CLASSES])
        self._counted = np.array([name in self.classes and name not in self.stuff for name in CLASSES])
        key = hashlib.sha256(f"{VERSION}:{rooms.digest}:{spacing!r}".encode()).hexdigest()
        self.digest, self.cache_dir = key, cache_dir or default_cache() / "rooms3d" / key[:16]

    def ids(self) -> list[str]:
        return self.rooms.scenes()

    def scene_of(self, id: str) -> str:
        return id

    def load(self, id: str) -> LabelledCloud:
        """Read a scan from the cache, where its frames are rendered and fused first when it is missing or damaged."""
        if id not in self.rooms.scenes():
            raise unknown("scan", id, self.rooms.scenes())
        scan = cached_arrays(self._path(id), partial(self._make, id), "scan")
        semantic, instance = scan["semantic"].astype(np.int64), scan["instance"].astype(np.int64)
        instance = np.where(self._counted[semantic], instance, 0)
        boxes = None
        if self.task == "detection3d":
            seen = np.bincount(instance, minlength=int(scan["box_instance"].max(initial=0)) + 1)
            large = seen >= self.min_points
            large[0] = False
            instance = np.where(large[instance], instance, 0)
            kept = self._counted[scan["box_semantic"]] & large[scan["box_instance"]]
            classes = self._class_of[scan["box_semantic"][kept]]
            boxes = Boxes3D(scan["box_center"][kept], scan["box_size"][kept], scan["box_heading"][kept], classes)
        return LabelledCloud(id, scan["points"], scan["colors"], self._class_of[semantic], instance, boxes)

    def prepare(self, progress: Progress | None = None) -> None:
        """Make the scans that the cache lacks, with `progress(done, total)` after each; safe in several processes."""
        names = self.ids()
        missing = [id for id in names if not self._path(id).exists()]
        if len(missing) < len(names):
            already(progress, len(names) - len(missing), len(names))
        for done, id in enumerate(missing, start=len(names) - len(missing) + 1):
            cached_arrays(self._path(id), partial(self._make, id), "scan")
            if progress is not None:
                progress(done, len(names))

    def fingerprint(self) -> str:
        """A digest of the scans and of what the task takes of them."""
        facts = f"{self.digest}:{self.rooms.config.scenes}:{self.task}:{self.min_points}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def _path(self, id: str) -> Path:
        return self.cache_dir / f"{id}.safetensors"

    def _make(self, id: str) -> Mapping[str, np.ndarray]:
        """Render and fuse a scan; boxes are those of all objects, seen or not."""
        frames = (self.rooms.load(id, frame) for frame in self.rooms.frame_ids(id))
        surface = fuse_labelled(frames, _labels, self.spacing)
        boxes = self.rooms.generator.boxes(id)
        turns = np.array([box.rotation for box in boxes]).reshape(-1, 3, 3)
        return {
            "points": surface.points,
            "colors": surface.colors,
            "semantic": (surface.labels // _OBJECTS).astype(np.uint8),
            "instance": (surface.labels % _OBJECTS).astype(np.uint16),
            "box_center": np.array([box.center for box in boxes], np.float32).reshape(-1, 3),
            "box_size": np.array([box.size for box in boxes], np.float32).reshape(-1, 3),
            "box_heading": np.arctan2(turns[:, 1, 0], turns[:, 0, 0]).astype(np.float32),
            "box_semantic": np.array([box.semantic for box in boxes], np.int64),
            "box_instance": np.array([box.instance for box in boxes], np.int64),
        }


def _labels(frame: Frame) -> np.ndarray:
    """Class and object of every pixel in one number: int64 [H, W]."""
    semantic, instance = cast(np.ndarray, frame.semantic), cast(np.ndarray, frame.instance)  # rooms have both
    return semantic.astype(np.int64) * _OBJECTS + instance


def open_rooms3d(
    split: str, task: str, options: Rooms3DOptions, progress: Progress | None = None
) -> Rooms3D | RoomObjects:
    """Open rooms as scans or as single objects; what the cache lacks is made, `progress(done, total)` after each."""
    source = _objects(split, task, options) if task in OBJECT_TASKS else _scans(split, task, options)
    source.prepare(progress)
    return source


def _objects(split: str, task: str, options: Rooms3DOptions) -> RoomObjects:
    count = options.objects if split == "train" else options.val_objects
    config = ObjectsConfig(options.seed, split, count, options.object_points, options.difficulty)
    return RoomObjects(config, task)


def _scans(split: str, task: str, options: Rooms3DOptions) -> Rooms3D:
    config = RoomsConfig(
        seed=options.seed,
        scenes=options.scenes if split == "train" else options.val_scenes,
        frames=options.frames,
        width=options.width,
        height=options.height,
        split=split,
        difficulty=options.difficulty,
        depth_noise=options.depth_noise,
        renderer=options.renderer,
    )
    return Rooms3D(Rooms(config, cache="none"), task, spacing=options.spacing, min_points=options.min_points)
