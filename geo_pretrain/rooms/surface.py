"""The surfaces of a scene as data: triangle mesh and labelled points, each snapped to the exact solids.

Points and triangles that no camera can see are left out where that is exact to decide: inside another part, or
outside of the room. Colors are the surface's own (albedo, gamma 2.2), without light.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from geo_pretrain.rooms.render import Renderer
from geo_pretrain.rooms.scene import QUADRIC, SHELL, SHELL_AXES, Scene
from geo_pretrain.rooms.textures import albedo

_INSIDE = 1e-3  # m; a point must be this deep in another part to count as hidden
_ROUND = 24  # segments of a circle


@dataclass(frozen=True)
class SurfacePoints:
    """Labelled points on the surfaces; world frame, meters."""

    points: np.ndarray  # float32 [N, 3]
    normals: np.ndarray  # float32 [N, 3], unit, out of the solids and into the room
    colors: np.ndarray  # uint8 [N, 3]
    semantic: np.ndarray  # int16 [N]
    instance: np.ndarray  # int32 [N]


@dataclass(frozen=True)
class Mesh:
    """Triangles of all parts. Vertices are not shared between faces with unlike normals."""

    vertices: np.ndarray  # float32 [V, 3]
    normals: np.ndarray  # float32 [V, 3]
    colors: np.ndarray  # uint8 [V, 3]
    semantic: np.ndarray  # int16 [V]
    instance: np.ndarray  # int32 [V]
    faces: np.ndarray  # int64 [F, 3], counter-clockwise seen from the side that the normals point to


@dataclass(frozen=True)
class _Raw:
    """Triangles before coloring: vertices [V, 3], the part of each vertex [V], faces [F, 3]."""

    vertices: np.ndarray
    part: np.ndarray
    faces: np.ndarray


def scene_mesh(scene: Scene, edge: float = 0.25) -> Mesh:
    """Triangulate every part and the room's shell; flat faces are divided into sides of at most `edge` meters."""
    raw = _triangulate(scene, edge)
    inner, part = _shrink_to_face(raw)
    return Mesh(raw.vertices.astype(np.float32), *surface_attributes(scene, inner, part), raw.faces)


def scene_points(scene: Scene, rng: np.random.Generator, density: float = 400.0) -> SurfacePoints:
    """Sample points uniformly on the visible surfaces, about `density` per square meter."""
    points, part = surface_sample(scene, rng, density)
    return SurfacePoints(points.astype(np.float32), *surface_attributes(scene, points, part))


