"""Rendering by compiled loops (extra `fast`): the ids of `render.Renderer`, depth and colors to rounding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.rooms.compiled.casting import cast, shadows
from geo_pretrain.rooms.compiled.patterns import albedo
from geo_pretrain.rooms.compiled.shading import arriving, assemble, shade, surface
from geo_pretrain.rooms.intersect import TILE, image_from_tiles
from geo_pretrain.rooms.render import OFFSETS, Rendering
from geo_pretrain.rooms.scene import Scene
from geo_pretrain.rooms.textures import tables

CENTER = ((0.0, 0.0),)


class Shapes(NamedTuple):
    """A scene's parts and shell faces as float32 arrays, see `scene.Scene`."""

    parts: int  # without the six shell faces
    kind: np.ndarray
    center: np.ndarray
    rotation: np.ndarray
    half: np.ndarray
    to_unit: np.ndarray  # world direction @ to_unit is in the unit frame
    bound: np.ndarray
    coef: np.ndarray
    radius: np.ndarray  # [P] of the sphere around a part's box
    reach: np.ndarray  # [3, P] half sizes of the box along the world's axes
    sphere: np.ndarray
    casts: np.ndarray
    material: np.ndarray
    semantic: np.ndarray
    instance: np.ndarray

    @staticmethod
    def of(scene: Scene) -> Shapes:
        """Convert a packed scene."""
        parts = len(scene.kind) - 6
        reach = (np.abs(scene.rotation) * scene.bound[:, None, :]).sum(-1)[:parts]
        return Shapes(
            parts=parts,
            kind=scene.kind,
            center=_float(scene.center),
            rotation=_float(scene.rotation),
            half=_float(scene.half),
            to_unit=_float(scene.rotation / scene.half[:, None, :]),
            bound=_float(scene.bound),
            coef=_float(scene.coef),
            radius=_float(np.linalg.norm(scene.bound[:parts], axis=1)),
            reach=_float(reach.T),
            sphere=scene.sphere,
            casts=scene.casts,
            material=_float(scene.material),
            semantic=scene.semantic.astype(np.int16),
            instance=scene.instance.astype(np.int32),
        )


class Light(NamedTuple):
    """The lights of a scene, the sun last."""

    position: np.ndarray
    color: np.ndarray
    normal: np.ndarray
    facing: np.ndarray
    ambient: np.ndarray
    sun: int  # its number, or -1
    wall: int
    rects: np.ndarray

    @staticmethod
    def of(scene: Scene) -> Light:
        """Convert a scene's lights."""
        lights, sun = scene.lights, scene.sun
        position, color, normal, facing = lights.position, lights.color, lights.normal, lights.facing
        if sun is not None:
            position, color = np.concatenate([position, sun.position[None]]), np.concatenate([color, sun.color[None]])
            normal, facing = np.concatenate([normal, np.zeros((1, 3))]), np.append(facing, 0.0)
        return Light(
            position=_float(position),
            color=_float(color),
            normal=_float(normal),
            facing=_float(facing),
            ambient=_float(scene.ambient),
            sun=-1 if sun is None else len(lights.position),
            wall=0 if sun is None else sun.wall,
            rects=_float(np.zeros((0, 4)) if sun is None else sun.rects.reshape(-1, 4)),
        )


class Edges(NamedTuple):
    """Rays beside a pixel's center that meet another part."""

    spot: np.ndarray  # of the pixel, in tile order
    sample: np.ndarray
    part: np.ndarray
    depth: np.ndarray


class Hits(NamedTuple):
    """Surface points, see `render.Hits`."""

    point: np.ndarray  # [3, N] world
    normal: np.ndarray  # [3, N] world
    local: np.ndarray  # [3, N] m in the part's frame
    face: np.ndarray  # [4, N] coordinates along the face and half its extent
    cosine: np.ndarray  # [N]
    footprint: np.ndarray  # [N]


class Images(NamedTuple):
    """What a frame consists of, see `render.Rendering`."""

    radiance: np.ndarray
    depth: np.ndarray
    semantic: np.ndarray
    instance: np.ndarray
    slant: np.ndarray
    gloss: np.ndarray


