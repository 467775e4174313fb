"""Pinhole cameras, back-projection and pixel correspondences: pure functions of tensors, batched over leading axes.

Meters and pixels; z-depth with 0 = invalid; camera frame x right, y down, z forward; poses are camera-to-world 4x4.
The center of pixel (row i, column j) lies at the integer coordinate (u = j, v = i).
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["floor", "nearest"]
MatchDistance = Literal["depth", "euclidean"]


def pixel_grid(height: int, width: int, like: Tensor) -> Tensor:
    """List pixel centers (u, v) in row-major order: [height * width, 2], with the dtype and device of `like`."""
    v, u = torch.meshgrid(
        torch.arange(height, dtype=like.dtype, device=like.device),
        torch.arange(width, dtype=like.dtype, device=like.device),
        indexing="ij",
    )
    return torch.stack([u.reshape(-1), v.reshape(-1)], dim=-1)


def backproject(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """Back-project depth images [..., H, W] m with pinhole matrices [..., 3, 3] to camera-frame points [..., H*W, 3] m.

    Invalid pixels (depth 0) come out at the camera center; mask them with the depth.
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
    """Project camera-frame points [..., N, 3] m to pixels uv [..., N, 2] and their z-depth [..., N] m.

    Points on the camera plane (z = 0) give infinite or NaN pixels: test z before using them.
    """
    fx, fy, cx, cy = _pinhole(intrinsics.to(points.dtype))
    z = points[..., 2]
    return torch.stack([points[..., 0] / z * fx + cx, points[..., 1] / z * fy + cy], dim=-1), z


def relative_pose(cam1_to_world: Tensor, cam2_to_world: Tensor) -> Tensor:
    """The transform from camera 1 to camera 2, [..., 4, 4], in float64 since world coordinates may be large."""
    return torch.linalg.solve(cam2_to_world.double(), cam1_to_world.double())


