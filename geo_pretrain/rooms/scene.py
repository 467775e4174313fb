"""The parts of a room: materials, convex parts, things built from parts, and the packed scene for ray casting.

A part is one convex solid in a unit frame, stretched by half sizes (meters), rotated and moved: a box, a box whose top
is scaled (frustum), or a quadric (cylinder, cone, ellipsoid). Everything visible is a part or one of the six shell
faces (floor, ceiling, four walls) of the room's inside box. World frame: meters, z up, floor at z = 0, room centered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

CLASSES: tuple[str, ...] = (
    "unlabeled",
    "wall",
    "floor",
    "ceiling",
    "window",
    "door",
    "bed",
    "sofa",
    "chair",
    "table",
    "desk",
    "cabinet",
    "shelf",
    "lamp",
    "picture",
    "rug",
    "curtain",
    "plant",
    "tv",
    "pillow",
    "book",
    "bin",
    "stool",
    "vase",
    "box",
    "ball",
)
CLASS_ID: dict[str, int] = {name: index for index, name in enumerate(CLASSES)}

BOX, FRUSTUM, QUADRIC, SHELL = range(4)

# Columns of the packed material table (float32): see `Material.row`.
M_KIND, M_BASE, M_SECOND, M_SCALE, M_GLOSS, M_SHINE, M_EMIT, M_SEED, M_GRAIN, M_COLUMNS = (
    0,
    1,
    4,
    7,
    8,
    9,
    10,
    11,
    12,
    13,
)


@dataclass(frozen=True)
class Material:
    """How a surface looks. Colors are linear RGB in [0, 1]; `scale` is the pattern's period in meters."""

    pattern: int = 0  # index into textures.PATTERNS
    base: tuple[float, float, float] = (0.5, 0.5, 0.5)
    second: tuple[float, float, float] = (0.5, 0.5, 0.5)
    scale: float = 0.2
    gloss: float = 0.0  # strength of the mirror-like term, 0..1
    shine: float = 20.0  # Blinn-Phong exponent
    emit: float = 0.0  # radiance that the surface gives off by itself, times its color
    seed: int = 0  # below 4096: phases and per-cell colors
    grain: float = 0.0  # strength of a fine noise over everything

    def row(self) -> list[float]:
        """The packed form, `M_COLUMNS` floats."""
        shape = (self.scale, self.gloss, self.shine, self.emit, float(self.seed), self.grain)
        return [float(self.pattern), *self.base, *self.second, *shape]


@dataclass(frozen=True)
class Part:
    """One convex solid: local = rotation^T (world - center); inside the unit solid after division by `half`.

    `taper` scales the cross-section linearly from 1 at local z = -half to `taper` at local z = +half.
    """

    kind: int
    center: np.ndarray  # [3] m
    half: np.ndarray  # [3] m
    rotation: np.ndarray  # [3, 3]
    material: Material
    taper: tuple[float, float] = (1.0, 1.0)
    sphere: bool = False  # a quadric that is an ellipsoid, not a cylinder
    casts: bool = True  # casts shadows
    name: str = ""  # what it is of its thing, such as "legs"; "" for things that are not taken apart

    @cached_property
    def bound(self) -> np.ndarray:
        """Half sizes [3] of the oriented box around the solid, in its own frame."""
        wide, deep = max(1.0, self.taper[0]), max(1.0, self.taper[1])
        return self.half if wide == deep == 1.0 else self.half * (wide, deep, 1.0)

    @property
    def coef(self) -> tuple[float, float, float, float]:
        """Frustum: |x| <= c0 + c1 z, |y| <= c2 + c3 z. Quadric: x^2 + y^2 <= c0 + c1 z + c2 z^2 (unit frame)."""
        (mx, nx), (my, ny) = (((1 + k) / 2, (k - 1) / 2) for k in self.taper)
        if self.kind != QUADRIC:
            return mx, nx, my, ny
        return (1.0, 0.0, -1.0, 0.0) if self.sphere else (mx * mx, 2 * mx * nx, nx * nx, 0.0)

    def moved(self, rotation: np.ndarray, shift: np.ndarray) -> Part:
        """Return this part moved by x -> rotation x + shift."""
        return replace(self, center=rotation @ self.center + shift, rotation=rotation @ self.rotation)


def rotation_about(axis: str, angle: float) -> np.ndarray:
    """Rotation matrix [3, 3] about the axis x, y or z by `angle` radians (right-handed)."""
    c, s = math.cos(angle), math.sin(angle)
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


