"""Metrics of single objects: IoU of their parts, accuracy of their categories, and of the rarest of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.errors import DataError


@dataclass(frozen=True)
class PartTable:
    """The parts of each category of objects."""

    categories: tuple[str, ...]
    parts: tuple[tuple[int, ...], ...]  # of each category: labels, which count all parts from 1

    def of(self, category: int) -> tuple[int, ...]:
        """Labels of the parts of a category, 1..K. Raises `DataError` for others."""
        if not 1 <= category <= len(self.parts):
            raise DataError(f"Category {category}; accepted: 1 to {len(self.parts)} ({', '.join(self.categories)}).")
        return self.parts[category - 1]


def part_table(classes: Sequence[str]) -> PartTable:
    """Read the table from names of classes such as "chair/leg"; the order of categories is that of their first parts.

    Raises `DataError` for a name without a category.
    """
    parts: dict[str, list[int]] = {}
    for label, name in enumerate(classes, 1):
        category, slash, part = name.rpartition("/")
        if not (category and slash and part):
            raise DataError(f"Class {name!r} names no category; accepted for parts: names such as 'chair/leg'.")
        parts.setdefault(category, []).append(label)
    return PartTable(tuple(parts), tuple(map(tuple, parts.values())))


def best_parts(logits: Tensor, parts: Sequence[int]) -> Tensor:
    """The likeliest of the given labels (1..P) at each point: int64 [N], for logits [N, P] of all parts."""
    labels = torch.as_tensor(parts, device=logits.device)
    return labels[logits[:, labels - 1].argmax(dim=1)]


def likeliest_category(logits: Tensor, table: PartTable) -> int:
    """The category whose parts have the largest probability over all points together, for logits [N, P] of all parts.

    On ties the smaller number.
    """
    weight = logits.softmax(dim=1).sum(dim=0)
    sums = torch.stack([weight[[part - 1 for part in parts]].sum() for parts in table.parts])
    return 1 + int(sums.argmax())


def shape_iou(truth: np.ndarray, predicted: np.ndarray, parts: Sequence[int]) -> float:
    """Mean IoU over the parts of an object's category; a part in neither truth nor prediction counts 1.

    Labels [N] count all parts from 1; points whose truth is 0 are left out. As in PointNet++'s released evaluation.
    """
    known = truth > 0
    truth, predicted = truth[known], predicted[known]
    ious = []
    for part in parts:
        union = ((truth == part) | (predicted == part)).sum()
        ious.append(1.0 if union == 0 else float(((truth == part) & (predicted == part)).sum() / union))
    return float(np.mean(ious))


def mean_shape_iou(ious: Sequence[tuple[int, float]], table: PartTable) -> tuple[float, dict[str, float | None]]:
    """Instance mean over all objects, and the mean of each category (None: no object), from (category, IoU) pairs.

    The class mean is the mean of the categories that have objects.
    """
    of: dict[int, list[float]] = {}
    for category, iou in ious:
        of.setdefault(category, []).append(iou)
    means = {name: float(np.mean(of[k])) if k in of else None for k, name in enumerate(table.categories, 1)}
    return float(np.mean([iou for _, iou in ious])), means


def rarest(categories: Iterable[int], count: int) -> list[int]:
    """The `count` least frequent of these categories, rarest first; on ties the smaller number."""
    numbers = Counter(categories)
    return sorted(numbers, key=lambda category: (numbers[category], category))[:count]


def accuracy(confusion: np.ndarray, categories: Sequence[int] | None = None) -> float | None:
    """Share of objects that are given their own category, among those of `categories` (None: all); None without any.

    `confusion` int64 [1 + K, 1 + K], rows = truth.
    """
    rows = np.arange(1, len(confusion)) if categories is None else np.array(categories, np.int64)
    total = confusion[rows].sum()
    return float(confusion[rows, rows].sum() / total) if total else None


def class_accuracy(confusion: np.ndarray) -> dict[int, float | None]:
    """Accuracy of each category 1..K; None where there is no object."""
    return {category: accuracy(confusion, [category]) for category in range(1, len(confusion))}
