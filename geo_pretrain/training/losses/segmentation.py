"""Losses of segmentation beside cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lovasz_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """The Lovasz extension of the Jaccard loss, Berman et al., CVPR 2018: a surrogate of 1 - mean IoU.

    For each class that occurs among the labels, the errors |truth - probability| of all rows are sorted from the
    largest; the weight of each is by how much it lets 1 - IoU grow. SLidR adds it to cross-entropy, over the points
    of a whole batch together.

    Args:
        logits: [N, C]. labels: int64 [N] in 0..C-1; rows to be ignored must be left out.

    Returns:
        A scalar: the mean over the classes that occur; 0 without rows.

    Example:
        >>> logits = torch.tensor([[9.0, -9.0], [9.0, -9.0], [9.0, -9.0]])  # class 0 throughout
        >>> lovasz_softmax(logits, torch.tensor([0, 0, 1])).round(decimals=4)  # IoU 2/3 and 0
        tensor(0.6667)
    """
    if not len(labels):
        return logits.sum() * 0
    probabilities = F.softmax(logits, dim=1)
    losses = []
    for label in labels.unique():
        truth = (labels == label).to(probabilities.dtype)
        errors, order = (truth - probabilities[:, label]).abs().sort(descending=True)
        losses.append(errors @ _growth(truth[order]))
    return torch.stack(losses).mean()


def _growth(truth: Tensor) -> Tensor:
    """By how much 1 - IoU of a class grows as each row in turn becomes wrong: [N], for its rows marked by 1 in [N]."""
    intersection = truth.sum() - truth.cumsum(0)
    union = truth.sum() + (1 - truth).cumsum(0)
    jaccard = 1 - intersection / union
    return torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
