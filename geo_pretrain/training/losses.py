"""Losses of the pretext tasks: pure functions, each with a slow twin and golden values in its test."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float,
    symmetric: bool = True,
    ignore: Tensor | None = None,
) -> Tensor:
    """Contrast matched rows: row i of `query` belongs to row i of `key`, every other row is a negative.

    Args:
        query, key: [..., N, C] features, L2-normalised here (zero rows stay zero). Leading axes are independent
            problems: negatives never cross them.
        symmetric: mean of both directions, as in Pri3D's code; its paper (eq. 1) has query -> key only.
        ignore: bool [..., N, N], True where a candidate must not count as a negative; the diagonal is never ignored.

    Returns:
        [...]: the mean over the N rows, one value a problem.
    """
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    logits = query @ key.transpose(-1, -2) / temperature
    if ignore is not None:
        own = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(ignore & ~own, -torch.inf)
    positive = logits.diagonal(dim1=-2, dim2=-1)
    loss = (logits.logsumexp(-1) - positive).mean(-1)
    if symmetric:
        loss = (loss + (logits.logsumexp(-2) - positive).mean(-1)) / 2
    return loss


def depth_loss(prediction: Tensor, target: Tensor, *, invalid: float = 0.0) -> Tensor:
    """Pri3D's depth proxy: log-error of depth and of its Sobel responses, and the angle between normals.

    Args:
        prediction: [B, 1, H, W] m, linear; target: [B, H, W] m, `invalid` where there is no depth.

    Returns:
        A scalar: (depth + normal + dx + dy) / 3, each a mean over the valid pixels of the batch; 0 without any.
        Its minimum is negative, because log(0 + 0.5) is. Sobel sees the zeros of invalid neighbours and of the image
        border, as in the released code; only the centre pixel is masked.
    """
    predicted = prediction.squeeze(1)
    mask = target != invalid
    if not mask.any():
        return prediction.sum() * 0
    dx_target, dy_target = _sobel(target)
    dx, dy = _sobel(predicted)
    terms = [
        torch.log((a - b).abs() + 0.5)[mask].mean() for a, b in ((predicted, target), (dx, dx_target), (dy, dy_target))
    ]
    normal, normal_target = _normals(dx, dy), _normals(dx_target, dy_target)
    terms.append((1 - F.cosine_similarity(normal, normal_target, dim=-1)).abs()[mask].mean())
    return torch.stack(terms).sum() / 3


def _sobel(image: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel responses (x, y) of [B, H, W], zero-padded; the x kernel has rows (1, 0, -1), (2, 0, -2), (1, 0, -1)."""
    x = image.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    y = image.new_tensor([[1, 2, 1], [0, 0, 0], [-1, -2, -1]])
    out = F.conv2d(image[:, None], torch.stack([x, y])[:, None], padding=1)
    return out[:, 0], out[:, 1]


def _normals(dx: Tensor, dy: Tensor) -> Tensor:
    """Unnormalised surface normals (-dx, -dy, 1) of [B, H, W] -> [B, H, W, 3]."""
    return torch.stack([-dx, -dy, torch.ones_like(dx)], dim=-1)
