"""Segmentation metrics: one confusion matrix over all images; mean IoU and accuracy from it. Scores over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one number from 0 to 1, such as a score for each seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return statistics.mean(self.values)

    @property
    def std(self) -> float:
        """Their sample standard deviation (n - 1); 0 for one value, NaN if one is not a number."""
        if any(math.isnan(value) for value in self.values):
            return math.nan
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        """In percent: "20.0 ± 10.0"; of one value the value alone."""
        return f"{100 * self.mean:.1f} ± {100 * self.std:.1f}" if len(self.values) > 1 else f"{100 * self.mean:.1f}"


RESAMPLES, FEWEST_GROUPS = 10_000, 5


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval by the bootstrap."""

    mean: float
    low: float
    high: float
    over: str  # what was drawn again: "scenes" with all their pairs, "stretches of 2 scenes" of them alone, or "pairs"

    def __str__(self) -> str:
        """In points: "+17.1 (95 % interval +14.9 to +19.3, over pairs)"."""
        mean, low, high = (f"{100 * value:+.1f}" for value in (self.mean, self.low, self.high))
        return f"{mean} (95 % interval {low} to {high}, over {self.over})"


def paired_difference(
    one: Sequence[float], other: Sequence[float], scenes: Sequence[str] = (), seed: int = 0
) -> Interval:
    """The mean of `one` - `other`, measured on the same pairs of frames, and how far it would move with other pairs.

    Percentile bootstrap of 10,000 draws with replacement. Pairs of one scene are alike, so where there are five
    `scenes` or more whole scenes are drawn. Of fewer, stretches of sqrt(N) neighbors are (circular block bootstrap,
    Politis and Romano, 1992; pairs are in order of time): the interval then holds for these scenes alone.
    Without `scenes` pairs are drawn, as if each told something new.
    """
    values = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    generator = np.random.default_rng(seed)
    names, groups = np.unique(np.asarray(scenes, dtype=str), return_inverse=True)
    if len(groups) != len(values):
        over, means = "pairs", _drawn_groups(values, np.arange(len(values)), generator)
    elif len(names) >= FEWEST_GROUPS:
        over, means = "scenes", _drawn_groups(values, groups, generator)
    else:
        over = f"stretches of {len(names)} scene{'s' * (len(names) > 1)}"
        means = _drawn_stretches(values, generator)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high), over)


def _drawn_groups(values: np.ndarray, groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of `values` [N] when whole groups [N] are drawn again, [RESAMPLES]."""
    sums, counts = np.bincount(groups, values), np.bincount(groups)
    drawn = generator.integers(0, len(sums), (RESAMPLES, len(sums)))
    means: np.ndarray = sums[drawn].sum(1) / counts[drawn].sum(1)
    return means


def _drawn_stretches(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of `values` [N] when stretches of neighbors are drawn again, the first following the last, [RESAMPLES]."""
    count = len(values)
    length = math.isqrt(count)
    ring = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[: length - 1]]))])
    stretches = (ring[length:] - ring[:-length]) / length  # [N], the mean of each
    means: np.ndarray = stretches[generator.integers(0, count, (RESAMPLES, -(-count // length)))].mean(1)
    return means


def confusion_matrix(truth: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """Count pixels by (true class, predicted class): int64 [classes, classes]; pixels whose truth is 0 are left out."""
    known = truth > 0
    index = truth[known] * classes + predicted[known]
    return torch.bincount(index, minlength=classes**2).reshape(classes, classes).cpu().numpy()


def mean_iou(confusion: np.ndarray, *, match_released_code: bool = False) -> float:
    """Mean intersection over union of the classes 1.. that occur in the truth.

    `match_released_code`: Pri3D's released code: pixels predicted as class 0 are left out altogether, and classes that
    occur neither in the truth nor in the prediction count as 0.
    """
    values = class_iou(confusion, match_released_code=match_released_code)
    if match_released_code:
        return float(np.nan_to_num(values).mean())
    present = confusion.sum(1)[1:] > 0
    return float(values[present].mean())


def class_iou(confusion: np.ndarray, *, match_released_code: bool = False) -> np.ndarray:
    """Intersection over union of each class 1..: float64 [classes - 1], NaN where there is no pixel of it."""
    if match_released_code:
        confusion = confusion.copy()
        confusion[0], confusion[:, 0] = 0, 0
    inside = confusion.diagonal()[1:].astype(np.float64)
    union = confusion.sum(0)[1:] + confusion.sum(1)[1:] - inside
    return np.divide(inside, union, out=np.full(len(inside), np.nan), where=union > 0)


def class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Share of each class 1..'s pixels (or voxels, points) that are right: float64 [classes - 1], NaN without any."""
    truth = confusion.sum(1)[1:]
    return np.divide(confusion.diagonal()[1:], truth, out=np.full(len(truth), np.nan), where=truth > 0)


def pixel_accuracy(confusion: np.ndarray) -> float:
    """Share of labelled pixels that are right."""
    return float(confusion.diagonal()[1:].sum() / max(confusion.sum(), 1))


def best_class(logits: Tensor) -> Tensor:
    """Return the likeliest class other than 0 (unlabeled): [B, classes, H, W] -> int64 [B, H, W]."""
    return logits[:, 1:].argmax(1) + 1