@dataclass
class Support:
    """A flat rectangle on which smaller things stand: center, height and full size, in the thing's frame."""

    x: float
    y: float
    z: float
    width: float
    depth: float
    headroom: float = 1.0
    kind: str = "top"  # "top" of furniture, or "shelf": a board inside a shelf


@dataclass
class Lamp:
    """A point light inside a thing, in the thing's frame; `color` is its intensity (linear RGB)."""

    position: tuple[float, float, float]
    color: tuple[float, float, float]


@dataclass
class Thing:
    """One object instance under construction: +y is its front, +z up, the origin is on the floor at its center.

    `parts` are in the thing's frame until `place` moves them into the room.
    """

    label: str
    parts: list[Part] = field(default_factory=list)
    supports: list[Support] = field(default_factory=list)
    lamps: list[Lamp] = field(default_factory=list)
    rotation: np.ndarray = field(default_factory=lambda: np.eye(3))
    shift: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def box(
        self,
        at: Sequence[float],
        size: Sequence[float],
        material: Material,
        *,
        taper: tuple[float, float] = (1.0, 1.0),
        rotation: np.ndarray | None = None,
        casts: bool = True,
        name: str = "",
    ) -> None:
        """Add a box standing on `at` = (x, y, bottom z), full `size` (x, y, z); `taper` scales its top face."""
        half = np.asarray(size, dtype=np.float64) / 2
        center = np.asarray(at, dtype=np.float64) + (0, 0, half[2])
        kind = BOX if taper == (1.0, 1.0) else FRUSTUM
        self.parts.append(Part(kind, center, half, _or_eye(rotation), material, taper, casts=casts, name=name))

    def cylinder(
        self,
        at: Sequence[float],
        diameter: float,
        height: float,
        material: Material,
        *,
        top: float = 1.0,
        rotation: np.ndarray | None = None,
        squash: float = 1.0,
        casts: bool = True,
        name: str = "",
    ) -> None:
        """Add a cylinder standing on `at`; its top has `top` times the diameter, its depth `squash` times it."""
        half = np.array([diameter / 2, diameter / 2 * squash, height / 2])
        center = np.asarray(at, dtype=np.float64) + (0, 0, height / 2)
        self.parts.append(Part(QUADRIC, center, half, _or_eye(rotation), material, (top, top), casts=casts, name=name))

    def ellipsoid(
        self,
        at: Sequence[float],
        size: Sequence[float],
        material: Material,
        *,
        rotation: np.ndarray | None = None,
        name: str = "",
    ) -> None:
        """Add an ellipsoid with its lowest point at `at` (before `rotation` about its center) and full `size`."""
        half = np.asarray(size, dtype=np.float64) / 2
        center = np.asarray(at, dtype=np.float64) + (0, 0, half[2])
        self.parts.append(Part(QUADRIC, center, half, _or_eye(rotation), material, sphere=True, name=name))

    def place(self, rotation: np.ndarray, shift: Sequence[float] | np.ndarray) -> None:
        """Move the whole thing by x -> rotation x + shift; may be called again to move it further."""
        offset = np.asarray(shift, dtype=np.float64)
        self.parts = [part.moved(rotation, offset) for part in self.parts]
        self.rotation = rotation @ self.rotation
        self.shift = rotation @ self.shift + offset

    def local_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner [3] of the parts in the thing's own frame."""
        center = (np.array([part.center for part in self.parts]) - self.shift) @ self.rotation
        axes = np.einsum("ji,pjk->pik", self.rotation, np.array([part.rotation for part in self.parts]))
        reach = (np.abs(axes) * np.array([part.bound for part in self.parts])[:, None, :]).sum(-1)
        return (center - reach).min(0), (center + reach).max(0)


def _or_eye(rotation: np.ndarray | None) -> np.ndarray:
    return np.eye(3) if rotation is None else rotation


@dataclass(frozen=True)
class OrientedBox:
    """The tight box of one instance: corners are center + rotation @ (+-size / 2). Meters, world frame."""

    center: np.ndarray  # [3]
    size: np.ndarray  # [3], full
    rotation: np.ndarray  # [3, 3], columns are the box axes; a rotation about z
    semantic: int
    instance: int


