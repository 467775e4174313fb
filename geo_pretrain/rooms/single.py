"""Single objects: furniture of the rooms by itself, as points that know the part of the object they are on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from geo_pretrain.errors import unknown
from geo_pretrain.rooms import furniture, objects
from geo_pretrain.rooms.materials import Palette
from geo_pretrain.rooms.scene import Lights, Material, Scene, Thing, pack
from geo_pretrain.rooms.surface import surface_attributes, surface_sample

# Parts that an object of a category may be built of; not every object has all of them.
PARTS: dict[str, tuple[str, ...]] = {
    "bed": ("frame", "mattress", "board"),
    "cabinet": ("body", "doors", "legs"),
    "chair": ("seat", "back", "legs", "arms"),
    "desk": ("top", "sides", "drawers"),
    "lamp": ("foot", "pole", "shade"),
    "plant": ("pot", "stem", "leaves"),
    "shelf": ("boards", "sides", "back"),
    "sofa": ("seat", "back", "arms", "legs"),
    "stool": ("seat", "legs"),
    "table": ("top", "legs", "board"),
    "tv": ("screen", "foot"),
}


@dataclass(frozen=True)
class ObjectPoints:
    """Points on the outside of one object; its own frame: meters, z up, +y its front, the origin below its middle."""

    points: np.ndarray  # float32 [N, 3]
    normals: np.ndarray  # float32 [N, 3], unit, outwards
    colors: np.ndarray  # uint8 [N, 3], without light
    parts: np.ndarray  # int64 [N], place of the part in `PARTS` of the category


def make_object(category: str, rng: np.random.Generator, difficulty: str = "medium") -> Thing:
    """Build one object as rooms have it, in colors of a palette of its own. Raises `UnknownName`."""
    builders: dict[str, Callable[[np.random.Generator, Palette], Thing]] = {
        "bed": furniture.bed,
        "cabinet": furniture.cabinet,
        "chair": furniture.chair,
        "desk": furniture.desk,
        "lamp": objects.floor_lamp if rng.random() < 0.5 else objects.table_lamp,
        "plant": lambda rng, palette: objects.plant(rng, palette, small=bool(rng.random() < 0.5)),
        "shelf": furniture.shelf,
        "sofa": furniture.sofa,
        "stool": furniture.stool,
        "table": furniture.table,
        "tv": lambda rng, palette: objects.screen(rng, palette, float(rng.uniform(0.5, 1.4))),
    }
    if category not in builders:
        raise unknown("category", category, list(PARTS))
    return builders[category](rng, Palette(rng, difficulty))


def object_points(thing: Thing, rng: np.random.Generator, count: int) -> ObjectPoints:
    """Sample `count` points uniformly on the surfaces of an object that can be seen from somewhere outside of it.

    Its underside, where it stands on the floor, is left out.
    """
    scene = _alone(thing)
    names = [PARTS[thing.label].index(part.name) for part in thing.parts]
    low, high = thing.local_bounds()
    width, depth, height = high - low
    density = count / (width * depth + width * height + depth * height)  # half of what a plain box would take
    points, part = np.empty((0, 3)), np.empty(0, np.int64)
    while len(points) < count:  # what parts hide of one another is not known before
        points, part = surface_sample(scene, rng, density, shell=False)
        density *= 2
    chosen = rng.permutation(len(points))[:count]
    points, part = points[chosen], part[chosen]
    normals, colors, _, _ = surface_attributes(scene, points, part)
    return ObjectPoints(points.astype(np.float32), normals, colors, np.array(names, np.int64)[part])


def _alone(thing: Thing) -> Scene:
    """The object in the middle of an empty room that it does not touch, but for the floor."""
    low, high = thing.local_bounds()
    size = np.array([*(2 * np.maximum(np.abs(low), np.abs(high))[:2] + 2), high[2] + 2])
    lamp = Lights(np.array([[0.0, 0.0, high[2] + 1]]), np.ones((1, 3)), np.array([[0.0, 0.0, -1.0]]), np.zeros(1))
    return pack(thing.label, size, [thing], [Material()] * 6, lamp, None, np.ones(3))
