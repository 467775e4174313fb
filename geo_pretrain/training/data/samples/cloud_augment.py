"""Augmentation of labelled clouds: pure functions of tensors and a generator, each one step of `CloudAugment`.

The steps and their order are those of the released code of Choy et al. (SpatioTemporalSegmentation), which
PointContrast and CSC share; mirrors, drawn points and translations are those of VoteNet, SLidR and the classification
of objects. A step that is switched off draws nothing, so that it can be added without changing the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geo_pretrain.geometry import centered, rotation, transform
from geo_pretrain.training.cloud_recipe import CloudAugment, CropSpec
from geo_pretrain.training.data.samples.augment import elastic_distortion, elastic_grid, uniform

AXES = "xyz"


def draw_rows(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Draw `wanted` of `count` rows at random, int64 [wanted]; with repetition if there are fewer."""
    if count < wanted:
        return torch.randint(count, (wanted,), generator=generator)
    return torch.randperm(count, generator=generator)[:wanted]


def unit_sphere(points: Tensor) -> Tensor:
    """The motion, float64 [4, 4], that takes the mean of points [N, 3] to the origin and their largest norm to 1."""
    motion = centered(points)
    largest = moved(points.double(), motion).norm(dim=1).max().clamp(min=1e-12)
    return torch.diag(torch.stack([1 / largest] * 3 + [torch.ones_like(largest)])) @ motion


def distorted(points: Tensor, spec: CloudAugment, generator: torch.Generator) -> Tensor:
    """Apply all rounds of elastic distortion, or none, to points [N, 3] m."""
    if not spec.elastic or uniform(0, 1, generator) >= spec.elastic_prob:
        return points
    for granularity, magnitude in spec.elastic:
        noise = torch.randn((*elastic_grid(points, granularity), 3), generator=generator)
        points = elastic_distortion(points, noise, granularity, magnitude)
    return points


def crop_rows(points: Tensor, spec: CropSpec, generator: torch.Generator) -> Tensor:
    """The rows of points [N, 3] m inside a random cube, int64 [n]: all of them where the cloud is small."""
    low, high = points.amin(dim=0).double(), points.amax(dim=0).double()
    extent = high - low
    shift = (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1) * torch.tensor(spec.shift).double()
    if float(extent.max()) < spec.minimum:
        return torch.arange(len(points))
    middle = (low + high) / 2 if spec.center == "box" else torch.zeros(3, dtype=torch.float64)
    return cube_rows(points, middle + shift * extent, spec.half)


def cube_rows(points: Tensor, center: Tensor, half: float) -> Tensor:
    """The rows of points [N, 3] in the cube [center - half, center + half) along each axis, int64 [n]."""
    offset = points.double() - center
    return ((offset >= -half) & (offset < half)).all(dim=1).nonzero()[:, 0]


def box_center(points: Tensor) -> Tensor:
    """The middle of the bounding box of points [N, 3]: float64 [3]."""
    return (points.amin(dim=0).double() + points.amax(dim=0).double()) / 2


def random_motion(points: Tensor, spec: CloudAugment, generator: torch.Generator) -> Tensor:
    """Draw mirror, rotation, scale and translation: one float64 [4, 4] from the cloud's frame to the augmented one."""
    motion = centered(points) if spec.center == "centroid" else torch.eye(4, dtype=torch.float64)
    if any(spec.mirror):
        signs = torch.rand(3, generator=generator) < torch.tensor(spec.mirror)
        motion = torch.diag(torch.cat([1 - 2 * signs.double(), torch.ones(1, dtype=torch.float64)])) @ motion
    if spec.scale != (1.0, 1.0):
        factors = [uniform(*spec.scale, generator) for _ in range(3 if spec.scale_axes else 1)]
        motion = torch.diag(torch.tensor([*(factors * 3)[:3], 1.0], dtype=torch.float64)) @ motion
    if any(spec.rotate):
        motion = random_turn(spec.rotate, generator) @ motion
    if any(spec.translate):
        limits = torch.tensor(spec.translate, dtype=torch.float64)
        shift = torch.eye(4, dtype=torch.float64)
        shift[:3, 3] = (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1) * limits
        motion = shift @ motion
    return motion


