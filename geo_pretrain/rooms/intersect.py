"""Find the first part that each ray hits: tile culling and exact ray-solid intersections, without loops over parts.

The image is divided into 8x8 tiles. A part is paired with a tile when its oriented box is not outside the tile's four
side planes; only pairs are intersected, 64 rays at once, and the nearest hit is a scatter-min. Shadow rays start at
the light and use the same kernels with the tiles' surface points as ends (see `occluded`).
Every function returns the ray parameter of the first hit, or `MISS`; origins must be outside of the solids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from geo_pretrain.rooms.scene import BOX, FRUSTUM, QUADRIC, SHELL_AXES, Scene

TILE = 8
MISS = 1e9
_STEEP = 1e30  # turns the sign of a condition into a huge penalty; much cheaper than torch.where on CPU
_TINY = 1e-12

Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Geometry:
    """A scene's shapes as float32 tensors on one device; `groups` holds the part indices of each kind."""

    center: Tensor  # [P, 3]
    rotation: Tensor  # [P, 3, 3]
    half: Tensor  # [P, 3]
    to_unit: Tensor  # [P, 3, 3]: world direction @ to_unit is in the unit frame
    bound: Tensor  # [P, 3]
    coef: Tensor  # [P, 4]
    casts: Tensor  # [P]
    room: Tensor  # [3]
    groups: tuple[Tensor, Tensor, Tensor]
    parts: int  # without the six shell faces
    chunk: int  # pairs intersected at once

    @staticmethod
    def of(scene: Scene, device: torch.device) -> Geometry:
        """Move a packed scene to a device."""

        def put(array: object) -> Tensor:
            return torch.as_tensor(array, dtype=torch.float32, device=device)

        kind = torch.as_tensor(scene.kind, device=device)
        groups = tuple((kind == which).nonzero()[:, 0] for which in (BOX, FRUSTUM, QUADRIC))
        return Geometry(
            center=put(scene.center),
            rotation=put(scene.rotation),
            half=put(scene.half),
            to_unit=put(scene.rotation / scene.half[:, None, :]),
            bound=put(scene.bound),
            coef=put(scene.coef),
            casts=torch.as_tensor(scene.casts, device=device),
            room=put(scene.size),
            groups=(groups[0], groups[1], groups[2]),
            parts=len(scene.kind) - 6,
            # On CPU the temporaries of one chunk should stay in the cache; on CUDA launches cost more than memory.
            chunk=512 if device.type == "cpu" else 1 << 17,
        )


def _away_from_zero(x: Tensor) -> Tensor:
    return x.abs().clamp_(min=_TINY).copysign_(x)


def _behind(x: Tensor) -> Tensor:
    """Penalize negative x: 0 where x >= 0, a huge number where x < 0."""
    return x.mul(-_STEEP).clamp_(min=0.0, max=MISS)


def hit_box(o: Triple, d: Triple, coef: Tensor) -> Tensor:
    """Intersect rays with the cube [-1, 1]^3: o components [n, 1], d components [n, R] -> ray parameters [n, R]."""
    enter, leave = _slab(o[0], d[0])
    for axis in (1, 2):
        near, far = _slab(o[axis], d[axis])
        enter, leave = torch.maximum(enter, near), torch.minimum(leave, far)
    return enter + _behind(leave - enter) + _behind(enter)


