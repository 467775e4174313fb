"""Average precision of boxes against a slow twin and by hand; which proposals are taken."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from geo_pretrain.training.evaluation.detection3d import (
    PROTOCOLS,
    BoxFilter,
    CloudMatches,
    FoundBoxes,
    ScoredBoxes,
    average_precision,
    envelope_area,
    filter_boxes,
    match_boxes,
)
from geo_pretrain.training.geometry3d.boxes import box_iou


def boxes(*centers, side=1.0):
    return torch.tensor([[x, y, 0.0, side, side, side, 0.0] for x, y in centers])


def found(rows, scores, classes=None):
    kinds = torch.ones(len(rows), dtype=torch.int64) if classes is None else torch.tensor(classes)
    return FoundBoxes(rows, kinds, torch.tensor(scores))


def ap(*clouds, classes=1, place=1):
    matches = [match_boxes(f, rows, torch.tensor(kinds, dtype=torch.int64), classes) for f, rows, kinds in clouds]
    return average_precision(matches, place)


def slow_ap(clouds, kind, threshold):
    """All predictions of a class by falling score; each takes its best true box if that is still free."""
    predictions = [(float(s), c, k) for c, (f, _, _) in enumerate(clouds)
                   for k, s in enumerate(f.scores) if f.classes[k] == kind]  # fmt: skip
    total = sum(int((truth == kind).sum()) for _, _, truth in clouds)
    used, tp, fp, curve = set(), 0, 0, [(0.0, 0.0)]
    for _, c, k in sorted(predictions, key=lambda p: (-p[0], p[1], p[2])):
        f, rows, truth = clouds[c]
        own = [m for m in range(len(rows)) if truth[m] == kind]
        ious = [float(box_iou(f.rows[k : k + 1], rows[m : m + 1])) for m in own]
        best = max(range(len(own)), key=lambda i: (ious[i], -i), default=None)
        if best is not None and ious[best] > threshold and (c, own[best]) not in used:
            used.add((c, own[best]))
            tp += 1
        else:
            fp += 1
        curve.append((tp / total, tp / (tp + fp)))
    area = 0.0
    for (before, _), (recall, _) in pairwise(curve):
        area += (recall - before) * max(p for r, p in curve if r >= recall)
    return area


@pytest.mark.parametrize("place, threshold", [(0, 0.25), (1, 0.5)])
def test_average_precision_is_the_slow_one(place: int, threshold: float):
    rng = np.random.default_rng(3)
    clouds = []
    for _ in range(4):
        truth = torch.from_numpy(np.concatenate([rng.uniform(-2, 2, (5, 3)), rng.uniform(0.5, 2, (5, 3)),
                                                 rng.uniform(-3, 3, (5, 1))], 1)).float()  # fmt: skip
        kinds = torch.from_numpy(rng.integers(1, 3, 5))
        near = truth.repeat(4, 1) + 0.15 * torch.from_numpy(rng.normal(size=(20, 7))).float()
        scores = torch.from_numpy(rng.integers(0, 8, 20) / 8.0)  # with ties
        clouds.append((FoundBoxes(near, torch.from_numpy(rng.integers(1, 3, 20)), scores), truth, kinds))
    matches = [match_boxes(f, rows, kinds, 2) for f, rows, kinds in clouds]
    got = average_precision(matches, place).ap
    wanted = [slow_ap(clouds, kind, threshold) for kind in (1, 2)]
    assert got.tolist() == pytest.approx(wanted, abs=1e-9)
    assert 0.05 < min(wanted) < max(wanted) < 0.95


def test_cases_by_hand():
    truth = boxes((0, 0), (5, 0))
    perfect = found(truth, [0.9, 0.8])
    assert ap((perfect, truth, [1, 1])).mean_ap == 1
    double = found(boxes((0, 0), (0.01, 0), (5, 0)), [0.9, 0.8, 0.7])
    assert ap((double, truth, [1, 1])).mean_ap == pytest.approx(0.5 + 0.5 * 2 / 3)  # the second hit is wrong
    half = found(boxes((0, 0)), [0.9])
    assert ap((half, truth, [1, 1])).mean_ap == 0.5
    assert ap((half, truth, [1, 1])).mean_recall == 0.5
    wrong_class = found(truth, [0.9, 0.8], [2, 2])
    result = ap((wrong_class, truth, [1, 1]), classes=2)
    assert result.ap[0] == 0
    assert np.isnan(result.ap[1])  # predicted, but without any true box: it counts for nothing
    assert result.mean_ap == 0
    elsewhere = found(boxes((0, 0)), [0.95])
    empty = truth[:0]
    assert ap((elsewhere, empty, []), (perfect, truth, [1, 1])).mean_ap == pytest.approx(2 / 3)
    nothing = found(empty, [])
    assert ap((nothing, truth, [1, 1])).mean_ap == 0
    assert ap((nothing, empty, [])).mean_ap == 0


def test_a_box_at_the_threshold_is_wrong():
    truth, shifted = boxes((0, 0)), boxes((0, 0))
    shifted[0, 5] = 0.5  # IoU exactly 0.5
    cloud = found(shifted, [0.9]), truth, [1]
    assert ap(cloud, place=1).mean_ap == 0
    assert ap(cloud, place=0).mean_ap == 1


def test_the_envelope():
    assert envelope_area(np.array([]), np.array([])) == 0
    assert envelope_area(np.array([0.25, 0.25, 0.5]), np.array([1, 0.5, 2 / 3])) == pytest.approx(0.25 + 0.25 * 2 / 3)


def test_order_of_clouds_decides_between_equal_scores():
    right = CloudMatches(np.array([1]), np.array([0.5]), np.array([[True]]), np.array([1]))
    wrong = CloudMatches(np.array([1]), np.array([0.5]), np.array([[False]]), np.array([0]))
    assert average_precision([right, wrong], 0).ap[0] == 1
    assert average_precision([wrong, right], 0).ap[0] == 0.5


def proposals():
    """Two boxes at one place, of two classes, a third above it, and a far one that is hardly an object."""
    rows = boxes((0, 0), (0.1, 0), (0, 0), (9, 0))
    rows[2, 2] = 3.0
    classes = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])
    return ScoredBoxes(rows, torch.tensor([0.9, 0.8, 0.7, 0.04]), classes)


def kept(rules, points=None):
    result = filter_boxes(proposals(), torch.zeros(0, 3) if points is None else points, rules)
    return [(float(row[0]), float(row[2]), int(kind), round(float(score), 3))
            for row, kind, score in zip(result.rows, result.classes, result.scores, strict=True)]  # fmt: skip


def test_suppression_by_class_by_volume_and_from_above():
    first, second, above = (0.0, 0.0, 1, 0.9), (pytest.approx(0.1), 0.0, 2, 0.8), (0.0, 3.0, 1, 0.7)
    assert kept(BoxFilter(per_class=False)) == [first, second, above]
    assert kept(BoxFilter(suppress="all", per_class=False)) == [first, above]
    assert kept(BoxFilter(suppress="plane", per_class=False)) == [first]


def test_each_box_is_entered_for_each_class():
    entries = kept(BoxFilter(suppress="all"))
    assert entries == [(0.0, 0.0, 1, 0.81), (0.0, 3.0, 1, 0.42), (0.0, 0.0, 2, 0.09), (0.0, 3.0, 2, 0.28)]


def test_empty_boxes_are_dropped_before_they_suppress_others():
    points = torch.tensor([[0.59, 0.0, 0.0]] * 5 + [[0.0, 0.0, 3.0]] * 4)  # within the second box; four in the third
    assert [entry[2] for entry in kept(BoxFilter(suppress="all", per_class=False, min_points=5), points)] == [2]


def test_the_named_protocols():
    assert PROTOCOLS["training"] == PROTOCOLS["csc_test"] == BoxFilter("class", 0.25, 0.05, True, 0)
    assert PROTOCOLS["pointcontrast_test"] == BoxFilter("plane", 0.25, 0.05, False, 0)
    assert PROTOCOLS["votenet_test"] == BoxFilter("class", 0.25, 0.05, True, 5)
