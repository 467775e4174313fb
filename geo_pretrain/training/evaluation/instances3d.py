"""Average precision of instances in point clouds, by the rules of ScanNet's evaluation script.

Written from a description of `evaluate_semantic_instance.py` (github.com/ScanNet/ScanNet, MIT); CSC's copy has the same
rules with other settings. Points stand for whatever is judged: vertices, points or voxels. A prediction's instance may
overlap others. Each cloud is reduced to sizes and intersections first, so that clouds need not be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geo_pretrain.errors import DataError
from geo_pretrain.training.checks import Count
from geo_pretrain.training.evaluation.grouping import Proposals

THRESHOLDS = tuple(round(0.5 + 0.05 * k, 2) for k in range(9))  # 0.50 to 0.90: the script stops before 0.95
LOW = 0.25  # judged apart from the mean
EVERY = np.array([*THRESHOLDS, LOW])


@dataclass(frozen=True)
class InstanceRules:
    """What counts as an instance: the benchmark's settings; CSC measures voxels with a minimum of 10."""

    minimum: Count = 100  # points; smaller instances are neither found nor missed, smaller predictions are left out
    # Classes without average precision. In the released code so is the class with raw id 0, clutter of S3DIS: ids of
    # true instances are 1000 times the class and a number, and those below 1000 count as "no instance".
    left_out: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Overlaps:
    """The true and predicted instances of one cloud: their sizes and intersections, in points."""

    true_classes: np.ndarray  # int64 [G], 1..C
    true_sizes: np.ndarray  # int64 [G]
    classes: np.ndarray  # int64 [P], 1..C
    scores: np.ndarray  # float64 [P]
    sizes: np.ndarray  # int64 [P]
    void: np.ndarray  # int64 [P]: points of a prediction that belong to no true instance
    common: np.ndarray  # int64 [P, G]


@dataclass(frozen=True)
class InstancePrecision:
    """Average precision of each class 1..C at `THRESHOLDS` and `LOW`; NaN for a class without a true instance."""

    values: np.ndarray  # float64 [C, 10]

    def per_class(self) -> dict[str, np.ndarray]:
        """float64 [C] each: "ap" is the mean over IoU 0.50 to 0.90, "ap50" and "ap25" are at one threshold."""
        high = self.values[:, :-1]
        return {"ap": high.mean(1), "ap50": high[:, 0], "ap25": self.values[:, -1]}

    def means(self) -> dict[str, float]:
        """Means over the classes with a true instance. Raises `DataError` if no class has any."""
        present = ~np.isnan(self.values[:, 0])
        if not present.any():
            raise DataError("No instance to find: average precision is not defined.")
        return {name: float(values[present].mean()) for name, values in self.per_class().items()}


def overlaps_of(labels: np.ndarray, instances: np.ndarray, found: Proposals) -> Overlaps:
    """Count the points that the true and predicted instances of a cloud have, and have in common.

    `labels` int64 [N]: 0 = void, 1..C; `instances` int64 [N]: numbers above 0, 0 = of no instance. Points of one number
    with different labels are different instances; a point without label or number is void.
    """
    true = (labels > 0) & (instances > 0)
    keys = np.where(true, labels * (int(instances.max(initial=0)) + 1) + instances, 0)
    numbers, first, which = np.unique(keys, return_index=True, return_inverse=True)
    if not len(numbers) or numbers[0] != 0:  # no point is void: column 0 stands for void all the same
        which, first = which + 1, np.concatenate([[0], first])
    count = len(first)
    owner = np.repeat(np.arange(len(found)), [len(one) for one in found.members])
    points = np.concatenate([np.zeros(0, np.int64), *found.members])
    common = np.bincount(owner * count + which[points], minlength=len(found) * count).reshape(-1, count)
    return Overlaps(
        true_classes=labels[first[1:]],
        true_sizes=np.bincount(which, minlength=count)[1:],
        classes=found.classes,
        scores=found.scores,
        sizes=common.sum(1),
        void=common[:, 0],
        common=common[:, 1:],
    )