def _slab(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    inverse = _away_from_zero(d).reciprocal_()
    middle, reach = -o * inverse, inverse.abs()
    return middle - reach, middle + reach


def hit_frustum(o: Triple, d: Triple, coef: Tensor) -> Tensor:
    """Intersect rays with the box of sides |x| <= c0 + c1 z and |y| <= c2 + c3 z; coef [n, 4]."""
    enter, leave = _slab(o[2], d[2])
    for axis in (0, 1):
        offset, slope = coef[:, 2 * axis, None], coef[:, 2 * axis + 1, None]
        lean = slope * d[2]
        for side in (1.0, -1.0):
            room = offset + slope * o[2] - side * o[axis]  # >= 0 inside this plane
            speed = _away_from_zero(side * d[axis] - lean)
            at = room / speed
            enter = torch.maximum(enter, at - speed.mul(_STEEP).clamp_(min=0.0, max=MISS))
            leave = torch.minimum(leave, at + _behind(speed))
    return enter + _behind(leave - enter) + _behind(enter)


def hit_quadric(o: Triple, d: Triple, coef: Tensor) -> Tensor:
    """Intersect rays with x^2 + y^2 <= c0 + c1 z + c2 z^2 inside |z| <= 1: cylinder, cone or ellipsoid."""
    c0, c1, c2 = coef[:, 0, None], coef[:, 1, None], coef[:, 2, None]

    def implicit(t: Tensor) -> tuple[Tensor, Tensor]:
        x, y, z = (oo + t * dd for oo, dd in zip(o, d, strict=True))
        return x * x + y * y - c0 - z * (c1 + c2 * z), z

    a = _away_from_zero(d[0] * d[0] + d[1] * d[1] - c2 * d[2] * d[2])
    b = o[0] * d[0] + o[1] * d[1] - (0.5 * c1 + c2 * o[2]) * d[2]
    # Solve around the ray's vertex: the discriminant of a far origin loses all digits in float32.
    vertex = (-b / a).clamp_(min=-MISS, max=MISS)
    square = -implicit(vertex)[0] / a
    reach = square.clamp(min=0.0).sqrt_()
    no_root = _behind(square)
    best = torch.full_like(vertex, MISS)
    for root in (vertex - reach, vertex + reach):
        z = o[2] + root * d[2]
        best = torch.minimum(best, root + _behind(1.0 - z.abs()) + no_root + _behind(root))
    cap, _ = _slab(o[2], d[2])
    cap = cap.clamp(min=-MISS, max=MISS)
    return torch.minimum(best, cap + _behind(-implicit(cap)[0]) + _behind(cap))


KERNELS: tuple[Callable[[Triple, Triple, Tensor], Tensor], ...] = (hit_box, hit_frustum, hit_quadric)


@dataclass(frozen=True)
class View:
    """A pinhole camera with a tiled image. Rays are camera directions (x, y, 1): the ray parameter is the z-depth."""

    cam_to_world: Tensor  # [4, 4] float32
    x: Tensor  # [columns, TILE] of each tile column
    y: Tensor  # [rows, TILE]
    edge_x: Tensor  # [columns + 1]: x of the tile borders
    edge_y: Tensor  # [rows + 1]

    @staticmethod
    def of(cam_to_world: Tensor, k: Tensor, width: int, height: int, shift: tuple[float, float] = (0, 0)) -> View:
        """Make the view of a pose; `shift`, (-0.5, 0.5) px, moves rays from the pixel centers, at integer (u, v)."""
        device = cam_to_world.device

        def rays(count: int, focal: Tensor, center: Tensor, offset: float) -> tuple[Tensor, Tensor]:
            pixels = torch.arange(count, device=device, dtype=torch.float64) + offset
            borders = torch.arange(0, count + 1, TILE, device=device, dtype=torch.float64) - 0.5
            return ((pixels - center) / focal).float().view(-1, TILE), ((borders - center) / focal).float()

        x, edge_x = rays(width, k[0, 0], k[0, 2], shift[0])
        y, edge_y = rays(height, k[1, 1], k[1, 2], shift[1])
        return View(cam_to_world.float(), x, y, edge_x, edge_y)

    def directions(self) -> Tensor:
        """World directions [tiles, 64, 3] with unit z-depth."""
        rows, columns = len(self.y), len(self.x)
        x = self.x.view(1, columns, 1, TILE).expand(rows, columns, TILE, TILE)
        y = self.y.view(rows, 1, TILE, 1).expand(rows, columns, TILE, TILE)
        r = self.cam_to_world[:3, :3]
        return torch.stack([r[i, 0] * x + r[i, 1] * y + r[i, 2] for i in range(3)], -1).view(-1, TILE * TILE, 3)


def image_from_tiles(tiles: Tensor, width: int, height: int) -> Tensor:
    """Rearrange tiles [tiles, 64, ...] to an image [height, width, ...]."""
    rest = tiles.shape[2:]
    grid = tiles.reshape(height // TILE, width // TILE, TILE, TILE, *rest)
    return grid.transpose(1, 2).reshape(height, width, *rest)


@dataclass(frozen=True)
class Sight:
    """The candidates visible from a camera pose: (tile, part) pairs of each kind, and the camera in every part's frame.

    It holds for all views that share pose and image, wherever their rays lie inside of the pixels.
    """

    geometry: Geometry
    pairs: tuple[tuple[Tensor, Tensor], ...]
    origin: Tensor  # [P, 3]
    basis: Tensor  # [P, camera axis, 3]

    @staticmethod
    def of(geometry: Geometry, view: View) -> Sight:
        """Cull parts once for a pose."""
        seen = _tile_overlap(geometry, view)
        to_unit = geometry.to_unit
        return Sight(
            geometry,
            tuple(_pairs(seen, group) for group in geometry.groups),
            origin=_apply(view.cam_to_world[:3, 3] - geometry.center, to_unit),
            basis=torch.stack(
                [_apply(view.cam_to_world[:3, i].expand_as(geometry.center), to_unit) for i in range(3)], 1
            ),
        )


def _apply(vector: Tensor, matrix: Tensor) -> Tensor:
    """Multiply rows [P, 3] by matrices [P, 3, 3]; written out, since the bits must not depend on a BLAS library."""
    x, y, z = (vector[:, i, None] * matrix[:, i] for i in range(3))
    return x + y + z


def first_hit(sight: Sight, view: View) -> tuple[Tensor, Tensor]:
    """Find depth [tiles, 64] (z, meters) and part index [tiles, 64] (shell faces follow the parts) of every ray."""
    depth, index = shell_hit(sight.geometry, view.cam_to_world[:3, 3], view.directions())
    hits = [_hit_camera(sight, view, *pair, kernel) for pair, kernel in zip(sight.pairs, KERNELS, strict=True)]
    tile, part = (torch.cat([pair[k] for pair in sight.pairs]) for k in (0, 1))
    t = torch.cat(hits)
    depth.scatter_reduce_(0, tile[:, None].expand_as(t), t, "amin")
    claim = torch.where(t == depth[tile], part[:, None], -1)
    best = torch.full_like(index, -1).scatter_reduce_(0, tile[:, None].expand_as(t), claim, "amax")
    return depth, torch.where(best >= 0, best, index)


def shell_hit(geometry: Geometry, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Find where rays from inside leave the room: parameter [...] and face index [...]; direction [..., 3]."""
    low = torch.stack([-geometry.room[0] / 2, -geometry.room[1] / 2, torch.zeros_like(geometry.room[2])])
    high = torch.stack([geometry.room[0] / 2, geometry.room[1] / 2, geometry.room[2]])
    d = _away_from_zero(direction)
    at = torch.maximum((low - origin) / d, (high - origin) / d)
    depth, axis = at.min(-1)
    positive = d.gather(-1, axis[..., None])[..., 0] > 0
    faces = torch.tensor([[SHELL_AXES.index((a, s)) for s in (-1, 1)] for a in range(3)], device=depth.device)
    return depth, faces[axis, positive.long()] + geometry.parts


def _tile_overlap(geometry: Geometry, view: View) -> Tensor:
    """Test conservatively which parts' oriented boxes may be seen in each tile: bool [tiles, P]."""
    count = geometry.parts
    rotation, origin = view.cam_to_world[:3, :3], view.cam_to_world[:3, 3]
    center = (geometry.center[:count] - origin) @ rotation  # [P, 3] camera frame
    axes = torch.einsum("pik,ij->pkj", geometry.rotation[:count], rotation) * geometry.bound[:count, :, None]
    front = center[:, 2] + axes[:, :, 2].abs().sum(1) > 0

    def strips(axis: int, edges: Tensor) -> Tensor:
        middle = center[:, axis, None] - center[:, 2, None] * edges
        reach = (axes[:, :, axis, None] - axes[:, :, 2, None] * edges).abs().sum(1)
        slack = 1e-4
        return (middle + reach > -slack)[:, :-1] & (middle - reach < slack)[:, 1:]  # [P, strips]

    rows, columns = strips(1, view.edge_y), strips(0, view.edge_x) & front[:, None]
    return (rows[:, :, None] & columns[:, None, :]).view(count, -1).T


def _pairs(seen: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    tile, column = seen[:, group].nonzero(as_tuple=True)
    return tile, group[column]


def _hit_camera(
    sight: Sight, view: View, tile: Tensor, part: Tensor, kernel: Callable[[Triple, Triple, Tensor], Tensor]
) -> Tensor:
    """Intersect the rays of tiles with parts: ray parameters [pairs, 64]."""
    geometry = sight.geometry
    columns = len(view.x)
    out = torch.empty(len(tile), TILE * TILE, device=tile.device)
    for start in range(0, len(tile), geometry.chunk):
        t, p = tile[start : start + geometry.chunk], part[start : start + geometry.chunk]
        x, y = view.x[t % columns], view.y[torch.div(t, columns, rounding_mode="floor")]  # [n, TILE]
        b, o = sight.basis[p], sight.origin[p]
        across = b[:, 0, :, None] * x[:, None, :]  # [n, 3, TILE]
        down = b[:, 1, :, None] * y[:, None, :] + b[:, 2, :, None]
        d = (down[..., :, None] + across[..., None, :]).flatten(2)  # [n, 3, 64]
        out[start : start + len(t)] = kernel(_split(o[..., None]), _split(d), geometry.coef[p])
    return out


def _split(x: Tensor) -> Triple:
    return x[:, 0], x[:, 1], x[:, 2]


def occluded(geometry: Geometry, light: Tensor, points: Tensor, wanted: Tensor) -> Tensor:
    """Test whether a shadow-casting part lies between `light` [3] and `points` [tiles, 64, 3]: bool [tiles, 64].

    Points must be a little off their surfaces. Only `wanted` [tiles, 64] points are answered for; others may be True.
    """
    blocked = torch.zeros(points.shape[:2], device=points.device)
    tiles = wanted.any(1).nonzero()[:, 0]
    if len(tiles) == 0:
        return blocked > 0
    reach = _light_overlap(geometry, light, points[tiles], wanted[tiles])
    origin = _apply(light - geometry.center, geometry.to_unit)
    towards = (points[tiles] - light).transpose(1, 2).contiguous()  # [tiles, 3, 64]
    for group, kernel in zip(geometry.groups, KERNELS, strict=True):
        tile, part = _pairs(reach, group)
        for start in range(0, len(tile), geometry.chunk):
            t, p = tile[start : start + geometry.chunk], part[start : start + geometry.chunk]
            s, rays = geometry.to_unit[p], towards[t]
            x, y, z = _split(rays)
            d = tuple(s[:, 0, j, None] * x + s[:, 1, j, None] * y + s[:, 2, j, None] * z for j in range(3))
            hit = kernel(_split(origin[p][..., None]), (d[0], d[1], d[2]), geometry.coef[p]) < 1.0
            blocked.index_add_(0, tiles[t], hit.float())
    return blocked > 0


def _light_overlap(geometry: Geometry, light: Tensor, points: Tensor, wanted: Tensor) -> Tensor:
    """Test conservatively which parts may intersect a segment from `light` to a wanted point: bool [tiles, P]."""
    count = geometry.parts
    weight = wanted.float()[..., None]
    center = (points * weight).sum(1) / weight.sum(1)
    spread = ((points - center[:, None]).norm(dim=-1) * weight[..., 0]).amax(1)  # [tiles]
    axis = center - light
    distance = axis.norm(dim=-1)
    axis = axis / distance[:, None]
    radius = geometry.bound[:count].norm(dim=-1)
    offset = geometry.center[:count] - light
    along = offset @ axis.T  # [P, tiles]
    aside = ((offset * offset).sum(-1)[:, None] - along * along).clamp_(min=0.0).sqrt_()
    sine = (spread / distance).clamp(max=0.999)
    cosine = (1 - sine * sine).sqrt()
    near = (aside * cosine - along * sine < radius[:, None]) & (along - radius[:, None] < distance + spread)
    near &= along > -radius[:, None]
    near |= (spread >= 0.9 * distance)[None, :]  # the light is (nearly) inside the points' sphere: no cone
    near &= geometry.casts[:count, None]
    # Separating slabs along the part's own axes: what remains of long flat parts, whose spheres are loose.
    tile_low, tile_high = center - spread[:, None], center + spread[:, None]
    low, high = torch.minimum(tile_low, light), torch.maximum(tile_high, light)
    reach = (geometry.rotation[:count].abs() * geometry.bound[:count, None, :]).sum(-1)  # [P, 3] world half sizes
    for k in range(3):
        middle = geometry.center[:count, k, None]
        near &= (middle - reach[:, k, None] < high[:, k]) & (middle + reach[:, k, None] > low[:, k])
    return near.T
