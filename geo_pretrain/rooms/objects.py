"""Smaller things and fixtures: lamps, pictures, rugs, curtains, plants, screens, books, vases, windows, doors.

Same frame as furniture: origin at the lower middle, +y the front. Things that hang on a wall have their back at
y = 0 and are moved up by the layout; things that hang from the ceiling have z = 0 at the ceiling.
"""

from __future__ import annotations

import math

import numpy as np

from geo_pretrain.rooms.materials import Palette
from geo_pretrain.rooms.scene import Lamp, Material, Support, Thing, rotation_about

WARM = (1.0, 0.82, 0.6)


def _light(rng: np.random.Generator, strength: float) -> tuple[float, float, float]:
    """A warm to neutral light color of some strength."""
    mix = rng.uniform(0.3, 1.0)
    r, g, b = (strength * (1 - mix + mix * w) for w in WARM)
    return float(r), float(g), float(b)


def floor_lamp(rng: np.random.Generator, palette: Palette) -> Thing:
    """A stand with a shade at the top; on in half of the cases."""
    thing = Thing("lamp")
    metal, lit = palette.metal(), rng.random() < 0.5
    height, wide = rng.uniform(1.35, 1.7), rng.uniform(0.3, 0.45)
    thing.cylinder((0, 0, 0), rng.uniform(0.24, 0.32), 0.03, metal, top=0.85, name="foot")
    thing.cylinder((0, 0, 0.03), 0.03, height - 0.28, metal, name="pole")
    drop = rng.uniform(0.22, 0.32)
    thing.cylinder(
        (0, 0, height - drop),
        wide,
        drop,
        palette.shade(1.6 if lit else 0.0),
        top=float(rng.uniform(0.5, 1.0)),
        casts=False,
        name="shade",
    )
    if lit:
        thing.lamps.append(Lamp((0, 0, height + 0.06), _light(rng, 0.9)))
    return thing


def table_lamp(rng: np.random.Generator, palette: Palette) -> Thing:
    """A foot of one or two bodies and a shade."""
    thing = Thing("lamp")
    foot, lit = palette.ceramic(), rng.random() < 0.5
    height, wide = rng.uniform(0.32, 0.5), rng.uniform(0.18, 0.28)
    body = height * 0.5
    thing.cylinder((0, 0, 0), wide * 0.5, 0.015, foot, name="foot")
    if rng.random() < 0.5:
        thing.ellipsoid((0, 0, 0.012), (wide * 0.5, wide * 0.5, body * 0.8), foot, name="foot")
    else:
        thing.cylinder((0, 0, 0.015), wide * 0.4, body * 0.75, foot, top=float(rng.uniform(0.3, 0.8)), name="foot")
    thing.cylinder((0, 0, body * 0.7), 0.02, height * 0.3, palette.metal(), name="pole")
    drop = height * 0.45
    thing.cylinder(
        (0, 0, height - drop),
        wide,
        drop,
        palette.shade(1.6 if lit else 0.0),
        top=float(rng.uniform(0.5, 0.95)),
        casts=False,
        name="shade",
    )
    if lit:
        thing.lamps.append(Lamp((0, 0, height + 0.05), _light(rng, 0.45)))
    return thing


def ceiling_lamp(rng: np.random.Generator, palette: Palette) -> Thing:
    """A disc, a bowl or a pendant under the ceiling (z = 0); always the room's main light."""
    thing = Thing("lamp")
    style = rng.integers(3)
    shade = palette.shade(2.2)
    if style == 0:
        thing.cylinder((0, 0, -0.07), rng.uniform(0.3, 0.5), 0.07, shade, casts=False, name="shade")
        bottom = -0.07
    elif style == 1:
        wide = rng.uniform(0.3, 0.45)
        thing.cylinder((0, 0, -0.12), wide * 0.6, 0.12, shade, top=1.6, casts=False, name="shade")
        bottom = -0.12
    else:
        drop, wide = rng.uniform(0.3, 0.5), rng.uniform(0.25, 0.4)
        thing.cylinder((0, 0, -drop), 0.012, drop, palette.metal(), casts=False, name="pole")
        thing.cylinder(
            (0, 0, -drop - wide * 0.5),
            wide,
            wide * 0.5,
            shade,
            top=float(rng.uniform(0.3, 0.9)),
            casts=False,
            name="shade",
        )
        bottom = -drop - wide * 0.5
    thing.lamps.append(Lamp((0, 0, bottom - 0.03), _light(rng, 2.6)))
    return thing


