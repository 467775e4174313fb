"""Compiled patterns: the color of surface points. Twin of `rooms.textures`, to rounding.

Coordinates of noise are float32 in the order of the torch code: a material's seed, up to 4096, is added to them and
takes most of their digits, which would otherwise differ.
"""
# mypy: allow-untyped-defs
# What numba compiles has no Python types.

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from geo_pretrain.rooms.compiled.jit import lean_entry, lean_helper
from geo_pretrain.rooms.scene import M_BASE, M_GRAIN, M_KIND, M_SCALE, M_SECOND, M_SEED
from geo_pretrain.rooms.textures import PATTERN_ID, TABLE

f = np.float32
ONE = f(1)
CHECKS, DOTS, MARBLE, NOISE, OUTDOOR, PICTURE, PLAID, PLANKS, SCREEN, SPINES, STRIPES, TILES, WEAVE, WOOD = (
    PATTERN_ID[name]
    for name in (
        "checks",
        "dots",
        "marble",
        "noise",
        "outdoor",
        "picture",
        "plaid",
        "planks",
        "screen",
        "spines",
        "stripes",
        "tiles",
        "weave",
        "wood",
    )
)


class Spot(NamedTuple):
    """A point on a surface with all inputs of its color; see `textures.Surface`."""

    x: float  # m in the part's frame
    y: float
    z: float
    u: float
    v: float
    half_u: float
    half_v: float
    longest: int
    footprint: float
    scale: float
    seed: int
    base: tuple
    second: tuple
    table: np.ndarray
    volume: np.ndarray


@lean_helper
def unit(x):
    """Clamp to [0, 1]."""
    return min(max(x, 0.0), 1.0)


@lean_helper
def random_of(s, a, b, seed, salt):
    """Hash integer cells (a, b) and a seed to three random numbers in [0, 1]."""
    mixed = int(a) * 1619 + int(b) * 3137 + seed * 797 + salt * 101
    row = s.table[(mixed ^ (mixed >> 5)) & (TABLE - 1)]
    return row[0], row[1], row[2]


@lean_helper
def noise(s, x, y, z, channel):
    """Evaluate smooth noise in [0, 1] with period 32 and lattice 1 at float32 coordinates."""
    i, j, k = math.floor(x), math.floor(y), math.floor(z)
    x, y, z = x - f(i), y - f(j), z - f(k)
    i, j, k = i & 31, j & 31, k & 31
    volume = s.volume
    c00 = volume[channel, k, j, i] * (ONE - x) + volume[channel, k, j, i + 1] * x
    c01 = volume[channel, k, j + 1, i] * (ONE - x) + volume[channel, k, j + 1, i + 1] * x
    c10 = volume[channel, k + 1, j, i] * (ONE - x) + volume[channel, k + 1, j, i + 1] * x
    c11 = volume[channel, k + 1, j + 1, i] * (ONE - x) + volume[channel, k + 1, j + 1, i + 1] * x
    return (c00 * (ONE - y) + c01 * y) * (ONE - z) + (c10 * (ONE - y) + c11 * y) * z


@lean_helper
def fbm(s, x, y, z, width):
    """Sum three octaves of noise, each faded where `width` (pixel size in lattice units) is too coarse."""
    total = 0.5
    for octave, weight in ((0, 0.55), (1, 0.3), (2, 0.2)):
        frequency, shift = f(2**octave), f(7.3 * octave)
        keep = unit(1.5 - 2 * width * frequency)
        if keep > 0:
            value = noise(s, x * frequency + shift, y * frequency + shift, z * frequency + shift, octave % 2)
            total += weight * keep * (value - 0.5) * 1.4
    return unit(total)


@lean_helper
def clouds(s, factor, width):
    """`fbm` of the point times `factor`, moved by the seed."""
    seed = f(s.seed)
    return fbm(s, s.x * factor + seed, s.y * factor + seed, s.z * factor + seed, width)


@lean_helper
def bands(x, width, share):
    """Evaluate a soft square wave of period 1, 1 for `share` of it; `width` is a pixel in periods."""
    distance = abs((x - math.floor(x)) - 0.5)
    wave = unit((share / 2 - distance) / max(width, 0.02) + 0.5)
    return share + (wave - share) * unit(1.6 - 2 * width)


@lean_helper
def scaled(color, factor):
    """Multiply a color by a number."""
    return color[0] * factor, color[1] * factor, color[2] * factor


@lean_helper
def blend(color, other, weight):
    """Interpolate from one color (`weight` 0) to another (1)."""
    return (
        color[0] + (other[0] - color[0]) * weight,
        color[1] + (other[1] - color[1]) * weight,
        color[2] + (other[2] - color[2]) * weight,
    )


