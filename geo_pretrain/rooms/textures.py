"""Procedural color of surface points: stripes, checks, noise, wood grain, tiles, pictures.

A pattern is a function of coordinates that are fixed to the surface (meters in the part's frame), so it sticks to the
surface from view to view. Patterns fade to their mean where a pixel covers more than half a period: no aliasing.
Colors are linear RGB. No pattern belongs to a class; `materials.py` deals them out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from geo_pretrain.rooms.scene import M_BASE, M_GRAIN, M_KIND, M_SCALE, M_SECOND, M_SEED

TABLE = 4096  # entries of the random table; a power of two
_VOLUME = 32  # side of the periodic noise volume


@dataclass(frozen=True)
class Surface:
    """Points [N] on surfaces, with all inputs of their color."""

    point: Tensor  # [N, 3] m in the part's frame
    uv: Tensor  # [N, 2] m along the face
    half_uv: Tensor  # [N, 2] m, half extent of the face
    longest: Tensor  # [N], the part's longest axis
    footprint: Tensor  # [N] m, size of a pixel on the surface
    material: Tensor  # [N, M_COLUMNS]

    def pick(self, index: Tensor) -> Surface:
        """Select the points of `index`."""
        return Surface(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @property
    def scale(self) -> Tensor:
        """Period of the pattern [N], meters."""
        return self.material[:, M_SCALE]

    @property
    def seed(self) -> Tensor:
        """Integer seed of the material [N]."""
        return self.material[:, M_SEED].long()


@lru_cache(maxsize=4)
def tables(device: str) -> tuple[Tensor, Tensor]:
    """The constant random table [TABLE, 3] in [0, 1] and noise volume [1, 2, 33, 33, 33] with mean 0.5."""
    rng = np.random.default_rng(20240607)
    table = torch.from_numpy(rng.random((TABLE, 3), dtype=np.float32))
    volume = rng.random((2, _VOLUME, _VOLUME, _VOLUME), dtype=np.float32)
    volume = np.pad(volume, ((0, 0), (0, 1), (0, 1), (0, 1)), mode="wrap")
    return table.to(device), torch.from_numpy(volume)[None].to(device)


def random_of(a: Tensor, b: Tensor, seed: Tensor, salt: int = 0) -> Tensor:
    """Hash integer cells (a, b) and a seed to three random numbers in [0, 1]: [N, 3]."""
    table, _ = tables(str(a.device))
    mixed = a.long() * 1619 + b.long() * 3137 + seed * 797 + salt * 101
    return table[(mixed ^ (mixed >> 5)) & (TABLE - 1)]


def noise(point: Tensor, channel: int = 0) -> Tensor:
    """Evaluate smooth noise in [0, 1] with period 32 and lattice 1: point [N, 3] -> [N]."""
    _, volume = tables(str(point.device))
    unit = torch.remainder(point, _VOLUME) * (2 / _VOLUME) - 1
    return F.grid_sample(volume, unit.view(1, 1, 1, -1, 3), align_corners=True)[0, channel, 0, 0]


def fbm(point: Tensor, width: Tensor) -> Tensor:
    """Sum three octaves of noise, each faded where `width` (pixel size in lattice units, [N]) is too coarse."""
    total = torch.full_like(width, 0.5)
    for octave, weight in enumerate((0.55, 0.3, 0.2)):
        frequency = 2.0**octave
        keep = (1.5 - 2 * width * frequency).clamp(0, 1)
        total = total + weight * keep * (noise(point * frequency + 7.3 * octave, octave % 2) - 0.5) * 1.4
    return total.clamp(0, 1)


def bands(x: Tensor, width: Tensor, share: float = 0.5) -> Tensor:
    """Evaluate a soft square wave of period 1, 1 for `share` of it; `width` is a pixel in periods. [N] -> [N]."""
    distance = ((x - torch.floor(x)) - 0.5).abs()  # 0 in the middle of the band
    soft = width.clamp(min=0.02)
    wave = ((share / 2 - distance) / soft + 0.5).clamp(0, 1)
    keep = (1.6 - 2 * width).clamp(0, 1)
    return share + (wave - share) * keep


def albedo(surface: Surface) -> Tensor:
    """Compute the linear RGB color [N, 3] in [0, 1] of the points."""
    kinds = surface.material[:, M_KIND].long()
    base = surface.material[:, M_BASE : M_BASE + 3]
    color = base.clone()
    for kind in torch.unique(kinds).tolist():
        draw = _DRAWERS[kind]
        if draw is not None:
            index = (kinds == kind).nonzero()[:, 0]
            color[index] = draw(surface.pick(index))
    grainy = (surface.material[:, M_GRAIN] > 0).nonzero()[:, 0]
    if len(grainy):
        part = surface.pick(grainy)
        fine = fbm(part.point * 60 + part.seed[:, None].float(), part.footprint * 60)
        color[grainy] *= 1 + part.material[:, M_GRAIN, None] * (fine[:, None] - 0.5) * 2
    return color.clamp(0.0, 1.0)


def _mix(surface: Surface, weight: Tensor) -> Tensor:
    """Interpolate from the base color (`weight` [N] 0) to the second color (1)."""
    base = surface.material[:, M_BASE : M_BASE + 3]
    second = surface.material[:, M_SECOND : M_SECOND + 3]
    return base + (second - base) * weight[:, None]


def _stripes(s: Surface) -> Tensor:
    along_v = (s.seed % 2) == 0
    x = torch.where(along_v, s.uv[:, 0], s.uv[:, 1])
    return _mix(s, bands(x / s.scale + 0.25, s.footprint / s.scale, 0.4))


def _checks(s: Surface) -> Tensor:
    width = s.footprint / s.scale
    a, b = bands(s.uv[:, 0] / s.scale, width), bands(s.uv[:, 1] / s.scale, width)
    return _mix(s, a + b - 2 * a * b)


def _plaid(s: Surface) -> Tensor:
    width = s.footprint / s.scale
    a, b = (bands(s.uv[:, k] / s.scale, width, 0.35) for k in (0, 1))
    fine = bands(s.uv[:, 0] / s.scale * 2 + 0.5, width * 2, 0.12)
    return _mix(s, (0.45 * (a + b) + 0.4 * fine).clamp(max=1))


def _dots(s: Surface) -> Tensor:
    cell = s.uv / s.scale[:, None]
    odd = torch.remainder(torch.floor(cell[:, 1]), 2) * 0.5
    local = torch.stack([torch.frac(cell[:, 0] + odd + 64), torch.frac(cell[:, 1] + 64)], 1) - 0.5
    width = s.footprint / s.scale
    inside = ((0.28 - local.norm(dim=1)) / width.clamp(min=0.04) + 0.5).clamp(0, 1)
    mean = math.pi * 0.28**2
    return _mix(s, mean + (inside - mean) * (1.6 - 2 * width).clamp(0, 1))


def _noise(s: Surface) -> Tensor:
    value = fbm(s.point / s.scale[:, None] * 2 + s.seed[:, None].float(), s.footprint / s.scale * 2)
    return _mix(s, ((value - 0.5) * 2.4 + 0.5).clamp(0, 1))


def _marble(s: Surface) -> Tensor:
    width = s.footprint / s.scale
    warp = fbm(s.point / s.scale[:, None] * 1.5 + s.seed[:, None].float(), width * 1.5)
    phase = s.point.sum(1) / s.scale + 3 * warp
    vein = (1 - torch.sin(phase * math.pi).abs()) ** 3
    return _mix(s, vein * (1.5 - 2 * width).clamp(0, 1) + 0.3 * warp)


def _wood(s: Surface) -> Tensor:
    """Wood: long fibers along the part's longest axis."""
    return _mix(s, _grain(s.point, s.longest, s.seed, s.scale, s.footprint))


