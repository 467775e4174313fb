"""Objects from images of instance ids against a pixel-by-pixel twin."""

from __future__ import annotations

import numpy as np
import pytest

from geo_pretrain.errors import BadFrame
from geo_pretrain.training.data.labelled.instances import instances_from_ids
from geo_pretrain.training.data.labelled.mapping import label_map
from tests.labelled_layouts import random_objects
from tests.training.data.labelled.twins import NYU40_20, assert_objects, objects


@pytest.mark.parametrize("seed", range(6))
def test_objects_are_those_of_the_twin(seed):
    rng = np.random.default_rng(seed)
    label, number = random_objects(rng, 24, 32, [1, 3, 5, 13, 14, 39, 40])
    number[label > 0] -= seed % 2  # the first object of each label has number 0
    for unnumbered in (False, True):
        found = instances_from_ids(
            label * 1000 + number, label_map("scannet18"), "x", min_pixels=40, unnumbered=unnumbered
        )
        expected = objects(label, number, NYU40_20[2:], min_pixels=40, unnumbered=unnumbered)
        assert_objects(found, expected, (24, 32))
        assert len(found) == len(expected)


def test_objects_below_the_minimum_are_left_out():
    ids = np.zeros((40, 60), np.int32)
    ids.reshape(-1)[:999] = 3001
    ids.reshape(-1)[1000:2000] = 3002
    found = instances_from_ids(ids, label_map("scannet18"), "x", min_pixels=1000)
    assert found.masks.sum((1, 2)).tolist() == [1000]
    assert len(instances_from_ids(ids, label_map("scannet18"), "x", min_pixels=999)) == 2


def test_an_image_without_objects_has_none():
    found = instances_from_ids(np.full((5, 7), 1001), label_map("scannet18"), "x", min_pixels=1)
    assert_objects(found, [], (5, 7))


@pytest.mark.parametrize("value", [41001, 65535, 65539001])
def test_a_label_out_of_range_is_named(value):
    ids = np.array([[3001, value]])
    with pytest.raises(BadFrame) as error:
        instances_from_ids(ids, label_map("scannet18"), "i.png", min_pixels=1)
    assert str(error.value) == (
        f"i.png: instance id {value} has label {value // 1000}; label map scannet18 accepts 0 to 40"
    )
