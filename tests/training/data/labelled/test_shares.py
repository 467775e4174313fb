"""The table of labels, classes and shares, which is printed before training on one's own images, boxes or clouds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.labelled.registry import open_labelled, subset
from geo_pretrain.training.data.labelled.shares import NO_CLASS, UNKNOWN, count_values, label_table, percent
from tests.training.data.labelled.test_own_images import IDS, boxes_json, opened, write_flat, write_image


def rows(table):
    return [(row.key, row.name, row.count, row.items) for row in table.rows]


def test_ids_that_may_count_from_0_are_shown_with_the_option_that_says_so(tmp_path):
    write_flat(tmp_path, 4)  # ids 0, 1, 2, 3 and 255; three names
    source = opened(tmp_path, val_share=0.25)
    table = label_table(source)
    assert rows(table) == [
        ("0", NO_CLASS, 3 * 48, 3),
        ("1", "wall", 3 * 48, 3),
        ("2", "chair", 3 * 48, 3),
        ("3", "table", 3 * 24, 3),
        ("255", NO_CLASS, 3 * 24, 3),
    ]
    assert [percent(table.share(row)) for row in table.rows] == ["25 %", "25 %", "25 %", "12.5 %", "12.5 %"]
    [note] = table.notes()
    assert "id 0 (25 % of the pixels) is of no class. Is id 0 'wall'?" in note
    assert "--set data.options.first=0" in note
    assert label_table(opened(tmp_path, first=1)).notes() == []
    from_0 = label_table(opened(tmp_path, first=0))
    assert (from_0.rows[0].name, [row.key for row in from_0.unknown]) == ("wall", ["3"])
    assert from_0.notes([7, 9]) == [  # what is ignored by now stays so
        "Labels that are no class: 3. Training stops at them: ignore them with --set data.options.ignore=[3,7,9], or "
        "add them to the list of classes."
    ]
    part = subset(source, 0.4)
    assert (label_table(part).total, label_table(part, most=1).looked) == (1, 1)


def test_ids_that_are_ignored_or_unknown_name_the_other_beginning(tmp_path):
    write_flat(tmp_path, 2, np.where(IDS == 0, 1, IDS))
    with pytest.raises(DataError, match=r"id 3 is a class .*3 is 'table'. From 0: --set data\.options\.first=0"):
        opened(tmp_path, ignore=[3])
    with pytest.raises(BadFrame, match=r"label id 3 in .*Do ids count from 1\? --set data\.options\.first=1"):
        opened(tmp_path, first=0).load(opened(tmp_path, first=0).ids()[0])
    write_flat(tmp_path, 2, np.where(IDS == 1, 11, IDS))
    with pytest.raises(BadFrame, match=r"label id 3 in .*no class: --set data\.options\.ignore=\[3,11\]$") as error:
        opened(tmp_path, first=0).load(opened(tmp_path, first=0).ids()[0])
    assert "first=1" not in str(error.value)  # an id 0 is there


def test_colors_and_what_is_no_class_are_counted(tmp_path):
    write_flat(tmp_path, 2, names="1 wall\n2 wall\n9 lamp\n")
    table = label_table(opened(tmp_path))
    assert rows(table)[1:] == [
        ("1", "wall", 48, 1),
        ("2", "wall", 48, 1),
        ("9", "lamp", 0, 0),
        ("255", NO_CLASS, 24, 1),
        ("3", UNKNOWN, 24, 1),
    ]
    (tmp_path / "classes.txt").write_text("1 1 1 wall\n2 2 2 chair\n3 3 3 table\n")
    assert rows(label_table(opened(tmp_path, void=["chair"])))[:3] == [
        ("0 0 0", NO_CLASS, 48, 1),
        ("1 1 1", "wall", 48, 1),
        ("2 2 2", NO_CLASS, 48, 1),
    ]


def test_labels_of_no_class_are_told_with_what_mends_them(tmp_path):
    write_flat(tmp_path, 4, np.where(IDS == 0, 1, IDS))  # ids 1, 2, 3; names alone are counted from 0
    assert label_table(opened(tmp_path, first=0)).notes()[0] == "Do ids count from 1? --set data.options.first=1."
    assert " 3 (in 1 of 3 files). " in label_table(opened(tmp_path, first=0), most=1).fault()
    (tmp_path / "classes.txt").write_text("1 1 1 wall\n2 2 2 chair\n")
    fault = label_table(opened(tmp_path)).fault()
    assert "no class: 3 3 3, 255 255 255. " in fault
    assert "--set data.options.void=[NAME]" in fault
    assert "data.options.ignore" not in fault  # it takes ids
    write_flat(tmp_path, 4, np.arange(IDS.size).reshape(IDS.shape))
    assert "data.options.ignore" not in label_table(opened(tmp_path)).fault()  # labels of other data


def test_broken_labels_are_left_out_of_the_table(tmp_path):
    write_flat(tmp_path, 4)
    (tmp_path / "labels" / f"{opened(tmp_path).ids()[0]}.png").write_bytes(b"no PNG")
    table = label_table(opened(tmp_path))
    assert (table.looked, table.total) == (2, 3)


def test_objects_of_boxes_are_counted_by_category(tmp_path):
    (tmp_path / "annotations.json").write_text(json.dumps(boxes_json()))
    write_image(tmp_path / "images" / "0.jpg")
    table = label_table(opened(tmp_path, task="detection", val_share=0.25))
    assert (table.counted, [(key, name) for key, name, _, _ in rows(table)]) == (
        "objects",
        [("3", "pen"), ("90", "mug")],
    )
    assert sum(row.count for row in table.rows) == 6


def test_clouds_may_count_from_0_too(tmp_path):
    (tmp_path / "classes.txt").write_text("wall\nchair\n")
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "a.npy", [[0, 0, 0, 0], [1, 0, 0, 1], [2, 0, 0, 1], [3, 0, 0, 1]])

    def clouds(**options):
        return open_labelled("clouds", tmp_path, "train", task="segmentation3d", options=options)

    table = label_table(clouds())
    assert rows(table) == [("0", NO_CLASS, 1, 1), ("1", "wall", 3, 1), ("2", "chair", 0, 0)]
    assert "id 0 (25 % of the points) is of no class. Is id 0 'wall'?" in table.notes()[0]
    from_0 = clouds(first=0)
    assert (rows(label_table(from_0))[1], label_table(from_0).notes()) == (("1", "chair", 3, 1), [])
    assert from_0.load("train/a").labels.tolist() == [1, 2, 2, 2]
    assert clouds(first=1).fingerprint() == clouds().fingerprint() != from_0.fingerprint()
    with pytest.raises(DataError, match=r"label 2 is a class .*2 is 'chair'. From 0: --set data\.options\.first=0"):
        clouds(ignore=[2])
    np.save(tmp_path / "train" / "a.npy", [[0, 0, 0, 2], [1, 0, 0, 1]])
    with pytest.raises(BadFrame, match=r"Do labels count from 1\? --set data\.options\.first=1"):
        clouds(first=0).load("train/a")
    assert label_table(clouds(first=0)).notes()[0] == "Do labels count from 1? --set data.options.first=1."


def test_runs_of_equal_values_are_counted_as_numpy_counts_them():
    values = np.random.default_rng(0).integers(0, 5, (30, 40)).repeat(3, 1)
    expected = dict(zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True))
    assert count_values(values) == expected
    assert count_values(values[:0]) == {}
    assert percent(0.00001) == "<0.01 %"