def random_turn(limits: tuple[float, float, float], generator: torch.Generator) -> Tensor:
    """Rotate about x, y and z, in random order, by angles drawn from +-`limits` (degrees): float64 [4, 4].

    With (180 / 64, 180 / 64, 180) it draws the same as `random_rotation(generator, "upright")`.
    """
    draw = torch.rand(4, generator=generator, dtype=torch.float64)
    angles = (2 * draw[:3] - 1) * torch.tensor([math.radians(limit) for limit in limits], dtype=torch.float64)
    turns = [rotation(axis, float(angle)) for axis, angle in zip(torch.eye(3), angles, strict=True)]
    first, second, third = torch.randperm(3, generator=generator).tolist()
    return turns[first] @ turns[second] @ turns[third]


def moved(points: Tensor, motion: Tensor) -> Tensor:
    """Move points [N, 3] by a motion [4, 4], computed in float64."""
    return transform(points.double(), motion).to(points.dtype)


def jittered(points: Tensor, spec: CloudAugment, generator: torch.Generator) -> Tensor:
    """Add clipped Gaussian noise to points [N, 3] m."""
    if not spec.jitter:
        return points
    noise = spec.jitter * torch.randn(points.shape, generator=generator)
    return points + (noise if spec.jitter_clip is None else noise.clamp(-spec.jitter_clip, spec.jitter_clip))


def kept_voxels(count: int, spec: CloudAugment, generator: torch.Generator) -> Tensor | None:
    """The rows of the voxels that dropout leaves, int64 [n] rising, at least one; None for all of them."""
    if not spec.dropout or uniform(0, 1, generator) >= spec.dropout_prob:
        return None
    wanted = max(1, int(count * (1 - spec.dropout)))
    return torch.randperm(count, generator=generator)[:wanted].sort().values


def flipped(cells: Tensor, spec: CloudAugment, generator: torch.Generator) -> Tensor:
    """Turn integer voxel coordinates [M, 3] round along some axes: c -> largest c - c."""
    if not spec.flip_axes or uniform(0, 1, generator) >= spec.flip_prob:
        return cells
    cells = cells.clone()
    for axis in (AXES.index(name) for name in spec.flip_axes):
        if uniform(0, 1, generator) < 0.5:
            cells[:, axis] = cells[:, axis].max() - cells[:, axis]
    return cells


def shifted(cells: Tensor, spec: CloudAugment, generator: torch.Generator) -> Tensor:
    """Move voxel coordinates [M, 3] by a random whole number from [0, shift) along each of `spec.shift_axes`."""
    if not spec.shift:
        return cells
    moves = torch.tensor([axis in spec.shift_axes for axis in AXES])
    return cells + (moves * torch.randint(spec.shift, (3,), generator=generator)).to(cells.dtype)


def augmented_colors(colors: Tensor, spec: CloudAugment, generator: torch.Generator) -> Tensor:
    """Stretch, shift and disturb colors float [M, 3] from 0 to 255, which stay in that range."""
    if spec.contrast_prob and uniform(0, 1, generator) < spec.contrast_prob:
        colors = stretched(colors, uniform(0, 1, generator))
    if spec.color_translation and uniform(0, 1, generator) < spec.color_translation_prob:
        shift = (2 * torch.rand(3, generator=generator) - 1) * 255 * spec.color_translation
        colors = (colors + shift).clamp(0, 255)
    if spec.color_jitter and uniform(0, 1, generator) < spec.color_jitter_prob:
        noise = torch.randn(colors.shape, generator=generator) * 255 * spec.color_jitter
        colors = (colors + noise).clamp(0, 255)
    return colors


def stretched(colors: Tensor, blend: float) -> Tensor:
    """Blend colors [M, 3] with those whose channels are stretched to 0..255 (share `blend`); constant ones stay."""
    low, high = colors.amin(dim=0), colors.amax(dim=0)
    full = torch.where(high > low, (colors - low) * 255 / (high - low).clamp(min=1e-6), colors)
    return (1 - blend) * colors + blend * full
