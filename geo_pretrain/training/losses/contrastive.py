"""Losses of the pretext tasks: pure functions, each with a slow twin and golden values in its test."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Denominator = Literal["other", "ntxent", "all", "batch"]


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
        query, key: [N, C] matched features, normalized already.
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


def anchor_nce(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float,
    negatives: Literal["positives", "anchors", "both"] = "positives",
    chunk: int = 4096,
) -> Tensor:
    """Contrast each anchor with its positive, in one direction, by any reading of who its negatives are.

    Args:
        anchors, positives: [N, C], normalized already; row i belongs to row i.
        negatives: "positives" are all other rows of `positives`, as in `info_nce` one way; "anchors" all other rows of
            `anchors`, the letter of Janda et al. (2022), who write "the feature vector of any other point"; or "both".
        chunk: anchors compared at once; of more, the N x N scores are computed anew in the backward pass.

    Returns:
        A scalar: the mean over the rows of -log(exp(own / t) / (exp(own / t) + sum over negatives of exp(score / t))).
    """

    def part(begin: int, end: int) -> Tensor:
        own, place = anchors[begin:end], torch.arange(begin, end, device=anchors.device)
        positive = (own * positives[begin:end]).sum(-1, keepdim=True) / temperature
        scores = [positive if negatives == "anchors" else own @ positives.T / temperature]
        if negatives != "positives":
            scores.append((own @ anchors.T / temperature).scatter(1, place[:, None], -torch.inf))
        return torch.cat(scores, dim=1).logsumexp(1) - positive[:, 0]

    count = len(anchors)
    if count <= chunk:
        return part(0, count).mean()
    bounds = [(begin, min(begin + chunk, count)) for begin in range(0, count, chunk)]
    return torch.cat([checkpoint(part, *bound, use_reentrant=False) for bound in bounds]).mean()


def nt_xent(
    view1: Tensor, view2: Tensor, *, temperature: float, negatives: Literal["both", "other"] = "both"
) -> Tensor:
    """SimCLR's loss: every row of both views is an anchor, its twin in the other view the positive.

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, equation 1.

    Args:
        view1, view2: [N, C], normalized already; row i belongs to row i.
        negatives: "both": the 2 (N - 1) other rows of the two views, as in the paper; "other": the N - 1 of the other
            view, as in `info_nce`.

    Returns:
        A scalar: the mean over the 2 N anchors.
    """
    reading: Literal["both", "positives"] = "both" if negatives == "both" else "positives"
    there = anchor_nce(view1, view2, temperature=temperature, negatives=reading)
    return (there + anchor_nce(view2, view1, temperature=temperature, negatives=reading)) / 2


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


def set_info_nce(
    features1: Tensor,
    features2: Tensor,
    ids1: Tensor,
    ids2: Tensor,
    *,
    temperature: float,
    denominator: Denominator = "other",
    symmetric: bool = True,
    renormalize: bool = True,
    min_size: int = 1,
    unmatched: bool = False,
    draws: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Contrast sets of pixels seen in two views: the mean feature of a set in one belongs to that in the other.

    Chen et al., "Self-Supervised Image Representation Learning with Geometric Set Consistency", CVPR 2022, equations 2
    and 3, whose text leaves open what the options here decide. Pixel features are L2-normalized, then averaged.

    Args:
        features1, features2: [..., N1, C], [..., N2, C] pixel features. Leading axes are pairs of views.
        ids1, ids2: int64 [..., N1], [..., N2] the set of each pixel, -1 for none; a number means one set in both views
            of its own pair.
        denominator: whose sets an anchor is compared with, beside its own in the other view. "other": those of the
            other view (equation 2); "ntxent": of both views; "all": of both and the anchor itself (equation 3 to the
            letter); "batch": those of the other view in every pair, though two pairs may show one surface.
        symmetric: anchors in both views, and the mean of both directions; False: anchors in view 1.
        renormalize: L2-normalize the means.
        min_size: a set with fewer pixels in a view is not there.
        unmatched: sets that one view alone has are negatives too; they are no anchors.
        draws: [..., N1], [..., N2] random numbers: then the pixel of a set with the lowest one stands for it as anchor
            and negative, and the mean is the positive alone (the paper's asymmetric form).

    Returns:
        [...]: the mean over the sets that both views have, one value a pair; 0 for a pair without any.
    """
    index1, index2, pair, pairs = _number_sets(ids1, ids2)
    draw1, draw2 = (None, None) if draws is None else draws
    mean1, single1, size1 = _set_features(features1, index1, len(pair), draw1, renormalize)
    mean2, single2, size2 = _set_features(features2, index2, len(pair), draw2, renormalize)
    there1, there2 = size1 >= min_size, size2 >= min_size
    anchors = (there1 & there2).nonzero()[:, 0]
    used1, used2 = (there1, there2) if unmatched else (there1 & there2, there1 & there2)
    across = denominator == "batch"

    def one_way(single: Tensor, positive: Tensor, other: Tensor, used: Tensor, used_other: Tensor) -> Tensor:
        positive = (single[anchors] * positive[anchors]).sum(-1, keepdim=True)
        terms = [positive, _negatives(single, other, anchors, used_other, pair, own=False, across=across)]
        if denominator in ("ntxent", "all"):
            own = denominator == "all"
            terms.append(_negatives(single, single, anchors, used, pair, own=own, across=False))
        return (torch.cat(terms, dim=1) / temperature).logsumexp(-1) - positive[:, 0] / temperature

    loss = one_way(single1, mean2, single2, used1, used2)
    if symmetric:
        loss = (loss + one_way(single2, mean1, single1, used2, used1)) / 2
    number = pair[anchors]
    total = loss.new_zeros(pairs).index_add(0, number, loss)
    return (total / torch.bincount(number, minlength=pairs).clamp(min=1)).reshape(ids1.shape[:-1])


