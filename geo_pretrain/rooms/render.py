"""Ray casting of one frame: exact depth and ids, then light, shadow, reflection and a camera's response.

Depth is analytic (the nearest intersection, float32) at integer pixel centers; color may take several rays per pixel
(`samples`). Lighting: ambient with soft darkening towards the room's corners, point lights and window light with cast
shadows, sunlight through the windows, Blinn-Phong highlights, and for glossy surfaces a mirror image of the bare room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.rooms.intersect import (
    TILE,
    Geometry,
    Sight,
    View,
    first_hit,
    image_from_tiles,
    occluded,
    shell_hit,
)
from geo_pretrain.rooms.scene import (
    M_BASE,
    M_EMIT,
    M_GLOSS,
    M_SECOND,
    M_SHINE,
    QUADRIC,
    SHELL,
    SHELL_AXES,
    Scene,
)
from geo_pretrain.rooms.textures import Surface, albedo

OFFSETS = ((-0.125, -0.375), (0.375, -0.125), (0.125, 0.375), (-0.375, 0.125))  # a rotated square: rays of a pixel


TILE_RAYS = TILE * TILE


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows [N, 3] -> [N]; on CPU several times faster than a sum over the short axis."""
    return a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1] + a[:, 2] * b[:, 2]


@dataclass(frozen=True)
class Rendering:
    """One noise-free frame, images [H, W] on the renderer's device."""

    radiance: Tensor  # [H, W, 3] linear RGB, before exposure
    depth: Tensor  # float32 m (z)
    semantic: Tensor  # int16
    instance: Tensor  # int32
    slant: Tensor  # cosine between the surface normal and the view ray
    gloss: Tensor  # 0..1


class SceneRenderer(Protocol):
    """What renders views of a scene: `Renderer` by torch, on any device, or `compiled.renderer` by numba on a CPU."""

    scene: Scene
    parts: int  # of the scene, without the six shell faces

    def depth(self, cam_to_world: np.ndarray, k: np.ndarray, width: int, height: int) -> tuple[Tensor, Tensor]:
        """Render only depth [H, W] and part index [H, W] (shell faces follow the parts)."""

    def render(self, cam_to_world: np.ndarray, k: np.ndarray, width: int, height: int, samples: int = 1) -> Rendering:
        """Render one frame; `samples` is 1 or 4 rays per pixel for color."""


@dataclass(frozen=True)
class Hits:
    """Surface points [N] seen by rays: everything that shading needs."""

    part: Tensor  # [N]
    point: Tensor  # [N, 3] world
    local: Tensor  # [N, 3] m in the part's frame
    normal: Tensor  # [N, 3] world, unit, outwards
    surface: Surface


