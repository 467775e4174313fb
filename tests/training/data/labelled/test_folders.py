"""Readers of folders on files in the real layouts: what was written is read back, a break is named with its place."""

from __future__ import annotations

import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from geo_pretrain.errors import BadFrame, DataError, RecipeError, UnknownName
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.data.labelled.scannet import read_scene_list
from tests.labelled_layouts import (
    random_image,
    random_objects,
    save,
    write_cityscapes_image,
    write_kitti_image,
    write_nyuv2_image,
    write_scannet_frame,
    write_sunrgbd_image,
)
from tests.training.data.labelled.twins import (
    CITYSCAPES,
    NYU9,
    NYU13,
    NYU40_20,
    assert_objects,
    mapped,
    objects,
    sample,
)

H, W = 45, 60
NYU9_IDS = [NYU13.index(label) + 1 for label in NYU9]
INDOOR = [0, 1, 2, 3, 5, 7, 13, 14, 16, 39, 40]


def picture(rng, labels, size=(H, W)):
    return random_image(rng, *size), *random_objects(rng, *size, labels)


# ScanNet


@pytest.fixture(scope="module")
def scannet(tmp_path_factory):
    """(folder, {id: (image, label, number)}); read-only. One frame of the second scene shows nothing but a wall."""
    base = tmp_path_factory.mktemp("scannet")
    root, rng, truth = base / "scannet_frames_25k", np.random.default_rng(1), {}
    scenes = {"train": ["scene0001_00", "scene0000_01"], "val": ["scene0007_00"]}
    for split, names in scenes.items():
        (base / f"scannetv2_{split}.txt").write_text("\n".join(names) + "\n")
        for scene in names:
            for frame in (0, 100, 1000):
                image, label, number = picture(rng, INDOOR)
                if (scene, frame) == ("scene0000_01", 100):
                    label[:], number[:] = 1, 1
                write_scannet_frame(root, scene, frame, image, label, number, label_bits=16 if frame else 8)
                truth[f"{scene}/{frame:06d}"] = image, label, number
    return base, truth


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


def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def remove(*names):
    def change(base):
        for name in names:
            shutil.rmtree(base / name) if (base / name).is_dir() else (base / name).unlink()

    return change


S25K = "scannet_frames_25k"


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


# NYUv2


@pytest.fixture(scope="module", params=["val", "test"])
def nyuv2(request, tmp_path_factory):
    root, rng, truth = tmp_path_factory.mktemp("nyuv2"), np.random.default_rng(2), {}
    for split in ("train", request.param):
        for number in (3, 14, 1449) if split == "train" else (1, 2):
            truth[f"{number:04d}"] = picture(rng, list(range(14)))
            write_nyuv2_image(root / split, number, *truth[f"{number:04d}"])
    return root, truth


def test_nyuv2_is_what_was_written(nyuv2):
    root, truth = nyuv2
    for split, names in (("train", ["0003", "0014", "1449"]), ("val", ["0001", "0002"])):
        segmentation = open_labelled("nyuv2", root, split, task="segmentation")
        detection = open_labelled("nyuv2", root, split, task="detection", options={"min_pixels": 60})
        assert segmentation.ids() == detection.ids() == names
        assert list(segmentation.classes) == NYU13
        assert list(detection.classes) == NYU9
        for id in names:
            image, label, number = truth[id]
            read = segmentation.load(id)
            np.testing.assert_array_equal(read.image, image)
            np.testing.assert_array_equal(read.semantic, label)
            expected = objects(label, number, NYU9_IDS, min_pixels=60)
            assert_objects(detection.load(id).instances, expected, (H, W))
        assert segmentation.scene_of(names[0]) == names[0]
    assert sum(len(detection.load(id).instances) for id in detection.ids()) > 3


