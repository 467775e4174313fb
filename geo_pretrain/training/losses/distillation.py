"""Losses of distillation from a frozen teacher: the baselines of PPKT."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-7  # of CRD's released code


def kl_distillation(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL divergence between a teacher's and a student's class distributions, Hinton et al., 2015.

    Args:
        student, teacher: [N, C] logits. temperature: both are divided by it; the loss is multiplied by its square, so
            that gradients keep their size (1: PPKT's paper names none).

    Returns:
        A scalar: summed over the classes, mean over the rows.

    Example:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        >>> kl_distillation(student, teacher).round(decimals=4)  # 0.75 log(1.5) + 0.25 log(0.5)
        tensor(0.1308)
    """
    log_student, log_teacher = (F.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def l2_distillation(
    student: Tensor, teacher: Tensor, *, form: Literal["squared", "norm", "mean"] = "squared"
) -> Tensor:
    """Distance between a student's and a teacher's features [N, C], Gupta et al., CVPR 2016; a mean over the rows.

    `form` says which distance: "squared", the squared L2 norm; "norm", the L2 norm; "mean", the squared differences
    averaged over the channels.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]])
        >>> [l2_distillation(student, teacher, form=form).item() for form in ("squared", "norm", "mean")]
        [4.0, 2.0, 2.0]
    """
    difference = student - teacher
    if form == "norm":
        return difference.norm(dim=-1).mean()
    square = difference.square()
    return square.mean() if form == "mean" else square.sum(-1).mean()


def crd_scores(anchor: Tensor, memory: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """Compute exp(anchor . memory row / temperature): [N, K] for anchors [N, C], memory [M, C], int64 rows [N, K].

    Example:
        >>> anchors = memory = torch.eye(2)
        >>> crd_scores(anchors, memory, torch.tensor([[0, 1], [1, 0]]), temperature=1.0)
        tensor([[2.7183, 1.0000],
                [2.7183, 1.0000]])
    """
    return torch.exp(torch.einsum("nc,nkc->nk", anchor, memory[rows]) / temperature)


def crd_loss(scores: Tensor, constant: Tensor, memory_size: int) -> Tensor:
    """One side of Contrastive Representation Distillation, Tian et al., ICLR 2020, as its released code computes it.

    Noise-contrastive estimation: each score is classified as the true pair or as noise from a uniform memory.

    Args:
        scores: [N, K + 1] of `crd_scores`; column 0 is the true pair.
        constant: the normalization Z of this side, a scalar. memory_size: rows M of the memory.

    Returns:
        A scalar, the mean over the anchors.

    Example:
        >>> scores = torch.ones(1, 2)  # the true pair, and one row of a memory of one
        >>> crd_loss(scores, torch.tensor(1.0), memory_size=1).round(decimals=4)  # 2 log(2)
        tensor(1.3863)
    """
    likelihood = scores / constant
    noise = (scores.shape[1] - 1) / memory_size
    positive, negative = likelihood[:, 0], likelihood[:, 1:]
    true = torch.log(positive / (positive + noise + EPSILON))
    drawn = torch.log(noise / (negative + noise + EPSILON))
    return -(true.sum() + drawn.sum()) / len(scores)