def picture(rng: np.random.Generator, palette: Palette) -> Thing:
    """A framed painting on a wall, its lower edge at z = 0."""
    thing = Thing("picture")
    width, height = rng.uniform(0.25, 0.9), rng.uniform(0.25, 0.7)
    frame = rng.uniform(0.015, 0.05)
    thing.box((0, 0.014, 0), (width, 0.028, height), palette.hard(), casts=False)
    thing.box((0, 0.03, frame), (width - 2 * frame, 0.008, height - 2 * frame), palette.picture(), casts=False)
    return thing


def rug(rng: np.random.Generator, palette: Palette) -> Thing:
    """A flat rectangle, with or without a border, or a disc."""
    thing = Thing("rug")
    cloth = palette.cloth()
    if rng.random() < 0.3:
        thing.cylinder((0, 0, 0), rng.uniform(1.2, 2.0), 0.006, cloth, casts=False)
        return thing
    width, depth = rng.uniform(1.4, 2.4), rng.uniform(0.9, 1.7)
    thing.box((0, 0, 0), (width, depth, 0.006), cloth, casts=False)
    if rng.random() < 0.5:
        thing.box((0, 0, 0.006), (width * 0.85, depth * 0.8, 0.002), palette.cloth(), casts=False)
    return thing


def curtain(rng: np.random.Generator, palette: Palette, width: float, height: float) -> Thing:
    """Folds: a row of upright cylinders, flattened towards the wall; back at y = 0."""
    thing = Thing("curtain")
    cloth = palette.cloth()
    count = max(3, round(width / rng.uniform(0.07, 0.11)))
    step = width / count
    for k in range(count):
        x = (k + 0.5) * step - width / 2
        y = 0.06 + (0.012 if k % 2 else -0.008)
        thing.cylinder((x, y, 0.0), step * 1.25, height, cloth, squash=float(rng.uniform(0.7, 1.0)) * 0.05 / step)
    return thing


def plant(rng: np.random.Generator, palette: Palette, small: bool = False) -> Thing:
    """A pot with a stem and leaves: long blades, or a crown of round leaves."""
    thing = Thing("plant")
    scale = rng.uniform(0.16, 0.26) if small else rng.uniform(0.6, 1.1)
    pot = scale * rng.uniform(0.28, 0.36)
    rim = pot * rng.uniform(0.9, 1.15)
    thing.cylinder((0, 0, 0), rim * 0.8, pot, palette.ceramic(), top=1.3, name="pot")
    thing.cylinder((0, 0, pot), rim * 0.92, 0.006, palette.hard(), name="pot")
    leaf = palette.leaves()
    count = int(rng.integers(7, 13))
    if rng.random() < 0.5:
        _blades(thing, rng, leaf, count, pot, scale)
    else:
        thing.cylinder((0, 0, pot), 0.05 * scale, scale * 0.45, palette.hard(), name="stem")
        for _ in range(count):
            angle, out = rng.uniform(0, 2 * math.pi), scale * rng.uniform(0.03, 0.2)
            z = pot + scale * rng.uniform(0.25, 0.62)
            size = scale * rng.uniform(0.16, 0.28)
            tilt = rotation_about("z", angle) @ rotation_about("y", rng.uniform(-0.6, 0.6))
            at = (out * math.cos(angle), out * math.sin(angle), z)
            thing.ellipsoid(at, (size, size * 0.7, size * rng.uniform(0.25, 0.7)), leaf, rotation=tilt, name="leaves")
    return thing


def _blades(thing: Thing, rng: np.random.Generator, leaf: Material, count: int, pot: float, scale: float) -> None:
    """Add leaves: thin long ellipsoids that lean outwards from the middle of the pot."""
    for k in range(count):
        angle = 2 * math.pi * k / count + rng.uniform(-0.3, 0.3)
        lean, length = rng.uniform(0.1, 0.75), scale * rng.uniform(0.4, 0.65)
        tilt = rotation_about("z", angle) @ rotation_about("y", lean)
        middle = tilt @ np.array([0, 0, length / 2])
        at = (middle[0], middle[1], pot + middle[2] - length / 2)
        thing.ellipsoid(
            at, (0.02 + 0.02 * scale, scale * rng.uniform(0.07, 0.13), length), leaf, rotation=tilt, name="leaves"
        )


def screen(rng: np.random.Generator, palette: Palette, diagonal: float) -> Thing:
    """A television or monitor on its foot."""
    thing = Thing("tv")
    width, height = diagonal * 0.87, diagonal * 0.49
    metal = palette.metal()
    lift = 0.04 + 0.1 * diagonal * float(rng.random() < 0.5)
    thing.box((0, 0, 0), (width * 0.4, 0.16, 0.015), metal, name="foot")
    thing.box((0, -0.03, 0.015), (0.06, 0.03, lift + 0.1), metal, name="foot")
    thing.box((0, 0, lift), (width, 0.035, height), metal, name="screen")
    thing.box(
        (0, 0.0185, lift + 0.012), (width - 0.024, 0.004, height - 0.024), palette.screen(), casts=False, name="screen"
    )
    return thing