@dataclass(frozen=True)
class Lights:
    """Point lights [L]. A positive `facing` makes a light shine with the cosine to `normal` only (a window)."""

    position: np.ndarray  # [L, 3] m
    color: np.ndarray  # [L, 3] linear intensity; falls off with 1 / (0.5 + distance^2)
    normal: np.ndarray  # [L, 3]
    facing: np.ndarray  # [L], 0 or 1


@dataclass(frozen=True)
class Sun:
    """Sunlight through windows: from a far `position`, through `rects` [K, 4] (lo, hi, z0, z1) of one wall."""

    position: np.ndarray  # [3] m
    color: np.ndarray  # [3] linear
    wall: int  # 0: x-, 1: x+, 2: y-, 3: y+
    rects: np.ndarray  # [K, 4]


@dataclass(frozen=True)
class Scene:
    """A packed room. Parts come first, then the six shell faces: floor, ceiling, walls x-, x+, y-, y+."""

    name: str
    size: np.ndarray  # [3] inside width (x), depth (y), height (z), m
    kind: np.ndarray  # int64 [P]
    center: np.ndarray  # float64 [P, 3]
    rotation: np.ndarray  # float64 [P, 3, 3]
    half: np.ndarray  # float64 [P, 3]
    bound: np.ndarray  # float64 [P, 3]
    coef: np.ndarray  # float64 [P, 4]
    sphere: np.ndarray  # bool [P]
    casts: np.ndarray  # bool [P]
    material: np.ndarray  # float32 [P, M_COLUMNS]
    semantic: np.ndarray  # int64 [P]
    instance: np.ndarray  # int64 [P]
    boxes: tuple[OrientedBox, ...]
    lights: Lights
    sun: Sun | None
    ambient: np.ndarray  # [3] linear


# Outward axis and sign of each shell face, in the order of the packed scene.
SHELL_AXES: tuple[tuple[int, int], ...] = ((2, -1), (2, 1), (0, -1), (0, 1), (1, -1), (1, 1))


def pack(
    name: str,
    size: np.ndarray,
    things: Sequence[Thing],
    shell: Sequence[Material],
    lights: Lights,
    sun: Sun | None,
    ambient: np.ndarray,
) -> Scene:
    """Pack placed things and the six shell materials. Instance ids: things from 1 in order, then the shell faces."""
    parts = [part for thing in things for part in thing.parts]
    owner = [index for index, thing in enumerate(things) for _ in thing.parts]
    labels = [CLASS_ID[things[index].label] for index in owner]
    count = len(parts) + 6
    middle = np.array([0.0, 0.0, size[2] / 2])
    center, half = np.tile(middle, (count, 1)), np.tile(size / 2, (count, 1))
    rotation, coef = np.tile(np.eye(3), (count, 1, 1)), np.tile([1.0, 0.0, 1.0, 0.0], (count, 1))
    bound = half.copy()
    for index, part in enumerate(parts):
        center[index], half[index], rotation[index] = part.center, part.half, part.rotation
        coef[index], bound[index] = part.coef, part.bound
    shell_labels = [CLASS_ID["floor"], CLASS_ID["ceiling"], *[CLASS_ID["wall"]] * 4]
    return Scene(
        name=name,
        size=np.asarray(size, dtype=np.float64),
        kind=np.array([*(part.kind for part in parts), *[SHELL] * 6], dtype=np.int64),
        center=center,
        rotation=rotation,
        half=half,
        bound=bound,
        coef=coef,
        sphere=np.array([*(part.sphere for part in parts), *[False] * 6]),
        casts=np.array([*(part.casts for part in parts), *[False] * 6]),
        material=np.array([m.row() for m in [*(part.material for part in parts), *shell]], dtype=np.float32),
        semantic=np.array([*labels, *shell_labels], dtype=np.int64),
        instance=np.array([*(index + 1 for index in owner), *(len(things) + 1 + k for k in range(6))], dtype=np.int64),
        boxes=tuple(oriented_box(thing, index + 1) for index, thing in enumerate(things)),
        lights=lights,
        sun=sun,
        ambient=ambient,
    )


def oriented_box(thing: Thing, instance: int) -> OrientedBox:
    """Compute the box of a placed thing along its own axes (rotated about z)."""
    low, high = thing.local_bounds()
    center = thing.rotation @ ((low + high) / 2) + thing.shift
    return OrientedBox(center, high - low, thing.rotation.copy(), CLASS_ID[thing.label], instance)
