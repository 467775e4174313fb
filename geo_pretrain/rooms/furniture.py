"""Furniture that stands on the floor: beds, sofas, chairs, stools, tables, desks, cabinets, shelves.

Each builder returns a `Thing` in its own frame: the origin on the floor in the middle, +y its front, meters.
Sizes and styles are drawn from `rng`, materials from the room's palette.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from geo_pretrain.rooms.materials import Palette
from geo_pretrain.rooms.scene import Material, Support, Thing, rotation_about

Builder = Callable[[np.random.Generator, Palette], Thing]


def legs(
    thing: Thing,
    rng: np.random.Generator,
    size: tuple[float, float, float],
    thickness: float,
    material: Material,
    name: str = "legs",
) -> None:
    """Add four legs under the corners of a footprint; size = (width, depth, height)."""
    width, depth, height = size
    style = rng.integers(3)
    inset = thickness * 0.75
    for sx in (-1, 1):
        for sy in (-1, 1):
            at = (sx * (width / 2 - inset), sy * (depth / 2 - inset), 0.0)
            if style == 0:
                thing.box(at, (thickness, thickness, height), material, name=name)
            elif style == 1:
                thing.cylinder(at, thickness * 0.7, height, material, top=1.5, name=name)
            else:
                thing.cylinder(at, thickness, height, material, name=name)


def bed(rng: np.random.Generator, palette: Palette) -> Thing:
    """Frame, mattress, blanket and headboard; the head is at the back."""
    thing = Thing("bed")
    width, length = float(rng.choice([0.9, 1.2, 1.4, 1.6])) + rng.uniform(-0.03, 0.05), rng.uniform(1.95, 2.1)
    wood, cloth, sheet = palette.hard(), palette.cloth(), palette.cloth()
    base, frame = rng.uniform(0.06, 0.2), rng.uniform(0.1, 0.2)
    legs(thing, rng, (width, length, base), 0.07, wood, name="frame")
    thing.box((0, 0, base), (width, length, frame), wood, name="frame")
    mattress = rng.uniform(0.15, 0.25)
    top = base + frame
    thing.box((0, 0.01, top), (width - 0.04, length - 0.06, mattress), sheet, taper=(0.98, 0.99), name="mattress")
    cover = rng.uniform(0.55, 0.75) * length
    thing.box(
        (0, length / 2 - cover / 2 - 0.005, top + 0.03),
        (width + 0.03, cover, mattress - 0.005),
        cloth,
        taper=(0.97, 1.0),
        name="mattress",
    )
    thing.box(
        (0, -length / 2 - 0.03, 0), (width + 0.06, 0.06, top + mattress + rng.uniform(0.2, 0.6)), wood, name="board"
    )
    if rng.random() < 0.4:
        thing.box((0, length / 2 + 0.025, 0), (width + 0.04, 0.05, top + rng.uniform(0.05, 0.3)), wood, name="board")
    surface = top + mattress
    for x in (-width / 4, width / 4) if width > 1.1 else (0.0,):
        thing.supports.append(Support(x, -length / 2 + 0.25, surface, width / 2 - 0.06, 0.4, kind="pillow"))
    return thing


def sofa(rng: np.random.Generator, palette: Palette, seats: int | None = None) -> Thing:
    """One to three seats with cushions, a back and arms."""
    thing = Thing("sofa")
    seats = int(rng.integers(1, 4)) if seats is None else seats
    cloth, cushion = palette.cloth(), palette.cloth()
    cushion = cushion if rng.random() < 0.4 else cloth
    arm, depth = rng.uniform(0.1, 0.22), rng.uniform(0.8, 0.95)
    each = rng.uniform(0.55, 0.72)
    width = seats * each + 2 * arm
    seat, back = rng.uniform(0.36, 0.44), rng.uniform(0.7, 0.92)
    foot = rng.uniform(0.05, 0.12)
    legs(thing, rng, (width - 0.1, depth - 0.1, foot), 0.05, palette.metal())
    thing.box((0, 0, foot), (width - 2 * arm, depth, seat - 0.12 - foot), cloth, name="seat")
    thing.box(
        (0, -depth / 2 + 0.1, seat - 0.12),
        (width - 2 * arm, 0.2, back - seat + 0.12),
        cloth,
        taper=(1.0, 0.6),
        name="back",
    )
    arm_height = rng.uniform(0.5, 0.64)
    for side in (-1, 1):
        thing.box((side * (width - arm) / 2, 0, foot), (arm, depth, arm_height - foot), cloth, name="arms")
        if arm > 0.16:
            roll = rotation_about("x", math.pi / 2)
            center = arm_height - depth / 2  # a cylinder lying along y with its axis at the arm's top edge
            thing.cylinder(
                (side * (width - arm) / 2, 0, center), arm * 0.99, depth * 0.99, cloth, rotation=roll, name="arms"
            )
    for index in range(seats):
        x = (index - (seats - 1) / 2) * each
        thing.box((x, 0.09, seat - 0.12), (each - 0.015, depth - 0.2, 0.12), cushion, taper=(0.96, 0.97), name="seat")
        lean = rotation_about("x", 0.16)
        thing.box(
            (x, -depth / 2 + 0.255, seat + 0.01),
            (each - 0.03, 0.13, back - seat - 0.04),
            cushion,
            taper=(0.94, 0.7),
            rotation=lean,
            name="back",
        )
        thing.supports.append(Support(x, 0.12, seat, each - 0.1, 0.4, kind="pillow"))
    return thing


def chair(rng: np.random.Generator, palette: Palette) -> Thing:
    """A dining chair or an office chair; its front (+y) goes under the table."""
    return _office_chair(rng, palette) if rng.random() < 0.3 else _dining_chair(rng, palette)


def _dining_chair(rng: np.random.Generator, palette: Palette) -> Thing:
    thing = Thing("chair")
    width, depth, seat = rng.uniform(0.4, 0.48), rng.uniform(0.4, 0.48), rng.uniform(0.42, 0.47)
    frame = palette.hard() if rng.random() < 0.6 else palette.metal()
    cushion = palette.cloth() if rng.random() < 0.5 else frame
    legs(thing, rng, (width, depth, seat - 0.04), 0.035, frame)
    thing.box((0, 0, seat - 0.04), (width, depth, 0.04), cushion, taper=(0.97, 0.97), name="seat")
    top, y = rng.uniform(0.8, 1.0), -depth / 2 + 0.02
    for side in (-1, 1):
        thing.box((side * (width / 2 - 0.02), y, seat), (0.03, 0.03, top - seat), frame, name="back")
    style = rng.integers(3)
    inner = width - 0.07
    if style == 0:
        thing.box((0, y, seat + 0.12), (inner, 0.025, top - seat - 0.14), cushion, name="back")
    elif style == 1:
        for z in np.linspace(seat + 0.12, top - 0.08, 3):
            thing.box((0, y, float(z)), (inner, 0.02, 0.06), frame, name="back")
    else:
        thing.box((0, y, top - 0.08), (inner, 0.025, 0.07), frame, name="back")
        for x in np.linspace(-inner / 2 + 0.05, inner / 2 - 0.05, 4):
            thing.cylinder((float(x), y, seat), 0.018, top - seat - 0.08, frame, name="back")
    return thing


def _office_chair(rng: np.random.Generator, palette: Palette) -> Thing:
    thing = Thing("chair")
    metal, cloth = palette.metal(), palette.cloth()
    seat, width = rng.uniform(0.44, 0.5), rng.uniform(0.44, 0.5)
    for k in range(5):
        angle = 2 * math.pi * k / 5 + 0.3
        c, s = math.cos(angle), math.sin(angle)
        thing.box(
            (0.13 * c, 0.13 * s, 0.06),
            (0.25, 0.04, 0.03),
            metal,
            rotation=rotation_about("z", angle),
            taper=(0.9, 0.6),
            name="legs",
        )
        thing.ellipsoid((0.25 * c, 0.25 * s, 0.0), (0.06, 0.06, 0.06), metal, name="legs")
    thing.cylinder((0, 0, 0.07), 0.05, seat - 0.13, metal, name="legs")
    thing.box((0, 0, seat - 0.07), (width, width, 0.07), cloth, taper=(0.92, 0.92), name="seat")
    top = rng.uniform(0.9, 1.1)
    thing.box(
        (0, -width / 2 + 0.01, seat + 0.12),
        (width * 0.9, 0.06, top - seat - 0.12),
        cloth,
        taper=(0.85, 0.7),
        name="back",
    )
    thing.box((0, -width / 2 + 0.01, seat - 0.05), (0.06, 0.03, 0.2), metal, name="back")
    if rng.random() < 0.5:
        for side in (-1, 1):
            thing.box((side * (width / 2 + 0.02), 0, seat + 0.18), (0.05, 0.25, 0.03), metal, name="arms")
            thing.box((side * (width / 2 + 0.02), 0, seat - 0.03), (0.03, 0.04, 0.21), metal, name="arms")
    return thing


def stool(rng: np.random.Generator, palette: Palette) -> Thing:
    """A round or square stool, or a pouf."""
    thing = Thing("stool")
    height, width = rng.uniform(0.38, 0.65), rng.uniform(0.3, 0.42)
    style = rng.integers(3)
    if style == 0:
        thing.cylinder((0, 0, 0), width + 0.1, 0.42, palette.cloth(), top=float(rng.uniform(0.85, 1.0)), name="seat")
    elif style == 1:
        frame = palette.hard()
        legs(thing, rng, (width * 0.72, width * 0.72, height - 0.04), 0.03, frame)
        thing.cylinder((0, 0, height - 0.04), width, 0.04, palette.hard(), top=0.95, name="seat")
    else:
        legs(thing, rng, (width, width, height - 0.05), 0.035, palette.metal())
        thing.box((0, 0, height - 0.05), (width, width, 0.05), palette.cloth(), taper=(0.95, 0.95), name="seat")
    return thing


def table(rng: np.random.Generator, palette: Palette, low: bool | None = None) -> Thing:
    """A dining table with legs or a pedestal, or a low coffee table."""
    thing = Thing("table")
    low = bool(rng.random() < 0.5) if low is None else low
    height = rng.uniform(0.34, 0.46) if low else rng.uniform(0.71, 0.77)
    top, frame = palette.hard(), palette.hard() if rng.random() < 0.5 else palette.metal()
    thickness = rng.uniform(0.02, 0.05)
    if rng.random() < 0.35:
        diameter = rng.uniform(0.6, 0.9) if low else rng.uniform(0.9, 1.2)
        thing.cylinder((0, 0, height - thickness), diameter, thickness, top, name="top")
        thing.cylinder((0, 0, 0.03), 0.1, height - thickness - 0.03, frame, top=0.7, name="legs")
        thing.cylinder((0, 0, 0), diameter * 0.45, 0.03, frame, top=0.8, name="legs")
        side = diameter * 0.7
        thing.supports.append(Support(0, 0, height, side, side))
        return thing
    width = rng.uniform(0.8, 1.2) if low else rng.uniform(1.2, 1.9)
    depth = rng.uniform(0.5, 0.7) if low else rng.uniform(0.8, 0.95)
    legs(thing, rng, (width - 0.04, depth - 0.04, height - thickness), rng.uniform(0.04, 0.08), frame)
    thing.box((0, 0, height - thickness), (width, depth, thickness), top, name="top")
    if rng.random() < 0.5:
        thing.box((0, 0, height - thickness - 0.07), (width - 0.2, depth - 0.2, 0.07), frame, name="legs")
    if low and rng.random() < 0.5:
        thing.box((0, 0, 0.1), (width - 0.1, depth - 0.1, 0.02), frame, name="board")
    thing.supports.append(Support(0, 0, height, width - 0.1, depth - 0.1))
    return thing


def desk(rng: np.random.Generator, palette: Palette) -> Thing:
    """A work table with a drawer block or side panels; the user sits at its front."""
    thing = Thing("desk")
    width, depth, height = rng.uniform(1.1, 1.6), rng.uniform(0.6, 0.75), rng.uniform(0.71, 0.76)
    top, side = palette.hard(), palette.hard()
    thing.box((0, 0, height - 0.03), (width, depth, 0.03), top, name="top")
    block = rng.uniform(0.32, 0.42)
    hand = rng.choice([-1, 1])
    if rng.random() < 0.65:
        x = hand * (width - block) / 2
        thing.box((x, -0.01, 0), (block, depth - 0.06, height - 0.03), side, name="drawers")
        _fronts(
            thing, rng, (x, depth / 2 - 0.04, 0.04), (block, height - 0.08), 1, 3, side, palette.metal(), name="drawers"
        )
    else:
        thing.box((hand * (width / 2 - 0.02), 0, 0), (0.035, depth - 0.04, height - 0.03), side, name="sides")
    thing.box((-hand * (width / 2 - 0.02), 0, 0), (0.035, depth - 0.04, height - 0.03), side, name="sides")
    thing.box((0, -depth / 2 + 0.06, height - 0.35), (width - 0.08, 0.02, 0.32), side, name="sides")
    thing.supports.append(Support(0, 0, height, width - 0.1, depth - 0.1))
    return thing


def _fronts(
    thing: Thing,
    rng: np.random.Generator,
    at: tuple[float, float, float],
    size: tuple[float, float],
    columns: int,
    rows: int,
    material: Material,
    metal: Material,
    name: str,
) -> None:
    """Add doors or drawers with handles: a grid of thin boxes on a front whose lower middle is `at`."""
    x0, y, z0 = at
    width, height = size[0] / columns, size[1] / rows
    knob = rng.random() < 0.5
    for c in range(columns):
        for r in range(rows):
            x, z = x0 + (c - (columns - 1) / 2) * width, z0 + r * height
            thing.box((x, y + 0.008, z + 0.006), (width - 0.012, 0.016, height - 0.012), material, name=name)
            tall = height > width * 1.3
            hx = x + (width / 2 - 0.05) * (1 if c % 2 == 0 else -1) if tall else x
            hz = z + (height * 0.5 if tall else height * 0.7)
            if knob:
                thing.ellipsoid((hx, y + 0.03, hz), (0.03, 0.03, 0.03), metal, name=name)
            else:
                thing.box((hx, y + 0.026, hz), (0.015, 0.02, 0.12) if tall else (0.12, 0.02, 0.015), metal, name=name)


def cabinet(rng: np.random.Generator, palette: Palette, style: str | None = None) -> Thing:
    """A nightstand, sideboard, dresser or wardrobe: a body with doors or drawers."""
    thing = Thing("cabinet")
    style = str(rng.choice(["night", "side", "dresser", "wardrobe"])) if style is None else style
    sizes = {
        "night": ((0.38, 0.5), (0.35, 0.42), (0.42, 0.6), (1, 1), (1, 3)),
        "side": ((1.1, 1.7), (0.38, 0.46), (0.5, 0.85), (2, 4), (1, 2)),
        "dresser": ((0.7, 1.1), (0.4, 0.5), (0.75, 1.15), (1, 2), (3, 4)),
        "wardrobe": ((0.9, 1.7), (0.52, 0.62), (1.8, 2.15), (2, 3), (1, 1)),
    }
    widths, depths, heights, columns, rows = sizes[style]
    width, depth, height = rng.uniform(*widths), rng.uniform(*depths), rng.uniform(*heights)
    body = palette.hard()
    front = palette.hard() if rng.random() < 0.35 else body
    foot = rng.uniform(0.05, 0.15) if rng.random() < 0.5 else 0.0
    if foot:
        legs(thing, rng, (width - 0.04, depth - 0.04, foot), 0.04, palette.metal())
    thing.box((0, 0, foot), (width, depth, height - foot), body, name="body")
    across, up = int(rng.integers(columns[0], columns[1] + 1)), int(rng.integers(rows[0], rows[1] + 1))
    area = (0.0, depth / 2, foot + 0.02), (width - 0.03, height - foot - 0.05)
    _fronts(thing, rng, area[0], area[1], across, up, front, palette.metal(), name="doors")
    if rng.random() < 0.4:
        thing.box((0, 0.01, height), (width + 0.03, depth + 0.03, 0.02), palette.hard(), name="body")
        height += 0.02
    if height < 1.3:
        thing.supports.append(Support(0, 0, height, width - 0.06, depth - 0.06))
    return thing


def shelf(rng: np.random.Generator, palette: Palette) -> Thing:
    """A bookcase with open boards; each board is a support of kind "shelf"."""
    thing = Thing("shelf")
    width, depth, height = rng.uniform(0.6, 1.2), rng.uniform(0.26, 0.36), rng.uniform(0.9, 2.1)
    wood = palette.hard()
    for side in (-1, 1):
        thing.box((side * (width / 2 - 0.012), 0, 0), (0.024, depth, height), wood, name="sides")
    if rng.random() < 0.7:
        thing.box((0, -depth / 2 + 0.006, 0.02), (width - 0.05, 0.012, height - 0.03), wood, name="back")
    count = max(2, round(height / rng.uniform(0.3, 0.4)))
    step = (height - 0.03) / count
    for k in range(count + 1):
        z = min(k * step + (0.02 if k == 0 else 0.0), height - 0.024)
        thing.box((0, 0, z), (width - 0.05, depth - 0.004, 0.022), wood, name="boards")
        room = step - 0.05 if k < count else 0.4
        thing.supports.append(
            Support(0, 0.01, z + 0.022, width - 0.1, depth - 0.06, room, kind="shelf" if k < count else "top")
        )
    return thing
