"""Pinhole cameras, back-projection and pixel correspondences: pure functions of tensors, batched over leading axes.

Metres and pixels; z-depth with 0 = invalid; camera frame x right, y down, z forward; poses are camera-to-world 4x4.
The centre of pixel (row i, column j) lies at the integer coordinate (u = j, v = i).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["floor", "nearest"]
MatchDistance = Literal["depth", "euclidean"]


def pixel_grid(height: int, width: int, like: Tensor) -> Tensor:
    """Pixel centres (u, v) in row-major order: [height * width, 2], with the dtype and device of `like`."""
    v, u = torch.meshgrid(
        torch.arange(height, dtype=like.dtype, device=like.device),
        torch.arange(width, dtype=like.dtype, device=like.device),
        indexing="ij",
    )
    return torch.stack([u.reshape(-1), v.reshape(-1)], dim=-1)


def backproject(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """Depth images [..., H, W] m and pinhole matrices [..., 3, 3] to camera-frame points [..., H*W, 3] m.

    Invalid pixels (depth 0) come out at the camera centre; mask them with the depth.
    """
    height, width = depth.shape[-2:]
    uv = pixel_grid(height, width, depth)
    z = depth.flatten(-2)
    fx, fy, cx, cy = _pinhole(intrinsics.to(depth.dtype))
    return torch.stack([(uv[:, 0] - cx) * z / fx, (uv[:, 1] - cy) * z / fy, z], dim=-1)


def transform(points: Tensor, a_to_b: Tensor) -> Tensor:
    """Move points [..., N, 3] by rigid or affine transforms [..., 4, 4]."""
    return points @ a_to_b[..., :3, :3].transpose(-1, -2) + a_to_b[..., None, :3, 3]


def project(points: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Camera-frame points [..., N, 3] m to pixels uv [..., N, 2] and their z-depth [..., N] m.

    Points on the camera plane (z = 0) give infinite or NaN pixels: test z before using them.
    """
    fx, fy, cx, cy = _pinhole(intrinsics.to(points.dtype))
    z = points[..., 2]
    return torch.stack([points[..., 0] / z * fx + cx, points[..., 1] / z * fy + cy], dim=-1), z


def relative_pose(cam1_to_world: Tensor, cam2_to_world: Tensor) -> Tensor:
    """Camera-1-to-camera-2 [..., 4, 4], computed in float64: world coordinates may be large."""
    return torch.linalg.solve(cam2_to_world.double(), cam1_to_world.double())