def instance_precision(
    clouds: Sequence[Overlaps], classes: int, rules: InstanceRules = InstanceRules()
) -> InstancePrecision:
    """Average precision over all clouds, for each of `classes` classes and each IoU threshold.

    >>> labels, instances = np.ones(300, np.int64), np.ones(300, np.int64)
    >>> half = Proposals.of([range(150)], classes=[1], scores=[0.9])  # its IoU is exactly 0.5, which is not enough
    >>> instance_precision([overlaps_of(labels, instances, half)], 1).means()
    {'ap': 0.0, 'ap50': 0.0, 'ap25': 1.0}
    """
    values = np.full((classes, len(EVERY)), np.nan)
    for label in set(range(1, classes + 1)) - rules.left_out:
        judged = [_judge(cloud, label, rules.minimum) for cloud in clouds]
        targets = sum(one.targets for one in judged)
        if not targets:
            continue
        for k in range(len(EVERY)):
            right = np.concatenate([one.right[k] for one in judged])
            wrong = np.concatenate([one.wrong[k] for one in judged])
            values[label - 1, k] = area_under_curve(right, wrong, targets)
    return InstancePrecision(values)


@dataclass(frozen=True)
class _Judged:
    """The predictions of one class in one cloud, at every threshold."""

    targets: int
    right: list[np.ndarray]  # the scores of matched targets, an array for each threshold
    wrong: list[np.ndarray]  # the scores of false positives


def _judge(cloud: Overlaps, label: int, minimum: int) -> _Judged:
    """Match predictions of a class with its true instances, in the order of the script.

    Each target takes the first prediction above the threshold that no earlier target took; of all free ones above it,
    the highest score counts for the target and every other score is a false positive, although those stay free.
    A prediction above the threshold with no true instance, of whatever size, is a false positive, unless more of it
    than the threshold is on void and on true instances of its class that are too small.
    """
    mine, true = (cloud.classes == label) & (cloud.sizes >= minimum), cloud.true_classes == label
    scores, sizes, common = cloud.scores[mine], cloud.sizes[mine], cloud.common[mine][:, true]
    true_sizes = cloud.true_sizes[true]
    small = true_sizes < minimum
    above = common / (true_sizes + sizes[:, None] - common) > EVERY[:, None, None]  # [thresholds, predictions, true]
    ignored = (cloud.void[mine] + common[:, small].sum(1)) / sizes
    unmatched = ~above.any(2) & (ignored <= EVERY[:, None])
    right, wrong = [], []
    for k in range(len(EVERY)):
        free = np.ones(len(scores), bool)
        matched, rest = [], [scores[unmatched[k]]]
        for target in np.flatnonzero(~small):
            rows = np.flatnonzero(above[k, :, target] & free)
            if len(rows):
                free[rows[0]] = False
                ranked = np.sort(scores[rows])
                matched.append(ranked[-1])
                rest.append(ranked[:-1])
        right.append(np.array(matched, np.float64))
        wrong.append(np.concatenate(rest))
    return _Judged(int((~small).sum()), right, wrong)


def area_under_curve(right: np.ndarray, wrong: np.ndarray, targets: int) -> float:
    """Average precision from the scores of true positives [T] and false positives [F], for `targets` instances.

    At each distinct score precision and recall count the predictions with at least that score; a point with precision
    1 and recall 0 is added. The precision at a point is weighted by half the recall between its neighbors, the highest
    recall being its own neighbor: precision is not made monotone.

    >>> area_under_curve(np.array([0.5]), np.array([0.9]), targets=1)  # a monotone envelope would give 0.5
    0.25
    """
    scores = np.concatenate([right, wrong])
    thresholds = np.unique(scores)
    reached = len(right) - np.searchsorted(np.sort(right), thresholds)
    given = len(scores) - np.searchsorted(np.sort(scores), thresholds)
    precision = np.append(reached / given, 1.0)
    recall = np.append(reached / targets, 0.0)
    padded = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (padded[:-2] - padded[2:]) / 2)