@lean_helper
def paint(color, other, cover):
    """Cover a color by another one, by at most all of it."""
    return blend(color, other, unit(cover))


@lean_helper
def mix(s, weight):
    """Interpolate from the base color (`weight` 0) to the second color (1)."""
    return blend(s.base, s.second, weight)


# ---- Cloth, stone, wood ---------------------------------------------------------------------------------------------


@lean_helper
def stripes(s):
    """Soft stripes along one axis of the face."""
    x = s.u if s.seed % 2 == 0 else s.v
    return mix(s, bands(x / s.scale + 0.25, s.footprint / s.scale, 0.4))


@lean_helper
def checks(s):
    """A checkerboard."""
    width = s.footprint / s.scale
    a, b = bands(s.u / s.scale, width, 0.5), bands(s.v / s.scale, width, 0.5)
    return mix(s, a + b - 2 * a * b)


@lean_helper
def plaid(s):
    """Crossed stripes, wide and fine."""
    width = s.footprint / s.scale
    a, b = bands(s.u / s.scale, width, 0.35), bands(s.v / s.scale, width, 0.35)
    fine = bands(s.u / s.scale * 2 + 0.5, width * 2, 0.12)
    return mix(s, min(0.45 * (a + b) + 0.4 * fine, 1.0))


@lean_helper
def fraction(x):
    """Return what is behind the point of x, with the sign of x."""
    return x - math.trunc(x)


@lean_helper
def dots(s):
    """Round dots, every other row moved by half a period."""
    x, y = s.u / s.scale, s.v / s.scale
    odd = (math.floor(y) % 2) * 0.5
    distance = math.hypot(fraction(x + odd + 64) - 0.5, fraction(y + 64) - 0.5)
    width = s.footprint / s.scale
    inside = unit((0.28 - distance) / max(width, 0.04) + 0.5)
    mean = math.pi * 0.28**2
    return mix(s, mean + (inside - mean) * unit(1.6 - 2 * width))


@lean_helper
def noisy(s):
    """Smooth clouds of two colors."""
    seed, two = f(s.seed), f(2)
    x, y, z = s.x / s.scale * two + seed, s.y / s.scale * two + seed, s.z / s.scale * two + seed
    return mix(s, unit((fbm(s, x, y, z, s.footprint / s.scale * 2) - 0.5) * 2.4 + 0.5))


@lean_helper
def marble(s):
    """Veins along the diagonal, warped by noise."""
    width, seed, factor = s.footprint / s.scale, f(s.seed), f(1.5)
    x, y, z = s.x / s.scale * factor + seed, s.y / s.scale * factor + seed, s.z / s.scale * factor + seed
    warp = fbm(s, x, y, z, width * 1.5)
    phase = (s.x + s.y + s.z) / s.scale + 3 * warp
    vein = (1 - abs(math.sin(phase * math.pi))) ** 3
    return mix(s, vein * unit(1.5 - 2 * width) + 0.3 * warp)


@lean_helper
def grain(s, x, y, z, along, scale):
    """Rings and fibers of wood, stretched `along` an axis."""
    stretch, shift = f(0.08), f(s.seed) * f(0.37)
    x = x * (stretch if along == 0 else f(1)) / scale + shift
    y = y * (stretch if along == 1 else f(1)) / scale + shift
    z = z * (stretch if along == 2 else f(1)) / scale + shift
    width, slow, fast = s.footprint / scale, f(0.7), f(6)
    warp = noise(s, x * slow, y * slow, z * slow, 0)
    rings = 0.5 + 0.5 * math.sin(2 * math.pi * (x + y + z + 1.6 * warp))
    fiber = fbm(s, x * fast, y * fast, z * fast, width * 6)
    return unit(0.45 + unit(1.5 - 2 * width) * (0.35 * (rings - 0.5)) + 0.6 * (fiber - 0.5))


@lean_helper
def tiles(s):
    """Square or brick tiles: grout in the second color, each tile a shade of the base."""
    brick = s.seed % 2
    width_u, width_v = s.scale * f(1 + brick), s.scale
    y = s.v / width_v
    row = math.floor(y)
    column = s.u / width_u + f(0.5 * brick) * (row % 2)
    gap_u = 1 - bands(column, s.footprint / width_u, 0.95)
    gap_v = 1 - bands(y, s.footprint / width_v, 0.95)
    shade = random_of(s, math.floor(column), row, s.seed, 0)[0]
    keep = unit(1.6 - 2 * s.footprint / width_v)
    return scaled(mix(s, max(gap_u, gap_v)), 1 + keep * (shade - 0.5) * 0.35)


