"""mIoU against loops over pixels, in both ways of counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from geo_pretrain.training.evaluation.metrics import (
    best_class,
    class_iou,
    confusion_matrix,
    mean_iou,
    paired_difference,
    pixel_accuracy,
)


def count(truth, predicted, c, *, exact):
    """Intersection and union of a class, pixel by pixel."""
    inside = union = 0
    for t, p in zip(truth.flatten().tolist(), predicted.flatten().tolist(), strict=True):
        if t == 0 or (exact and p == 0):
            continue
        inside += t == c and p == c
        union += t == c or p == c
    return inside, union


def slow_iou(truth, predicted, classes, *, exact):
    values = []
    for c in range(1, classes):
        inside, union = count(truth, predicted, c, exact=exact)
        values.append(inside / union if union else math.nan)
    return values


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, (7, 31))  # 5 is only predicted, 6 nowhere
    predicted = np.where(rng.random((7, 31)) < 0.6, truth, rng.integers(0, 6, (7, 31)))
    return truth, predicted


def confusion_of(truth, predicted, classes=7):
    return confusion_matrix(torch.from_numpy(truth), torch.from_numpy(predicted), classes)


def test_confusion_counts_pixels_by_truth_and_prediction(pixels):
    truth, predicted = pixels
    found = confusion_of(truth, predicted)
    for t in range(7):
        for p in range(7):
            assert found[t, p] == (((truth == t) & (predicted == p)).sum() if t else 0)
    assert found.dtype == np.int64


@pytest.mark.parametrize("exact", [False, True])
def test_iou_of_each_class_equals_the_loop(pixels, exact):
    truth, predicted = pixels
    found = class_iou(confusion_of(truth, predicted), match_released_code=exact)
    assert found == pytest.approx(slow_iou(truth, predicted, 7, exact=exact), nan_ok=True)
    assert found[4] == 0
    assert np.isnan(found[5])


def test_mean_leaves_out_classes_without_truth_or_counts_them_as_zero(pixels):
    truth, predicted = pixels
    confusion = confusion_of(truth, predicted)
    mended, exact = (slow_iou(truth, predicted, 7, exact=flag) for flag in (False, True))
    assert mean_iou(confusion) == pytest.approx(sum(mended[:4]) / 4)
    assert mean_iou(confusion, match_released_code=True) == pytest.approx(sum(exact[:4]) / 6)
    before = confusion.copy()
    mean_iou(confusion, match_released_code=True)
    assert (confusion == before).all(), "the matrix is the caller's"


def test_one_matrix_over_all_images_is_not_the_mean_over_images():
    one, other = (
        confusion_of(np.array([1, 1]), np.array([1, 1]), 3),
        confusion_of(np.array([1, 2]), np.array([2, 2]), 3),
    )
    assert mean_iou(one + other) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_accuracy_is_over_labelled_pixels(pixels):
    truth, predicted = pixels
    known = truth > 0
    assert pixel_accuracy(confusion_of(truth, predicted)) == pytest.approx((truth == predicted)[known].mean())


def test_unlabelled_is_never_the_best_class():
    logits = torch.tensor([9.0, 1.0, 2.0]).view(1, 3, 1, 1)
    assert best_class(logits).item() == 2


def test_the_interval_of_a_paired_difference_covers_as_often_as_it_says():
    """A slow twin draws pairs one by one; of known distributions 95 % of the intervals hold the truth."""
    draw = np.random.default_rng(3)
    one, other = draw.random(12), draw.random(12)
    found = paired_difference(one, other)
    means = sorted(np.mean([(one - other)[draw.integers(12)] for _ in range(12)]) for _ in range(3000))
    assert found.mean == pytest.approx(one.mean() - other.mean())
    assert found.low == pytest.approx(means[75], abs=0.02)
    assert found.high == pytest.approx(means[-75], abs=0.02)
    assert found.over == "pairs"
    held = 0
    for _ in range(100):
        interval = paired_difference(draw.normal(0.3, 1, 50), np.zeros(50))
        held += interval.low <= 0.3 <= interval.high
    assert 88 <= held <= 99


def test_the_interval_of_few_scenes_is_one_of_stretches_of_neighbors():
    """A slow twin draws stretches one by one; of neighbors that are alike single pairs claim far too much."""
    draw = np.random.default_rng(4)
    values, scenes = draw.random(12), ["a"] * 12
    found = paired_difference(values, np.zeros(12), scenes)
    means = []
    for _ in range(3000):
        starts = [int(draw.integers(12)) for _ in range(4)]
        means.append(np.mean([values[(start + step) % 12] for start in starts for step in range(3)]))
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
    assert found.over == "stretches of 1 scene"
    assert paired_difference(values, np.zeros(12), ["a", "b"] * 6).over == "stretches of 2 scenes"
    held = {"stretches": 0, "pairs": 0}
    for _ in range(100):
        noise = draw.normal(0, 1, 200)
        alike = np.zeros(200)
        for k in range(1, 200):
            alike[k] = 0.8 * alike[k - 1] + noise[k]
        for kind, given in (("stretches", ["a"] * 100), ("pairs", [])):
            interval = paired_difference(alike[100:] + 0.3, np.zeros(100), given)
            held[kind] += interval.low <= 0.3 <= interval.high
    assert held["stretches"] >= 70
    assert held["pairs"] <= 62


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_interval_of_very_few_pairs(count):
    found = paired_difference(np.arange(count), np.zeros(count), ["a"] * count)
    assert found.low <= found.mean <= found.high
    assert (found.high > found.low) == (count > 1)


def test_pairs_of_a_scene_are_drawn_together():
    scenes = [scene for scene in "abcde" for _ in range(20)]
    values = np.repeat([0.0, 0.1, 0.2, 0.3, 0.4], 20)  # nothing varies within a scene
    whole, alone = paired_difference(values, np.zeros(100), scenes), paired_difference(values, np.zeros(100))
    assert (whole.over, alone.over) == ("scenes", "pairs")
    assert whole.high - whole.low > 2 * (alone.high - alone.low)
    assert str(alone).startswith("+20.0 (95 % interval +17.")