def resize_intrinsics(intrinsics: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Pinhole matrices [..., 3, 3] of an image of size `old` (H, W) after `nearest_indices` brought it to `new`.

    Exact when the sizes divide (output pixel u is then the camera ray of source pixel s*u + s//2); otherwise the
    centre-aligned rule, which is right to within half a source pixel.
    """
    scaled = intrinsics.clone()
    for axis, row in ((1, 0), (0, 1)):
        ratio = old[axis] / new[axis]
        offset = old[axis] // new[axis] // 2 if old[axis] % new[axis] == 0 else (ratio - 1) / 2
        scaled[..., row, row] = intrinsics[..., row, row] / ratio
        scaled[..., row, 2] = (intrinsics[..., row, 2] - offset) / ratio
    return scaled


def nearest_indices(old: int, new: int) -> list[int]:
    """Source index of each of `new` samples along an axis of length `old`: Pillow's NEAREST rule."""
    return [min(math.floor((index + 0.5) * old / new), old - 1) for index in range(new)]


def match_pixels(
    depth1: Tensor,
    depth2: Tensor,
    intrinsics1: Tensor,
    intrinsics2: Tensor,
    cam1_to_world: Tensor,
    cam2_to_world: Tensor,
    *,
    tolerance: float = 0.05,
    distance: MatchDistance = "depth",
    rounding: Rounding = "floor",
    authors_exact: bool = False,
) -> Tensor:
    """For every pixel of frame 1 the pixel of frame 2 that sees the same surface point, by projection.

    Args:
        depth1, depth2: [B, H, W] m, 0 = invalid (the two may differ in size).
        intrinsics1, intrinsics2: [B, 3, 3]; cam1_to_world, cam2_to_world: [B, 4, 4].
        tolerance: metres. With `distance="depth"` it bounds the difference along the optical axis of frame 2, as
            Pri3D's code does (5 cm); with "euclidean" the distance of the two surface points, as its paper says (2 cm).
        rounding: how a projected coordinate becomes a pixel. The authors truncate; "nearest" has no half-pixel bias.
        authors_exact: Pri3D's released matcher to the letter: truncation towards zero, which lets (-1, 0) in as row or
            column 0, and invalid depth taken to be -1, so that zero-depth pixels take part.

    Returns:
        int64 [B, H*W]: the flat pixel index in frame 2, or -1 where there is no match.
    """
    height, width = depth2.shape[-2:]
    points = backproject(depth1, intrinsics1)
    points = transform(points, relative_pose(cam1_to_world, cam2_to_world).to(depth1.dtype))
    uv, z = project(points, intrinsics2)
    if authors_exact:
        pixel, valid = uv.trunc(), depth1.flatten(-2) != -1
    else:
        pixel, valid = (uv.floor() if rounding == "floor" else (uv + 0.5).floor()), depth1.flatten(-2) > 0
        valid &= z > 0
    column, row = pixel[..., 0], pixel[..., 1]
    # NaN and infinite coordinates fail these comparisons, so they never reach the integer conversion below.
    valid &= (column >= 0) & (column < width) & (row >= 0) & (row < height)
    target = torch.where(valid, row * width + column, 0).long()
    seen = depth2.flatten(-2).gather(-1, target)
    if distance == "depth":
        gap = (z - seen).abs()
    else:
        surface = backproject(depth2, intrinsics2).gather(-2, target[..., None].expand(*target.shape, 3))
        gap = (points - surface).norm(dim=-1)
    valid &= gap < tolerance
    if not authors_exact:
        valid &= seen > 0
    return torch.where(valid, target, -1)


def overlap_ratio(forward: Tensor, backward: Tensor, depth1: Tensor, depth2: Tensor) -> Tensor:
    """Share of the valid pixels of two frames that have a match: (|1->2| + |2->1|) / (valid 1 + valid 2), [B].

    `forward` and `backward` come from `match_pixels` in both directions. Symmetric, in [0, 1]; 0 when no pixel is
    valid. The measure of Pri3D's paper (section 3), with projective instead of nearest-neighbour matches.
    """
    matched = (forward >= 0).sum(-1) + (backward >= 0).sum(-1)
    valid = (depth1 > 0).flatten(-2).sum(-1) + (depth2 > 0).flatten(-2).sum(-1)
    return matched / valid.clamp(min=1)


def register_depth(
    depth: Tensor, intrinsics: Tensor, color_intrinsics: Tensor, depth_to_color: Tensor, size: tuple[int, int]
) -> Tensor:
    """Move a depth image [H, W] into the colour camera: [size] m, 0 where no depth point lands.

    Every depth pixel is splatted to the colour pixel it falls on; the nearest surface wins. `depth_to_color` [4, 4]
    takes points of the depth camera to the colour camera.
    """
    height, width = size
    points = transform(backproject(depth, intrinsics), depth_to_color.to(depth.dtype))
    uv, z = project(points, color_intrinsics)
    column, row = (uv + 0.5).floor().unbind(-1)
    valid = (depth.flatten() > 0) & (z > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    target = (row[valid] * width + column[valid]).long()
    image = depth.new_full((height * width,), math.inf)
    image.scatter_reduce_(0, target, z[valid], reduce="amin")
    return torch.where(image.isinf(), 0, image).reshape(height, width)


def _pinhole(intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fx, fy, cx, cy, each [..., 1] to broadcast over points."""
    flat = intrinsics.flatten(-2)[..., None]
    return flat[..., 0, :], flat[..., 4, :], flat[..., 2, :], flat[..., 5, :]