@lean_helper
def planks(s):
    """Boards along u: each its own shade, with wood grain and dark joints."""
    row = math.floor(s.v / s.scale)
    offset = random_of(s, row, row, s.seed, 0)[0]
    length = s.scale * f(9)
    along = s.u / length + offset
    shade = random_of(s, row, math.floor(along), s.seed, 1)
    wood = grain(s, s.u, s.v, shade[1] * f(20), 0, s.scale * f(0.5))
    width = s.footprint / s.scale
    gap = 1 - bands(s.v / s.scale, width, 0.96)
    ends = 1 - bands(along, s.footprint / length, 0.995)
    tone = 1 + (shade[0] - 0.5) * 0.4 * unit(1.6 - 2 * width)
    return scaled(mix(s, wood), tone * (1 - 0.6 * max(gap, ends)))


@lean_helper
def spines(s):
    """Backs of books side by side along u: random widths and colors."""
    cell = s.u / s.scale
    shift = f(0.35) * (random_of(s, math.floor(cell), 0, s.seed, 0)[0] - f(0.5))
    r, g, b = random_of(s, math.floor(cell + shift), 1, s.seed, 0)
    color = 0.06 + 0.65 * r * r, 0.06 + 0.65 * g * g, 0.06 + 0.65 * b * b
    half = max(s.half_v, 1e-3)
    label = bands(s.v / half * 0.5 + color[0], s.footprint / half, 0.25)
    width = s.footprint / s.scale
    color = blend(color, (0.75, 0.75, 0.75), 0.6 * label)
    edge = 1 - 0.5 * bands(fraction(cell + shift + 64) + 0.5, width, 0.15)
    return blend((0.25, 0.25, 0.25), scaled(color, edge), unit(1.8 - 2 * width))


@lean_helper
def weave(s):
    """Woven or tufted cloth: a fine net of two shades under larger clouds."""
    turn = 2 * math.pi / s.scale
    net = 0.5 + 0.25 * (math.sin(s.u * turn) + math.sin(s.v * turn)) * unit(1.5 - 2 * s.footprint / s.scale)
    return mix(s, unit(0.6 * net + 0.8 * (clouds(s, f(4), s.footprint * 4) - 0.3)))


# ---- Pictures, windows, screens -------------------------------------------------------------------------------------


@lean_helper
def tone(s, which):
    """The n-th color of the picture's own small palette."""
    r, g, b = random_of(s, which, s.seed, s.seed, 5)
    return 0.04 + 0.8 * r**1.6, 0.04 + 0.8 * g**1.6, 0.04 + 0.8 * b**1.6


@lean_helper
def sharpness(s):
    """How fast an edge may rise per unit of the face: a pixel's inverse size."""
    return 1 / max(s.footprint / s.half_v, 0.02)


@lean_helper
def landscape(s, x, y):
    """Sky, sun and three ridges."""
    soft, phase = sharpness(s), scaled(random_of(s, s.seed, s.seed, s.seed, 9), f(6))
    color = paint(tone(s, 0), tone(s, 1), 0.5 - 0.5 * y)
    color = paint(color, tone(s, 2), (0.22 - math.hypot(x - phase[0] / 4 + 0.7, y - 0.45)) * soft)
    for layer, level in ((0, 0.1), (1, -0.2), (2, -0.55)):
        ridge = level + 0.18 * math.sin(x * (2.2 + layer) + phase[layer]) + 0.06 * math.sin(x * 7 + phase[1])
        color = paint(color, tone(s, 3 + layer), (ridge - y) * soft)
    return color


@lean_helper
def blocks(s, x, y):
    """Rectangles split by random lines, some of the fields filled."""
    cuts = random_of(s, s.seed, s.seed + 1, s.seed, 2)
    cut_x, cut_y = cuts[0] * f(0.8) - f(0.4), cuts[1] * f(0.8) - f(0.4)
    column = (x > f(-0.55)) + (x > 0.0) + (x > 0.5) + 4 * (x > cut_x)
    row = (y > f(-0.3)) + (y > f(0.45)) + 3 * (y > cut_y)
    r, g, b = random_of(s, column, row, s.seed, 3)
    color = 0.03 + 0.85 * r**1.5, 0.03 + 0.85 * g**1.5, 0.03 + 0.85 * b**1.5
    return paint(color, (0.03, 0.03, 0.03), (0.04 - min(abs(x - cut_x), abs(y - cut_y))) * 30)


@lean_helper
def circles(s, x, y):
    """Six discs."""
    soft, color = sharpness(s), tone(s, 0)
    for which in range(6):
        a, b, size = random_of(s, which, s.seed + 2, s.seed, 4)
        distance = math.hypot(x - (a * 1.6 - 0.8), y - (b * 1.6 - 0.8))
        color = paint(color, tone(s, 1 + which), (0.15 + 0.4 * size - distance) * soft)
    return color