def resize_intrinsics(intrinsics: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Adapt pinhole matrices [..., 3, 3] to an image that `nearest_indices` resized from `old` (H, W) to `new`.

    Exact when the sizes divide (output pixel u is then the camera ray of source pixel s*u + s//2); otherwise the
    center-aligned rule, which is right to within half a source pixel.
    """
    scaled = intrinsics.clone()
    for axis, row in ((1, 0), (0, 1)):
        ratio = old[axis] / new[axis]
        offset = old[axis] // new[axis] // 2 if old[axis] % new[axis] == 0 else (ratio - 1) / 2
        scaled[..., row, row] = intrinsics[..., row, row] / ratio
        scaled[..., row, 2] = (intrinsics[..., row, 2] - offset) / ratio
    return scaled


def nearest_indices(old: int, new: int) -> list[int]:
    """Source index of each of `new` samples along an axis of length `old`: the pixel under the sample's center.

    Ties are exact here. Pillow sums positions up in floating point, so that it may choose the other pixel at a tie;
    the input transform of a contract follows Pillow (`contract`), training data follow this rule.
    """
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
    match_released_code: bool = False,
    authors_exact: bool | None = None,
) -> Tensor:
    """Find for every pixel of frame 1 the pixel of frame 2 that sees the same surface point, by projection.

    Args:
        depth1, depth2: [B, H, W] m, 0 = invalid (the two may differ in size).
        intrinsics1, intrinsics2: [B, 3, 3]; cam1_to_world, cam2_to_world: [B, 4, 4].
        tolerance: meters. With `distance="depth"` it bounds the difference along the optical axis of frame 2, as
            Pri3D's code does (5 cm); with "euclidean" the distance of the two surface points, as its paper says (2 cm).
        rounding: how a projected coordinate becomes a pixel. The authors truncate; "nearest" has no half-pixel bias.
        match_released_code: Pri3D's released matcher to the letter: truncation towards zero, which lets (-1, 0) in as
            row or column 0, and invalid depth taken to be -1, so that zero-depth pixels take part.
        authors_exact: former name of `match_released_code`.

    Returns:
        int64 [B, H*W]: the flat pixel index in frame 2, or -1 where there is no match.
    """
    if authors_exact is not None:
        warnings.warn("'authors_exact' is now 'match_released_code'.", FutureWarning, stacklevel=2)
        match_released_code = authors_exact
    points = backproject(depth1, intrinsics1)
    points = transform(points, relative_pose(cam1_to_world, cam2_to_world).to(depth1.dtype))
    target, inside, z = _pixels_of(points, intrinsics2, depth2.shape, rounding, match_released_code)
    valid = inside & (depth1.flatten(-2) != -1 if match_released_code else depth1.flatten(-2) > 0)
    seen = depth2.flatten(-2).gather(-1, target)
    if distance == "depth":
        gap = (z - seen).abs()
    else:
        surface = backproject(depth2, intrinsics2).gather(-2, target[..., None].expand(*target.shape, 3))
        gap = (points - surface).norm(dim=-1)
    valid &= gap < tolerance
    if not match_released_code:
        valid &= seen > 0
    return torch.where(valid, target, -1)


def seen_at(
    points: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam_to_world: Tensor,
    *,
    tolerance: float = 0.05,
    rounding: Rounding = "floor",
    match_released_code: bool = False,
) -> Tensor:
    """Find for every world point [..., N, 3] m the pixel of a frame that sees it, by projection.

    Args:
        points: for example voxel centers; the authors project the voxels' lower corners.
        depth: [..., H, W] m, 0 = invalid; intrinsics: [..., 3, 3]; cam_to_world: [..., 4, 4].
        tolerance: meters along the optical axis between the point and the depth there; Pri3D's code allows 0.2.
        rounding: how a projected coordinate becomes a pixel, see `match_pixels`.
        match_released_code: Pri3D's released voxel matcher to the letter: truncation towards zero and no test of
            validity, so that points within the tolerance of the camera plane, before or behind, match pixels without
            depth.

    Returns:
        int64 [..., N]: the flat pixel index, or -1 where the point is not seen.
    """
    in_camera = transform(points.double(), torch.linalg.inv(cam_to_world.double())).to(points.dtype)
    target, inside, z = _pixels_of(in_camera, intrinsics, depth.shape, rounding, match_released_code)
    seen = depth.flatten(-2).gather(-1, target)
    valid = inside & ((z - seen).abs() < tolerance)
    if not match_released_code:
        valid &= seen > 0
    return torch.where(valid, target, -1)


def overlap_ratio(forward: Tensor, backward: Tensor, depth1: Tensor, depth2: Tensor) -> Tensor:
    """Share of the valid pixels of two frames that have a match: (|1->2| + |2->1|) / (valid 1 + valid 2), [B].

    `forward` and `backward` come from `match_pixels` in both directions. Symmetric, in [0, 1]; 0 when no pixel is
    valid. The measure of Pri3D's paper (section 3), with projective instead of nearest-neighbor matches.
    """
    matched = (forward >= 0).sum(-1) + (backward >= 0).sum(-1)
    valid = (depth1 > 0).flatten(-2).sum(-1) + (depth2 > 0).flatten(-2).sum(-1)
    return matched / valid.clamp(min=1)


def register_depth(
    depth: Tensor, intrinsics: Tensor, color_intrinsics: Tensor, depth_to_color: Tensor, size: tuple[int, int]
) -> Tensor:
    """Move a depth image [H, W] into the color camera: [size] m, 0 where no depth point lands.

    Every depth pixel is splatted to the color pixel it falls on; the nearest surface wins. `depth_to_color` [4, 4]
    takes points of the depth camera to the color camera.
    """
    height, width = size
    to_color = depth_to_color.double()
    fx, fy, cx, cy = (value.item() for value in _pinhole(color_intrinsics))
    # The color camera's matrix; the half turns a pixel's center into its edge, so that floor finds the pixel.
    color_camera = to_color.new_tensor([[fx, 0, cx + 0.5], [0, fy, cy + 0.5], [0, 0, 1]])
    turn, shift = (color_camera @ to_color[:3]).to(depth.dtype).split([3, 1], dim=1)
    fx, fy, cx, cy = (value.item() for value in _pinhole(intrinsics))
    i, j = (torch.arange(n, dtype=depth.dtype, device=depth.device) for n in depth.shape)
    x, y = (j - cx) / fx, ((i - cy) / fy)[:, None]
    # Planes instead of rows of three numbers: a quarter of the time.
    u, v, z = (torch.addcmul(b, depth, x * a[0] + (y * a[1] + a[2])) for a, b in zip(turn, shift, strict=True))
    column, row = (u / z).floor_(), (v / z).floor_()
    valid = (depth > 0) & (z > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    target = row.int().mul_(width).add_(column.int()).masked_fill_(~valid, height * width)
    image = depth.new_full((height * width + 1,), math.inf)  # the last one takes what falls outside
    image.scatter_reduce_(0, target.flatten().long(), z.flatten(), reduce="amin")
    return torch.where(image.isinf(), 0, image)[:-1].reshape(height, width)


def radius_matches(points1: Tensor, points2: Tensor, radius: float) -> Tensor:
    """Find all pairs of a point of [N, 3] and a point of [M, 3] less than `radius` apart: int64 [K, 2].

    Rows (index 1, index 2) in ascending order. Distances are measured in float64 and must be strictly smaller, as in
    the k-d tree of PointContrast's code. Points are binned into cells as wide as the radius, so that time and memory
    grow with the number of pairs found.
    """
    if not radius > 0:
        raise ValueError(f"radius is {radius!r}; accepted: meters above 0.")
    if not (torch.isfinite(points1).all() and torch.isfinite(points2).all()):
        raise ValueError("Some points are not finite; drop them first.")
    points1, points2 = points1.double(), points2.double()
    if not (len(points1) and len(points2)):
        return torch.empty(0, 2, dtype=torch.int64, device=points1.device)
    # A hair wider than the radius: rounding of the quotients cannot put a pair two cells apart.
    origin, edge = points2.amin(dim=0), radius * (1 + 1e-6)
    cells1, cells2 = (torch.floor((points - origin) / edge).long() for points in (points1, points2))
    extent = cells2.amax(dim=0) + 1
    if math.prod((extent + 2).tolist()) >= 1 << 62:
        raise ValueError(
            f"Points span {extent.tolist()} cells of {radius:g} m, too many to number; use a larger radius."
        )
    key2, order = ((cells2[:, 0] * (extent[1] + 2) + cells2[:, 1]) * (extent[2] + 2) + cells2[:, 2]).sort()
    near = ((cells1 >= -1) & (cells1 <= extent)).all(dim=1).nonzero()[:, 0]
    columns = torch.tensor([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)], device=points1.device)
    column = cells1[near, None, :2] + columns  # the three cells of a column have consecutive keys
    key1 = (column[..., 0] * (extent[1] + 2) + column[..., 1]) * (extent[2] + 2) + cells1[near, None, 2]
    first = torch.searchsorted(key2, (key1 - 1).flatten())
    count = torch.searchsorted(key2, (key1 + 1).flatten(), right=True) - first
    candidate = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    position = (
        torch.arange(len(candidate), device=count.device) - (count.cumsum(0) - count)[candidate] + first[candidate]
    )
    index1, index2 = near[candidate // len(columns)], order[position]
    close = (points1[index1] - points2[index2]).square().sum(dim=1) < radius**2
    flat = (index1[close] * len(points2) + index2[close]).sort().values
    return torch.stack([flat // len(points2), flat % len(points2)], dim=1)


def rotation(axis: Tensor, angle: float) -> Tensor:
    """The rotation by `angle` (radians, right-handed) about `axis` [3], of any length: float64 [4, 4]."""
    x, y, z = (axis.double() / axis.double().norm()).tolist()
    skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64, device=axis.device)
    rotated = torch.eye(4, dtype=torch.float64, device=axis.device)
    rotated[:3, :3] += math.sin(angle) * skew + (1 - math.cos(angle)) * (skew @ skew)
    return rotated


def centered(points: Tensor) -> Tensor:
    """The translation of the centroid of points [N, 3] to the origin: float64 [4, 4]."""
    shift = torch.eye(4, dtype=torch.float64, device=points.device)
    shift[:3, 3] = -points.double().mean(dim=0)
    return shift


def _pixels_of(
    points: Tensor, intrinsics: Tensor, shape: torch.Size, rounding: Rounding, match_released_code: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels that camera-frame points fall on in an image [..., H, W]: flat index (0: outside), inside, z-depth."""
    height, width = shape[-2:]
    uv, z = project(points, intrinsics)
    if match_released_code:
        pixel, inside = uv.trunc(), torch.ones_like(z, dtype=torch.bool)
    else:
        pixel, inside = (uv.floor() if rounding == "floor" else (uv + 0.5).floor()), z > 0
    column, row = pixel[..., 0], pixel[..., 1]
    # NaN and infinite coordinates fail these comparisons, so they never reach the integer conversion below.
    inside = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return torch.where(inside, row * width + column, 0).long(), inside, z


def _pinhole(intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fx, fy, cx, cy, each [..., 1] to broadcast over points."""
    flat = intrinsics.flatten(-2)[..., None]
    return flat[..., 0, :], flat[..., 4, :], flat[..., 2, :], flat[..., 5, :]
