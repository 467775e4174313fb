"""The check of labelled data: all that is wrong at once, shares of classes, a picture; which folders are labelled."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from geo_pretrain.training.data.check.labelled import check_labelled, labelled_task
from geo_pretrain.training.data.check.report import Level
from tests.front_door import geo_pretrain
from tests.training.data.labelled.test_own_images import IDS, boxes_json, write_image, write_label


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "own"
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            write_image(root / split / "images" / f"{split}{number}.jpg", number)
            write_label(root / split / "labels" / f"{split}{number}.png", IDS)
    (root / "classes.txt").write_text("0 sky\n1 wall\n2 chair\n3 table\n9 lamp\n")
    return root


def test_everything_that_is_wrong_is_told_at_once(folder, tmp_path):
    labels = folder / "train" / "labels"
    write_label(labels / "train0.png", np.where(IDS == 3, 77, np.where(IDS == 2, 66, IDS)))
    write_label(labels / "train1.png", IDS[:6])
    (folder / "train" / "images" / "train2.jpg").write_bytes(b"no picture")
    (labels / "train3.png").rename(labels / "elsewhere.png")
    out = tmp_path / "check.png"
    ended = geo_pretrain("data", "check", f"folder:{folder}", "--json", "-o", out, expected=1)
    found = json.loads(ended.output)
    assert {path.rpartition("/")[2]: reason.partition(";")[0] for path, reason in found["unusable"].items()} == {
        "train0.png": "label id 66 in 48 pixels",
        "train1.png": "annotation is 16x6, the image 16x12",
        "train2.jpg": "color image cannot be read (cannot identify image file '"
        + str(folder / "train/images/train2.jpg")
        + "')",
    }
    said = {(one["topic"], one["level"], one["text"]) for one in found["findings"]}
    assert ("train files", "wrong", "3 cannot be used (below)") in said
    assert ("train files", "doubtful", "1 without a label file, left out: train/images/train3.jpg") in said
    assert ("train files", "doubtful", "1 label files without an image: train/labels/elsewhere.png") in said
    assert any("Labels that are no class: 66, 77." in text for _, _, text in said)
    assert ("val labels", "doubtful", "never occur: lamp") in said
    assert (found["level"], found["labels"]["val"][0]["class"], found["labels"]["val"][0]["count"]) == (
        "wrong",
        "sky",
        96,
    )
    with Image.open(out) as picture:
        assert picture.height > picture.width / 2  # two images of val
    text = geo_pretrain("data", "check", f"folder:{folder}", "-o", out, expected=1).output
    assert "  " + str(labels / "train1.png") + ": annotation is 16x6" in text
    assert ["0", "sky", "30", "%", "25", "%"] in [line.split() for line in text.splitlines()]


def test_a_folder_that_is_right_and_one_whose_ids_may_count_from_0(folder, tmp_path):
    assert geo_pretrain("data", "check", f"folder:{folder}", "-o", tmp_path / "check.png").code == 0
    geo_pretrain("data", "preview", f"folder:{folder}", "-o", tmp_path / "preview.png")
    assert (tmp_path / "preview.png").is_file()
    (folder / "classes.txt").write_text("sky\nwall\nchair\ntable\n")  # 0 occurs, 4 does not
    report = check_labelled("folder", str(folder), "segmentation", {})
    texts = [finding.text for finding in report.findings if finding.level == Level.WRONG]
    assert (len(texts), "--set data.options.first=0 or =1" in texts[0]) == (1, True)
    assert set(report.tables) == {"train", "val"}  # and the rest is checked all the same
    geo_pretrain("data", "check", f"folder:{folder}", "--set", "data.options.first=0", "-o", tmp_path / "check.png")
    wrong = geo_pretrain("data", "check", f"folder:{folder}", "--set", "first=0", expected=2)
    assert "accepted for labelled data" in wrong.errors


def test_images_in_both_splits_and_missing_splits_are_findings(folder):
    for kind, end in (("images", "jpg"), ("labels", "png")):
        (folder / kind).mkdir()
        for number in range(4):
            shutil.copy(folder / "train" / kind / f"train{number}.{end}", folder / kind)
        shutil.rmtree(folder / "train" / kind)
        shutil.rmtree(folder / "val" / kind)
    (folder / "train.txt").write_text("train0\ntrain1\n")
    (folder / "val.txt").write_text("train1\n")
    report = check_labelled("folder", str(folder), "segmentation", {})
    assert [f.text for f in report.findings if f.topic == "splits"] == ["1 images are in train and in val: train1.jpg"]
    (folder / "val.txt").unlink()
    report = check_labelled("folder", str(folder), "segmentation", {})
    assert any("has train.txt and no val.txt" in f.text for f in report.findings if f.level == Level.WRONG)


def test_boxes_and_clouds_are_checked_too(tmp_path):
    boxes, clouds = tmp_path / "boxes", tmp_path / "clouds"
    boxes.mkdir()
    (boxes / "annotations.json").write_text(json.dumps(boxes_json()))
    for number in range(3):
        write_image(boxes / "images" / f"{number}.jpg")
    report = check_labelled("folder", str(boxes), "detection", {"val_share": 0.25})
    assert list(report.faults) == [str(boxes / "images" / "3.jpg")]
    assert sum(row.count for table in report.tables.values() for row in table.rows) == 8
    for split in ("train", "val"):
        (clouds / split).mkdir(parents=True)
        np.save(clouds / split / "a.npy", [[0, 0, 0, 1], [1, 0, 0, 2]])
    (clouds / "classes.txt").write_text("wall\nchair\n")
    (clouds / "train" / "b.npy").write_bytes(b"no array")
    found = json.loads(geo_pretrain("data", "check", f"clouds:{clouds}", "--json", expected=1).output)
    assert (list(found["unusable"]), found["task"], found["picture"]) == (
        [str(clouds / "train" / "b.npy")], "segmentation3d", None
    )  # fmt: skip
    assert [row["count"] for row in found["labels"]["train"]] == [1, 1]


def test_which_folders_are_labelled_data(folder, tmp_path):
    assert labelled_task("folder", str(folder)) == "segmentation"
    assert labelled_task("folder", str(folder), "detection") == "detection"
    assert labelled_task("coco", "anywhere") == "detection"
    assert labelled_task("folder", str(tmp_path)) is None  # RGB-D in the plain layout, as before
    assert labelled_task("scannet", str(folder)) is None
    assert labelled_task("scannet", str(folder), "segmentation") == "segmentation"
    assert labelled_task("tum", str(folder)) is None


def test_clouds_in_centimeters_are_doubtful(tmp_path):
    points = np.random.default_rng(0).uniform(0, 200, (600, 3))
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / f"{split}.npy", np.column_stack([points, np.arange(600) % 2 + 1]))
    (tmp_path / "classes.txt").write_text("wall\nchair\n")
    found = check_labelled("clouds", str(tmp_path), "segmentation3d", {})
    (train, _) = [one for one in found.findings if one.topic.endswith("units")]
    assert (train.topic, train.level) == ("train units", Level.DOUBTFUL)
    assert train.text.startswith("1 of 1 clouds: hardly any of the 600 points")
    assert "Centimeters: --set data.options.scale=0.01" in train.text
    fine = check_labelled("clouds", str(tmp_path), "segmentation3d", {"scale": 0.01})
    assert [one.level for one in fine.findings] == [Level.OK, Level.OK]
