"""Linear regression from sums: what is needed of all places is one Gram matrix for each group of frames.

Groups add up, so that any choice of held-out groups, any penalty and the choice of the penalty itself (by leaving each
group out in turn) come from the same matrices, in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geo_pretrain.errors import DataError
from geo_pretrain.training.evaluation.awareness.spec import PENALTIES

LEAST_STD = 1e-6  # a channel that varies less is constant
ALONE = 1e-3  # penalty where there is one group, so that none can be left out


def gram(features: Tensor, targets: Tensor) -> Tensor:
    """Sum of the products of all columns of [1, features [N, C], targets [N, T]]: float64 [1 + C + T, 1 + C + T]."""
    rows = torch.cat([features.new_ones(len(features), 1), features, targets], dim=1).double()
    return rows.T @ rows


@dataclass(frozen=True)
class LinearFit:
    """Linear functions of features."""

    weight: Tensor  # float32 [C, T]
    bias: Tensor  # float32 [T]
    penalties: tuple[float, ...]  # chosen for each target


def solve(total: Tensor, targets: int, penalty: float) -> Tensor:
    """Minimize mean squared error + penalty |w|^2 over standardized features, from a `gram`: float64 [1 + C, T].

    Row 0 is the bias, which is not penalized; the weights are those of features that are not standardized.
    """
    count, chans = total[0, 0], len(total) - 1 - targets
    mean = total[0, 1:] / count
    cov = total[1:, 1:] / count - torch.outer(mean, mean)
    std = cov.diagonal()[:chans].clamp_min(0).sqrt()
    scale = torch.where(std > LEAST_STD, 1 / std.clamp_min(LEAST_STD), 0.0)
    system = cov[:chans, :chans] * torch.outer(scale, scale)
    system.diagonal().add_(penalty)
    weight = torch.linalg.solve(system, cov[:chans, chans:] * scale[:, None]) * scale[:, None]
    return torch.cat([(mean[chans:] - mean[:chans] @ weight)[None], weight])


def squared_errors(total: Tensor, solution: Tensor) -> Tensor:
    """Sum of squared errors of a `solution` on the rows of a `gram`, for each target: float64 [T]."""
    targets = solution.shape[1]
    residual = torch.cat([-solution, torch.eye(targets, dtype=solution.dtype)])
    return (residual * (total @ residual)).sum(0).clamp_min(0)


def fit_linear(groups: Sequence[Tensor], kinds: Sequence[int]) -> LinearFit:
    """Fit targets to features from the `gram` of each group; `kinds`: numbers of targets that share one penalty.

    The penalty is the one of `PENALTIES` with the least squared error on each group by the fit to the others.
    """
    if not groups:
        raise DataError("No frame that is not held out has a place whose normal is known; probes need some.")
    total, targets = torch.stack(list(groups)).sum(0), sum(kinds)
    parts = torch.arange(len(kinds)).repeat_interleave(torch.tensor(list(kinds)))
    chosen = [ALONE] * len(kinds)
    if len(groups) > 1:
        errors = torch.zeros(len(PENALTIES), len(kinds), dtype=torch.float64)
        for left_out in groups:
            for row, penalty in enumerate(PENALTIES):
                errors[row].index_add_(0, parts, squared_errors(left_out, solve(total - left_out, targets, penalty)))
        chosen = [PENALTIES[row] for row in errors.argmin(0).tolist()]
    solutions = {penalty: solve(total, targets, penalty) for penalty in set(chosen)}
    columns = [solutions[chosen[part]][:, column] for column, part in enumerate(parts.tolist())]
    both = torch.stack(columns, dim=1).float()
    return LinearFit(both[1:], both[0], tuple(chosen))


def depth_scores(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Depth metrics of one frame [N] m: share with max(p / t, t / p) < 1.25^k for k = 1, 2, 3 (d1, d2, d3), rmse m."""
    ratio = torch.maximum(predicted / truth, truth / predicted)
    scores = {f"d{k}": float((ratio < 1.25**k).double().mean()) for k in (1, 2, 3)}
    return scores | {"rmse": float((predicted - truth).double().square().mean().sqrt())}


def normal_scores(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Metrics of one frame's normals [N, 3]: shares with an error below 11.25, 22.5, 30 degrees; rmse in degrees."""
    cosine = torch.cosine_similarity(predicted.double(), truth.double(), dim=1).clamp(-1, 1)
    error = torch.rad2deg(torch.acos(cosine))
    scores = {f"{limit:g} deg": float((error < limit).double().mean()) for limit in (11.25, 22.5, 30)}
    return scores | {"rmse": float(error.square().mean().sqrt())}


def mean_scores(frames: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over frames of each metric."""
    return {key: sum(one[key] for one in frames) / len(frames) for key in frames[0]} if frames else {}
