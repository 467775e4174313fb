"""ScanNet's labelled frames: what is read is what was written; what is missing or broken is named."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.data.labelled.scannet import read_scene_list
from tests.labelled_layouts import (
    save,
    write_scannet_frame,
)
from tests.training.data.labelled.layouts import S25K, H, W, copy, remove
from tests.training.data.labelled.twins import (
    NYU40_20,
    assert_objects,
    mapped,
    objects,
)


@pytest.mark.parametrize("inside", [False, True])
def test_scannet_segmentation_is_what_was_written(scannet, inside):
    base, truth = scannet
    source = open_labelled("scannet", base / "scannet_frames_25k" if inside else base, "train", task="segmentation")
    frames = ["000000", "000100", "001000"]
    assert source.ids() == [f"{scene}/{frame}" for scene in ("scene0001_00", "scene0000_01") for frame in frames]
    assert (source.name, source.split, len(source.classes)) == ("scannet", "train", 20)
    for id in source.ids():
        image, label, _ = truth[id]
        read = source.load(id)
        assert read.id == id
        assert read.instances is None
        assert read.image.dtype == np.uint8
        assert np.abs(read.image.astype(int) - image).max() < 12  # JPEG
        np.testing.assert_array_equal(read.semantic, mapped(label, NYU40_20))
        assert read.semantic.dtype == np.uint8
        assert source.scene_of(id) == id.split("/")[0]
    assert source.file_name(id) == "scene0000_01/color/001000.jpg"


def test_scannet_splits_share_no_scene(scannet):
    train, val = (open_labelled("scannet", scannet[0], split, task="segmentation") for split in ("train", "val"))
    assert {val.scene_of(id) for id in val.ids()} == {"scene0007_00"}
    assert not set(train.ids()) & set(val.ids())


def test_scannet_objects_are_what_was_written(scannet):
    base, truth = scannet
    source = open_labelled("scannet", base, "train", task="detection", options={"min_pixels": 100})
    assert source.classes[0] == "cabinet"
    assert len(source.classes) == 18
    sizes = []
    for id in source.ids():
        _, label, number = truth[id]
        read = source.load(id)
        assert read.semantic is None
        assert_objects(read.instances, objects(label, number, NYU40_20[2:], min_pixels=100), (H, W))
        sizes.append(len(read.instances))
    assert sizes[source.ids().index("scene0000_01/000100")] == 0  # kept by default
    assert sum(sizes) > 5


def test_the_published_minimum_of_1000_pixels_is_the_default(scannet):
    base, truth = scannet
    source = open_labelled("scannet", base, "train", task="detection")
    for id in source.ids():
        _, label, number = truth[id]
        assert len(source.load(id).instances) == len(objects(label, number, NYU40_20[2:], min_pixels=1000))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("options, unnumbered", [({"drop_empty": True}, False), ({"match_released_code": True}, True)])
def test_images_without_objects_are_dropped_on_demand_from_validation_too(tmp_path, split, options, unnumbered):
    """Frame 0 shows a chair, 1 a wall, 2 a chair that is no object (instance 0), 3 one of too few pixels."""
    (tmp_path / f"scannetv2_{split}.txt").write_text("scene0000_00\nscene0001_00")
    image = np.zeros((H, W, 3), np.uint8)
    for scene, frame, label, number, size in (
        ("scene0000_00", 0, 5, 1, 30),
        ("scene0000_00", 1, 1, 1, 30),
        ("scene0000_00", 2, 5, 0, 30),
        ("scene0000_00", 3, 5, 1, 5),
        ("scene0001_00", 4, 1, 1, 30),
    ):
        labels = np.zeros((H, W), int)
        labels[:size, :40] = label
        write_scannet_frame(tmp_path, scene, frame, image, labels, number * (labels > 0))
    source = open_labelled("scannet", tmp_path, split, task="detection", options=options)
    wanted = ["000000", *(["000002"] if unnumbered else [])]
    assert source.ids() == [f"scene0000_00/{frame}" for frame in wanted]
    assert [len(source.load(id).instances) for id in source.ids()] == [1] * len(wanted)
    assert source.scenes() == ["scene0000_00", "scene0001_00"]
    assert len(open_labelled("scannet", tmp_path, split, task="detection").ids()) == 5


def test_a_broken_label_file_is_not_dropped_with_the_empty_ones(tmp_path, scannet):
    base = copy(scannet[0], tmp_path)
    path = base / "scannet_frames_25k/scene0001_00/instance/000100.png"
    path.write_bytes(b"broken")
    source = open_labelled("scannet", base, "train", task="detection", options={"drop_empty": True})
    with pytest.raises(BadFrame, match="not a PNG") as error:
        source.load("scene0001_00/000100")
    assert error.value.path == str(path)
    assert "scene0001_00/000100" in source.ids()


@pytest.mark.parametrize(
    "change, reason",
    [
        (remove(f"{S25K}/scene0001_00"), r"lacks 1 of the 2 scenes of '.*scannetv2_train.txt': scene0001_00"),
        (remove(f"{S25K}/scene0000_01/label"), r"No folder 'label' in 1 of 2 scenes of '.*25k': scene0000_01"),
        (remove(f"{S25K}/scene0000_01/color", f"{S25K}/scene0001_00/color"), r"No folder 'color' in 2 of 2 scenes"),
        (remove("scannetv2_train.txt"), r"No list of scenes 'scannetv2_train.txt' in '.*copy' or '.*25k'.*split_file"),
        (lambda base: (base / "scannetv2_train.txt").write_text("\n"), "list of scenes is empty"),
        (lambda base: (base / "scannetv2_train.txt").write_text("a\nb\na\n"), "train.txt': a more than once"),
        (remove(S25K), r"lacks 2 of the 2 scenes"),
    ],
)
def test_scannet_says_what_is_missing_where(tmp_path, scannet, change, reason):
    base = copy(scannet[0], tmp_path)
    change(base)
    with pytest.raises(DataError, match=reason):
        open_labelled("scannet", base, "train", task="segmentation")


def test_scannet_without_instances_still_segments(tmp_path, scannet):
    base = copy(scannet[0], tmp_path)
    for scene in ("scene0000_01", "scene0001_00"):
        shutil.rmtree(base / S25K / scene / "instance")
    assert len(open_labelled("scannet", base, "train", task="segmentation").ids()) == 6
    with pytest.raises(DataError, match="No folder 'instance' in 2 of 2 scenes"):
        open_labelled("scannet", base, "train", task="detection")


def test_a_list_of_ones_own_is_a_split(tmp_path, scannet):
    mine = tmp_path / "mine.txt"
    mine.write_text("scene0007_00\r\nscene0000_01\r\n")
    source = open_labelled("scannet", scannet[0], "train", task="segmentation", options={"split_file": str(mine)})
    assert list(dict.fromkeys(map(source.scene_of, source.ids()))) == ["scene0007_00", "scene0000_01"]


def test_official_lists_are_found_by_their_share(tmp_path):
    for percent, names in ((1, "a"), (20, "a b"), (40, "a b c")):
        (tmp_path / f"scannetv2_train_{percent}.txt").write_text(names.replace(" ", "\n"))
    assert read_scene_list(tmp_path, 0.2) == ["a", "b"]
    assert read_scene_list(tmp_path, 0.01) == ["a"]
    assert read_scene_list(tmp_path / "scannetv2_train_40.txt", 0.2) == ["a", "b", "c"]
    there = "scannetv2_train_1.txt, scannetv2_train_20.txt, scannetv2_train_40.txt"
    with pytest.raises(DataError, match=f"No list 'scannetv2_train_5.txt' in .*; there are: {there}"):
        read_scene_list(tmp_path, 0.05)
    with pytest.raises(DataError, match=f"is a folder; name one of its lists: {there}"):
        read_scene_list(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_scene_list(tmp_path / "none.txt")


def test_lists_of_released_code_name_files(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("train/scene0191_00.ply\nscene0191_01.pth\nArea_1/office_8.ply\nArea_1/office_9\na/b.c")
    assert read_scene_list(path) == ["scene0191_00", "scene0191_01", "Area_1/office_8", "Area_1/office_9", "a/b.c"]


def write_label(array, kind="label"):
    def change(base):
        save(base / S25K / "scene0001_00" / kind / "000100.png", array)

    return change


@pytest.mark.parametrize(
    "task, change, file, reason",
    [
        ("segmentation", write_label(np.full((H, W), 41, np.uint8)), "label", f"label id 41 in {H * W} pixels"),
        ("segmentation", write_label(np.ones((W, H), np.uint8)), "label", f"annotation is {H}x{W}, the image {W}x{H}"),
        ("segmentation", remove(f"{S25K}/scene0001_00/label/000100.png"), "label", "annotation is missing"),
        ("segmentation", remove(f"{S25K}/scene0001_00/color/000100.jpg"), "color", "color image is missing"),
        (
            "detection",
            write_label(np.zeros((H, W), np.uint8), "instance"),
            "instance",
            "8-bit gray, expected 16-bit ids",
        ),
        (
            "detection",
            write_label(np.full((H, W), 50001, np.uint16), "instance"),
            "instance",
            "instance id 50001 has label 50; label map scannet18 accepts 0 to 40",
        ),
        ("detection", remove(f"{S25K}/scene0001_00/instance/000100.png"), "instance", "annotation is missing"),
        ("detection", write_label(np.ones((H, 5), np.uint16), "instance"), "instance", f"annotation is 5x{H}"),
    ],
)
def test_a_bad_file_of_scannet_is_named_with_its_value(tmp_path, scannet, task, change, file, reason):
    base = copy(scannet[0], tmp_path)
    source = open_labelled("scannet", base, "train", task=task)
    change(base)
    with pytest.raises(BadFrame) as error:
        source.load("scene0001_00/000100")
    assert os.path.relpath(error.value.path, base / S25K / "scene0001_00").startswith(f"{file}/000100.")
    assert error.value.reason.startswith(reason)
    source.load("scene0001_00/000000")
