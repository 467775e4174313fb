"""Single objects of rooms as labelled clouds, each with its category and the parts it is built of.

Categories are as unequally frequent as in real collections: of 24 objects one to five are of a category.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from geo_pretrain.errors import unknown
from geo_pretrain.hub.cache import default_cache
from geo_pretrain.rooms import GENERATOR
from geo_pretrain.rooms.generator import SPLITS
from geo_pretrain.rooms.single import PARTS, make_object, object_points
from geo_pretrain.training.data.cache import cached_arrays
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.dataset import Progress

VERSION = "1"  # changes whenever the same options would give other objects
CATEGORIES = tuple(sorted(PARTS))
PART_CLASSES = tuple(f"{category}/{part}" for category in CATEGORIES for part in PARTS[category])
# How many of each in a block of objects; blocks are shuffled.
_BLOCK = {"chair": 5, "table": 4, "cabinet": 3, "sofa": 3, "lamp": 2, "shelf": 2}
_SHARES = [number for number, name in enumerate(CATEGORIES, start=1) for _ in range(_BLOCK.get(name, 1))]


@dataclass(frozen=True)
class ObjectsConfig:
    """Which objects: the same config gives the same ones; an object does not depend on how many there are."""

    seed: int
    split: str
    count: int
    points: int  # of each
    difficulty: str

    def digest(self) -> str:
        """A sha256 (hex) of all that affects an object, so not of their number."""
        facts = [VERSION, GENERATOR, self.seed, self.split, self.points, self.difficulty, PARTS, _SHARES]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class RoomObjects:
    """Objects as a `CloudSource`; ids such as "rooms_train_object_00012", each a scene of its own.

    Task "classification3d": `classes` are the categories. Task "parts3d": `classes` are "category/part", and `labels`
    say them of every point. Both give the cloud its `category`. Points: the object's own frame, m, z up, +y its front.
    """

    name = "rooms3d"

    def __init__(self, config: ObjectsConfig, task: str, cache_dir: Path | None = None) -> None:
        self.config, self.split, self.task = config, config.split, task
        self.classes = PART_CLASSES if task == "parts3d" else CATEGORIES
        self.digest = config.digest()
        self.cache_dir = cache_dir or default_cache() / "rooms3d" / self.digest[:16]

    def ids(self) -> list[str]:
        return [f"rooms_{self.split}_object_{number:05d}" for number in range(self.config.count)]

    def scene_of(self, id: str) -> str:
        return id

    def category_of(self, id: str) -> int:
        """The category 1..K of an object, which is known without making it."""
        number = self._number(id)
        shuffled = self._rng(0, number // len(_SHARES)).permutation(_SHARES)
        return int(shuffled[number % len(_SHARES)])

    def load(self, id: str) -> LabelledCloud:
        """Read an object from the cache, where it is made first when it is missing or damaged."""
        category = self.category_of(id)
        arrays = cached_arrays(self._path(id), partial(self._make, id), "object")
        labels = None
        if self.task == "parts3d":
            first = PART_CLASSES.index(f"{CATEGORIES[category - 1]}/{PARTS[CATEGORIES[category - 1]][0]}")
            labels = arrays["parts"].astype(np.int64) + first + 1
        return LabelledCloud(id, arrays["points"], arrays["colors"], labels, category=category)

    def prepare(self, progress: Progress | None = None) -> None:
        """Make the objects that the cache lacks, with `progress(done, total)` after each; safe in several processes."""
        names = self.ids()
        for done, id in enumerate(names, start=1):
            if not self._path(id).exists():
                cached_arrays(self._path(id), partial(self._make, id), "object")
            if progress is not None:
                progress(done, len(names))

    def fingerprint(self) -> str:
        """A digest of the objects and of what the task takes of them."""
        return hashlib.sha256(f"{self.digest}:{self.config.count}:{self.task}".encode()).hexdigest()

    def _make(self, id: str) -> Mapping[str, np.ndarray]:
        category, rng = CATEGORIES[self.category_of(id) - 1], self._rng(1, self._number(id))
        thing = make_object(category, rng, self.config.difficulty)
        found = object_points(thing, rng, self.config.points)
        return {"points": found.points, "colors": found.colors, "parts": found.parts.astype(np.uint8)}

    def _path(self, id: str) -> Path:
        return self.cache_dir / f"{id}.safetensors"

    def _number(self, id: str) -> int:
        prefix, _, digits = id.rpartition("_")
        known = prefix == f"rooms_{self.split}_object" and len(digits) == 5 and digits.isdecimal()
        if not known or int(digits) >= self.config.count:
            raise unknown("object", id, self.ids())
        return int(digits)

    def _rng(self, purpose: int, number: int) -> np.random.Generator:
        """Independent streams for the categories of a block (0) and for each object (1)."""
        return np.random.default_rng([self.config.seed, SPLITS.index(self.split), 100 + purpose, number])
