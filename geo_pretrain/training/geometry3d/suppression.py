"""Greedy non-maximum suppression of boxes in 3D, on their hulls."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.sparse.backend import is_fast
from geo_pretrain.training.geometry3d import loops
from geo_pretrain.training.geometry3d.boxes import hull_iou


def suppress(
    hulls: Tensor, scores: Tensor, threshold: float, *, classes: Tensor | None = None, plane: bool = False
) -> Tensor:
    """Keep boxes that no better kept one overlaps by more than `threshold` of their union: int64 indices, best first.

    Of equal scores the first box counts as better.

    Args:
        hulls: [K, 6] m: lowest and highest corner of each box.
        scores: [K].
        classes: int64 [K]; boxes of other classes do not suppress each other. None: all boxes compete.
        plane: compare footprints seen from above instead of volumes.

    >>> hulls = torch.tensor([[0.0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0.9], [5, 5, 5, 6, 6, 6]])
    >>> suppress(hulls, torch.tensor([0.5, 0.9, 0.7]), 0.25).tolist()
    [1, 2]
    """
    order = scores.argsort(descending=True, stable=True)
    sorted_hulls = hulls[order]
    overlapping = hull_iou(sorted_hulls, sorted_hulls, plane=plane) > threshold
    if classes is not None:
        own = classes[order]
        overlapping &= own[:, None] == own[None]
    return order[_kept(overlapping).to(order.device)]


def _kept(overlapping: Tensor) -> Tensor:
    """Which of boxes sorted by score stay, from their overlaps bool [K, K]: bool [K]."""
    table = overlapping.cpu().numpy()  # one copy: the rest goes box by box
    kept = np.zeros(len(table), bool)
    if is_fast(torch.empty(0)):
        loops.compiled()["suppress"](table, kept)
        return torch.from_numpy(kept)
    gone = np.zeros(len(table), bool)
    for k in range(len(table)):
        if not gone[k]:
            kept[k] = True
            gone |= table[k]
    return torch.from_numpy(kept)
