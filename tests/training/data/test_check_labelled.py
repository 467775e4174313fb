"""The check of labelled data: all that is wrong at once, shares of classes, a picture; which folders are labelled."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from geo_pretrain.training.data.check.labelled import check_labelled, labelled_task
from geo_pretrain.training.data.check.report import Level
from geo_pretrain.training.visualize.colors import class_colors
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
        "train2.jpg": "color image cannot be read (cannot identify image file)",
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


def test_files_with_one_fault_are_one_line(folder, tmp_path):
    for number in range(4):
        write_label(folder / "train" / "labels" / f"train{number}.png", np.where(number == IDS, 77, IDS))
        (folder / "val" / "images" / f"val{number}.jpg").write_bytes(b"no picture")
        write_label(folder / "val" / "labels" / f"val{number}.png", IDS)
    ended = geo_pretrain("data", "check", f"folder:{folder}", "-o", tmp_path / "check.png", expected=1)
    lines = [line for line in ended.output.splitlines() if (line.startswith("  ") and ".png" in line) or ".jpg" in line]
    train, val = (str(folder / split) for split in ("train", "val"))
    first = ", ".join(f"{train}/labels/train{number}.png" for number in range(3))
    assert len(lines) == 2, lines
    assert lines[0].startswith("  4 files: label id 77; ")
    assert lines[0].endswith(f"--set data.options.ignore=[77]: {first} and 1 more")
    assert lines[1].startswith(f"  4 files: color image cannot be read (cannot identify image file): {val}/images/val0")
    assert "--set data.options.ignore=[77]," in ended.output


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
    out = tmp_path / "check.png"
    found = json.loads(geo_pretrain("data", "check", f"clouds:{clouds}", "--json", "-o", out, expected=1).output)
    assert (list(found["unusable"]), found["task"], found["picture"]) == (
        [str(clouds / "train" / "b.npy")], "segmentation3d", str(out)
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


def write_clouds(root, clouds):
    """Clouds by split and name: [N, 6] and labels 1, 2 in turn."""
    for name, cloud in clouds.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.column_stack([cloud, np.arange(len(cloud)) % 2 + 1]))
    (root / "classes.txt").write_text("wall\nchair\n")


def cloud(scale=1.0, brightest=255.0, count=600):
    generator = np.random.default_rng(0)
    colors = generator.uniform(0, brightest, (count, 3 if brightest else 0))
    return np.column_stack([generator.uniform(0, 2, (count, 3)) * scale, colors])


def said(root, options={}):  # noqa: B006
    found = check_labelled("clouds", str(root), "segmentation3d", options)
    return {one.topic: (one.level, one.text) for one in found.findings}


def test_clouds_that_are_all_not_in_meters_are_wrong_until_their_unit_is_stated(tmp_path):
    write_clouds(tmp_path, {"train/a.npy": cloud(100), "val/b.npy": cloud(100)})
    level, text = said(tmp_path)["train units"]
    assert level == Level.WRONG
    assert text.startswith("1 of 1 clouds: hardly any of the 600 points")
    assert "Centimeters: --set data.options.scale=0.01" in text
    assert said(tmp_path, {"scale": 1})["train units"][0] == Level.DOUBTFUL
    fine = said(tmp_path, {"scale": 0.01})
    assert {topic: level for topic, (level, _) in fine.items()} == dict.fromkeys(
        ["train", "train colors", "val", "val colors"], Level.OK
    )
    assert fine["train"][1] == "1 clouds of 600 points, 2 m wide"


def test_clouds_of_another_unit_than_the_rest_are_named(tmp_path):
    clouds = {f"train/{name}.npy": cloud(scale) for name, scale in (("a", 1), ("b", 1000), ("c", 1))}
    write_clouds(tmp_path, clouds | {"val/d.npy": cloud()})
    found = said(tmp_path)
    level, text = found["train units"]
    assert level == Level.DOUBTFUL
    assert text.startswith("1 of 3 clouds have another unit than the rest, or other spacing: train/b. ")
    assert "millimeters: times 0.001" in text
    assert "--set" not in text  # which would change all files
    assert found["train"][1] == "3 clouds of 600 points, 2 to 2000 m wide"
    assert "val units" not in found


@pytest.mark.parametrize(
    ("brightest", "level", "text"),
    [
        ([255, 1, 65535 / 257], Level.OK, "in all, from 0 to 255 or brought there"),
        ([255, 0, 255], Level.DOUBTFUL, "1 of 3 clouds have none, and are left out of training with colors: train/1"),
        ([0, 0, 0], Level.UNKNOWN, "none. Fields of another name: --set data.options.color=NAME. Without any, "),
        ([255, 1.4, 255], Level.DOUBTFUL, "1 of 3 clouds are black: train/1. Accepted: whole numbers to 255"),
    ],
)
def test_colors_of_clouds_are_told(tmp_path, brightest, level, text):
    clouds = {f"train/{number}.npy": cloud(brightest=value) for number, value in enumerate(brightest)}
    write_clouds(tmp_path, clouds | {"val/d.npy": cloud()})
    found = said(tmp_path)["train colors"]
    assert found[0] == level
    assert found[1].startswith(text)


@pytest.mark.parametrize(
    ("strongest", "level", "text"),
    [
        ([0.5, 1.0], Level.OK, "in all; the strongest of each cloud 0.5 to 1 of 1"),
        ([0.5, None], Level.DOUBTFUL, "1 of 2 clouds have none: train/1"),
        ([0.001, 0.004], Level.DOUBTFUL, "at most 0.004 of 1 in any cloud. Are they divided by too much? --set data."),
    ],
)
def test_intensities_of_clouds_are_told(tmp_path, strongest, level, text):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    (tmp_path / "classes.txt").write_text("wall\n")
    points = np.random.default_rng(0).uniform(0, 2, (600, 3))
    plain = {"points": points, "label": np.ones(600, np.int64)}
    np.savez(tmp_path / "val" / "a.npz", **plain)
    for number, value in enumerate(strongest):
        own = {} if value is None else {"intensity": np.linspace(0, value, 600, dtype=np.float32)}
        np.savez(tmp_path / "train" / f"{number}.npz", **plain, **own)
    found = said(tmp_path)
    assert found["train intensities"][0] == level
    assert found["train intensities"][1].startswith(text)
    assert "val intensities" not in found


def test_the_unit_of_clouds_with_labels_of_no_class_is_told_too(tmp_path):
    write_clouds(tmp_path, {"train/a.npy": cloud(100), "val/b.npy": cloud()})
    (tmp_path / "classes.txt").write_text("wall\n")
    found = said(tmp_path)
    assert found["train"] == (Level.WRONG, "none of 1 can be read: clouds of 600 points, 200 m wide")
    assert found["train units"][0] == Level.WRONG
    assert found["train files"] == (Level.WRONG, "1 cannot be used (below)")


def test_clouds_that_are_not_read_are_told_and_the_others_drawn(tmp_path):
    write_clouds(tmp_path / "own", {"train/a.npy": cloud(), "val/b.npy": cloud()})
    (tmp_path / "own" / "train" / "scan.csv").write_text("x,y,z\n1,2,3\n")
    out = tmp_path / "check.png"
    words = ["data", "check", f"clouds:{tmp_path / 'own'}", "-o", out]
    text = geo_pretrain(*words).output
    assert "train files: doubtful 1 are not read: scan.csv. Columns of numbers: numpy.save(" in text
    assert "delimiter=',', skiprows=1" in text
    assert f"Wrote {out}" in text
    with Image.open(out) as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
    assert {tuple(int(v) for v in color) for color in class_colors(np.array([1, 2]))} < colors
    for path in (tmp_path / "own").glob("*/*.npy"):
        path.write_bytes(b"broken")
    assert "No picture: nothing with labels could be read." in geo_pretrain(*words, expected=1).output
