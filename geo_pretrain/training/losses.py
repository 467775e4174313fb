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
    normalize: bool = True,
    ignore: Tensor | None = None,
) -> Tensor:
    """Contrast matched rows: row i of `query` belongs to row i of `key`, every other row is a negative.

    Args:
        query, key: [..., N, C] features. Leading axes are independent problems: negatives never cross them.
        symmetric: mean of both directions, as in Pri3D's code; its paper (eq. 1) and PointContrast have query -> key.
        normalize: L2-normalise the rows here (zero rows stay zero); PointContrast's network does it itself.
        ignore: bool [..., N, N], True where a candidate must not count as a negative; the diagonal is never ignored.

    Returns:
        [...]: the mean over the N rows, one value a problem.
    """
    if normalize:
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


def partition_info_nce(
    query: Tensor, key: Tensor, points: Tensor, *, temperature: float, inner: float, outer: float
) -> Tensor:
    """One `info_nce` (query -> key) for each part of the space around an anchor, whose rows alone are its negatives.

    Hou et al., "Exploring Data-Efficient 3D Scene Understanding with Contrastive Scene Contexts", CVPR 2021. The four
    parts are {above, below} x {inner < distance <= outer, distance > outer}; rows at the anchor's height or within
    `inner` lie in none.

    Args:
        query, key: [N, C] matched features, normalised already.
        points: [N, 3] m, positions of the matches in a frame whose z axis points up. inner, outer: m.

    Returns:
        A scalar: the mean over the four parts and the N rows.
    """
    distance = torch.cdist(points, points)
    rise = points[None, :, 2] - points[:, None, 2]
    part = torch.where(rise > 0, 0, 2) + (distance > outer)
    part[(rise == 0) | (distance <= inner)] = 4  # none
    logits = query / temperature @ key.T
    # Rows of length 1 keep these powers far from overflow at any temperature above 0.03.
    ratio = (logits - logits.diagonal()[:, None]).exp()
    sums = ratio.new_zeros(len(ratio), 5).scatter_add(1, part, ratio)[:, :4]
    return sums.log1p().mean()


def hardest_contrastive(
    f0: Tensor,
    f1: Tensor,
    pairs: Tensor,
    positives: Tensor,
    candidates0: Tensor,
    candidates1: Tensor,
    *,
    positive_margin: float = 0.1,
    negative_margin: float = 1.4,
    squared: bool = True,
) -> tuple[Tensor, Tensor]:
    """Pull matched rows together and push each away from its nearest candidate: PointContrast's second loss.

    Args:
        f0, f1: [N0, C], [N1, C] features of the two views, normalised already.
        pairs: int64 [M, 2], every match (row of f0, row of f1); a nearest candidate that is a match is no negative.
        positives: int64 [P], the rows of `pairs` to use. candidates0, candidates1: int64 [K], rows of f0 and of f1.
        squared: a positive costs relu(d^2 - margin), as in the released code; False: relu(d - margin)^2, the paper's.

    Returns:
        The positive and the negative term, scalars; the loss is their sum. A term without any row is 0.
    """
    sampled = pairs[positives]
    square = (f0[sampled[:, 0]] - f1[sampled[:, 1]]).square().sum(-1)
    paper = F.relu((square + 1e-7).sqrt() - positive_margin).square()
    positive = F.relu(square - positive_margin) if squared else paper
    there = _hardest_negatives(f0, f1, pairs, sampled, candidates1, negative_margin)
    back = _hardest_negatives(f1, f0, pairs.flip(-1), sampled.flip(-1), candidates0, negative_margin)
    return positive.sum() / max(len(positive), 1), (there + back) / 2


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


def _hardest_negatives(
    f0: Tensor, f1: Tensor, pairs: Tensor, sampled: Tensor, candidates: Tensor, margin: float
) -> Tensor:
    """Mean of relu(margin - distance)^2 to the nearest candidate in f1, over the anchors whose nearest is no match."""
    anchor = sampled[:, 0]
    hardest = candidates[_nearest(f0[anchor], f1[candidates])]
    negative = ~torch.isin(anchor * len(f1) + hardest, pairs[:, 0] * len(f1) + pairs[:, 1])
    distance = ((f0[anchor] - f1[hardest]).square().sum(-1) + 1e-7).sqrt()
    return (F.relu(margin - distance).square() * negative).sum() / negative.sum().clamp(min=1)


@torch.no_grad()
def _nearest(rows: Tensor, candidates: Tensor) -> Tensor:
    """The index of each row's nearest candidate, int64 [N], in parts: the whole distance matrix can take gigabytes."""
    size = candidates.square().sum(-1)
    return torch.cat([(size - 2 * part @ candidates.T).argmin(-1) for part in rows.split(4096)])


def _sobel(image: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel responses (x, y) of [B, H, W], zero-padded; the x kernel has rows (1, 0, -1), (2, 0, -2), (1, 0, -1)."""
    x = image.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    y = image.new_tensor([[1, 2, 1], [0, 0, 0], [-1, -2, -1]])
    out = F.conv2d(image[:, None], torch.stack([x, y])[:, None], padding=1)
    return out[:, 0], out[:, 1]


def _normals(dx: Tensor, dy: Tensor) -> Tensor:
    """Unnormalised surface normals (-dx, -dy, 1) of [B, H, W] -> [B, H, W, 3]."""
    return torch.stack([-dx, -dy, torch.ones_like(dx)], dim=-1)
