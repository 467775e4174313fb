"""Metrics of objects against slow twins and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geo_pretrain.errors import DataError
from geo_pretrain.training.evaluation.objects import (
    accuracy,
    best_parts,
    class_accuracy,
    mean_shape_iou,
    part_table,
    rarest,
    shape_iou,
)

TABLE = part_table(["chair/seat", "chair/leg", "lamp/foot", "chair/back", "table/top/left"])


def slow_shape_iou(truth, predicted, parts):
    ious = []
    for part in parts:
        both = sum(t == p == part for t, p in zip(truth, predicted, strict=True) if t)
        either = sum(part in (t, p) for t, p in zip(truth, predicted, strict=True) if t)
        ious.append(both / either if either else 1)
    return sum(ious) / len(ious)


def test_the_table_comes_from_the_names_of_classes():
    assert TABLE.categories == ("chair", "lamp", "table/top")
    assert [TABLE.of(k) for k in (1, 2, 3)] == [(1, 2, 4), (3,), (5,)]
    with pytest.raises(DataError, match="Category 4; accepted: 1 to 3"):
        TABLE.of(4)
    with pytest.raises(DataError, match="'chair' names no category"):
        part_table(["chair/leg", "chair"])


def test_only_parts_of_the_category_are_predicted():
    logits = torch.tensor([[0.0, 3, 9, 1, 9], [2, 1, 0, 3, 0]])
    assert best_parts(logits, TABLE.of(1)).tolist() == [2, 4]
    assert best_parts(logits, TABLE.of(2)).tolist() == [3, 3]


@pytest.mark.parametrize("seed", range(4))
def test_iou_of_a_shape_is_its_slow_twin(seed):
    rng = np.random.default_rng(seed)
    truth, predicted = rng.choice([0, 1, 2], 30), rng.choice([1, 2, 4], 30)
    assert shape_iou(truth, predicted, (1, 2, 4)) == pytest.approx(slow_shape_iou(truth, predicted, (1, 2, 4)))


def test_a_part_in_neither_counts_one():
    whole = np.array([1, 1, 1, 1])
    assert shape_iou(whole, whole, (1, 2, 4)) == 1
    assert shape_iou(whole, np.array([1, 1, 2, 2]), (1, 2, 4)) == pytest.approx((0.5 + 0 + 1) / 3)


def test_means_over_objects_and_over_categories():
    mean, of_category = mean_shape_iou([(1, 1.0), (1, 0.5), (1, 0.6), (3, 0.1)], TABLE)
    assert mean == pytest.approx(2.2 / 4)
    assert of_category == {"chair": pytest.approx(0.7), "lamp": None, "table/top": pytest.approx(0.1)}


def test_accuracy_of_all_of_tails_and_of_each():
    confusion = np.array([[0, 0, 0, 0], [0, 8, 2, 0], [1, 0, 1, 2], [0, 0, 0, 0]])
    assert accuracy(confusion) == pytest.approx(9 / 14)
    assert accuracy(confusion, [2]) == 0.25  # an object without an answer (column 0) is wrong
    assert accuracy(confusion, [3]) is None
    assert class_accuracy(confusion) == {1: 0.8, 2: 0.25, 3: None}


def test_the_rarest_categories():
    assert rarest([5, 5, 5, 2, 2, 9, 1], 3) == [1, 9, 2]
    assert rarest([1, 2], 10) == [1, 2]
