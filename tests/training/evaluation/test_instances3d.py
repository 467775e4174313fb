"""Average precision of instances in clouds: hand-made cases, published golden values, and a twin that loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from geo_pretrain.errors import DataError
from geo_pretrain.training.evaluation.grouping import Proposals
from geo_pretrain.training.evaluation.instances3d import (
    EVERY,
    InstanceRules,
    instance_precision,
    overlaps_of,
)


def cloud(*parts):
    """Labels and instances of a cloud of (points, class, instance) runs."""
    sizes, labels, instances = zip(*parts, strict=True)
    return np.repeat(labels, sizes).astype(np.int64), np.repeat(instances, sizes).astype(np.int64)


def found(*predictions):
    """Proposals of (first point, end, class, score)."""
    spans, classes, scores = [range(a, b) for a, b, _, _ in predictions], [], []
    for _, _, label, score in predictions:
        classes.append(label)
        scores.append(score)
    return Proposals.of(spans, classes, scores)


def measure(scenes, classes=2, **rules):
    overlaps = [overlaps_of(*truth, proposals) for truth, proposals in scenes]
    return instance_precision(overlaps, classes, InstanceRules(**rules))


def ap(truth, predictions, classes=2, **rules):
    """(AP, AP50, AP25) of one cloud."""
    means = measure([(truth, found(*predictions))], classes, **rules).means()
    return means["ap"], means["ap50"], means["ap25"]


# ---- The rules, one loop after the other ----------------------------------------------------------------------------


def slow_precision(scenes, classes, minimum, none_below=1000):
    """The rules as they are written down: `scenes` are (ids, masks, labels, scores) with ids = class * 1000 + number.

    Ids below `none_below` are no instance.
    """
    values = np.full((classes, len(EVERY)), np.nan)
    for label in range(1, classes + 1):
        for k, threshold in enumerate(EVERY):
            hits, hard_negatives, has_truth, has_predictions = [], 0, False, False
            for ids, masks, labels, scores in scenes:
                void = (ids // 1000 < 1) | (ids // 1000 > classes) | (ids == 0)
                true = [(int(i), ids == i) for i in np.unique(ids) if i != 0 and i // 1000 == label]
                predictions = [
                    (mask, score)
                    for mask, one, score in zip(masks, labels, scores, strict=True)
                    if one == label and mask.sum() >= minimum
                ]
                targets = [mask for i, mask in true if i >= none_below and mask.sum() >= minimum]
                has_truth, has_predictions = has_truth or bool(targets), has_predictions or bool(predictions)
                used = set()
                for target in targets:
                    best = None
                    for number, (mask, score) in enumerate(predictions):
                        if number in used or not (mask & target).any():
                            continue
                        if (mask & target).sum() / (mask | target).sum() > threshold:
                            if best is None:
                                best = score
                                used.add(number)
                            else:
                                hits.append((min(best, score), False))
                                best = max(best, score)
                    if best is None:
                        hard_negatives += 1
                    else:
                        hits.append((best, True))
                for mask, score in predictions:
                    if any((mask & one).sum() / (mask | one).sum() > threshold for _, one in true):
                        continue
                    ignored = (mask & void).sum()
                    for i, one in true:
                        ignored += (mask & one).sum() if i < none_below else 0
                        ignored += (mask & one).sum() if one.sum() < minimum else 0
                    if ignored / mask.sum() <= threshold:
                        hits.append((score, False))
            if has_truth:
                values[label - 1, k] = slow_area(hits, hard_negatives) if has_predictions else 0.0
    return values


def slow_area(hits, hard_negatives):
    precision, recall = [], []
    for score in sorted({score for score, _ in hits}):
        tp = sum(right for other, right in hits if other >= score)
        fp = sum(not right for other, right in hits if other >= score)
        fn = sum(right for other, right in hits if other < score) + hard_negatives
        precision.append(tp / (tp + fp))
        recall.append(tp / (tp + fn))
    precision, recall = [*precision, 1.0], [*recall, 0.0]
    padded = [recall[0], *recall, 0.0]
    return sum(p * (padded[k] - padded[k + 2]) / 2 for k, p in enumerate(precision))


def random_scene(rng, classes):
    """Overlapping predictions, tied scores, void, stuff beyond the classes, small and unlabelled things."""
    points = 160
    ids = np.zeros(points, np.int64)
    for number in range(1, 9):
        start, size = rng.integers(points), rng.integers(1, 40)
        ids[start : start + size] = rng.integers(0, classes + 2) * 1000 + number
    ids[rng.random(points) < 0.1] = 0
    masks = []
    for _ in range(14):
        mask = np.zeros(points, bool)
        if rng.random() < 0.6:
            mask = ids == rng.choice(ids)
            mask ^= rng.random(points) < rng.choice([0.0, 0.03, 0.1])
        else:
            start = rng.integers(points)
            mask[start : start + rng.integers(1, 40)] = True
        masks.append(mask)
    labels = rng.integers(1, classes + 1, len(masks))
    scores = rng.integers(0, 6, len(masks)) / 6
    return ids, masks, labels, scores


def as_given(ids, classes):
    """Labels and instance numbers; whatever is beyond the classes has none."""
    labels = np.where(ids // 1000 > classes, 0, ids // 1000)
    return labels, np.where(labels > 0, ids, 0)


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_rules_written_as_loops(seed):
    rng, classes, minimum = np.random.default_rng(seed), 3, 6
    scenes = [random_scene(rng, classes) for _ in range(5)]
    fast = measure(
        [
            (as_given(ids, classes), Proposals.of([np.flatnonzero(m) for m in masks], labels, scores))
            for ids, masks, labels, scores in scenes
        ],
        classes,
        minimum=minimum,
    )
    slow = slow_precision(scenes, classes, minimum)
    np.testing.assert_allclose(fast.values, slow, atol=1e-12)
    assert np.nanmin(slow) < np.nanmax(slow)


def test_class_with_raw_id_0_never_enters_the_mean():
    """S3DIS by the released code: raw ids 0.. are classes, so ids of class 0 are below 1000 and are no instance."""
    rng = np.random.default_rng(0)
    scenes = []
    for _ in range(4):
        ids, masks, labels, scores = random_scene(rng, 3)
        scenes.append((np.where(ids > 0, ids, 0), masks, labels, scores))
    fast = measure(
        [
            (as_given(ids, 3), Proposals.of([np.flatnonzero(m) for m in masks], labels, scores))
            for ids, masks, labels, scores in scenes
        ],
        3,
        minimum=6,
        left_out=frozenset({1}),
    )
    slow = slow_precision(scenes, 3, 6, none_below=2000)  # as if class 1's ids were below 1000
    np.testing.assert_allclose(fast.values[1:], slow[1:], atol=1e-12)
    assert np.isnan(fast.values[0]).all()
    assert np.isnan(slow[0]).all()
    assert fast.means()["ap50"] == np.nanmean(slow[:, 0])


# ---- Hand-made cases ------------------------------------------------------------------------------------------------

TARGET = cloud((300, 1, 1), (300, 0, 0), (300, 2, 5))  # 300 points of class 1, void, 300 of class 2


def test_golden_values_of_the_released_code():
    one = cloud((300, 1, 1), (300, 0, 0))
    assert ap(one, [(0, 300, 1, 0.5)], classes=1) == (1.0, 1.0, 1.0)
    assert ap(one, [(0, 300, 1, 0.5), (300, 600, 1, 0.9)], classes=1) == (1.0, 1.0, 1.0)  # on void alone: ignored
    assert ap(one, [(0, 300, 1, 0.5), (0, 300, 1, 0.4)], classes=1) == (1.0, 1.0, 1.0)  # a duplicate, less certain
    assert ap(one, [(0, 150, 1, 0.5), (150, 300, 1, 0.4)], classes=1) == (0.0, 0.0, 1.0)  # IoU is exactly 0.5
    wrong = measure([(TARGET, found((0, 300, 1, 0.5), (600, 900, 1, 0.9)))])
    assert wrong.per_class()["ap50"].tolist() == [0.25, 0.0]  # 0.5 with an envelope
    two = cloud((300, 1, 1), (50, 1, 2))
    assert ap(two, [(0, 300, 1, 0.5)], classes=1) == (1.0, 1.0, 1.0)
    assert ap(two, [(0, 300, 1, 0.5)], classes=1, minimum=10) == (0.5, 0.5, 0.5)


def test_duplicate_with_the_higher_score_becomes_the_match_and_the_first_a_false_positive():
    one = cloud((300, 1, 1))
    assert ap(one, [(0, 300, 1, 0.4), (0, 300, 1, 0.5)], classes=1) == (1.0, 1.0, 1.0)
    assert ap(one, [(0, 300, 1, 0.5), (0, 300, 1, 0.5)], classes=1) == (0.75, 0.75, 0.75)  # tied: one point, 1/2


def test_second_duplicate_stays_free_for_the_next_target():
    """Only the first prediction above the threshold is used up (rule 2)."""
    truth = cloud((100, 1, 1), (100, 1, 2))
    both, first = (0, 200, 1, 0.9), (0, 100, 1, 0.8)
    # IoU of `both` with each target is 0.5: at 0.25 the first target takes `first`, `both` is its duplicate and
    # then the second target's match
    assert ap(truth, [first, both], classes=1)[2] == pytest.approx(
        slow_area([(0.8, False), (0.9, True), (0.9, True)], 0)
    )
    # in the other order `both` is used up by the first target, and nothing is left for the second
    assert ap(truth, [both, first], classes=1)[2] == pytest.approx(slow_area([(0.8, False), (0.9, True)], 1))


def test_sizes_at_the_minimum_count_and_below_it_do_not():
    truth = cloud((100, 1, 1), (400, 2, 1))
    assert ap(truth, [(0, 100, 1, 0.5), (100, 500, 2, 0.5)])[1] == 1.0
    smaller = cloud((99, 1, 1), (400, 2, 1))
    found_small = measure([(smaller, found((0, 99, 1, 0.5), (99, 499, 2, 0.5)))])
    assert np.isnan(found_small.values[0]).all()
    assert found_small.means()["ap50"] == 1.0


def test_prediction_on_too_small_truth_is_ignored_up_to_the_threshold():
    truth = cloud((300, 1, 1), (60, 1, 2), (60, 2, 7), (300, 2, 1))
    good = (0, 300, 1, 0.5), (420, 720, 2, 0.5)
    # half on a small instance of its class, half on another class's: IoU 0.5 with the small one. At 0.5 the share
    # ignored, 0.5, is not above the threshold: a false positive; at 0.25 it is
    mixed = measure([(truth, found(*good, (300, 420, 1, 0.9)))])
    assert mixed.per_class()["ap50"][0] == 0.25
    assert mixed.per_class()["ap25"][0] == 1.0
    whole = measure([(truth, found(*good, (240, 360, 1, 0.9)))])  # IoU with the target 60 / 360, with the small 0.5
    assert whole.per_class()["ap25"][0] == 1.0


def test_void_counts_in_the_size_of_a_prediction():
    truth = cloud((300, 1, 1), (300, 0, 0))
    assert ap(truth, [(0, 600, 1, 0.5)], classes=1) == (0.0, 0.0, 1.0)  # IoU 0.5; half void is no excuse at 0.5


def test_thresholds_stop_at_90_and_ask_for_more():
    truth = cloud((1000, 1, 1))
    for size, passed in ((901, 9), (900, 8), (851, 8), (550, 1), (551, 2)):
        assert ap(truth, [(0, size, 1, 0.5)], classes=1)[0] == pytest.approx(passed / 9)


def test_classes_without_truth_or_prediction():
    missed = measure([(TARGET, found((0, 300, 1, 0.5)))], classes=3)
    assert missed.per_class()["ap50"][:2].tolist() == [1.0, 0.0]
    assert math.isnan(missed.per_class()["ap50"][2])
    assert missed.means() == {"ap": 0.5, "ap50": 0.5, "ap25": 0.5}
    only_ignored = measure([(TARGET, found((300, 600, 1, 0.5)))])  # a prediction that is ignored: no score at all
    assert only_ignored.means()["ap50"] == 0.0
    nothing = measure([(TARGET, Proposals.of([], [], []))])
    assert nothing.means()["ap50"] == 0.0
    with pytest.raises(DataError, match="No instance to find"):
        measure([(cloud((300, 0, 0)), found((0, 300, 1, 0.5)))]).means()


def test_scores_rank_predictions_of_all_clouds_together():
    one, other = cloud((300, 1, 1)), cloud((300, 2, 1))
    scenes = [(one, found((0, 300, 1, 0.3))), (other, found((0, 300, 1, 0.8), (0, 300, 2, 0.1)))]
    assert measure(scenes).per_class()["ap50"].tolist() == [0.25, 1.0]


def test_equal_scores_in_several_clouds_are_one_point_of_the_curve():
    one, other = cloud((300, 1, 1)), cloud((300, 2, 1))
    scenes = [(one, found((0, 300, 1, 0.5))), (other, found((0, 300, 2, 0.1), (0, 300, 1, 0.5)))]
    # precision 1/2 at recall 1, then the added point: each weighs half the recall
    assert measure(scenes).per_class()["ap50"].tolist() == [0.75, 1.0]
    for order in ((0.6, 0.5), (0.5, 0.6)):  # apart, the right one first: 1, the wrong one first: 1/4
        scenes = [(one, found((0, 300, 1, order[0]))), (other, found((0, 300, 2, 0.1), (0, 300, 1, order[1])))]
        assert measure(scenes).per_class()["ap50"][0] == (1.0 if order[0] > order[1] else 0.25)


def test_predictions_of_a_class_that_no_truth_has_cost_nothing():
    alone = measure([(TARGET, found((0, 300, 1, 0.5), (600, 900, 2, 0.5)))], classes=3)
    more = measure([(TARGET, found((0, 300, 1, 0.5), (600, 900, 2, 0.5), (0, 900, 3, 0.99)))], classes=3)
    np.testing.assert_array_equal(alone.values, more.values)


def test_too_small_predictions_are_left_out_whatever_they_cover():
    truth = cloud((100, 1, 1), (300, 2, 1))
    right, others = (0, 100, 1, 0.5), (100, 400, 2, 0.5)
    assert ap(truth, [right, others, (100, 199, 1, 0.9)])[1] == 1.0  # 99 points on another class
    assert ap(truth, [right, others, (100, 200, 1, 0.9)])[1] == pytest.approx((0.25 + 1) / 2)  # 100 points
    assert ap(truth, [(0, 99, 1, 0.5), others])[1] == 0.5  # IoU 0.99, but too small: missed


def test_truth_that_is_too_small_is_neither_missed_nor_found():
    truth = cloud((300, 1, 1), (99, 1, 2), (300, 2, 1))
    good = (0, 300, 1, 0.5), (399, 699, 2, 0.5)
    assert ap(truth, good)[0] == 1.0  # not missed
    assert ap(truth, [*good, (299, 399, 1, 0.9)])[0] == 1.0  # found, IoU 0.99: neither right nor wrong
    # 60 or 50 of 110 points are on the small one, IoU 0.4 or less: the larger share is ignored at 0.5, the other is not
    for start, expected in ((339, 1.0), (349, 0.25)):
        mixed = measure([(truth, found(*good, (start, start + 110, 1, 0.9)))])
        assert mixed.per_class()["ap50"][0] == expected


def test_void_of_a_prediction_is_ignored_above_the_threshold_only():
    truth = cloud((300, 1, 1), (300, 0, 0), (300, 2, 1))
    good = (0, 300, 1, 0.5), (600, 900, 2, 0.5)
    for size, expected in ((300, 0.25), (299, 1.0)):  # void's share of 600 and 599 points is 0.5, and just above
        mixed = measure([(truth, found(*good, (300, 600 + size, 1, 0.9)))])
        assert mixed.per_class()["ap50"][0] == expected


def test_points_without_void_and_numbers_shared_by_classes():
    labels, instances = cloud((200, 1, 7), (200, 2, 7))
    assert ap((labels, instances), [(0, 200, 1, 0.5), (200, 400, 2, 0.5)]) == (1.0, 1.0, 1.0)
    overlaps = overlaps_of(labels, instances, found((100, 300, 1, 0.5)))
    assert overlaps.true_sizes.tolist() == [200, 200]
    assert (overlaps.common.tolist(), overlaps.void.tolist()) == ([[100, 100]], [0])