def _grain(point: Tensor, along: Tensor, seed: Tensor, scale: Tensor, footprint: Tensor) -> Tensor:
    stretch = torch.ones_like(point).scatter_(1, along[:, None], 0.08)
    q = point * stretch / scale[:, None] + seed[:, None].float() * 0.37
    width = footprint / scale
    rings = 0.5 + 0.5 * torch.sin(2 * math.pi * (q[:, 0] + q[:, 1] + q[:, 2] + 1.6 * noise(q * 0.7)))
    keep = (1.5 - 2 * width).clamp(0, 1)
    fiber = fbm(q * 6, width * 6)
    return (0.45 + keep * (0.35 * (rings - 0.5)) + 0.6 * (fiber - 0.5)).clamp(0, 1)


def _tiles(s: Surface) -> Tensor:
    """Square or brick tiles: grout in the second color, each tile a shade of the base."""
    brick = (s.seed % 2).float()
    size = torch.stack([s.scale * (1 + brick), s.scale], 1)
    cell = s.uv / size
    row = torch.floor(cell[:, 1])
    column = cell[:, 0] + 0.5 * brick * torch.remainder(row, 2)
    width = s.footprint[:, None] / size
    joint = 0.05
    gap_u = 1 - bands(column, width[:, 0], 1 - joint)
    gap_v = 1 - bands(cell[:, 1], width[:, 1], 1 - joint)
    shade = random_of(torch.floor(column), row, s.seed)[:, :1]
    grout = torch.maximum(gap_u, gap_v)
    keep = (1.6 - 2 * width[:, 1:]).clamp(0, 1)
    return _mix(s, grout) * (1 + keep * (shade - 0.5) * 0.35)