def surface_sample(
    scene: Scene, rng: np.random.Generator, density: float, shell: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Sample the visible surfaces, about `density` points per square meter: float64 [N, 3], and their parts [N].

    `shell`: also the room's own walls, floor and ceiling.
    """
    raw = _triangulate(scene, 1.0)
    corners = raw.vertices[raw.faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    if not shell:
        area = np.where(scene.kind[raw.part[raw.faces[:, 0]]] == SHELL, 0.0, area)
    count = rng.poisson(area * density)
    which = np.repeat(np.arange(len(area)), count)
    a, b = rng.random((2, len(which), 1))
    fold = a + b > 1
    a, b = np.where(fold, 1 - a, a), np.where(fold, 1 - b, b)
    origin = corners[which, 0]
    points = origin + a * (corners[which, 1] - origin) + b * (corners[which, 2] - origin)
    part = raw.part[raw.faces[which, 0]]
    points = snap(scene, points, part)
    seen = ~hidden(scene, points, part)
    return points[seen], part[seen]


def snap(scene: Scene, points: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Move points [N, 3] from the facets of round parts [N] onto the round surface; flat parts stay."""
    unit = _unit(scene, points, part)
    z = np.clip(unit[:, 2], -1, 1)
    coef = scene.coef[part]
    radius = np.sqrt(np.maximum(coef[:, 0] + z * (coef[:, 1] + coef[:, 2] * z), 0.0))
    across = np.hypot(unit[:, 0], unit[:, 1])
    sphere, round_part = scene.sphere[part], scene.kind[part] == QUADRIC
    side = round_part & ~sphere & (np.abs(np.abs(unit[:, 2]) - 1) > 1e-6)
    scale = np.where(side, radius / np.maximum(across, 1e-9), 1.0)
    out = unit * np.stack([scale, scale, np.ones_like(scale)], 1)
    length = np.linalg.norm(unit, axis=1)
    out = np.where(sphere[:, None], unit / np.maximum(length, 1e-9)[:, None], out)
    moved = np.einsum("nij,nj->ni", scene.rotation[part], out * scene.half[part]) + scene.center[part]
    return np.where(round_part[:, None], moved, points)


def depth_inside(scene: Scene, points: np.ndarray, part: int) -> np.ndarray:
    """Compute how deep (m) points [N, 3] lie inside one part (a lower bound for round parts); negative outside."""
    unit = _unit(scene, points, np.full(len(points), part))
    half, coef = scene.half[part], scene.coef[part]
    x, y, z = unit.T
    cap = (1 - np.abs(z)) * half[2]
    if scene.kind[part] == QUADRIC:
        room = coef[0] + z * (coef[1] + coef[2] * z)
        radius = np.sqrt(np.maximum(room, 0.0))
        side = (radius - np.hypot(x, y)) * min(half[0], half[1])
        return np.minimum(side, cap)
    side_x = (coef[0] + coef[1] * z - np.abs(x)) * half[0]
    side_y = (coef[2] + coef[3] * z - np.abs(y)) * half[1]
    return np.minimum(np.minimum(side_x, side_y), cap)


def hidden(scene: Scene, points: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Test whether a point of `part` [N] lies inside another part, on the shell behind a part, or outside the room."""
    room = scene.size / 2
    outside = (
        (np.abs(points[:, :2]) > room[:2] - 1e-4).any(1) | (points[:, 2] < 1e-4) | (points[:, 2] > scene.size[2] - 1e-4)
    )
    result = outside & (scene.kind[part] != SHELL)
    # A shell point is covered when the space just inside of it belongs to a part.
    probe = points.copy()
    for face, (axis, sign) in enumerate(SHELL_AXES):
        probe[part == len(scene.kind) - 6 + face, axis] -= sign * 2 * _INSIDE
    reach = (np.abs(scene.rotation) * scene.bound[:, None, :]).sum(-1)
    order = np.argsort(probe[:, 0])  # a slab of points along x holds all that can lie in a part
    low, high = (np.searchsorted(probe[order, 0], scene.center[:, 0] + sign * reach[:, 0]) for sign in (-1, 1))
    for other in range(len(scene.kind) - 6):
        slab = order[low[other] : high[other]]
        box = (np.abs(probe[slab, 1:] - scene.center[other, 1:]) <= reach[other, 1:]).all(1)
        index = slab[box & (part[slab] != other) & ~result[slab]]
        if len(index):
            result[index] = depth_inside(scene, probe[index], other) > _INSIDE
    return result


def _unit(scene: Scene, points: np.ndarray, part: np.ndarray) -> np.ndarray:
    return np.einsum("nj,nji->ni", points - scene.center[part], scene.rotation[part]) / scene.half[part]


def surface_attributes(
    scene: Scene, points: np.ndarray, part: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compute normals, colors, semantic and instance ids of surface points."""
    renderer = Renderer(scene)
    normals, colors = [], []
    for start in range(0, len(points), 1 << 16):
        chunk = torch.as_tensor(points[start : start + (1 << 16)], dtype=torch.float32)
        index = torch.as_tensor(part[start : start + (1 << 16)])
        hits = renderer.hits_at(chunk, index, torch.full((len(chunk),), 0.002))
        normals.append(hits.normal.numpy())
        colors.append((albedo(hits.surface).clamp(0, 1) ** (1 / 2.2) * 255 + 0.5).to(torch.uint8).numpy())
    return (
        np.concatenate(normals),
        np.concatenate(colors),
        scene.semantic[part].astype(np.int16),
        scene.instance[part].astype(np.int32),
    )


def _shrink_to_face(raw: _Raw) -> tuple[np.ndarray, np.ndarray]:
    """Move vertices slightly towards the middle of their faces, so that each gets its own face's normal and color."""
    total, count = np.zeros_like(raw.vertices), np.zeros((len(raw.vertices), 1))
    middle = raw.vertices[raw.faces].mean(1)
    for corner in range(3):
        np.add.at(total, raw.faces[:, corner], middle)
        np.add.at(count, raw.faces[:, corner], 1.0)
    return raw.vertices + 1e-3 * (total / np.maximum(count, 1) - raw.vertices), raw.part


def _triangulate(scene: Scene, edge: float) -> _Raw:
    vertices, parts, faces = [], [], []
    start = 0
    for part in range(len(scene.kind)):
        for grid, flip in _patches(scene, part, edge):
            rows, columns = grid.shape[:2]
            world = (grid.reshape(-1, 3) * scene.half[part]) @ scene.rotation[part].T + scene.center[part]
            cell = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel() + start
            a, b, c, d = cell, cell + 1, cell + columns + 1, cell + columns
            quads = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
            vertices.append(world)
            parts.append(np.full(len(world), part))
            faces.append(quads[:, ::-1] if flip else quads)
            start += len(world)
    return _drop_slivers(_Raw(np.concatenate(vertices), np.concatenate(parts), np.concatenate(faces)))


def _drop_slivers(raw: _Raw) -> _Raw:
    """Leave out triangles without area (at poles and cone tips)."""
    corners = raw.vertices[raw.faces]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return _Raw(raw.vertices, raw.part, raw.faces[(cross * cross).sum(1) > 1e-20])


def _patches(scene: Scene, part: int, edge: float) -> list[tuple[np.ndarray, bool]]:
    """Cover a part by grids [rows, columns, 3] of unit-frame points, each with whether to flip its triangles."""
    if scene.kind[part] == QUADRIC:
        return _round_patches(scene, part, edge)
    if scene.kind[part] == SHELL:
        axis, sign = SHELL_AXES[part - (len(scene.kind) - 6)]
        return [(_flat_patch(scene, part, axis, sign, edge), sign > 0)]
    sides = [(axis, sign) for axis in range(3) for sign in (-1, 1)]
    return [(_flat_patch(scene, part, axis, sign, edge), sign < 0) for axis, sign in sides]


def _flat_patch(scene: Scene, part: int, axis: int, sign: int, edge: float) -> np.ndarray:
    first, second = (axis + 1) % 3, (axis + 2) % 3
    steps = [max(1, int(np.ceil(2 * scene.half[part, k] / edge))) + 1 for k in (first, second)]
    grid = np.empty((steps[1], steps[0], 3))
    grid[..., axis] = sign
    # Columns run along `first`, rows along `second`: counter-clockwise seen from +axis.
    grid[..., first] = np.linspace(-1, 1, steps[0])[None, :]
    grid[..., second] = np.linspace(-1, 1, steps[1])[:, None]
    coef, z = scene.coef[part], grid[..., 2].copy()
    grid[..., 0] *= coef[0] + coef[1] * z
    grid[..., 1] *= coef[2] + coef[3] * z
    return grid


def _round_patches(scene: Scene, part: int, edge: float) -> list[tuple[np.ndarray, bool]]:
    angle = np.linspace(0, 2 * np.pi, _ROUND + 1)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    if scene.sphere[part]:
        z = -np.cos(np.linspace(0, np.pi, _ROUND // 2 + 1))
    else:
        z = np.linspace(-1, 1, max(1, int(np.ceil(2 * scene.half[part, 2] / edge))) + 1)
    coef = scene.coef[part]
    radius = np.sqrt(np.maximum(coef[0] + z * (coef[1] + coef[2] * z), 0.0))
    side = np.empty((len(z), _ROUND + 1, 3))
    side[..., :2] = radius[:, None, None] * ring
    side[..., 2] = z[:, None]
    patches = [(side, False)]
    if not scene.sphere[part]:
        for end, flip in ((0, False), (-1, True)):
            cap = np.empty((2, _ROUND + 1, 3))
            cap[0, :, :2], cap[1, :, :2] = 0.0, radius[end] * ring
            cap[..., 2] = z[end]
            patches.append((cap, flip))
    return patches
