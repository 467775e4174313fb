"""Rooms with labels, the embedded data set: no path, no download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from geo_pretrain.errors import RecipeError, unknown
from geo_pretrain.rooms import CLASSES, RoomsConfig
from geo_pretrain.training.checks import Count, Ranged
from geo_pretrain.training.data.labelled.image import LabelledImage
from geo_pretrain.training.data.labelled.instances import instances_from_ids
from geo_pretrain.training.data.labelled.mapping import LabelMap
from geo_pretrain.training.data.sources.rooms import Rooms

STUFF = ("wall", "floor", "ceiling")  # segmented, not detected
# The coarse classes: each with what joins it. All others are objects.
COARSE = {
    "wall": ("ceiling",),
    "floor": ("rug",),
    "window": (),
    "door": (),
    "curtain": (),
    "bed": (),
    "sofa": (),
    "chair": ("stool",),
    "table": ("desk",),
    "cabinet": ("shelf",),
    "lamp": (),
}
OTHERS = "object"
_FULL = 640 * 480  # pixels of the frames for which the published minimum of 1000 holds


@dataclass(frozen=True)
class LabelledRoomsOptions(Ranged):
    """Options of labelled rooms: scenes to render, labelled frames. Images do not depend on the number of scenes."""

    section = "data.options."

    seed: int = 0
    scenes: int = 24  # of the training split
    val_scenes: int = 8
    frames: int = 12  # rendered per scene
    labelled: Count = 2  # of them, in a training scene; every frame of a validation scene has labels
    width: int = 160
    height: int = 120
    difficulty: str = "medium"
    renderer: str = "torch"  # see `RoomsConfig`
    min_pixels: Count | None = None  # of an object; None: as large a part of the image as 1000 pixels of 640x480
    classes: Literal["all", "coarse"] = "all"  # segmentation: all 25, or 12, each at least 1 % of the pixels


class LabelledRooms:
    """Rendered rooms as a labelled source; ids such as "rooms_train_0000/0003"."""

    name = "rooms"

    def __init__(
        self,
        rooms: Rooms,
        split: str,
        task: str,
        *,
        labelled: int,
        min_pixels: int | None = None,
        coarse: bool = False,
    ) -> None:
        self.rooms, self.split, self.task = rooms, split, task
        config = rooms.config
        if min_pixels is None:
            min_pixels = max(1, round(1000 * config.width * config.height / _FULL))
        self.labelled, self.min_pixels = min(labelled, config.frames), min_pixels
        self.coarse, self.labels = coarse, _coarse_labels() if coarse else _labels(task)
        self.classes = self.labels.classes

    def ids(self) -> list[str]:
        """The labelled frames of each scene, evenly spaced in time, starting later from scene to scene."""
        names = []
        for number, scene in enumerate(self.rooms.scenes()):
            frames = self.rooms.frame_ids(scene)
            places = [(number + k * len(frames) // self.labelled) % len(frames) for k in range(self.labelled)]
            names += [f"{scene}/{frames[place]}" for place in places]
        return names

    def scene_of(self, id: str) -> str:
        return id.partition("/")[0]

    def load(self, id: str) -> LabelledImage:
        """Read one frame from the cache of rooms; its scene is rendered first when that is missing."""
        scene, _, frame_id = id.partition("/")
        if not frame_id:
            raise unknown("image", id, self.ids())
        frame = self.rooms.load(scene, frame_id)
        semantic, instance = cast(np.ndarray, frame.semantic), cast(np.ndarray, frame.instance)  # rooms have both
        if self.task == "segmentation":
            return LabelledImage(id, frame.color, self.labels.apply(semantic, id), None)
        ids = semantic.astype(np.int32) * 1000 + instance
        return LabelledImage(
            id, frame.color, None, instances_from_ids(ids, self.labels, id, min_pixels=self.min_pixels)
        )

    def fingerprint(self) -> str:
        """A digest of the rooms and of their labelled frames."""
        classes = ":coarse" if self.coarse else ""
        return f"{self.rooms.fingerprint()}[{self.task}:{self.labelled}:{self.min_pixels}{classes}]"


def open_rooms(
    split: str, task: str, options: LabelledRoomsOptions, progress: Callable[[int, int], None] | None = None
) -> LabelledRooms:
    """Open rooms with labels; scenes that the cache lacks are rendered, `progress(done, total)` after each."""
    coarse = options.classes == "coarse"
    if coarse and task != "segmentation":
        raise RecipeError(f"'data.options.classes' is 'coarse', accepted for labels of {task} is 'all'.")
    train = split == "train"
    rooms = Rooms(
        RoomsConfig(
            seed=options.seed,
            scenes=options.scenes if train else options.val_scenes,
            frames=options.frames,
            width=options.width,
            height=options.height,
            split=split,
            difficulty=options.difficulty,
            renderer=options.renderer,
        )
    )
    rooms.prepare(progress)
    labelled = options.labelled if train else options.frames
    return LabelledRooms(rooms, split, task, labelled=labelled, min_pixels=options.min_pixels, coarse=coarse)


def _labels(task: str) -> LabelMap:
    """Map labels to all classes for segmentation, to countable ones for detection."""
    chosen = CLASSES[1:] if task == "segmentation" else tuple(name for name in CLASSES[1:] if name not in STUFF)
    ids = {given: chosen.index(name) + 1 if name in chosen else 0 for given, name in enumerate(CLASSES)}
    return LabelMap("rooms", "class ids of rooms", chosen, ids)


def _coarse_labels() -> LabelMap:
    """Map labels to the coarse classes, for segmentation."""
    chosen = (*COARSE, OTHERS)
    joined = {other: name for name, others in COARSE.items() for other in others}
    ids = {0: 0}
    for given, name in enumerate(CLASSES[1:], start=1):
        kept = joined.get(name, name)
        ids[given] = chosen.index(kept if kept in COARSE else OTHERS) + 1
    return LabelMap("rooms, coarse", "groups of the classes of rooms", chosen, ids)
