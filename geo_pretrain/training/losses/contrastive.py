"""Contrastive losses between matched rows: pixels, voxels, or whole images."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from geo_pretrain.training.losses.fused import COLDEST, info_nce_of_rows, log_sums, partition_nce_of_rows


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
        normalize: L2-normalize the rows here (zero rows stay zero); PointContrast's network does it itself.
        ignore: bool [..., N, N], True where a candidate must not count as a negative; the diagonal is never ignored.

    Returns:
        [...]: the mean over the N rows, one value a problem.

    Example:
        >>> features = torch.eye(2)
        >>> info_nce(features, features, temperature=1.0).round(decimals=4)  # log(1 + exp(-1))
        tensor(0.3133)
    """
    if normalize:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    *axes, rows, width = query.shape
    if ignore is not None:
        ignore = ignore.expand(*axes, rows, rows).reshape(-1, rows, rows)
    bound = 1 / temperature if normalize and temperature >= COLDEST else None
    return info_nce_of_rows(
        query.reshape(-1, rows, width), key.reshape(-1, rows, width), ignore, temperature, symmetric, bound
    ).reshape(axes)


def partition_info_nce(
    query: Tensor,
    key: Tensor,
    points: Tensor,
    *,
    temperature: float,
    inner: float,
    outer: float,
    partitions: Literal[4, 8] = 4,
) -> Tensor:
    """Average one `info_nce` (query -> key) per part of the space around an anchor; its negatives lie in that part.

    Hou et al., "Exploring Data-Efficient 3D Scene Understanding with Contrastive Scene Contexts", CVPR 2021. Rows
    within `inner` of an anchor lie in no part; `partitions`: 4 is the fast form of the released code, 8 its slow one.

    Args:
        query, key: [N, C] matched features, normalized already.
        points: [N, 3] m, positions of the matches in a frame whose z axis points up. inner, outer: m.

    Returns:
        A scalar: the mean over the parts and the N rows.

    Example:
        >>> features, points = torch.eye(2), torch.tensor([[0.0, 0, 0], [0, 0, 1]])
        >>> loss = partition_info_nce(features, features, points, temperature=1.0, inner=0.1, outer=0.5)
        >>> loss.round(decimals=4)  # log(1 + exp(-1)) / 4: one of four parts holds a negative
        tensor(0.0783)
    """
    # Rows of length 1 keep the ratios of powers far from overflow at any temperature above 0.03.
    parts = _eight_parts if partitions == 8 else _four_parts

    def around(rows: slice) -> Tensor:
        return parts(points[rows], points, inner, outer)

    return partition_nce_of_rows(query, key, around, partitions, temperature)


def _four_parts(anchors: Tensor, points: Tensor, inner: float, outer: float) -> Tensor:
    """The part {above, below} x {inner < distance <= outer, distance > outer} of points around anchors: uint8 [A, N].

    4 where a point lies in none: at the anchor's height, or within `inner`. The released code's fast partition.
    """
    distance, (_, _, rise) = _distance(anchors, points)
    part = (rise <= 0).byte().mul_(2).add_(distance > outer)
    return part.masked_fill_((rise == 0).logical_or_(distance <= inner), 4)


def _eight_parts(anchors: Tensor, points: Tensor, inner: float, outer: float) -> Tensor:
    """The part of points around anchors: uint8 [A, N], 4 far + 2 azimuth + second; 8 where a point lies in none.

    The released code's slow partition with two bins an angle: half-planes by azimuth, in [0, pi) or [pi, 2 pi); halves
    of the angle in the y-z plane modulo pi, so that opposite directions fall together; and {inner <= distance < outer,
    distance >= outer}. Angles that rounding puts at a full turn belong to the last bin.
    """
    distance, (x, y, z) = _distance(anchors, points, 1e-7)
    azimuth = (torch.atan2(y, x).remainder(2 * torch.pi) / torch.pi).floor().clamp(0, 1)
    second = ((torch.atan2(y, z) + 2 * torch.pi).remainder(torch.pi) / (torch.pi / 2)).floor().clamp(0, 1)
    part = (2 * azimuth + second).byte().add_((distance >= outer).byte().mul_(4))
    return part.masked_fill_(distance < inner, 8)


