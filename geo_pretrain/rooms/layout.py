"""A furnished room from a seed: shell, doors and windows, furniture by room type, small things, lights.

`make_scene` is the one entry. The order of random draws is part of the data's definition: changing it needs a new
`GENERATOR` version in `generator.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from geo_pretrain.rooms import furniture as fu
from geo_pretrain.rooms import objects as ob
from geo_pretrain.rooms.materials import Palette, linear
from geo_pretrain.rooms.placing import Room
from geo_pretrain.rooms.scene import Lights, Scene, Sun, Support, Thing, pack, rotation_about


@dataclass(frozen=True)
class Level:
    """What a difficulty changes about layout and light (materials: `materials.LOOKS`; sensor: `sensor.SENSORS`)."""

    clutter: float  # scales the number of small things
    lights: int  # most lights that cast shadows
    ambient: float  # light without direction
    sun: float  # chance of sunlight through the windows


LEVELS: dict[str, Level] = {
    "easy": Level(clutter=0.6, lights=2, ambient=0.5, sun=0.2),
    "medium": Level(clutter=1.0, lights=3, ambient=0.36, sun=0.4),
    "hard": Level(clutter=1.5, lights=4, ambient=0.26, sun=0.5),
}
ROOM_TYPES = ("bedroom", "living", "office", "dining", "studio")


def make_scene(name: str, rng: np.random.Generator, difficulty: str) -> Scene:
    """Build one room; the same generator state gives the same room."""
    level = LEVELS[difficulty]
    palette = Palette(rng, difficulty)
    size = np.array([rng.uniform(3.2, 5.6), rng.uniform(3.2, 5.6), rng.uniform(2.35, 2.9)])
    room = Room(rng, size)
    wall = palette.wall()
    walls = [wall if rng.random() < 0.75 else palette.wall() for _ in range(4)]
    shell = [palette.floor(), palette.ceiling(), *walls]
    _structure(room, palette)
    _doors(room, palette)
    day = bool(rng.random() < 0.75)
    windows = _windows(room, palette, 1.1 if day else 0.12)
    ceiling_on = not day or rng.random() < 0.75
    ceiling = _ceiling_lamps(room, palette)
    _FURNISH[str(rng.choice(ROOM_TYPES))](room, palette)
    _dress_walls(room, palette, level)
    _floor_things(room, palette, level)
    _fill_supports(room, palette, level)
    lights = _lights(room, windows if day else [], ceiling if ceiling_on else [], level)
    sun = _sun(room, windows, rng) if day and windows and rng.random() < level.sun else None
    tint = np.array(linear((0.98, 0.97, 0.95) if rng.random() < 0.5 else (0.93, 0.96, 1.0)))
    return pack(name, size, room.things, shell, lights, sun, tint * level.ambient * rng.uniform(0.8, 1.2))


def _structure(room: Room, palette: Palette) -> None:
    """Add baseboards, and at times a column in a corner, a chimney breast or ceiling beams; all of class wall."""
    rng, (w, d, h) = room.rng, room.size
    if rng.random() < 0.6:
        board, high = palette.hard(), rng.uniform(0.06, 0.11)
        thing = Thing("wall")
        for side in (-1, 1):
            thing.box((side * (w / 2 - 0.006), 0, 0), (0.012, d, high), board, casts=False)
            thing.box((0, side * (d / 2 - 0.006), 0), (w - 0.024, 0.012, high), board, casts=False)
        room.add(thing, solid=False)
    draw = rng.random()
    if draw < 0.3:
        column = Thing("wall")
        a, b = rng.uniform(0.25, 0.9, 2)
        column.box((0, 0, 0), (a, b, h), palette.wall())
        room.against_wall(column, gap=0.0, corner=False)
    elif draw < 0.45:
        beams, count = Thing("wall"), int(rng.integers(2, 5))
        wood = palette.wood()
        for k in range(count):
            beams.box((((k + 0.5) / count - 0.5) * w, 0, h - 0.14), (0.12, d, 0.14), wood)
        room.add(beams)


def _doors(room: Room, palette: Palette) -> None:
    for _ in range(int(room.rng.choice([1, 1, 2]))):
        width, height = room.rng.uniform(0.75, 0.95), room.rng.uniform(1.95, 2.1)
        room.against_wall(ob.door(room.rng, palette, width, height), gap=0.0, front=0.75)


def _windows(room: Room, palette: Palette, brightness: float) -> list[Thing]:
    """Add windows to one or two walls, alike within a room, with curtains in half of the rooms."""
    rng = room.rng
    width, height = rng.uniform(0.8, 1.8), rng.uniform(0.9, 1.4)
    sill = rng.uniform(0.75, 1.0)
    height = min(height, float(room.size[2]) - sill - 0.35)
    walls = rng.permutation(4)[: int(rng.integers(1, 3))]
    with_curtains = rng.random() < 0.55
    made: list[Thing] = []
    for wall in walls:
        for _ in range(2 if room.wall_length(int(wall)) > 2 * width + 1.4 and rng.random() < 0.6 else 1):
            thing = ob.window(rng, palette, width, height, brightness)
            placed = room.against_wall(thing, walls=[int(wall)], gap=0.0, z=sill)
            if placed is None:
                continue
            made.append(placed)
            if with_curtains:
                _hang_curtains(room, palette, placed, width, height, sill)
    return made


def _hang_curtains(room: Room, palette: Palette, window: Thing, width: float, height: float, sill: float) -> None:
    """Hang a curtain on each side of a window, half over the wall, from above it to the sill or the floor."""
    rng = room.rng
    top = min(sill + height + 0.14, float(room.size[2]) - 0.03)
    bottom = 0.04 if rng.random() < 0.6 else sill - 0.2
    wide = rng.uniform(0.25, 0.5)
    for side in (-1, 1):
        thing = ob.curtain(rng, palette, wide, top - bottom)
        local = np.array([side * (width / 2 + 0.1 + wide / 2), 0.06, bottom - sill])
        room.try_at(thing, window.rotation, window.rotation @ local + window.shift)


def _ceiling_lamps(room: Room, palette: Palette) -> list[Thing]:
    """Add one ceiling lamp in the middle, or two alike along the longer axis."""
    rng, (w, d, h) = room.rng, room.size
    spots = [(0.0, 0.0)]
    if max(w, d) > 4.6 and rng.random() < 0.6:
        spots = [(-w / 4, 0.0), (w / 4, 0.0)] if w > d else [(0.0, -d / 4), (0.0, d / 4)]
    thing = ob.ceiling_lamp(rng, palette)
    placed = [room.try_at(thing, np.eye(3), np.array([x, y, h - 0.001])) for x, y in spots]
    return [lamp for lamp in placed if lamp is not None]


def _bedroom(room: Room, palette: Palette) -> None:
    rng = room.rng
    bed = room.against_wall(fu.bed(rng, palette), tries=40)
    if bed is not None:
        night = fu.cabinet(rng, palette, "night")
        for side in (-1, 1):
            if rng.random() < 0.8:
                room.beside(night, bed, side)
        if rng.random() < 0.6:
            _rug(room, palette, bed)
    room.against_wall(fu.cabinet(rng, palette, "wardrobe"), front=0.4, tries=24)
    if rng.random() < 0.6:
        _desk_place(room, palette)
    if rng.random() < 0.5:
        _tv_place(room, palette)
    _maybe_wall(room, palette, (fu.shelf, 0.5), (_dresser, 0.5))
    if rng.random() < 0.4:
        room.against_wall(fu.sofa(rng, palette, 1))
    if rng.random() < 0.6:
        room.in_open(fu.stool(rng, palette))


def _living(room: Room, palette: Palette) -> None:
    rng = room.rng
    sofa = room.against_wall(fu.sofa(rng, palette, int(rng.integers(2, 4))), tries=40)
    if sofa is not None:
        high = sofa.local_bounds()[1]
        table = fu.table(rng, palette, low=True)
        reach = table.local_bounds()[1]
        _rug(room, palette, sofa, forward=high[1] + 0.7)
        room.facing(table, sofa, (0.0, high[1] + rng.uniform(0.3, 0.45) + reach[1]))
        chair = fu.sofa(rng, palette, 1)
        for side in (-1, 1):
            if rng.random() < 0.5:
                room.facing(
                    chair, sofa, (side * (high[0] + rng.uniform(0.3, 0.7)), high[1] + rng.uniform(0.4, 0.8)), 0.2
                )
    _tv_place(room, palette)
    _maybe_wall(room, palette, (fu.shelf, 0.9), (fu.shelf, 0.5), (_sideboard, 0.5), (_dresser, 0.4))
    if rng.random() < 0.5:
        _dining_set(room, palette, seats=2)
    if rng.random() < 0.4:
        room.in_open(fu.stool(rng, palette))


def _office(room: Room, palette: Palette) -> None:
    rng = room.rng
    for _ in range(int(rng.integers(2, 5))):
        _desk_place(room, palette)
    shelf = fu.shelf(rng, palette)
    for _ in range(int(rng.integers(1, 4))):  # alike: repeated things are hard to tell apart
        room.against_wall(shelf, front=0.3)
    _maybe_wall(room, palette, (_dresser, 0.7), (_sideboard, 0.5), (_wardrobe, 0.3))
    if rng.random() < 0.4:
        room.against_wall(fu.sofa(rng, palette, 2))
    elif rng.random() < 0.5:
        _dining_set(room, palette, seats=4)


def _dining(room: Room, palette: Palette) -> None:
    rng = room.rng
    _dining_set(room, palette, seats=6)
    _maybe_wall(room, palette, (_sideboard, 0.9), (fu.shelf, 0.7), (_dresser, 0.6), (_wardrobe, 0.3))
    if rng.random() < 0.5:
        room.against_wall(fu.sofa(rng, palette, 2))
    if rng.random() < 0.4:
        _tv_place(room, palette)
    stool = fu.stool(rng, palette)
    for _ in range(int(rng.integers(0, 4))):
        room.against_wall(stool)


def _studio(room: Room, palette: Palette) -> None:
    rng = room.rng
    bed = room.against_wall(fu.bed(rng, palette), corner=True, tries=40)
    if bed is not None and rng.random() < 0.5:
        room.beside(fu.cabinet(rng, palette, "night"), bed, int(rng.choice([-1, 1])))
    _desk_place(room, palette)
    sofa = room.against_wall(fu.sofa(rng, palette, int(rng.integers(1, 3))))
    if sofa is not None and rng.random() < 0.6:
        _rug(room, palette, sofa, forward=0.9)
    _maybe_wall(room, palette, (fu.shelf, 0.8), (_wardrobe, 0.7), (_dresser, 0.5))
    if rng.random() < 0.6:
        _dining_set(room, palette, seats=2)


_FURNISH = {"bedroom": _bedroom, "living": _living, "office": _office, "dining": _dining, "studio": _studio}


def _sideboard(rng: np.random.Generator, palette: Palette) -> Thing:
    return fu.cabinet(rng, palette, "side")


def _dresser(rng: np.random.Generator, palette: Palette) -> Thing:
    return fu.cabinet(rng, palette, "dresser")


def _wardrobe(rng: np.random.Generator, palette: Palette) -> Thing:
    return fu.cabinet(rng, palette, "wardrobe")


def _maybe_wall(room: Room, palette: Palette, *options: tuple[fu.Builder, float]) -> None:
    for builder, chance in options:
        if room.rng.random() < chance:
            room.against_wall(builder(room.rng, palette), front=0.3)


def _rug(room: Room, palette: Palette, near: Thing, forward: float = 0.3) -> None:
    """Add a rug in front of a thing, shifted back into the room; none if it does not fit."""
    rug = ob.rug(room.rng, palette)
    rug.place(near.rotation, near.rotation @ np.array([0, forward, 0]) + near.shift * (1, 1, 0))
    corners = np.abs(np.concatenate([part.bound[None] for part in rug.parts])).max(0)
    reach = np.abs(near.rotation) @ (corners * (1, 1, 0))
    limit = room.size[:2] / 2 - reach[:2] - 0.1
    if (limit < 0).any():
        return
    middle = rug.parts[0].center[:2]
    rug.place(np.eye(3), [*(np.clip(middle, -limit, limit) - middle), 0.0])
    room.add(rug, solid=False)


def _desk_place(room: Room, palette: Palette) -> None:
    """Add a desk at a wall with a chair in front of it and a screen on it."""
    rng = room.rng
    desk = room.against_wall(fu.desk(rng, palette), tries=20)
    if desk is None:
        return
    low, high = desk.local_bounds()
    chair = fu.chair(rng, palette)
    front = chair.local_bounds()[1][1]
    for x in (0.0, -0.12, 0.12, -0.25, 0.25):
        if room.facing(chair, desk, (x, high[1] + front - rng.uniform(-0.35, 0.1)), 0.12):
            break
    if rng.random() < 0.8:
        screen = ob.screen(rng, palette, float(rng.uniform(0.5, 0.75)))
        spot = Support(
            rng.uniform(-0.2, 0.2), low[1] + 0.2, high[2], float(screen.local_bounds()[1][0]) * 2 + 0.05, 0.3
        )
        spot.z = desk.supports[0].z
        room.on(desk, spot, screen, random_angle=lambda: float(rng.normal(0, 0.08)))


def _tv_place(room: Room, palette: Palette) -> None:
    """Add a television on a sideboard, or on the wall."""
    rng = room.rng
    if rng.random() < 0.3:
        room.against_wall(ob.wall_screen(rng, palette), gap=0.0, z=float(rng.uniform(0.9, 1.2)))
        return
    board = room.against_wall(_sideboard(rng, palette), front=0.4)
    if board is not None:
        screen = ob.screen(rng, palette, float(rng.uniform(0.85, 1.2)))
        room.on(board, board.supports[0], screen, random_angle=lambda: 0.0)


def _dining_set(room: Room, palette: Palette, seats: int) -> None:
    """Add a table with chairs that are alike, pushed under it by various amounts."""
    rng = room.rng
    table = room.in_open(fu.table(rng, palette, low=False), middle=True, tries=25)
    if table is None:
        return
    high = table.local_bounds()[1]
    chair = fu.chair(rng, palette)
    chair_high = chair.local_bounds()[1]
    wide, deep = float(high[0]), float(high[1])
    round_table = abs(wide - deep) < 0.02
    sides = [(0.0, -1.0), (0.0, 1.0), (1.0, 0.0), (-1.0, 0.0)]
    if not round_table and wide > 0.7:
        sides = [(-0.45, -1.0), (0.45, -1.0), (-0.45, 1.0), (0.45, 1.0), (1.0, 0.0), (-1.0, 0.0)]
    for x, y in sides[:seats] if seats > 2 else [sides[0], sides[3]]:
        out = float(chair_high[1]) - rng.uniform(-0.12, 0.15) + (0.12 if round_table else 0.0)
        at = (x * (wide - 0.05), y * (deep + out)) if y else (x * (wide + out), 0.0)
        room.facing(chair, table, at, 0.08)


def _dress_walls(room: Room, palette: Palette, level: Level) -> None:
    """Hang pictures in free wall space, at times a row of equal ones."""
    rng = room.rng
    for _ in range(rng.poisson(2.5 + 1.5 * level.clutter)):
        thing = ob.picture(rng, palette)
        room.against_wall(thing, gap=0.0, z=float(rng.uniform(1.15, 1.6)), tries=6)
    if rng.random() < 0.4:
        wall, z, start = int(rng.integers(4)), rng.uniform(1.3, 1.6), rng.uniform(-1.2, 0.2)
        thing = ob.picture(rng, palette)
        step = 2 * thing.local_bounds()[1][0] + rng.uniform(0.08, 0.2)
        for k in range(3):
            if abs(start + k * step) + step / 2 < room.wall_length(wall) / 2:
                room.try_at(thing, *room.wall_spot(thing, wall, start + k * step, 0.0, float(z)))


def _floor_things(room: Room, palette: Palette, level: Level) -> None:
    """Add plants, floor lamps, bins, boxes, balls, stacks; and a rug if there is none."""
    rng = room.rng
    if rng.random() < 0.35 and not any(thing.label == "rug" for thing in room.things):
        middle = Thing("rug", shift=np.zeros(3))
        _rug(room, palette, middle, forward=0.0)
    for builder, mean in ((ob.plant, 1.0), (ob.floor_lamp, 0.8), (ob.bin_, 1.0)):
        for _ in range(min(3, rng.poisson(mean))):
            room.against_wall(builder(rng, palette), gap=float(rng.uniform(0.03, 0.15)), corner=rng.random() < 0.5)
    for _ in range(min(5, rng.poisson(1.0 * level.clutter))):
        carton = ob.carton(rng, palette)
        room.against_wall(carton) if rng.random() < 0.6 else room.in_open(carton)
    for _ in range(min(3, rng.poisson(0.6 * level.clutter))):
        room.in_open(ob.ball(rng, palette))
    if rng.random() < 0.3 * level.clutter:
        room.in_open(ob.book_stack(rng, palette))


def _fill_supports(room: Room, palette: Palette, level: Level) -> None:
    """Put small things on tables, boards, beds and sofas."""
    rng = room.rng
    for owner in list(room.things):
        for support in owner.supports:
            if support.kind == "pillow":
                if rng.random() < 0.75:
                    room.on(owner, support, ob.pillow(rng, palette), random_angle=lambda: float(rng.normal(0, 0.15)))
            elif support.kind == "shelf":
                _fill_board(room, palette, owner, support, level)
            else:
                area = support.width * support.depth
                for _ in range(min(7, rng.poisson(level.clutter * (0.6 + 2.2 * area)))):
                    thing = _small_thing(rng, palette)
                    room.on(owner, support, thing, random_angle=lambda: float(rng.normal(0, 0.5)), tries=3)


def _small_thing(rng: np.random.Generator, palette: Palette) -> Thing:
    draw = rng.random()
    if draw < 0.2:
        return ob.vase(rng, palette)
    if draw < 0.38:
        return ob.book_stack(rng, palette)
    if draw < 0.53:
        return ob.table_lamp(rng, palette)
    if draw < 0.68:
        return ob.plant(rng, palette, small=True)
    if draw < 0.84:
        return ob.carton(rng, palette, small=True)
    return ob.ball(rng, palette, small=True)


def _fill_board(room: Room, palette: Palette, owner: Thing, support: Support, level: Level) -> None:
    """Put books and a few other things along a board of a shelf."""
    rng = room.rng
    if support.headroom > 0.16 and rng.random() < 0.75:
        share = rng.uniform(0.25, 0.95)
        books = ob.book_row(rng, palette, support.width * share - 0.01, support.headroom - 0.01)
        room.on(owner, support, books, random_angle=lambda: 0.0, tries=3)
    for _ in range(min(3, rng.poisson(0.6 * level.clutter))):
        thing = ob.vase(rng, palette) if rng.random() < 0.4 else _small_thing(rng, palette)
        if thing.lamps:
            continue
        room.on(owner, support, thing, random_angle=lambda: float(rng.uniform(0, 2 * math.pi)), tries=3)


def _lights(room: Room, windows: list[Thing], ceiling: list[Thing], level: Level) -> Lights:
    """Choose the strongest lights: ceiling lamps, windows by day, then lit lamps."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray, float]] = []
    down = np.array([0.0, 0.0, -1.0])
    for thing in ceiling:
        share = 1 / len(ceiling) ** 0.5
        found.append(
            (
                thing.rotation @ np.array(thing.lamps[0].position) + thing.shift,
                np.array(thing.lamps[0].color) * share,
                down,
                0.0,
            )
        )
    for thing in windows[: 2 if level.lights > 2 else 1]:
        low, high = thing.local_bounds()
        inside = np.array([0.0, 0.2, (low[2] + high[2]) / 2])
        color = np.array([0.85, 0.95, 1.1]) * 2.6
        normal = thing.rotation @ np.array([0.0, 1.0, 0.0])
        found.append((thing.rotation @ inside + thing.shift, color, normal, 1.0))
    hanging = {id(thing) for thing in room.things if thing.label == "lamp" and thing.shift[2] > 2}
    for thing in room.things:
        if id(thing) not in hanging:
            for lamp in thing.lamps:
                found.append((thing.rotation @ np.array(lamp.position) + thing.shift, np.array(lamp.color), down, 0.0))
    found = found[: level.lights]
    if not found:  # neither day nor lamp: a faint light under the ceiling
        found = [(np.array([0.0, 0.0, room.size[2] - 0.2]), np.full(3, 2.0), down, 0.0)]
    position, color, normal = (np.array([light[k] for light in found]) for k in range(3))
    return Lights(position, color, normal, np.array([light[3] for light in found]))


def _sun(room: Room, windows: list[Thing], rng: np.random.Generator) -> Sun:
    """Add sunlight through the windows of one wall, low enough to reach the floor inside."""
    first = windows[0]
    normal = first.rotation @ np.array([0.0, 1.0, 0.0])
    wall = int(np.argmax([normal @ n for n in np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])]))
    axis = 1 if wall < 2 else 0
    rects = []
    for window in windows:
        if window.rotation @ np.array([0.0, 1.0, 0.0]) @ normal < 0.9:
            continue
        low, high = window.local_bounds()
        half = (high[0] - low[0]) / 2 - 0.1
        middle = window.shift[axis]
        rects.append((middle - half, middle + half, window.shift[2] + 0.05, window.shift[2] + high[2] - 0.05))
    spread = rotation_about("z", float(rng.uniform(-0.7, 0.7)))
    direction = spread @ -normal * math.cos(0.6) + np.array([0.0, 0.0, math.sin(rng.uniform(0.4, 0.9))])
    direction /= np.linalg.norm(direction)
    return Sun(
        direction * 40.0, np.array([1.0, 0.93, 0.8]) * rng.uniform(1.2, 2.2), wall, np.array(rects).reshape(-1, 4)
    )