def wall_screen(rng: np.random.Generator, palette: Palette) -> Thing:
    """A television on the wall; back at y = 0."""
    thing = Thing("tv")
    diagonal = rng.uniform(0.9, 1.4)
    width, height = diagonal * 0.87, diagonal * 0.49
    thing.box((0, 0.035, 0), (width, 0.05, height), palette.metal(), name="screen")
    thing.box((0, 0.061, 0.012), (width - 0.024, 0.004, height - 0.024), palette.screen(), casts=False, name="screen")
    return thing


def pillow(rng: np.random.Generator, palette: Palette) -> Thing:
    """A lying cushion: two flat pyramids back to back, or a flattened ellipsoid."""
    thing = Thing("pillow")
    width, depth, height = rng.uniform(0.38, 0.52), rng.uniform(0.3, 0.38), rng.uniform(0.09, 0.14)
    cloth = palette.cloth()
    if rng.random() < 0.3:
        thing.ellipsoid((0, 0, 0), (width, depth, height), cloth)
        return thing
    half = height / 2
    thing.box((0, 0, half), (width, depth, half), cloth, taper=(0.72, 0.72))
    thing.box((0, 0, 0), (width, depth, half), cloth, taper=(0.72, 0.72), rotation=rotation_about("x", math.pi))
    return thing


def book_row(rng: np.random.Generator, palette: Palette, width: float, headroom: float) -> Thing:
    """Standing books, in two or three runs of unlike height."""
    thing = Thing("book")
    runs = int(rng.integers(1, 4))
    shares = rng.dirichlet(np.full(runs, 4.0)) * width
    x = -width / 2
    for share in shares:
        height = min(rng.uniform(0.17, 0.29), headroom - 0.02)
        thing.box((x + share / 2, 0, 0), (share - 0.003, rng.uniform(0.13, 0.19), height), palette.books())
        x += share
    return thing


def book_stack(rng: np.random.Generator, palette: Palette) -> Thing:
    """One to four lying books."""
    thing = Thing("book")
    z = 0.0
    for _ in range(int(rng.integers(1, 5))):
        size = (rng.uniform(0.14, 0.22), rng.uniform(0.2, 0.28), rng.uniform(0.015, 0.045))
        thing.box((0, 0, z), size, palette.hard(), rotation=rotation_about("z", rng.uniform(-0.4, 0.4)))
        z += size[2] + 0.0005
    return thing


def bin_(rng: np.random.Generator, palette: Palette) -> Thing:
    """An open waste bin, round with a dark mouth or square with thin walls."""
    thing = Thing("bin")
    width, height = rng.uniform(0.2, 0.32), rng.uniform(0.26, 0.42)
    body = palette.metal() if rng.random() < 0.5 else palette.cloth()
    if rng.random() < 0.5:
        flare = float(rng.uniform(1.0, 1.3))
        thing.cylinder((0, 0, 0), width / flare, height, body, top=flare)
        thing.cylinder((0, 0, height), width * 0.9, 0.004, Material(base=(0.02, 0.02, 0.02)))
        return thing
    thing.box((0, 0, 0), (width, width, 0.015), body)
    for side in (-1, 1):
        thing.box((side * (width / 2 - 0.006), 0, 0.015), (0.012, width, height), body)
        thing.box((0, side * (width / 2 - 0.006), 0.015), (width - 0.024, 0.012, height), body)
    return thing


def vase(rng: np.random.Generator, palette: Palette) -> Thing:
    """A turned vessel of two or three bodies, at times with twigs."""
    thing = Thing("vase")
    body = palette.ceramic()
    wide, height = rng.uniform(0.07, 0.15), rng.uniform(0.12, 0.3)
    style = rng.integers(3)
    if style == 0:
        thing.cylinder((0, 0, 0), wide * 0.6, height * 0.5, body, top=1.65)
        thing.cylinder((0, 0, height * 0.5), wide, height * 0.5, body, top=float(rng.uniform(0.35, 0.6)))
    elif style == 1:
        thing.ellipsoid((0, 0, 0), (wide, wide, height * 0.75), body)
        thing.cylinder((0, 0, height * 0.65), wide * 0.4, height * 0.35, body, top=1.3)
    else:
        thing.cylinder((0, 0, 0), wide * 0.8, height, body, top=float(rng.uniform(0.9, 1.3)))
    if rng.random() < 0.4:
        leaf = palette.leaves()
        for _ in range(3):
            tilt = rotation_about("z", rng.uniform(0, 6.28)) @ rotation_about("y", rng.uniform(0.05, 0.35))
            middle = tilt @ np.array([0, 0, height * 0.5])
            at = (middle[0], middle[1], height * 0.98 + middle[2] - height * 0.5)
            thing.ellipsoid(at, (0.012, 0.03, height), leaf, rotation=tilt)
    return thing


