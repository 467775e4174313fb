"""Losses of VoteNet: votes for object centers, and the boxes proposed from clusters of votes.

Qi et al., "Deep Hough Voting for 3D Object Detection in Point Clouds", ICCV 2019; weights and rules are those of its
code, which PointContrast and CSC share. A mean over a mask divides by its size plus 1e-6. Clouds have M places for
boxes, of which those without a box are padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEAR, FAR = 0.3, 0.6  # m: a proposal nearer to a box's center is an object, one farther than the second is none
OBJECTNESS_WEIGHTS = (0.2, 0.8)  # of the cross-entropy of no object, of an object
TERMS = {  # weights in the sum; all are multiplied by SCALE
    "vote": 1.0,
    "objectness": 0.5,
    "center": 1.0,
    "heading_class": 0.1,
    "heading_residual": 1.0,
    "size_class": 0.1,
    "size_residual": 1.0,
    "class": 0.1,
}
SCALE = 10.0


class Proposals(NamedTuple):
    """What VoteNet says of K proposals in each of B clouds; H headings, S size templates, C classes."""

    bases: Tensor  # [B, K, 3] m: the vote that each proposal is centered on
    objectness: Tensor  # [B, K, 2] logits: no object, object
    centers: Tensor  # [B, K, 3] m
    headings: Tensor  # [B, K, H] logits
    heading_residuals: Tensor  # [B, K, H] in half bins
    sizes: Tensor  # [B, K, S] logits
    size_residuals: Tensor  # [B, K, S, 3] in sizes of the template
    classes: Tensor  # [B, K, C] logits


class BoxTargets(NamedTuple):
    """The true boxes of B clouds as VoteNet encodes them; padding is 0 everywhere."""

    present: Tensor  # bool [B, M]
    centers: Tensor  # [B, M, 3] m
    headings: Tensor  # int64 [B, M]: bins
    heading_residuals: Tensor  # [B, M] in half bins
    sizes: Tensor  # int64 [B, M]: templates
    size_residuals: Tensor  # [B, M, 3] in sizes of the template
    classes: Tensor  # int64 [B, M], from 0


class Assignment(NamedTuple):
    """Which box each proposal is compared with."""

    boxes: Tensor  # int64 [B, K]: places of the nearest boxes
    positive: Tensor  # bool [B, K]: the proposal is an object
    counted: Tensor  # bool [B, K]: it is near to a box or far from all


def vote_loss(votes: Tensor, truths: Tensor, mask: Tensor) -> Tensor:
    """L1 distance of each seed's vote to the nearest of its true ones, averaged over seeds on objects.

    Args:
        votes: [B, S, V, 3] m, V votes of each seed; the nearest of them counts. truths: [B, S, T, 3] m.
        mask: bool [B, S]: the seed lies on an object.

    Example:
        >>> votes, truths = torch.zeros(1, 2, 1, 3), torch.tensor([[[[1.0, 1, 1], [0, 0, 2]], [[9, 9, 9], [9, 9, 9]]]])
        >>> vote_loss(votes, truths, torch.tensor([[True, False]])).round(decimals=4)
        tensor(2.)
    """
    distances = (votes[:, :, :, None] - truths[:, :, None]).abs().sum(-1)
    return _masked_mean(distances.amin((2, 3)), mask)


def assign_proposals(bases: Tensor, targets: BoxTargets, *, padding_at_origin: bool = False) -> Assignment:
    """Assign each proposal to the box whose center is nearest to the proposal's vote (not to its predicted center).

    Args:
        bases: [B, K, 3] m.
        padding_at_origin: let places without a box take part as boxes at the origin, of the first class: an accident
            of the released code, by which a proposal near the origin becomes an object.

    Example:
        >>> box = BoxTargets(torch.tensor([[True]]), torch.ones(1, 1, 3), *[torch.zeros(1, 1)] * 5)
        >>> assign_proposals(torch.tensor([[[1.0, 1, 1.2], [1, 1, 1.5], [5, 5, 5]]]), box).positive.tolist()
        [[True, False, False]]
    """
    squared = (bases[:, :, None] - targets.centers[:, None]).square().sum(-1)
    if not padding_at_origin:
        squared = squared.masked_fill(~targets.present[:, None], torch.inf)
    nearest, boxes = squared.min(2)
    distance = (nearest + 1e-6).sqrt()
    return Assignment(boxes, distance < NEAR, (distance < NEAR) | (distance > FAR))


def objectness_loss(logits: Tensor, assignment: Assignment) -> Tensor:
    """Cross-entropy of no object (weight 0.2) and object (0.8), summed and divided by the number of counted proposals.

    Example:
        >>> yes = torch.tensor([[True, False]])
        >>> assignment = Assignment(torch.zeros(1, 2), yes, ~yes | yes)
        >>> objectness_loss(torch.zeros(1, 2, 2), assignment).round(decimals=4)  # 0.5 log(2)
        tensor(0.3466)
    """
    weights = logits.new_tensor(OBJECTNESS_WEIGHTS)
    entropy = F.cross_entropy(logits.transpose(1, 2), assignment.positive.long(), weights, reduction="none")
    return _masked_mean(entropy, assignment.counted)


def center_loss(
    centers: Tensor, targets: BoxTargets, assignment: Assignment, *, padding_at_origin: bool = False
) -> Tensor:
    """Squared distance of each object's predicted center to the nearest box, and of each box to the nearest center.

    The first is averaged over positive proposals, the second over boxes, to the nearest of all proposals.

    Args:
        centers: [B, K, 3] m. padding_at_origin: as in `assign_proposals`, for the first term.

    Example:
        >>> box = BoxTargets(torch.tensor([[True]]), torch.zeros(1, 1, 3), *[torch.zeros(1, 1)] * 5)
        >>> yes = torch.tensor([[True, False]])
        >>> assignment = Assignment(torch.zeros(1, 2), yes, yes)
        >>> center_loss(torch.tensor([[[2.0, 0, 0], [1, 0, 0]]]), box, assignment).round(decimals=4)
        tensor(5.)
    """
    squared = (centers[:, :, None] - targets.centers[:, None]).square().sum(-1)
    to_boxes = squared if padding_at_origin else squared.masked_fill(~targets.present[:, None], torch.inf)
    first = torch.where(assignment.positive, to_boxes.amin(2), 0)  # without a box there is no positive proposal
    return _masked_mean(first, assignment.positive) + _masked_mean(squared.amin(1), targets.present)


def box_losses(proposals: Proposals, targets: BoxTargets, assignment: Assignment) -> dict[str, Tensor]:
    """The losses of heading, size and class of positive proposals against their boxes, not weighted yet.

    Classes are compared by cross-entropy; residuals of the true heading bin and of the true size template by a Huber
    loss with delta 1, that of sizes as a mean over the three axes.

    Example:
        >>> one = torch.zeros(1, 1, dtype=torch.long)
        >>> box = BoxTargets(one == 0, torch.zeros(1, 1, 3), one, one + 0.5, one, torch.ones(1, 1, 3), one)
        >>> zeros = [torch.zeros(1, 1, *shape) for shape in ((3,), (2,), (3,), (4,), (4,), (4,), (4, 3), (4,))]
        >>> losses = box_losses(Proposals(*zeros), box, Assignment(one, one == 0, one == 0))
        >>> {name: round(value.item(), 3) for name, value in losses.items()}  # log(4), 0.5 * 0.5^2, 0.5
        {'heading_class': 1.386, 'heading_residual': 0.125, 'size_class': 1.386, 'size_residual': 0.5, 'class': 1.386}
    """
    heading, size, label, turn, growth = (
        _taken(values, assignment.boxes)
        for values in (
            targets.headings, targets.sizes, targets.classes, targets.heading_residuals, targets.size_residuals
        )
    )  # fmt: skip
    own_turn = proposals.heading_residuals.gather(2, heading[..., None])[..., 0]
    template = size[..., None, None].expand(-1, -1, 1, 3)
    own_growth = proposals.size_residuals.gather(2, template)[:, :, 0]
    errors = {
        "heading_class": _cross_entropy(proposals.headings, heading),
        "heading_residual": F.huber_loss(own_turn, turn, reduction="none"),
        "size_class": _cross_entropy(proposals.sizes, size),
        "size_residual": F.huber_loss(own_growth, growth, reduction="none").mean(2),
        "class": _cross_entropy(proposals.classes, label),
    }
    return {name: _masked_mean(error, assignment.positive) for name, error in errors.items()}


def votenet_losses(
    votes: tuple[Tensor, Tensor, Tensor],
    proposals: Proposals,
    targets: BoxTargets,
    *,
    padding_at_origin: bool = False,
) -> dict[str, Tensor]:
    """All terms of VoteNet's loss by name, weighted as in `TERMS`: their sum is the loss.

    Args:
        votes: the arguments of `vote_loss`. padding_at_origin: see `assign_proposals`.

    Example:
        >>> votes = torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1, 3), torch.tensor([[True]])
        >>> one = torch.zeros(1, 1, dtype=torch.long)
        >>> box = BoxTargets(one == 0, torch.zeros(1, 1, 3), one, one + 0.0, one, torch.zeros(1, 1, 3), one)
        >>> shapes = (3,), (2,), (3,), (1,), (1,), (1,), (1, 3), (1,)
        >>> losses = votenet_losses(votes, Proposals(*[torch.zeros(1, 1, *shape) for shape in shapes]), box)
        >>> round(sum(losses.values()).item(), 4), round(losses["objectness"].item(), 4)  # 10 * 0.5 * 0.8 log(2)
        (2.7726, 2.7726)
    """
    assignment = assign_proposals(proposals.bases, targets, padding_at_origin=padding_at_origin)
    losses = {
        "vote": vote_loss(*votes),
        "objectness": objectness_loss(proposals.objectness, assignment),
        "center": center_loss(proposals.centers, targets, assignment, padding_at_origin=padding_at_origin),
        **box_losses(proposals, targets, assignment),
    }
    return {name: SCALE * weight * losses[name] for name, weight in TERMS.items()}


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(values.dtype)
    return (values * weights).sum() / (weights.sum() + 1e-6)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def _taken(values: Tensor, places: Tensor) -> Tensor:
    """values [B, M, ...] at `places` [B, K]: [B, K, ...]."""
    rows = torch.arange(len(places), device=places.device)[:, None]
    taken: Tensor = values[rows, places]
    return taken
