"""Detection in clouds: which proposals become boxes, and their average precision, by VoteNet's rules.

Average precision is the area under the monotone envelope of precision over recall (PASCAL VOC 2010 and later).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.training.geometry3d.boxes import box_hulls, box_iou, points_in_boxes
from geo_pretrain.training.geometry3d.suppression import suppress

THRESHOLDS = (0.25, 0.5)  # of intersection over union


@dataclass(frozen=True)
class BoxFilter:
    """Which of a network's proposals are taken as found boxes."""

    # Suppression, on hulls. class: boxes of one class by volume; all: of all classes by volume; plane: of all classes,
    # seen from above
    suppress: Literal["class", "all", "plane"] = "class"
    iou: float = 0.25  # above it the less certain box goes
    min_score: float = 0.05  # probability that the proposal is an object; it must lie above
    per_class: bool = True  # every box is entered once for each class, not for its likeliest one alone
    min_points: int = 0  # boxes with fewer points of the cloud inside are dropped before suppression


PROTOCOLS = {
    # The evaluation while training, of VoteNet, PointContrast and CSC.
    "training": BoxFilter(),
    # The final tests as the released configurations really run: "faster_eval: False," with its comma is a text, and
    # true, so that empty boxes stay; PointContrast's file also switches off 3D suppression and per-class proposals.
    "pointcontrast_test": BoxFilter(suppress="plane", per_class=False),
    "csc_test": BoxFilter(),
    # The final test as VoteNet describes it.
    "votenet_test": BoxFilter(min_points=5),
}


@dataclass(frozen=True)
class ScoredBoxes:
    """The proposals of a network in one cloud."""

    rows: Tensor  # float32 [K, 7], as in `geometry3d.boxes`
    objectness: Tensor  # [K]: probability of being an object
    classes: Tensor  # [K, C]: probability of each class


@dataclass(frozen=True)
class FoundBoxes:
    """Boxes found in one cloud, with class and score; in the order in which they were entered."""

    rows: Tensor  # float32 [E, 7]
    classes: Tensor  # int64 [E], 1..C
    scores: Tensor  # [E]


def filter_boxes(given: ScoredBoxes, points: Tensor, rules: BoxFilter) -> FoundBoxes:
    """Take boxes from proposals; `points` [N, 3] m are the cloud's. Entries of a class stand in falling order."""
    kept = torch.arange(len(given.rows), device=given.rows.device)
    likeliest = given.classes.argmax(1)
    if rules.min_points:
        full = points_in_boxes(points, given.rows).sum(1)
        kept = kept[full >= rules.min_points]
    hulls, scores = box_hulls(given.rows[kept]), given.objectness[kept]
    same = likeliest[kept] if rules.suppress == "class" else None
    kept = kept[suppress(hulls, scores, rules.iou, classes=same, plane=rules.suppress == "plane")]
    kept = kept[given.objectness[kept] > rules.min_score]
    rows, scores = given.rows[kept], given.objectness[kept]
    if not rules.per_class:
        return FoundBoxes(rows, likeliest[kept] + 1, scores)
    count = given.classes.shape[1]
    every = torch.arange(1, count + 1, device=rows.device).repeat_interleave(len(rows))
    return FoundBoxes(rows.repeat(count, 1), every, (given.classes[kept] * scores[:, None]).T.flatten())


@dataclass(frozen=True)
class CloudMatches:
    """The boxes found in one cloud, compared with the true ones."""

    classes: np.ndarray  # int64 [E], 1..C
    scores: np.ndarray  # float64 [E]
    hits: np.ndarray  # bool [T, E]: the box is right at each threshold
    truths: np.ndarray  # int64 [C]: true boxes of each class


def match_boxes(
    found: FoundBoxes, rows: Tensor, classes: Tensor, count: int, thresholds: Sequence[float] = THRESHOLDS
) -> CloudMatches:
    """Compare found boxes with the true ones [M, 7] of `classes` int64 [M] (1..`count`) in one cloud.

    A found box, best score first, is right if the true box of its class that it overlaps most is overlapped by more
    than the threshold and was not found before; a second box there is wrong.
    """
    kinds, scores = found.classes.cpu().numpy(), found.scores.double().cpu().numpy()
    hits = np.zeros((len(thresholds), len(kinds)), bool)
    for kind in torch.unique(classes).tolist():
        entries = np.flatnonzero(kinds == kind)
        if not len(entries):
            continue
        entries = entries[np.argsort(-scores[entries], kind="stable")]
        overlap = box_iou(found.rows[entries], rows[classes == kind]).cpu().numpy()
        best, most = overlap.argmax(1), overlap.max(1)
        for place, threshold in enumerate(thresholds):
            taken = np.zeros(overlap.shape[1], bool)
            for entry, own, iou in zip(entries, best, most, strict=True):
                if iou > threshold and not taken[own]:
                    taken[own] = hits[place, entry] = True
    truths = torch.bincount(classes, minlength=count + 1)[1:].cpu().numpy()
    return CloudMatches(kinds, scores, hits, truths)


@dataclass(frozen=True)
class Precision:
    """Average precision and largest recall of each class; NaN for a class without a true box."""

    ap: np.ndarray  # float64 [C]
    recall: np.ndarray  # float64 [C]

    @property
    def mean_ap(self) -> float:
        """The mean over classes with true boxes; the released code's is not a number if any class has none."""
        return _mean(self.ap)

    @property
    def mean_recall(self) -> float:
        """The mean of the largest recalls over classes with true boxes."""
        return _mean(self.recall)


def average_precision(clouds: Iterable[CloudMatches], threshold: int) -> Precision:
    """Average precision over clouds at the threshold of this number. A class that is never found has 0."""
    matches = list(clouds)
    truths = np.sum([one.truths for one in matches], axis=0)
    kinds = np.concatenate([one.classes for one in matches])
    scores = np.concatenate([one.scores for one in matches])
    hits = np.concatenate([one.hits[threshold] for one in matches])
    ap, recall = np.full((2, len(truths)), np.nan)
    for place in np.flatnonzero(truths):
        own = kinds == place + 1
        order = np.argsort(-scores[own], kind="stable")  # equal scores in the order of the clouds
        right = np.cumsum(hits[own][order])
        reached = right / truths[place]
        ap[place] = envelope_area(reached, right / np.arange(1, len(right) + 1))
        recall[place] = reached[-1] if len(reached) else 0.0
    return Precision(ap, recall)


def envelope_area(recall: np.ndarray, precision: np.ndarray) -> float:
    """The area under the largest precision at this or any higher recall, from recall 0 to 1.

    >>> envelope_area(np.array([0.0, 0.5, 0.5, 1.0]), np.array([0.0, 0.5, 1 / 3, 0.5]))
    0.5
    """
    envelope = np.maximum.accumulate(np.append(precision, 0.0)[::-1])[::-1]
    steps = np.diff(np.concatenate([[0.0], recall, [1.0]]))
    return float((steps * envelope).sum())


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0