def test_nyuv2_as_converted_by_the_authors_counts_instance_0(tmp_path):
    label, number = np.full((H, W), 4), np.zeros((H, W), int)
    for name, kind in (("0001", 4), ("0002", 12)):
        write_nyuv2_image(tmp_path / "train", int(name), np.zeros((H, W, 3), np.uint8), label * 0 + kind, number)
    assert len(open_labelled("nyuv2", tmp_path, "train", task="detection").load("0001").instances) == 0
    exact = open_labelled("nyuv2", tmp_path, "train", task="detection", options={"match_released_code": True})
    assert exact.ids() == ["0001"]
    assert exact.load("0001").instances.classes.tolist() == [3]  # chair


def test_nyuv2_says_what_is_missing_where(tmp_path, nyuv2):
    root = copy(nyuv2[0], tmp_path)
    shutil.rmtree(root / "train" / "instance")
    open_labelled("nyuv2", root, "train", task="segmentation")
    with pytest.raises(DataError, match=r"copy.train' has no folder 'instance'. Expected layout: .*new_nyu_class13"):
        open_labelled("nyuv2", root, "train", task="detection")
    for path in (root / "train" / "color").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"No nyu_rgb_\*.png in '.*train.color'"):
        open_labelled("nyuv2", root, "train", task="segmentation")
    shutil.rmtree(root / "train")
    with pytest.raises(DataError, match=r"No folder '.*copy.train'"):
        open_labelled("nyuv2", root, "train", task="segmentation")


def test_nyuv2s_matlab_file_is_not_read_and_the_message_says_what_to_do(tmp_path):
    mat = tmp_path / "nyu_depth_v2_labeled.mat"
    mat.write_bytes(b"MATLAB 7.3 MAT-file")
    for path in (tmp_path, mat):
        with pytest.raises(DataError, match=r"labeled.mat' is NYUv2's labelled file \(HDF5\).*docs/labelled_data.md"):
            open_labelled("nyuv2", path, "train", task="segmentation")
    write_nyuv2_image(tmp_path / "train", 1, *picture(np.random.default_rng(0), [1]))
    assert open_labelled("nyuv2", tmp_path, "train", task="segmentation").ids() == ["0001"]


def test_nyuv2_errors_name_the_file_that_holds_the_value(tmp_path):
    image, label, number = picture(np.random.default_rng(0), [4])
    write_nyuv2_image(tmp_path / "train", 1, image, label * 0 + 14, number)
    write_nyuv2_image(tmp_path / "train", 2, image, label, number)
    save(tmp_path / "train" / "instance" / "0002.png", np.full((H, W), 1000, np.uint16))
    write_nyuv2_image(tmp_path / "train", 3, image, label, number)
    save(tmp_path / "train" / "label" / "new_nyu_class13_0003.png", np.ones((W, H), np.uint8))
    source = open_labelled("nyuv2", tmp_path, "train", task="detection")
    for id, path, reason in (
        ("0001", "label/new_nyu_class13_0001.png", "has label 14; label map nyu9 accepts 0 to 13"),
        ("0002", "instance/0002.png", "instance number 1000, accepted are 0 to 999"),
        ("0003", "label/new_nyu_class13_0003.png", f"annotation is {H}x{W}, the image {W}x{H}"),
    ):
        with pytest.raises(BadFrame) as error:
            source.load(id)
        assert error.value.path == str(tmp_path / "train" / path)
        assert error.value.reason.endswith(reason)


# Cityscapes, KITTI, SUN RGB-D


