"""Surface normals of a depth image, by fitting planes to its neighborhoods.

In a pinhole image the inverse depth of a plane is an affine function of the pixel: n . X = d with X = z K^-1 (u, v, 1)
gives 1 / z = w . (u, v, 1), where K^T w is parallel to n. So a plane is fitted to a neighborhood by linear least
squares, in the domain in which the noise of structured-light and stereo sensors is even.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 0.5  # of the pixels of a neighborhood must lie on the surface of its center
WINDOW = 48  # image heights in a neighborhood's radius: 5 pixels of an image 240 high


def depth_normals(
    depth: Tensor, intrinsics: Tensor, pixels: Tensor, *, radius: int | None = None, gap: float = 0.05
) -> Tensor:
    """Estimate unit normals of a depth image [H, W] m at flat `pixels` [N]: [N, 3], camera frame, towards the camera.

    Args:
        intrinsics: pinhole matrix [3, 3].
        radius: of the square neighborhoods, pixels; None: a 48th of the height, at least 1.
        gap: a neighbor belongs to another surface if its depth differs from the center's by more than this share.

    Returns:
        0 where the depth is 0, or unknown or of another surface in half of the neighborhood.
    """
    height, width = depth.shape
    reach = max(1, round(height / WINDOW)) if radius is None else radius
    inverse = F.pad(torch.where(depth > 0, 1 / depth.clamp_min(1e-6), 0.0).double(), (reach,) * 4)
    side = torch.arange(-reach, reach + 1)
    dv, du = (offset.flatten() for offset in torch.meshgrid(side, side, indexing="ij"))
    row, column = pixels // width, pixels % width
    near = inverse[row[:, None] + (dv + reach), column[:, None] + (du + reach)]  # [N, neighbors]
    own = inverse[row + reach, column + reach][:, None]
    same = (((near - own).abs() <= gap * near) & (near > 0)).double()
    powers = torch.stack([torch.ones_like(du), du, dv, du * du, du * dv, dv * dv], dim=1).double()
    count, u, v, uu, uv, vv = (same @ powers).T
    q, uq, vq = ((same * near) @ powers[:, :3]).T
    total = count.clamp_min(1)
    var_u, var_v, cov = uu - u * u / total, vv - v * v / total, uv - u * v / total
    slope_u, slope_v = uq - u * q / total, vq - v * q / total
    det = var_u * var_v - cov * cov
    known = (own[:, 0] > 0) & (count >= LEAST * len(du)) & (det > 1e-9)
    det = torch.where(known, det, 1.0)
    a, b = (var_v * slope_u - cov * slope_v) / det, (var_u * slope_v - cov * slope_u) / det
    center = (q - a * u - b * v) / total
    (fx, _, cx), (_, fy, cy), _ = intrinsics.double().tolist()
    normal = -torch.stack([fx * a, fy * b, center + a * (cx - column) + b * (cy - row)], dim=1)
    return torch.where(known[:, None], F.normalize(normal, dim=1), 0.0).float()