class Renderer:
    """Renders views of one scene on one device."""

    def __init__(self, scene: Scene, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.scene = scene
        self.geometry = Geometry.of(scene, self.device)
        self.parts = self.geometry.parts

        def put(array: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.as_tensor(array, dtype=dtype, device=self.device)

        self.material = put(scene.material)
        self.kind = put(scene.kind, torch.int64)
        self.sphere = put(scene.sphere, torch.bool)
        self.semantic = put(scene.semantic, torch.int16)
        self.instance = put(scene.instance, torch.int32)
        self.ambient = put(scene.ambient)
        axes = torch.zeros(6, 3)
        for face, (axis, sign) in enumerate(SHELL_AXES):
            axes[face, axis] = -sign  # shell normals look into the room
        self.shell_normals = axes.to(self.device)

    def depth(self, cam_to_world: np.ndarray, k: np.ndarray, width: int, height: int) -> tuple[Tensor, Tensor]:
        """Render only depth [H, W] and part index [H, W]; sizes are multiples of 8."""
        view = self._view(cam_to_world, k, width, height)
        sight = Sight.of(self.geometry, view)
        depth, part = first_hit(sight, view)
        return image_from_tiles(depth, width, height), image_from_tiles(part, width, height)

    @torch.no_grad()
    def render(self, cam_to_world: np.ndarray, k: np.ndarray, width: int, height: int, samples: int = 1) -> Rendering:
        """Render one frame; `samples` is 1 or 4 rays per pixel for color (depth and ids always take the center)."""
        view = self._view(cam_to_world, k, width, height)
        sight = Sight.of(self.geometry, view)
        depth, part = first_hit(sight, view)
        focal = float(k[0, 0])
        rays = view.directions().view(-1, 3)
        hits, cosine = self._surface(view, rays, depth.flatten(), part.flatten(), focal)
        radiance = self._shade(hits, view)
        if samples > 1:
            shifted = [self._view(cam_to_world, k, width, height, shift) for shift in OFFSETS]
            radiance = self._smooth_edges(sight, shifted, part, radiance, focal)

        def image(flat: Tensor) -> Tensor:
            return image_from_tiles(flat.reshape(*depth.shape, *flat.shape[1:]), width, height).contiguous()

        flat = part.flatten()
        return Rendering(
            radiance=image(radiance),
            depth=image(depth.flatten()),
            semantic=image(self.semantic[flat]),
            instance=image(self.instance[flat]),
            slant=image(cosine),
            gloss=image(self.material[flat, M_GLOSS]),
        )

    def _view(
        self, cam_to_world: np.ndarray, k: np.ndarray, width: int, height: int, shift: tuple[float, float] = (0.0, 0.0)
    ) -> View:
        pose = torch.as_tensor(cam_to_world, dtype=torch.float64, device=self.device)
        return View.of(pose, torch.as_tensor(k, dtype=torch.float64, device=self.device), width, height, shift)

    def _smooth_edges(self, sight: Sight, views: list[View], part: Tensor, radiance: Tensor, focal: float) -> Tensor:
        """Average rays through four points of each pixel; only those that meet another part are shaded again.

        Textures are already filtered by their footprint, so inside of a part one color a pixel is enough.
        """
        found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for view in views:
            depth, other = first_hit(sight, view)
            edge = (other != part).flatten().nonzero()[:, 0]
            # Neighbors in tile order share their shadow tests in groups of a tile's size: fill up the last one.
            fill = edge[-1:].expand(-len(edge) % TILE_RAYS) if len(edge) else edge
            spots = torch.cat([edge, fill])
            weight = torch.cat([torch.ones_like(edge), torch.zeros_like(fill)])
            rays = view.directions().view(-1, 3)[spots]
            found.append((spots, weight, rays, torch.stack([depth.flatten()[spots], other.flatten()[spots].float()])))
        spots, weight, rays = (torch.cat([row[k] for row in found]) for k in range(3))
        if len(spots) == 0:
            return radiance
        z, other = torch.cat([row[3] for row in found], 1)
        hits, _ = self._surface(views[0], rays, z, other.long(), focal)
        change = (self._shade(hits, views[0]) - radiance[spots]) * weight[:, None]
        smooth = radiance.clone()
        # One place at a time: within it each pixel occurs once (fillers weigh nothing), so sums have a fixed order.
        for row, step in zip(found, change.split([len(row[0]) for row in found]), strict=True):
            smooth.index_add_(0, row[0], step, alpha=1 / len(views))
        return smooth

    def _surface(self, view: View, rays: Tensor, z: Tensor, part: Tensor, focal: float) -> tuple[Hits, Tensor]:
        """Compute points, normals and surface coordinates where rays [N, 3] meet parts [N]; and view cosines [N]."""
        point = view.cam_to_world[:3, 3] + rays * z[:, None]
        hits = self.hits_at(point, part, torch.ones_like(z))
        cosine = -dot(rays, hits.normal) / dot(rays, rays).sqrt()
        footprint = z / focal / cosine.clamp(min=0.15)
        return Hits(hits.part, point, hits.local, hits.normal, _with_footprint(hits.surface, footprint)), cosine

    def hits_at(self, point: Tensor, part: Tensor, footprint: Tensor) -> Hits:
        """Compute normals and texture coordinates of surface points [N, 3] of known parts [N]."""
        rotation = self.geometry.rotation[part]
        half = self.geometry.half[part]
        coef = self.geometry.coef[part]
        offset = point - self.geometry.center[part]
        local = torch.stack([dot(offset, rotation[:, :, j]) for j in range(3)], 1)
        unit = local / half
        kind = self.kind[part]
        local_normal = _normals(unit, half, coef, kind, self.sphere[part])
        normal = torch.stack([dot(rotation[:, i], local_normal) for i in range(3)], 1)
        shell = (kind == SHELL).nonzero()[:, 0]
        normal[shell] = self.shell_normals[part[shell] - self.geometry.parts]
        local_normal[shell] = normal[shell]
        uv, half_uv = _face_coordinates(local, local_normal, half, (kind == QUADRIC), self.sphere[part])
        surface = Surface(local, uv, half_uv, half.argmax(1), footprint, self.material[part])
        return Hits(part, point, local, normal, surface)

    def _shade(self, hits: Hits, view: View) -> Tensor:
        """Compute the radiance [N, 3] towards the camera."""
        color = albedo(hits.surface)
        material = hits.surface.material
        eye = view.cam_to_world[:3, 3] - hits.point
        eye = eye / dot(eye, eye).sqrt()[:, None]
        light = self._ambient(hits)
        shine = torch.zeros_like(light)
        glossy = (material[:, M_GLOSS] > 0.02).nonzero()[:, 0]
        gloss = material[glossy]
        for position, strength in self._sources(hits):
            towards = position - hits.point
            towards = towards / dot(towards, towards).sqrt()[:, None]
            cosine = dot(towards, hits.normal)
            wanted = (cosine > 0) & (strength[:, 0] > 1e-4)
            lifted = (hits.point + 0.003 * hits.normal).view(-1, TILE_RAYS, 3)
            dark = occluded(self.geometry, position, lifted, wanted.view(-1, TILE_RAYS)).flatten()
            arriving = strength * (wanted & ~dark).float()[:, None]
            light += arriving * cosine.clamp(min=0)[:, None]
            if len(glossy):
                middle = towards[glossy] + eye[glossy]
                sine = dot(middle, hits.normal[glossy]) / dot(middle, middle).sqrt().clamp(min=1e-6)
                peak = sine.clamp(min=0) ** gloss[:, M_SHINE]
                shine[glossy] += (
                    arriving[glossy] * (peak * gloss[:, M_GLOSS] * (0.25 + gloss[:, M_SHINE] / 40))[:, None]
                )
        radiance = color * (light + material[:, M_EMIT, None]) + shine
        return self._mirror(hits, eye, radiance)

    def _ambient(self, hits: Hits) -> Tensor:
        """Compute ambient light [N, 3], darker in the room's edges and on undersides."""
        room = self.geometry.room
        near = torch.stack([room[0] / 2 - hits.point[:, 0].abs(), room[1] / 2 - hits.point[:, 1].abs()], 1)
        height = torch.stack([hits.point[:, 2], room[2] - hits.point[:, 2]], 1)
        gap = torch.cat([near, height], 1).clamp(min=0)
        # A face lies in its own plane: only the three other planes can darken it.
        axis = torch.stack([hits.normal[:, 0].abs(), hits.normal[:, 1].abs(), hits.normal[:, 2].abs()], 1)
        weight = 1 - torch.cat([axis[:, :2], axis[:, 2:], axis[:, 2:]], 1)
        shade = (1 - 0.35 * weight * torch.exp(-gap / 0.28)).prod(1)
        up = 0.8 + 0.2 * hits.normal[:, 2]
        return self.ambient * (shade * up)[:, None]

    def _sources(self, hits: Hits) -> list[tuple[Tensor, Tensor]]:
        """Position [3] of each light and its strength at the points [N, 3], before cosine and shadow."""
        lights, sun = self.scene.lights, self.scene.sun
        sources = []
        for position, color, normal, facing in zip(
            lights.position, lights.color, lights.normal, lights.facing, strict=True
        ):
            at, tint = self._put(position), self._put(color)
            away = hits.point - at
            square = dot(away, away)
            strength = 1 / (0.5 + square)
            if facing > 0:
                strength = strength * (
                    dot(away, self._put(normal).expand_as(away)) / square.sqrt().clamp(min=1e-3)
                ).clamp(min=0)
            sources.append((at, strength[:, None] * tint))
        if sun is not None:
            at = self._put(sun.position)
            sources.append((at, self._sunlit(hits.point, at, sun.wall)[:, None] * self._put(sun.color)))
        return sources

    def _sunlit(self, point: Tensor, sun: Tensor, wall: int) -> Tensor:
        """Test whether the line to the sun leaves the room through a window pane: 1 or 0."""
        axis = 0 if wall < 2 else 1
        plane = self.geometry.room[axis] / 2 * (-1 if wall % 2 == 0 else 1)
        towards = sun - point
        at = point + towards * ((plane - point[:, axis]) / towards[:, axis])[:, None]
        inside = torch.zeros(len(point), device=self.device)
        rects = self.scene.sun.rects if self.scene.sun is not None else np.zeros((0, 4))
        for low, high, bottom, top in rects:
            side = (at[:, 1 - axis] > low) & (at[:, 1 - axis] < high)
            inside += (side & (at[:, 2] > bottom) & (at[:, 2] < top)).float()
        return inside.clamp(max=1)

    def _mirror(self, hits: Hits, eye: Tensor, radiance: Tensor) -> Tensor:
        """Blend glossy surfaces with the mean color of the shell face that they mirror, more at grazing views."""
        gloss = hits.surface.material[:, M_GLOSS]
        index = (gloss > 0.05).nonzero()[:, 0]
        if len(index) == 0:
            return radiance
        normal, view = hits.normal[index], eye[index]
        facing = dot(normal, view).clamp(min=0)[:, None]
        ray = 2 * facing * normal - view
        distance, face = shell_hit(self.geometry, hits.point[index], ray)
        shell = self.material[face]
        color = 0.5 * (shell[:, M_BASE : M_BASE + 3] + shell[:, M_SECOND : M_SECOND + 3])
        height = (hits.point[index, 2] + ray[:, 2] * distance) / self.geometry.room[2]
        seen = color * (self.ambient + 0.2 + 0.25 * height.clamp(0, 1)[:, None])
        fresnel = 0.25 + 0.75 * (1 - facing[:, 0]) ** 4
        share = (gloss[index] * fresnel * 0.8)[:, None]
        radiance[index] = radiance[index] * (1 - share) + seen * share
        return radiance

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)


def _with_footprint(surface: Surface, footprint: Tensor) -> Surface:
    return Surface(surface.point, surface.uv, surface.half_uv, surface.longest, footprint, surface.material)


def _normals(unit: Tensor, half: Tensor, coef: Tensor, kind: Tensor, sphere: Tensor) -> Tensor:
    """Compute outward unit normals [N, 3] in the part's frame from positions on the unit solid."""
    x, y, z = unit.unbind(1)
    quadric = kind == QUADRIC
    # Signed excess over each bounding surface; the largest is the face that the point lies on.
    side_x = x.abs() - (coef[:, 0] + coef[:, 1] * z)
    side_y = y.abs() - (coef[:, 2] + coef[:, 3] * z)
    round_side = x * x + y * y - coef[:, 0] - z * (coef[:, 1] + coef[:, 2] * z)
    cap = z.abs() - 1
    # Compare in meters, so that thin parts pick the right face.
    excess = torch.stack([side_x * half[:, 0], side_y * half[:, 1], cap * half[:, 2]], 1)
    excess_round = torch.stack([round_side * half[:, 0] * 0.5, torch.full_like(cap, -1e9), cap * half[:, 2]], 1)
    face = torch.where(quadric[:, None], excess_round, excess).argmax(1)
    zero = torch.zeros_like(x)
    flat_x = torch.stack([x.sign(), zero, -coef[:, 1]], 1)
    flat_y = torch.stack([zero, y.sign(), -coef[:, 3]], 1)
    flat_z = torch.stack([zero, zero, z.sign()], 1)
    curved = torch.stack([x, y, -(0.5 * coef[:, 1] + coef[:, 2] * z)], 1)
    side = torch.where(quadric[:, None], curved, torch.where((face == 0)[:, None], flat_x, flat_y))
    cap_hit = (face == 2) & ~sphere
    normal = torch.where(cap_hit[:, None], flat_z, side) / half  # gradients scale with the inverse half sizes
    return normal / dot(normal, normal).sqrt().clamp(min=1e-9)[:, None]


def _face_coordinates(
    local: Tensor, normal: Tensor, half: Tensor, quadric: Tensor, sphere: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute coordinates [N, 2] along the face (m) and the face's half extent [N, 2]; round sides are unrolled."""
    axis = normal.abs().argmax(1)
    first = torch.where(axis == 0, 1, 0)
    second = torch.where(axis == 2, 1, 2)
    pick = torch.stack([first, second], 1)
    uv, extent = local.gather(1, pick), half.gather(1, pick)
    rolled = quadric & (sphere | (normal[:, 2].abs() < 0.9))
    index = rolled.nonzero()[:, 0]
    if len(index):
        radius = half[index, 0]
        angle = torch.atan2(local[index, 1] / half[index, 1], local[index, 0] / radius)
        uv[index] = torch.stack([angle * radius, local[index, 2]], 1)
        extent[index] = torch.stack([radius * 3.14, half[index, 2]], 1)
    return uv, extent