@lean_helper
def portrait(s, x, y):
    """A head and shoulders."""
    soft = sharpness(s)
    color = paint(tone(s, 0), tone(s, 1), 0.5 + 0.5 * y)
    color = paint(color, tone(s, 2), (0.75 - math.hypot(x * 0.9, (y + 1.0) * 1.1)) * soft)
    color = paint(color, tone(s, 3), (0.38 - math.hypot(x, (y - 0.35) * 0.9)) * soft)
    head = (0.36 - math.hypot(x, (y - 0.15) * 0.75)) * soft
    return paint(color, tone(s, 4), head if y < f(0.35) else 0.0)


@lean_helper
def picture(s, x, y):
    """One of four paintings, by seed."""
    style = s.seed % 4
    if style == 0:
        return landscape(s, x, y)
    if style == 1:
        return blocks(s, x, y)
    if style == 2:
        return circles(s, x, y)
    return portrait(s, x, y)


@lean_helper
def outdoor(s, x, y):
    """What a window shows: sky above, blurred trees and houses below."""
    seed, half, two, four = f(s.seed), f(0.5), f(2), f(4)
    a, b = s.u * four + seed, s.v * four + seed
    sky = scaled(s.base, 0.75 + 0.25 * y + 0.5 * (fbm(s, a * half, b * half, seed * half, s.footprint * 2) - 0.5))
    horizon = -0.25 + 0.5 * (fbm(s, a + seed, seed, seed, s.footprint * 4) - 0.5)
    trees = scaled(s.second, 0.5 + fbm(s, a * two, b * two, seed * two, s.footprint * 8))
    return paint(sky, trees, (horizon - y) * 8)


@lean_helper
def screen(s, x, y):
    """A lit display: windows on a background."""
    soft = sharpness(s)
    color = paint(tone(s, 0), tone(s, 1), 0.5 + 0.5 * x)
    lines = bands(y * 6, s.footprint / s.half_v * 6, 0.4)
    for which in range(3):
        a, b, c = random_of(s, which, s.seed + 3, s.seed, 6)
        inside = -max(abs(x - (a - 0.5)) - 0.2 - 0.25 * c, abs(y - (b - 0.5)) - 0.2 - 0.2 * a)
        color = paint(color, tone(s, 3 + which), inside * soft)
        color = paint(color, tone(s, 6), lines * 0.7 if inside > 0.05 else 0.0)
    return color


# ---- All together ---------------------------------------------------------------------------------------------------


@lean_helper
def pattern(kind, s):
    """Compute the color of a point by the pattern of its material."""
    if kind == STRIPES:
        return stripes(s)
    if kind == CHECKS:
        return checks(s)
    if kind == PLAID:
        return plaid(s)
    if kind == DOTS:
        return dots(s)
    if kind == NOISE:
        return noisy(s)
    if kind == MARBLE:
        return marble(s)
    if kind == WOOD:
        return mix(s, grain(s, s.x, s.y, s.z, s.longest, s.scale))
    if kind == TILES:
        return tiles(s)
    if kind == PLANKS:
        return planks(s)
    if kind == SPINES:
        return spines(s)
    if kind == WEAVE:
        return weave(s)
    x, y = s.u / max(s.half_u, f(1e-4)), s.v / max(s.half_v, f(1e-4))
    if kind == PICTURE:
        return picture(s, x, y)
    if kind == OUTDOOR:
        return outdoor(s, x, y)
    if kind == SCREEN:
        return screen(s, x, y)
    return scaled(s.base, 1.0)


@lean_entry
def albedo(part, local, face, footprint, longest, material, table, volume, color):
    """Compute the linear RGB color [3, N] in [0, 1] of points [3, N]; face [4, N]: uv and half extent."""
    for i in range(len(part)):
        m = material[part[i]]
        spot = Spot(
            local[0, i],
            local[1, i],
            local[2, i],
            face[0, i],
            face[1, i],
            face[2, i],
            face[3, i],
            longest[part[i]],
            footprint[i],
            m[M_SCALE],
            int(m[M_SEED]),
            (m[M_BASE], m[M_BASE + 1], m[M_BASE + 2]),
            (m[M_SECOND], m[M_SECOND + 1], m[M_SECOND + 2]),
            table,
            volume,
        )
        r, g, b = pattern(int(m[M_KIND]), spot)
        if m[M_GRAIN] > 0:
            fine = 1 + m[M_GRAIN] * (clouds(spot, f(60), footprint[i] * 60) - 0.5) * 2
            r, g, b = r * fine, g * fine, b * fine
        color[0, i], color[1, i], color[2, i] = unit(r), unit(g), unit(b)
