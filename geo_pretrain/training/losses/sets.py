"""Contrast between sets of pixels, such as the segments of a surface that two frames see."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Denominator = Literal["other", "ntxent", "all", "batch"]


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
    """Contrast sets of pixels seen in two views: a set's mean feature in one view is the positive of the other's.

    Chen et al., "Self-Supervised Image Representation Learning with Geometric Set Consistency", CVPR 2022, equations 2
    and 3; options stand for what the paper leaves open. Pixel features are L2-normalized, then averaged.

    Args:
        features1, features2: [..., N1, C], [..., N2, C] pixel features. Leading axes are pairs of views.
        ids1, ids2: int64 [..., N1], [..., N2] the set of each pixel, -1 for none; a number means one set in both views
            of its own pair.
        denominator: which sets are negatives, beside the anchor's own set in the other view. "other": sets of the
            other view (equation 2); "ntxent": of both views; "all": of both and the anchor itself (equation 3 to the
            letter); "batch": of the other view in every pair, though two pairs may show one surface.
        symmetric: anchors in both views, and the mean of both directions; False: anchors in view 1.
        renormalize: L2-normalize the means. min_size: ignore a set with fewer pixels in a view.
        unmatched: sets that only one view sees are negatives too; they are never anchors.
        draws: [..., N1], [..., N2] random numbers: then the pixel of a set with the lowest number represents it as
            anchor and negative, and the mean is the positive alone (the paper's asymmetric form).

    Returns:
        [...]: the mean over the sets that both views have, one value a pair; 0 for a pair without any.

    Example:
        >>> features, ids = torch.eye(4), torch.tensor([0, 0, 1, 1])  # two sets of two pixels
        >>> set_info_nce(features, features, ids, ids, temperature=1.0).round(decimals=4)  # log(1 + exp(-1))
        tensor(0.3133)
    """
    index1, index2, pair, pairs = _number_sets(ids1, ids2)
    draw1, draw2 = draws or (None, None)
    mean1, single1, size1 = _set_features(features1, index1, len(pair), draw1, renormalize)
    mean2, single2, size2 = _set_features(features2, index2, len(pair), draw2, renormalize)
    present1, present2 = size1 >= min_size, size2 >= min_size
    anchors = (present1 & present2).nonzero()[:, 0]
    used1, used2 = (present1, present2) if unmatched else (present1 & present2, present1 & present2)

    def one_way(single: Tensor, positive: Tensor, other: Tensor, used: Tensor, used_other: Tensor) -> Tensor:
        positive = (single[anchors] * positive[anchors]).sum(-1, keepdim=True)
        across = denominator == "batch"
        terms = [positive, _negatives(single, other, anchors, used_other, pair, own=False, across=across)]
        if denominator in ("ntxent", "all"):
            terms.append(_negatives(single, single, anchors, used, pair, own=denominator == "all", across=False))
        return (torch.cat(terms, dim=1) / temperature).logsumexp(-1) - positive[:, 0] / temperature

    loss = one_way(single1, mean2, single2, used1, used2)
    if symmetric:
        loss = (loss + one_way(single2, mean1, single1, used2, used1)) / 2
    return _mean_by_pair(loss, pair[anchors], pairs).reshape(ids1.shape[:-1])


def _mean_by_pair(values: Tensor, pair: Tensor, pairs: int) -> Tensor:
    """Average values [N] over each pair, whose number is `pair` int64 [N]: [pairs], 0 for a pair without any."""
    total = values.new_zeros(pairs).index_add(0, pair, values)
    return total / torch.bincount(pair, minlength=pairs).clamp(min=1)


def _number_sets(ids1: Tensor, ids2: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Number the sets of all pairs: int64 [pixels] of each view (-1 for none), the pair of each set, how many pairs."""
    flat1, flat2 = (ids.reshape(-1, ids.shape[-1]) for ids in (ids1, ids2))
    pairs = len(flat1)
    stride = max(int(ids.max()) if ids.numel() else -1 for ids in (ids1, ids2)) + 1
    start = torch.arange(pairs, device=ids1.device)[:, None] * stride
    key1, key2 = (torch.where(flat >= 0, flat + start, -1).flatten() for flat in (flat1, flat2))
    both = torch.cat([key1, key2])
    keys = torch.unique(both[both >= 0])
    index1, index2 = (torch.where(key >= 0, torch.searchsorted(keys, key), -1) for key in (key1, key2))
    return index1, index2, keys // max(stride, 1), pairs


def _set_features(
    features: Tensor, index: Tensor, count: int, draw: Tensor | None, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Summarize pixels [..., N, C] by their sets `index` [pixels]: means and representatives [count, C], and sizes."""
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
    # One more pixel, of zeros, represents the sets that this view does not see.
    order, rows = torch.cat([order, position.new_tensor([len(order)])]), F.pad(rows, (0, 0, 0, 1))
    return mean, rows[order[first]], size


def _negatives(
    anchor: Tensor, other: Tensor, anchors: Tensor, used: Tensor, pair: Tensor, *, own: bool, across: bool
) -> Tensor:
    """Products [A, K] of the rows `anchors` with the used rows of `other`; -inf where two must not be compared."""
    columns = used.nonzero()[:, 0]
    allowed = torch.ones(len(anchors), len(columns), dtype=torch.bool, device=pair.device)
    if not across:
        allowed = pair[anchors][:, None] == pair[columns]
    if not own:
        allowed = allowed & (anchors[:, None] != columns)
    return (anchor[anchors] @ other[columns].T).masked_fill(~allowed, -torch.inf)