def _distance(anchors: Tensor, points: Tensor, floor: float = 0.0) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Distances [A, N] of points [N, 3] from anchors [A, 3], and the coordinates of the way from one to the other."""
    x, y, z = (there - here[:, None] for here, there in zip(anchors.T, points.T.contiguous(), strict=True))
    return (x * x).addcmul_(y, y).addcmul_(z, z).add_(floor).sqrt_(), (x, y, z)


def anchor_nce(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float,
    negatives: Literal["positives", "anchors", "both"] = "positives",
) -> Tensor:
    """Contrast each anchor with its positive, in one direction, with a choice of negatives.

    Args:
        anchors, positives: [N, C], normalized already; row i belongs to row i.
        negatives: "positives" are all other rows of `positives`, as in `info_nce` one way; "anchors" all other rows of
            `anchors`, the letter of Janda et al. (2022), who write "the feature vector of any other point"; or "both".

    Returns:
        A scalar: the mean over the rows of -log(exp(own / t) / (exp(own / t) + sum over negatives of exp(score / t))).

    Example:
        >>> anchors = positives = torch.eye(2)
        >>> anchor_nce(anchors, positives, temperature=1.0, negatives="both").round(decimals=4)  # log(1 + 2 exp(-1))
        tensor(0.5514)
    """

    positive = (anchors * positives).sum(-1) / temperature
    sums = positive if negatives == "anchors" else log_sums(anchors, positives, temperature)
    if negatives != "positives":
        sums = torch.logaddexp(sums, log_sums(anchors, anchors, temperature, own=False))
    return (sums - positive).mean()


def nt_xent(
    view1: Tensor, view2: Tensor, *, temperature: float, negatives: Literal["both", "other"] = "both"
) -> Tensor:
    """SimCLR's loss: every row of both views is an anchor; its counterpart in the other view is the positive.

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, equation 1.

    Args:
        view1, view2: [N, C], normalized already; row i belongs to row i.
        negatives: "both": the 2 (N - 1) other rows of the two views, as in the paper; "other": the N - 1 of the other
            view, as in `info_nce`.

    Returns:
        A scalar: the mean over the 2 N anchors.

    Example:
        >>> views = torch.eye(2)
        >>> nt_xent(views, views, temperature=1.0).round(decimals=4)  # log(1 + 2 exp(-1))
        tensor(0.5514)
    """
    among: Literal["both", "positives"] = "both" if negatives == "both" else "positives"
    forward = anchor_nce(view1, view2, temperature=temperature, negatives=among)
    return (forward + anchor_nce(view2, view1, temperature=temperature, negatives=among)) / 2


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
        f0, f1: [N0, C], [N1, C] features of the two views, normalized already.
        pairs: int64 [M, 2], every match (row of f0, row of f1); a nearest candidate that is a match is not a negative.
        positives: int64 [P], the rows of `pairs` to use. candidates0, candidates1: int64 [K], rows of f0 and of f1.
        squared: a positive costs relu(d^2 - margin), as in the released code; False: relu(d - margin)^2, the paper's.

    Returns:
        The positive and the negative term, scalars; the loss is their sum. A term without any row is 0.

    Example:
        >>> features, rows = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.arange(2)
        >>> matches = torch.stack([rows, rows], dim=1)
        >>> positive, negative = hardest_contrastive(features, features, matches, rows, rows, rows[1:])
        >>> positive.item(), round(negative.item(), 4)  # the two rows are 0.63 apart
        (0.0, 0.2946)
    """
    sampled = pairs[positives]
    square = (f0[sampled[:, 0]] - f1[sampled[:, 1]]).square().sum(-1)
    paper = F.relu((square + 1e-7).sqrt() - positive_margin).square()
    positive = F.relu(square - positive_margin) if squared else paper
    forward = _hardest_negatives(f0, f1, pairs, sampled, candidates1, negative_margin)
    backward = _hardest_negatives(f1, f0, pairs.flip(-1), sampled.flip(-1), candidates0, negative_margin)
    return positive.sum() / max(len(positive), 1), (forward + backward) / 2


def queue_nce(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Contrast each query with its own key and with every row of a queue of older keys.

    He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, equation 1.

    Args:
        query, key: [N, C] features; row i of both shows one image. queue: [K, C], may be empty. All are normalized.

    Returns:
        A scalar: the mean over the N rows. Other rows of `key` are not negatives.

    Example:
        >>> queries = keys = torch.tensor([[1.0, 0.0]])
        >>> queue_nce(queries, keys, torch.tensor([[0.0, 1.0]]), temperature=1.0).round(decimals=4)  # log(1 + exp(-1))
        tensor(0.3133)
    """
    positive = (query * key).sum(-1, keepdim=True) / temperature
    logits = torch.cat([positive, query @ queue.T / temperature], dim=1)
    return (logits.logsumexp(-1) - positive[:, 0]).mean()


def _hardest_negatives(
    f0: Tensor, f1: Tensor, pairs: Tensor, sampled: Tensor, candidates: Tensor, margin: float
) -> Tensor:
    """Mean of relu(margin - distance)^2 to the nearest candidate in f1, over anchors whose nearest is not a match."""
    anchor = sampled[:, 0]
    hardest = candidates[_nearest(f0[anchor], f1[candidates])]
    negative = ~torch.isin(anchor * len(f1) + hardest, pairs[:, 0] * len(f1) + pairs[:, 1])
    distance = ((f0[anchor] - f1[hardest]).square().sum(-1) + 1e-7).sqrt()
    return (F.relu(margin - distance).square() * negative).sum() / negative.sum().clamp(min=1)


@torch.no_grad()
def _nearest(rows: Tensor, candidates: Tensor) -> Tensor:
    """Find each row's nearest candidate: int64 [N]. In parts, because the distance matrix can take gigabytes."""
    size = candidates.square().sum(-1)
    return torch.cat([(size - 2 * part @ candidates.T).argmin(-1) for part in rows.split(4096)])