def _planks(s: Surface) -> Tensor:
    """Boards along u: each its own shade, with wood grain and dark joints."""
    row = torch.floor(s.uv[:, 1] / s.scale)
    offset = random_of(row, row, s.seed)[:, 0]
    length = s.scale * 9
    column = torch.floor(s.uv[:, 0] / length + offset)
    shade = random_of(row, column, s.seed, 1)
    flat = torch.stack([s.uv[:, 0], s.uv[:, 1], shade[:, 1] * 20], 1)
    grain = _grain(flat, torch.zeros_like(s.longest), s.seed, s.scale * 0.5, s.footprint)
    width = s.footprint / s.scale
    gap = 1 - bands(s.uv[:, 1] / s.scale, width, 0.96)
    ends = 1 - bands(s.uv[:, 0] / length + offset, s.footprint / length, 0.995)
    tone = 1 + (shade[:, :1] - 0.5) * 0.4 * (1.6 - 2 * width[:, None]).clamp(0, 1)
    return _mix(s, grain) * tone * (1 - 0.6 * torch.maximum(gap, ends)[:, None])


def _spines(s: Surface) -> Tensor:
    """Backs of books side by side along u: random widths and colors."""
    cell = s.uv[:, 0] / s.scale
    shift = 0.35 * (random_of(torch.floor(cell), torch.zeros_like(cell), s.seed)[:, 0] - 0.5)
    column = torch.floor(cell + shift)
    color = random_of(column, torch.ones_like(column), s.seed)
    color = 0.06 + 0.65 * color**2
    height = s.uv[:, 1] / s.half_uv[:, 1].clamp(min=1e-3)
    label = bands(height * 0.5 + color[:, 0], s.footprint / s.half_uv[:, 1].clamp(min=1e-3), 0.25)
    keep = (1.8 - 2 * s.footprint / s.scale).clamp(0, 1)[:, None]
    striped = color + (0.75 - color) * 0.6 * label[:, None]
    edge = 1 - 0.5 * bands(torch.frac(cell + shift + 64) + 0.5, s.footprint / s.scale, 0.15)[:, None]
    return 0.25 + (striped * edge - 0.25) * keep


def _weave(s: Surface) -> Tensor:
    """Woven or tufted cloth: a fine net of two shades under larger clouds."""
    width = s.footprint / s.scale
    net = 0.5 + 0.25 * (
        torch.sin(s.uv[:, 0] / s.scale * 2 * math.pi) + torch.sin(s.uv[:, 1] / s.scale * 2 * math.pi)
    ) * (1.5 - 2 * width).clamp(0, 1)
    clouds = fbm(s.point * 4 + s.seed[:, None].float(), s.footprint * 4)
    return _mix(s, (0.6 * net + 0.8 * (clouds - 0.3)).clamp(0, 1))


def _unit(s: Surface) -> tuple[Tensor, Tensor]:
    """Coordinates in [-1, 1] over the face: x to the right, y up."""
    unit = s.uv / s.half_uv.clamp(min=1e-4)
    return unit[:, 0], unit[:, 1]


def _tone(s: Surface, which: int) -> Tensor:
    """The n-th color of the picture's own small palette, [N, 3]."""
    number = torch.full_like(s.seed, which)
    return 0.04 + 0.8 * random_of(number, s.seed, s.seed, 5) ** 1.6


def _paint(color: Tensor, other: Tensor, cover: Tensor) -> Tensor:
    return color + (other - color) * cover.clamp(0, 1)[:, None]


def _picture(s: Surface) -> Tensor:
    """One of four paintings, by seed: landscape, blocks, circles, portrait."""
    style = s.seed % 4
    color = torch.empty(len(s.uv), 3, device=s.uv.device)
    for which, draw in enumerate((_landscape, _blocks, _circles, _portrait)):
        index = (style == which).nonzero()[:, 0]
        if len(index):
            color[index] = draw(s.pick(index))
    return color


def _landscape(s: Surface) -> Tensor:
    x, y = _unit(s)
    soft = 1 / (s.footprint / s.half_uv[:, 1]).clamp(min=0.02)
    phase = random_of(s.seed, s.seed, s.seed, 9) * 6
    sky = _paint(_tone(s, 0), _tone(s, 1), 0.5 - 0.5 * y)
    sun = ((0.22 - torch.hypot(x - phase[:, 0] / 4 + 0.7, y - 0.45)) * soft).clamp(0, 1)
    color = _paint(sky, _tone(s, 2), sun)
    for layer, level in enumerate((0.1, -0.2, -0.55)):
        ridge = level + 0.18 * torch.sin(x * (2.2 + layer) + phase[:, layer]) + 0.06 * torch.sin(x * 7 + phase[:, 1])
        color = _paint(color, _tone(s, 3 + layer), (ridge - y) * soft)
    return color