class CompiledRenderer:
    """Renders views of one scene on one core."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.parts = len(scene.kind) - 6
        self.shapes, self.lights = Shapes.of(scene), Light.of(scene)
        self.room, self.longest = _float(scene.size), _float(scene.half).argmax(1)

    def depth(self, cam_to_world: np.ndarray, k: np.ndarray, width: int, height: int) -> tuple[Tensor, Tensor]:
        """Render only depth [H, W] and part index [H, W]; sizes are multiples of 8."""
        x, y = _rays(k, width, height, CENTER)
        depth, part, _ = self._cast(_float(cam_to_world), k, x, y)
        return _image(depth, width, height), _image(part, width, height)

    def render(self, cam_to_world: np.ndarray, k: np.ndarray, width: int, height: int, samples: int = 1) -> Rendering:
        """Render one frame; `samples` is 1 or 4 rays per pixel for color (depth and ids always take the center)."""
        pose, shapes, lights, room = _float(cam_to_world), self.shapes, self.lights, self.room
        x, y = _rays(k, width, height, CENTER + OFFSETS if samples > 1 else CENTER)
        depth, part, edges = self._cast(pose, k, x, y)
        depth, part = np.concatenate([depth, edges.depth]), np.concatenate([part, edges.part])
        hits = _hits(len(part))
        surface(shapes, pose, x, y, np.float32(k[0, 0]), part, depth, edges.spot, edges.sample, hits)
        color = np.empty((3, len(part)), np.float32)
        table, volume = (tensor.numpy() for tensor in tables("cpu"))
        albedo(part, hits.local, hits.face, hits.footprint, self.longest, shapes.material, table, volume[0], color)
        strength = np.empty((len(lights.position), len(part)), np.float32)
        arriving(lights, room, hits, strength)
        shadows(shapes, lights.position, hits.point, hits.normal, strength)
        shade(shapes, lights, room, pose[:, 3].copy(), part, hits, strength, color)
        images = _images(width, height)
        assemble(shapes, part, depth, color, hits, edges.spot, np.float32(1 / len(OFFSETS)), images)
        return Rendering(*map(torch.from_numpy, images))

    def _cast(
        self, pose: np.ndarray, k: np.ndarray, x: np.ndarray, y: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, Edges]:
        """Find the first hits of the first view, in tile order, and the other views' rays that meet another part."""
        pixels = x[0].size * y[0].size
        depth, part = np.empty(pixels, np.float32), np.empty(pixels, np.int32)
        most = pixels * (len(x) - 1)
        edges = Edges(*(np.empty(most, kind) for kind in (np.int32, np.int32, np.int32, np.float32)))
        borders = _borders(x[0].size, k[0, 0], k[0, 2]), _borders(y[0].size, k[1, 1], k[1, 2])
        found = cast(self.shapes, self.room, pose, x, y, *borders, depth, part, edges)
        return depth, part, Edges(*(array[:found] for array in edges))


def _rays(
    k: np.ndarray, width: int, height: int, shifts: tuple[tuple[float, float], ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the ray coordinates x and y [V, strips, TILE] of V views, moved by `shifts` from the pixel centers."""
    offset = np.array(shifts)[:, :, None]
    x = (np.arange(width) + offset[:, 0] - k[0, 2]) / k[0, 0]
    y = (np.arange(height) + offset[:, 1] - k[1, 2]) / k[1, 1]
    return _float(x).reshape(len(shifts), -1, TILE), _float(y).reshape(len(shifts), -1, TILE)


def _borders(count: int, focal: float, center: float) -> np.ndarray:
    """Compute the coordinates of the tiles' borders."""
    return _float((np.arange(0, count + 1, TILE) - 0.5 - center) / focal)


def _hits(count: int) -> Hits:
    shapes = (3, count), (3, count), (3, count), (4, count), count, count
    return Hits(*(np.empty(shape, np.float32) for shape in shapes))


def _images(width: int, height: int) -> Images:
    kinds = np.float32, np.float32, np.int16, np.int32, np.float32, np.float32
    shapes = [(height, width, 3), *[(height, width)] * 5]
    return Images(*(np.empty(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)))


def _image(tiles: np.ndarray, width: int, height: int) -> Tensor:
    return image_from_tiles(torch.from_numpy(tiles).view(-1, TILE * TILE), width, height)


def _float(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)