def carton(rng: np.random.Generator, palette: Palette, small: bool = False) -> Thing:
    """A box with a lid or a band of tape."""
    thing = Thing("box")
    scale = 0.45 if small else 1.0
    size = (rng.uniform(0.28, 0.55) * scale, rng.uniform(0.25, 0.4) * scale, rng.uniform(0.18, 0.4) * scale)
    body = palette.hard()
    thing.box((0, 0, 0), size, body)
    if rng.random() < 0.5:
        thing.box((0, 0, size[2]), (size[0] * 0.16, size[1], 0.002), palette.hard(), casts=False)
    else:
        thing.box((0, 0, size[2]), (size[0] + 0.012, size[1] + 0.012, size[2] * 0.18), palette.hard())
    if not small:
        thing.supports.append(Support(0, 0, thing.local_bounds()[1][2], size[0] - 0.06, size[1] - 0.06))
    return thing


def ball(rng: np.random.Generator, palette: Palette, small: bool = False) -> Thing:
    """A ball: a toy on a shelf or a seat ball on the floor."""
    thing = Thing("ball")
    diameter = rng.uniform(0.06, 0.14) if small else rng.uniform(0.2, 0.6)
    tilt = rotation_about("x", rng.uniform(0, 3)) @ rotation_about("y", rng.uniform(0, 3))
    thing.ellipsoid((0, 0, 0), (diameter, diameter, diameter), palette.ceramic(), rotation=tilt)
    return thing


def window(rng: np.random.Generator, palette: Palette, width: float, height: float, brightness: float) -> Thing:
    """Panes in a frame; back at y = 0, lower edge at z = 0."""
    thing = Thing("window")
    frame = palette.metal()
    border = rng.uniform(0.04, 0.07)
    thing.box(
        (0, 0.006, border), (width - 2 * border, 0.012, height - 2 * border), palette.outdoor(brightness), casts=False
    )
    for side in (-1, 1):
        thing.box((side * (width - border) / 2, 0.025, 0), (border, 0.05, height), frame, casts=False)
    for z in (0.0, height - border):
        thing.box((0, 0.025, z), (width - 2 * border, 0.05, border), frame, casts=False)
    for k in range(1, int(rng.integers(1, 4))):
        x = width * (k / max(1, round(width / 0.6)) - 0.5)
        if abs(x) < width / 2 - 0.1:
            thing.box((x, 0.025, border), (0.04, 0.036, height - 2 * border), frame)
    if rng.random() < 0.5:
        thing.box((0, 0.025, height * 0.6), (width - 2 * border, 0.034, 0.035), frame)
    thing.box((0, 0.07, -0.03), (width + 0.08, 0.14, 0.028), palette.hard())
    return thing


def door(rng: np.random.Generator, palette: Palette, width: float, height: float) -> Thing:
    """A closed door in its frame, with panels and a handle; back at y = 0."""
    thing = Thing("door")
    frame, leaf, metal = palette.hard(), palette.hard(), palette.metal()
    border = rng.uniform(0.06, 0.1)
    for side in (-1, 1):
        thing.box((side * (width + border) / 2, 0.03, 0), (border, 0.06, height + border), frame, casts=False)
    thing.box((0, 0.03, height), (width, 0.06, border), frame, casts=False)
    thing.box((0, 0.02, 0.005), (width, 0.04, height - 0.005), leaf, casts=False)
    rows = int(rng.integers(0, 4))
    inlay = leaf if rng.random() < 0.6 else palette.hard()
    for r in range(rows):
        each = (height - 0.25) / rows
        thing.box((0, 0.042, 0.15 + r * each), (width - 0.25, 0.012, each - 0.1), inlay, taper=(0.98, 0.6), casts=False)
    hand = rng.choice([-1, 1])
    thing.box((hand * (width / 2 - 0.1), 0.07, 1.02), (0.13, 0.02, 0.02), metal)
    thing.box((hand * (width / 2 - 0.06), 0.055, 1.02), (0.02, 0.05, 0.02), metal)
    return thing