def test_cityscapes_is_what_was_written(tmp_path):
    rng, truth = np.random.default_rng(3), {}
    for split, names in (
        ("train", ["zurich_000001_000019", "aachen_000000_000019"]),
        ("val", ["lindau_000000_000019"]),
    ):
        for name in names:
            image, label, _ = truth[name] = picture(rng, list(range(34)))
            write_cityscapes_image(tmp_path, split, name, image, label)
    train, val = (open_labelled("cityscapes", tmp_path, split, task="segmentation") for split in ("train", "val"))
    assert train.ids() == ["aachen_000000_000019", "zurich_000001_000019"]
    assert val.ids() == ["lindau_000000_000019"]
    assert [train.scene_of(id) for id in train.ids()] == ["aachen", "zurich"]
    for source in (train, val):
        for id in source.ids():
            read = source.load(id)
            np.testing.assert_array_equal(read.image, truth[id][0])
            np.testing.assert_array_equal(read.semantic, mapped(truth[id][1], CITYSCAPES))
    with pytest.raises(UnknownName, match="Unknown split 'test'"):
        open_labelled("cityscapes", tmp_path, "test", task="segmentation")
    (tmp_path / "gtFine").rename(tmp_path / "gtCoarse")
    with pytest.raises(DataError, match=r"has no folder 'gtFine/train'. Expected layout: leftImg8bit"):
        open_labelled("cityscapes", tmp_path, "train", task="segmentation")


@pytest.mark.parametrize("as_authors", [False, True])
def test_kitti_validates_on_the_first_40_by_name(tmp_path, as_authors):
    rng, truth = np.random.default_rng(4), {}
    for number in np.random.default_rng(0).permutation(43):
        name = f"{number:06d}_10"
        image, label, _ = truth[name] = picture(rng, list(range(34)), (16, 24))
        write_kitti_image(tmp_path, name, image, label)
    root = tmp_path / "training" if as_authors else tmp_path
    train, val = (open_labelled("kitti", root, split, task="segmentation") for split in ("train", "val"))
    assert val.ids() == [f"{number:06d}_10" for number in range(40)]
    assert train.ids() == [f"{number:06d}_10" for number in range(40, 43)]
    for source in (train, val):
        for id in source.ids()[:3]:
            np.testing.assert_array_equal(source.load(id).image, truth[id][0])
            np.testing.assert_array_equal(source.load(id).semantic, mapped(truth[id][1], CITYSCAPES))
    for path in list((tmp_path / "training" / "image_2").iterdir())[:3]:
        path.unlink()
    with pytest.raises(DataError, match=r"40 images in '.*image_2': the first 40 are for validation"):
        open_labelled("kitti", root, "train", task="segmentation")
    shutil.rmtree(tmp_path / "training" / "semantic")
    with pytest.raises(DataError, match=r"has no folder 'semantic'. Expected layout: training/"):
        open_labelled("kitti", root, "train", task="segmentation")


@pytest.mark.parametrize("dash", ["_", "-"])
@pytest.mark.parametrize("folders", [False, True])
def test_sunrgbd_is_what_was_written(tmp_path, folders, dash):
    rng, truth = np.random.default_rng(5), {}
    for number, split in ((1, "test"), (5050, "test"), (5051, "train"), (10335, "train")):
        image, label, _ = truth[f"{number:06d}"] = picture(rng, [*range(37), 255])
        write_sunrgbd_image(tmp_path, number, image, label, split if folders else "")
    (tmp_path / "semseg_label37").rename(tmp_path / f"semseg{dash}label37")
    train, val = (open_labelled("sunrgbd", tmp_path, split, task="segmentation") for split in ("train", "val"))
    assert train.ids() == ["005051", "010335"]
    assert val.ids() == ["000001", "005050"]
    for source in (train, val):
        for id in source.ids():
            label = truth[id][1]
            np.testing.assert_array_equal(source.load(id).semantic, np.where(label == 255, 0, label + 1))
    assert len(train.classes) == 37


def test_folders_of_splits_decide_before_the_numbers(tmp_path):
    image, label, _ = picture(np.random.default_rng(0), [1])
    write_sunrgbd_image(tmp_path, 7, image, label, "train")
    write_sunrgbd_image(tmp_path, 9000, image, label, "val")
    assert open_labelled("sunrgbd", tmp_path, "train", task="segmentation").ids() == ["000007"]
    assert open_labelled("sunrgbd", tmp_path, "val", task="segmentation").ids() == ["009000"]


