"""Label maps against the protocols' own lists, and against torchvision's table of Cityscapes."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import torchvision

from geo_pretrain.errors import BadFrame, UnknownName
from geo_pretrain.training.data.labelled.mapping import label_map, list_label_maps
from tests.training.data.labelled.twins import CITYSCAPES, NYU9, NYU13, NYU40_20, mapped

ALL = ["ade20k150", "cityscapes19", "nyu13", "nyu9", "scannet18", "scannet20"]
ALL += ["semantickitti19", "sunrgbd37", "synthia12"]
# Some lines of the challenge's objectInfo150.txt: number and first name.
ADE20K = {
    1: "wall",
    2: "building",
    3: "sky",
    4: "floor",
    8: "bed",
    9: "windowpane",
    20: "chair",
    34: "desk",
    48: "sink",
}
ADE20K |= {59: "screen door", 64: "blind", 83: "light", 90: "television", 100: "buffet", 131: "screen", 150: "flag"}


def test_every_map_comes_with_the_package():
    assert list_label_maps() == ALL


@pytest.mark.parametrize("name", ALL)
def test_a_map_has_as_many_classes_as_its_name_says_and_an_id_for_each(name):
    labels = label_map(name)
    count = int(re.findall(r"\d+$", name)[0])
    assert len(labels.classes) == len(set(labels.classes)) == count
    assert sorted({label for label in labels.ids.values() if label}) == list(range(1, count + 1))
    once = [label for label in labels.ids.values() if label]
    assert name == "semantickitti19" or len(once) == count  # there several ids are one class
    assert labels.about


@pytest.mark.parametrize(
    "name, order, last",
    [
        ("scannet20", NYU40_20, 40),
        ("scannet18", NYU40_20[2:], 40),
        ("nyu13", list(range(1, 14)), 13),
        ("nyu9", [NYU13.index(label) + 1 for label in NYU9], 13),
        ("cityscapes19", CITYSCAPES, 33),
        ("sunrgbd37", list(range(37)), 36),
        ("ade20k150", list(range(1, 151)), 150),
        ("synthia12", [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15], 15),
    ],
)
def test_ids_become_the_classes_of_the_protocol(name, order, last):
    ids = np.random.default_rng(0).permutation(np.arange(last + 1).repeat(3)).reshape(3, -1).astype(np.int32)
    given = label_map(name).apply(ids, "x.png")
    assert given.dtype == np.uint8
    np.testing.assert_array_equal(given, mapped(ids, order))


def test_nyu_classes_carry_the_names_of_the_protocol():
    assert list(label_map("nyu13").classes) == NYU13
    assert list(label_map("nyu9").classes) == NYU9
    assert label_map("scannet18").classes == label_map("scannet20").classes[2:]


def test_ade20k_counts_as_the_challenge_does():
    labels = label_map("ade20k150")
    assert {number: labels.classes[labels.ids[number] - 1] for number in ADE20K} == ADE20K
    assert labels.ids[0] == 0


def test_cityscapes_is_torchvisions_table():
    labels = label_map("cityscapes19")
    table = [c for c in torchvision.datasets.Cityscapes.classes if c.id >= 0]
    assert len(table) == 34
    for entry in table:
        assert labels.ids[entry.id] == (0 if entry.ignore_in_eval else entry.train_id + 1)
        if not entry.ignore_in_eval:
            assert labels.classes[entry.train_id] == entry.name


def test_no_label_of_sunrgbd_is_ignored():
    assert label_map("sunrgbd37").apply(np.array([[255, 0, 36]]), "x").tolist() == [[0, 1, 37]]
    assert label_map("sunrgbd37").classes[0] == "wall"
    assert label_map("sunrgbd37").classes[24] == "tv"


@pytest.mark.parametrize(
    "name, ids, reason",
    [
        ("scannet20", [0, 41, 50, 41], "label id 41 in 2 pixels; label map scannet20 accepts 0 to 40"),
        ("ade20k150", [0, 151], "label id 151 in 1 pixels; label map ade20k150 accepts 0 to 150"),
        ("nyu13", [14], "label id 14 in 1 pixels; label map nyu13 accepts 0 to 13"),
        ("cityscapes19", [255], "label id 255 in 1 pixels; label map cityscapes19 accepts 0 to 33"),
        ("sunrgbd37", [37, 255], "label id 37 in 1 pixels; label map sunrgbd37 accepts 0 to 36, 255"),
        ("scannet20", [65535], "label id 65535 in 1 pixels; label map scannet20 accepts 0 to 40"),
    ],
)
def test_an_unknown_id_is_an_error_that_names_file_and_value(name, ids, reason):
    with pytest.raises(BadFrame) as error:
        label_map(name).apply(np.array([ids]), "labels/7.png")
    assert (error.value.path, error.value.reason) == ("labels/7.png", reason)


def test_unknown_map_names_the_nearest():
    with pytest.raises(UnknownName, match=r"Unknown label map 'scannet2'. Closest: 'scannet20'"):
        label_map("scannet2")


def test_maps_travel_to_worker_processes():
    labels = label_map("scannet20")
    labels.apply(np.zeros((1, 1), int), "x")
    assert pickle.loads(pickle.dumps(labels)) == labels