def queue_nce(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Contrast each query with its own key and with every row of a queue of older keys.

    He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, equation 1.

    Args:
        query, key: [N, C] features, row by row of one image; queue: [K, C]. All normalized already.

    Returns:
        A scalar: the mean over the N rows. Other rows of `key` are no negatives.
    """
    positive = (query * key).sum(-1, keepdim=True) / temperature
    logits = torch.cat([positive, query @ queue.T / temperature], dim=1)
    return (logits.logsumexp(-1) - positive[:, 0]).mean()


def depth_loss(prediction: Tensor, target: Tensor, *, invalid: float = 0.0) -> Tensor:
    """Pri3D's depth proxy: log-error of depth and of its Sobel responses, and the angle between normals.

    Args:
        prediction: [B, 1, H, W] m, linear; target: [B, H, W] m, `invalid` where there is no depth.

    Returns:
        A scalar: (depth + normal + dx + dy) / 3, each a mean over the valid pixels of the batch; 0 without any.
        Its minimum is negative, because log(0 + 0.5) is. Sobel sees the zeros of invalid neighbors and of the image
        border, as in the released code; only the center pixel is masked.
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


def _number_sets(ids1: Tensor, ids2: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Number the sets of all pairs: int64 [pixels] of each view (-1 for none), the pair of each set, how many pairs."""
    flat1, flat2 = (ids.reshape(-1, ids.shape[-1]) for ids in (ids1, ids2))
    pairs = len(flat1)
    stride = max(int(ids.max()) if ids.numel() else -1 for ids in (ids1, ids2)) + 1
    start = torch.arange(pairs, device=ids1.device)[:, None] * stride
    key1, key2 = (torch.where(flat >= 0, flat + start, -1).flatten() for flat in (flat1, flat2))
    both = torch.cat([key1, key2])
    found = torch.unique(both[both >= 0])
    index1, index2 = (torch.where(key >= 0, torch.searchsorted(found, key), -1) for key in (key1, key2))
    return index1, index2, found // max(stride, 1), pairs


def _set_features(
    features: Tensor, index: Tensor, count: int, draw: Tensor | None, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of pixels [..., N, C] in sets `index` [pixels]: means of sets, what stands for each, [count, C], and sizes."""
    rows = F.normalize(features, dim=-1).reshape(-1, features.shape[-1])[index >= 0]
    draw = None if draw is None else draw.flatten()[index >= 0]
    index = index[index >= 0]
    size = torch.bincount(index, minlength=count)
    mean = rows.new_zeros(count, rows.shape[1]).index_add(0, index, rows) / size.clamp(min=1)[:, None]
    if renormalize:
        mean = F.normalize(mean, dim=-1)
    if draw is None:
        return mean, mean, size
    order = draw.argsort()
    position = torch.arange(len(order), device=order.device)
    first = torch.full_like(size, len(order)).scatter_reduce(0, index[order], position, reduce="amin")
    # One pixel more, of zeros, stands for the sets that this view has not.
    order, rows = torch.cat([order, position.new_tensor([len(order)])]), F.pad(rows, (0, 0, 0, 1))
    return mean, rows[order[first]], size


def _negatives(
    anchor: Tensor, other: Tensor, anchors: Tensor, used: Tensor, pair: Tensor, *, own: bool, across: bool
) -> Tensor:
    """Products [A, K] of the rows `anchors` with the rows of `other` in use; -inf where two are not to be compared."""
    columns = used.nonzero()[:, 0]
    allowed = torch.ones(len(anchors), len(columns), dtype=torch.bool, device=pair.device)
    if not across:
        allowed = pair[anchors][:, None] == pair[columns]
    if not own:
        allowed = allowed & (anchors[:, None] != columns)
    return (anchor[anchors] @ other[columns].T).masked_fill(~allowed, -torch.inf)


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
    """Unnormalized surface normals (-dx, -dy, 1) of [B, H, W] -> [B, H, W, 3]."""
    return torch.stack([-dx, -dy, torch.ones_like(dx)], dim=-1)