def _blocks(s: Surface) -> Tensor:
    """Rectangles split by random lines, some of the fields filled."""
    x, y = _unit(s)
    cuts = random_of(s.seed, s.seed + 1, s.seed, 2) * 0.8 - 0.4
    x, y = x.contiguous(), y.contiguous()
    column = torch.bucketize(x, torch.tensor([-0.55, 0.0, 0.5], device=x.device)) + (x > cuts[:, 0]).long() * 4
    row = torch.bucketize(y, torch.tensor([-0.3, 0.45], device=x.device)) + (y > cuts[:, 1]).long() * 3
    color = 0.03 + 0.85 * random_of(column, row, s.seed, 3) ** 1.5
    line = ((0.04 - torch.minimum((x - cuts[:, 0]).abs(), (y - cuts[:, 1]).abs())) * 30).clamp(0, 1)
    return _paint(color, torch.full_like(color, 0.03), line)


def _circles(s: Surface) -> Tensor:
    x, y = _unit(s)
    soft = 1 / (s.footprint / s.half_uv[:, 1]).clamp(min=0.02)
    color = _tone(s, 0)
    for which in range(6):
        spot = random_of(torch.full_like(s.seed, which), s.seed + 2, s.seed, 4)
        radius = 0.15 + 0.4 * spot[:, 2]
        distance = torch.hypot(x - (spot[:, 0] * 1.6 - 0.8), y - (spot[:, 1] * 1.6 - 0.8))
        color = _paint(color, _tone(s, 1 + which), (radius - distance) * soft)
    return color


def _portrait(s: Surface) -> Tensor:
    x, y = _unit(s)
    soft = 1 / (s.footprint / s.half_uv[:, 1]).clamp(min=0.02)
    color = _paint(_tone(s, 0), _tone(s, 1), 0.5 + 0.5 * y)
    body = (0.75 - torch.hypot(x * 0.9, (y + 1.0) * 1.1)) * soft
    head = (0.36 - torch.hypot(x, (y - 0.15) * 0.75)) * soft
    hair = (0.38 - torch.hypot(x, (y - 0.35) * 0.9)) * soft
    return _paint(_paint(_paint(color, _tone(s, 2), body), _tone(s, 3), hair), _tone(s, 4), head * (y < 0.35).float())


def _outdoor(s: Surface) -> Tensor:
    """What a window shows: sky above, blurred trees and houses below."""
    x, y = _unit(s)
    base, second = s.material[:, M_BASE : M_BASE + 3], s.material[:, M_SECOND : M_SECOND + 3]
    seed = s.seed[:, None].float()
    flat = torch.stack([s.uv[:, 0] * 4, s.uv[:, 1] * 4, torch.zeros_like(x)], 1) + seed
    clouds = fbm(flat * 0.5, s.footprint * 2)
    sky = base * (0.75 + 0.25 * y + 0.5 * (clouds - 0.5))[:, None]
    horizon = -0.25 + 0.5 * (fbm(flat * torch.tensor([1.0, 0.0, 0.0], device=x.device) + seed, s.footprint * 4) - 0.5)
    trees = second * (0.5 + fbm(flat * 2, s.footprint * 8))[:, None]
    return _paint(sky, trees, (horizon - y) * 8)


def _screen(s: Surface) -> Tensor:
    """A lit display: windows on a background, or a film (a painting)."""
    x, y = _unit(s)
    soft = 1 / (s.footprint / s.half_uv[:, 1]).clamp(min=0.02)
    color = _paint(_tone(s, 0), _tone(s, 1), 0.5 + 0.5 * x)
    for which in range(3):
        spot = random_of(torch.full_like(s.seed, which), s.seed + 3, s.seed, 6)
        dx = (x - (spot[:, 0] - 0.5)).abs() - 0.2 - 0.25 * spot[:, 2]
        dy = (y - (spot[:, 1] - 0.5)).abs() - 0.2 - 0.2 * spot[:, 0]
        inside = -torch.maximum(dx, dy)
        color = _paint(color, _tone(s, 3 + which), inside * soft)
        lines = bands(y * 6, s.footprint / s.half_uv[:, 1] * 6, 0.4) * (inside > 0.05).float()
        color = _paint(color, _tone(s, 6), lines * 0.7)
    return color


PATTERNS: dict[str, Callable[[Surface], Tensor] | None] = {
    "plain": None,
    "stripes": _stripes,
    "checks": _checks,
    "plaid": _plaid,
    "dots": _dots,
    "noise": _noise,
    "marble": _marble,
    "wood": _wood,
    "tiles": _tiles,
    "planks": _planks,
    "spines": _spines,
    "weave": _weave,
    "picture": _picture,
    "outdoor": _outdoor,
    "screen": _screen,
}
PATTERN_ID: dict[str, int] = {name: index for index, name in enumerate(PATTERNS)}
_DRAWERS: list[Callable[[Surface], Tensor] | None] = list(PATTERNS.values())
