"""Placement of things: exact separation tests of oriented boxes, spots along walls and on surfaces.

A `Room` collects placed things. A new thing is accepted when the boxes of its parts overlap neither another thing's
parts nor a zone that must stay free (in front of doors, wardrobes, desks), and lie inside the room.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import numpy as np

from geo_pretrain.rooms.scene import Material, Part, Support, Thing, rotation_about

# Turn about z that makes a thing's front look into the room, for walls x-, x+, y-, y+.
WALL_TURNS = (-math.pi / 2, math.pi / 2, 0.0, math.pi)
_TOUCH = 0.002  # m; boxes that overlap by less count as touching


class Boxes:
    """Oriented boxes as arrays: center [N, 3], axes [N, 3, 3] (columns), half [N, 3]."""

    def __init__(self, parts: Iterable[Part]) -> None:
        parts = list(parts)
        self.center = np.array([p.center for p in parts]).reshape(-1, 3)
        self.axes = np.array([p.rotation for p in parts]).reshape(-1, 3, 3)
        self.half = np.array([p.bound for p in parts]).reshape(-1, 3)

    def reach(self) -> np.ndarray:
        """Half sizes [N, 3] of the axis-aligned boxes around each."""
        return np.asarray((np.abs(self.axes) * self.half[:, None, :]).sum(-1))

    def overlaps(self, other: Boxes, slack: float = _TOUCH) -> np.ndarray:
        """Test which boxes overlap by more than `slack` along every separating axis: bool [N, M]."""
        hit = np.zeros((len(self.center), len(other.center)), dtype=bool)
        if hit.size == 0:
            return hit
        gap = other.center[None] - self.center[:, None]
        reach = np.linalg.norm(self.half, axis=1)[:, None] + np.linalg.norm(other.half, axis=1)[None]
        i, j = np.nonzero((gap * gap).sum(-1) < reach * reach)
        if len(i):
            hit[i, j] = _cross_section(gap[i, j], self.axes[i], self.half[i], other.axes[j], other.half[j]) > slack
        return hit


def _cross_section(
    gap: np.ndarray, axes: np.ndarray, half: np.ndarray, other_axes: np.ndarray, other_half: np.ndarray
) -> np.ndarray:
    """Compute the least overlap [K] of pairs of boxes over the 15 separating axes; negative when they are apart."""
    mine, theirs = axes.swapaxes(-1, -2), other_axes.swapaxes(-1, -2)
    a, b = np.repeat(mine, 3, axis=1), np.tile(theirs, (1, 3, 1))
    edges = a[..., [1, 2, 0]] * b[..., [2, 0, 1]] - a[..., [2, 0, 1]] * b[..., [1, 2, 0]]
    length = np.sqrt((edges * edges).sum(-1, keepdims=True))
    edges = np.where(length > 1e-6, edges / np.maximum(length, 1e-6), mine[:, :1])  # parallel edges add no axis
    lines = np.concatenate([mine, theirs, edges], axis=1)
    reach = (np.abs(lines @ axes) * half[:, None]).sum(-1) + (np.abs(lines @ other_axes) * other_half[:, None]).sum(-1)
    return np.asarray((reach - np.abs((lines @ gap[..., None])[..., 0])).min(-1))


class Room:
    """Things placed so far in a room of inside `size` [3]; `rng` decides where the next one goes."""

    def __init__(self, rng: np.random.Generator, size: np.ndarray) -> None:
        self.rng = rng
        self.size = size
        self.things: list[Thing] = []
        self._parts: list[Part] = []
        self._zones: list[Part] = []
        self._boxes = Boxes([])
        self._zone_boxes = Boxes([])

    def fits(self, thing: Thing, *, ignore_zones: bool = False) -> bool:
        """Test whether a thing is inside the room, off everything placed and out of the zones that must stay free."""
        boxes = Boxes(thing.parts)
        reach = boxes.reach()
        low, high = (boxes.center - reach).min(0) + 1e-6, (boxes.center + reach).max(0) - 1e-6
        walls = np.array([self.size[0] / 2, self.size[1] / 2, self.size[2]])
        if (low < walls * (-1, -1, 0)).any() or (high > walls).any():
            return False
        if boxes.overlaps(self._boxes).any():
            return False
        return ignore_zones or not boxes.overlaps(self._zone_boxes).any()

    def add(self, thing: Thing, *, solid: bool = True) -> Thing:
        """Accept a placed thing. Rugs and the like are not `solid`: things stand on them."""
        self.things.append(thing)
        if solid:
            self._parts += thing.parts
            self._boxes = Boxes(self._parts)
        return thing

    def zone(self, thing: Thing, at: tuple[float, float], size: tuple[float, float], height: float = 1.9) -> bool:
        """Keep a box in front of a placed thing free (thing's frame, on the floor); False when it is taken already."""
        probe = Thing("box")
        probe.box((at[0], at[1], 0.02), (size[0], size[1], height), Material())
        probe.place(thing.rotation, thing.shift * (1, 1, 0))
        if Boxes(probe.parts).overlaps(self._boxes).any():
            return False
        self._zones += probe.parts
        self._zone_boxes = Boxes(self._zones)
        return True

    def try_at(self, thing: Thing, rotation: np.ndarray, shift: np.ndarray, *, front: float = 0.0) -> Thing | None:
        """Place and add if it fits; `front` meters before it must be free and stay so."""
        attempt = copy.copy(thing)
        low, high = thing.local_bounds()
        attempt.place(rotation, shift)
        if not self.fits(attempt):
            return None
        if front > 0 and not self.zone(
            attempt, ((low[0] + high[0]) / 2, high[1] + front / 2 + 0.01), (high[0] - low[0], front)
        ):
            return None
        return self.add(attempt)

    def wall_spot(
        self, thing: Thing, wall: int, along: float, gap: float, z: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute rotation and shift that put a thing's back `gap` from a wall, its middle at `along` on the wall."""
        rotation = rotation_about("z", WALL_TURNS[wall])
        normal, tangent = rotation @ np.array([0.0, 1.0, 0.0]), rotation @ np.array([1.0, 0.0, 0.0])
        reach = self.size[0] / 2 if wall < 2 else self.size[1] / 2
        low, _ = thing.local_bounds()
        shift = normal * (gap - low[1] - reach) + tangent * along
        return rotation, shift + np.array([0.0, 0.0, z])

    def wall_length(self, wall: int) -> float:
        """Length of a wall, meters."""
        return float(self.size[1] if wall < 2 else self.size[0])

    def against_wall(
        self,
        thing: Thing,
        *,
        walls: Iterable[int] | None = None,
        z: float = 0.0,
        gap: float | None = None,
        front: float = 0.0,
        tries: int = 16,
        corner: bool = False,
    ) -> Thing | None:
        """Try random spots along walls, or only their ends with `corner`."""
        options = list(range(4)) if walls is None else list(walls)
        low, high = thing.local_bounds()
        width = high[0] - low[0]
        for _ in range(tries):
            wall = int(self.rng.choice(options))
            space = (self.wall_length(wall) - width) / 2 - 0.03
            if space < 0:
                continue
            along = float(self.rng.choice([-1, 1])) * space if corner else float(self.rng.uniform(-space, space))
            distance = float(self.rng.uniform(0.02, 0.06)) if gap is None else gap
            placed = self.try_at(
                thing, *self.wall_spot(thing, wall, along - (low[0] + high[0]) / 2, distance, z), front=front
            )
            if placed:
                return placed
        return None

    def in_open(
        self, thing: Thing, *, middle: bool = False, tries: int = 12, front: float = 0.0, z: float = 0.0
    ) -> Thing | None:
        """Try random spots on the floor: near the middle and square to the walls, or anywhere at any angle."""
        for _ in range(tries):
            if middle:
                x, y = self.rng.normal(0, 0.1, 2) * self.size[:2]
                angle = float(self.rng.integers(4)) * math.pi / 2 + self.rng.normal(0, 0.03)
            else:
                x, y = self.rng.uniform(-0.5, 0.5, 2) * self.size[:2]
                angle = float(self.rng.uniform(0, 2 * math.pi))
            placed = self.try_at(thing, rotation_about("z", angle), np.array([x, y, z]), front=front)
            if placed:
                return placed
        return None

    def beside(self, thing: Thing, other: Thing, side: int, gap: float = 0.04) -> Thing | None:
        """Put a thing next to a placed one, backs in line; side -1 or +1 along the other's x."""
        low, high = thing.local_bounds()
        other_low, other_high = other.local_bounds()
        x = other_high[0] + gap - low[0] if side > 0 else other_low[0] - gap - high[0]
        local = np.array([x, other_low[1] - low[1], 0.0])
        return self.try_at(thing, other.rotation, other.rotation @ local + other.shift * (1, 1, 0))

    def facing(self, thing: Thing, other: Thing, at: tuple[float, float], jitter: float = 0.0) -> Thing | None:
        """Put a thing at a point of another's frame, its front towards the other's middle (rotated to an axis)."""
        x, y = at
        angle = 0.0 if y < 0 else math.pi
        if abs(x) > abs(y):
            angle = math.pi / 2 if x > 0 else -math.pi / 2
        rotation = other.rotation @ rotation_about("z", angle + float(self.rng.normal(0, jitter)))
        return self.try_at(thing, rotation, other.rotation @ np.array([x, y, 0.0]) + other.shift * (1, 1, 0))

    def on(
        self, owner: Thing, support: Support, thing: Thing, *, random_angle: Callable[[], float], tries: int = 5
    ) -> Thing | None:
        """Stand a small thing on a support of a placed owner, anywhere that is free."""
        low, high = thing.local_bounds()
        if high[2] - low[2] > support.headroom:
            return None
        for _ in range(tries):
            angle = random_angle()
            c, s = abs(math.cos(angle)), abs(math.sin(angle))
            wide, deep = (high - low)[0] * c + (high - low)[1] * s, (high - low)[0] * s + (high - low)[1] * c
            room_x, room_y = (support.width - wide) / 2, (support.depth - deep) / 2
            if room_x < 0 or room_y < 0:
                continue
            spin = rotation_about("z", angle)
            middle = spin @ ((low + high) / 2 * (1, 1, 0))
            local = np.array(
                [
                    support.x + self.rng.uniform(-room_x, room_x),
                    support.y + self.rng.uniform(-room_y, room_y),
                    support.z + 0.0005 - low[2],
                ]
            )
            attempt = copy.copy(thing)
            attempt.place(owner.rotation @ spin, owner.rotation @ (local - middle) + owner.shift)
            if self.fits(attempt, ignore_zones=True):
                return self.add(attempt)
        return None
