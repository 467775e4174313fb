"""Recall of nearest features: what every matching protocol reports, and the loop over held-out pairs they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.frame import Skips

Unit = Literal["px", "voxels"]
T = TypeVar("T")


@dataclass(frozen=True)
class MatchingResult:
    """Recall of a network over pairs; `per_pair` has one value a pair in the order of the pairs."""

    recall: float  # mean over pairs of the share of queries matched within `threshold`
    threshold: float
    per_pair: tuple[float, ...]
    queries: int  # in all
    chance: float  # recall of a uniformly drawn candidate
    unit: Unit = "px"  # of the threshold

    @property
    def spread(self) -> float:
        """Standard deviation over pairs."""
        return float(np.std(self.per_pair))

    @property
    def measure(self) -> str:
        """What is measured, such as "recall at 4 px"."""
        return f"recall {'at' if self.unit == 'px' else 'within'} {self.threshold:g} {self.unit}"


def average_recall(
    items: Sequence[T],
    measure: Callable[[int, T], tuple[np.ndarray, float]],
    *,
    source: str,
    threshold: float,
    unit: Unit,
    skips: Skips | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MatchingResult:
    """Mean recall over `items`: pairs, numbered for `measure`, which returns each query's error and the chance level.

    Pairs that raise `BadFrame` are added to `skips`. Raises `DataError` when none is left; `source` names the data.
    """
    skips = skips if skips is not None else Skips()
    recalls, chances, total = [], [], 0
    for number, item in enumerate(items):
        if progress is not None:
            progress(number, len(items))
        try:
            error, chance = measure(number, item)
        except BadFrame as bad:
            skips.add(bad)
            continue
        recalls.append(float((error <= threshold).mean()))
        chances.append(chance)
        total += len(error)
    if not recalls:
        raise DataError(f"No pair of source {source!r} could be evaluated.\n{skips.summary()}")
    return MatchingResult(float(np.mean(recalls)), threshold, tuple(recalls), total, float(np.mean(chances)), unit)


def spread_evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, from the first to the last at even distances."""
    if len(items) <= count:
        return list(items)
    return [items[k] for k in np.linspace(0, len(items) - 1, count).round().astype(int)]


def nearest_row(query: Tensor, candidates: Tensor) -> Tensor:
    """For each query [Q, C] the row of `candidates` [N, C] with the largest cosine: int64 [Q]."""
    return (F.normalize(query, dim=-1) @ F.normalize(candidates, dim=-1).T).argmax(-1)


def chance_within(truth: Tensor, places: Tensor, radius: float) -> float:
    """Share of candidates at `places` [N, 3] within `radius` of a true position [Q, 3], mean over queries."""
    exact = "donot_use_mm_for_euclid_dist"
    near = [torch.cdist(part, places, compute_mode=exact) <= radius for part in truth.split(64)]
    return float(torch.cat(near).double().mean())
