"""Losses of distillation between whole images and clouds: the baselines of PPKT. Pure; slow twins in their test."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-7  # of CRD's released code


def kl_distillation(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL divergence of a teacher's distribution from a student's, Hinton et al., 2015.

    Args:
        student, teacher: [N, C] logits. temperature: both are divided by it; the loss is multiplied by its square, so
            that gradients keep their size (1: PPKT's paper names none).

    Returns:
        A scalar: summed over the classes, mean over the rows.
    """
    log_student, log_teacher = (F.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def l2_distillation(
    student: Tensor, teacher: Tensor, *, form: Literal["squared", "norm", "mean"] = "squared"
) -> Tensor:
    """Distance of features [N, C], Gupta et al., CVPR 2016: a scalar, the mean over the rows.

    "squared": of the squared L2 norm; "norm": of the L2 norm; "mean": of the squared differences' mean over channels.
    """
    difference = student - teacher
    if form == "norm":
        return difference.norm(dim=-1).mean()
    square = difference.square()
    return square.mean() if form == "mean" else square.sum(-1).mean()


def queue_info_nce(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Contrast each row of `query` with its row of `key` and with all rows of a queue of earlier keys.

    Args:
        query, key: [N, C]; queue: [K, C], may be empty. All are normalized already.

    Returns:
        A scalar: cross-entropy with candidates (own key, queue), mean over the N rows.
    """
    positive = (query * key).sum(-1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T], dim=1) / temperature
    return (logits.logsumexp(1) - logits[:, 0]).mean()


def crd_scores(anchor: Tensor, memory: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """exp(anchor . memory row / temperature): [N, K] for anchors [N, C], memory [M, C] and int64 rows [N, K]."""
    return torch.exp(torch.einsum("nc,nkc->nk", anchor, memory[rows]) / temperature)


def crd_loss(scores: Tensor, constant: Tensor, memory_size: int) -> Tensor:
    """One side of Contrastive Representation Distillation, Tian et al., ICLR 2020, as its released code computes it.

    Noise-contrastive estimation: every score is judged true or drawn from a uniform memory.

    Args:
        scores: [N, K + 1] of `crd_scores`, the own sample in column 0.
        constant: the normalization Z of this side, a scalar. memory_size: rows M of the memory.

    Returns:
        A scalar, the mean over the anchors.
    """
    likelihood = scores / constant
    noise = (scores.shape[1] - 1) / memory_size
    positive, negative = likelihood[:, 0], likelihood[:, 1:]
    true = torch.log(positive / (positive + noise + EPSILON))
    drawn = torch.log(noise / (negative + noise + EPSILON))
    return -(true.sum() + drawn.sum()) / len(scores)
