"""Losses of predicted depth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def depth_loss(prediction: Tensor, target: Tensor, *, invalid: float = 0.0) -> Tensor:
    """Pri3D's depth proxy: the log error of depth and of its Sobel gradients, and the angle between surface normals.

    Args:
        prediction: [B, 1, H, W] m, linear; target: [B, H, W] m, `invalid` where there is no depth.

    Returns:
        A scalar: (depth + normal + dx + dy) / 3, each a mean over the valid pixels of the batch; 0 without any.
        Its minimum is negative, because log(0 + 0.5) is. The Sobel filter sees the zeros of invalid neighbors and of
        the padding, as in the released code; only invalid center pixels are masked.

    Example:
        >>> depth = torch.full((1, 4, 4), 2.0)
        >>> depth_loss(depth[:, None], depth).round(decimals=4)  # 3 log(0.5) / 3
        tensor(-0.6931)
    """
    predicted = prediction.squeeze(1)
    mask = target != invalid
    if not mask.any():
        return prediction.sum() * 0
    dx_target, dy_target = _sobel(target)
    dx, dy = _sobel(predicted)
    # The normals are (-dx, -dy, 1); all terms are means over the same pixels, so they are added up first.
    lengths = (dx * dx + dy * dy + 1).sqrt() * (dx_target * dx_target + dy_target * dy_target + 1).sqrt()
    total = (1 - (dx * dx_target + dy * dy_target + 1) / lengths).abs()
    for one, other in ((predicted, target), (dx, dx_target), (dy, dy_target)):
        total = total + torch.log((one - other).abs() + 0.5)
    return torch.where(mask, total, 0).sum() / (3 * mask.sum())


def _sobel(image: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel gradients (x, y) of [B, H, W], zero-padded; the x kernel has rows (1, 0, -1), (2, 0, -2), (1, 0, -1)."""
    padded = F.pad(image, (1, 1, 1, 1))
    # By sums of shifted images: on a CPU a convolution with so few channels takes ten times as long, and its gradient.
    down = padded[:, :-2].add(padded[:, 1:-1], alpha=2) + padded[:, 2:]
    across = padded[..., :-2].add(padded[..., 1:-1], alpha=2) + padded[..., 2:]
    return down[..., :-2] - down[..., 2:], across[:, :-2] - across[:, 2:]