def test_sunrgbd_says_what_is_missing_where(tmp_path):
    image, label, _ = picture(np.random.default_rng(0), [1])
    write_sunrgbd_image(tmp_path, 7, image, label)
    with pytest.raises(DataError, match=r"No image of split 'train' in '.*image': those are img-5051 to 10335"):
        open_labelled("sunrgbd", tmp_path, "train", task="segmentation")
    (tmp_path / "image" / "img-7a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"img-7a.jpg': the name has no number"):
        open_labelled("sunrgbd", tmp_path, "val", task="segmentation")
    (tmp_path / "image" / "train").mkdir()
    with pytest.raises(DataError, match="has no folder 'image/test', 'semseg_label37/test'"):
        open_labelled("sunrgbd", tmp_path, "val", task="segmentation")
    shutil.rmtree(tmp_path / "semseg_label37")
    with pytest.raises(DataError, match="has no folder 'semseg_label37'"):
        open_labelled("sunrgbd", tmp_path, "val", task="segmentation")


def test_real_labels_of_sunrgbd():
    root = sample("sunrgbd_labelled")
    source = open_labelled("sunrgbd", root, "val", task="segmentation")
    assert source.ids() == ["000001"]
    read = source.load("000001")
    raw = np.asarray(Image.open(root / "semseg_label37" / "00000001.png"))
    assert read.image.shape == (530, 730, 3)
    assert (read.semantic == 0).sum() == (raw == 255).sum() > 0
    np.testing.assert_array_equal(read.semantic[raw != 255], raw[raw != 255] + 1)
    present = {source.classes[label - 1] for label in np.unique(read.semantic) if label}
    assert {"wall", "floor", "chair", "lamp", "bag"} <= present


# All of them


def test_a_fingerprint_changes_with_any_file_the_split_and_the_rule(tmp_path, scannet):
    base = copy(scannet[0], tmp_path)

    def digest(split="train", task="detection", **options):
        return open_labelled("scannet", base, split, task=task, options=options).fingerprint()

    seen = [digest(), digest("val"), digest(task="segmentation"), digest(min_pixels=5), digest(drop_empty=True)]
    seen.append(digest(match_released_code=True))
    assert digest() == seen[0]
    for name in ("instance/000100.png", "color/000100.jpg"):
        path = base / S25K / "scene0001_00" / name
        path.write_bytes(path.read_bytes() + b"\0")
        seen.append(digest())
        path.unlink()
        seen.append(digest())
    assert len(set(seen)) == len(seen)


def test_a_source_travels_to_worker_processes(scannet):
    options = {"drop_empty": True, "min_pixels": 100}
    source = open_labelled("scannet", scannet[0], "train", task="detection", options=options)
    again = pickle.loads(pickle.dumps(source))
    assert again.ids() == source.ids()
    assert again.load(source.ids()[0]).instances.boxes.tolist() == source.load(source.ids()[0]).instances.boxes.tolist()


def test_an_unknown_image_names_the_nearest(scannet):
    with pytest.raises(UnknownName, match=r"Unknown image 'scene0001_00/000101'. Closest: 'scene0001_00/0001"):
        open_labelled("scannet", scannet[0], "train", task="detection").load("scene0001_00/000101")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"min_pixel": 3}, "unknown key 'data.options.min_pixel'. Closest: 'data.options.min_pixels'"),
        ({"min_pixels": 0}, "min_pixels=0 is out of range"),
        ({"match_released_code": 1}, "'data.options.match_released_code' is 1"),
    ],
)
def test_wrong_options_are_named(scannet, options, reason):
    with pytest.raises(RecipeError, match=reason):
        open_labelled("scannet", scannet[0], "train", task="detection", options=options)


def test_a_split_without_any_object_is_an_error(scannet):
    options = {"drop_empty": True, "min_pixels": H * W}
    source = open_labelled("scannet", scannet[0], "train", task="detection", options=options)
    with pytest.raises(
        DataError, match=f"None of 6 images of 'scannet', split 'train', has an object of at least {H * W}"
    ):
        source.ids()
