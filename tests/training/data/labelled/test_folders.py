"""Readers of folders on files in the real layouts: what was written is read back, a break is named with its place."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from geo_pretrain.errors import BadFrame, DataError, RecipeError, UnknownName
from geo_pretrain.training.data.labelled.registry import open_labelled
from tests.labelled_layouts import (
    save,
    write_ade20k_image,
    write_cityscapes_image,
    write_kitti_image,
    write_nyuv2_image,
    write_sunrgbd_image,
)
from tests.training.data.labelled.layouts import NYU9_IDS, S25K, H, W, copy, picture
from tests.training.data.labelled.twins import (
    CITYSCAPES,
    NYU9,
    NYU13,
    assert_objects,
    mapped,
    objects,
    sample,
)

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


def test_ade20k_is_what_was_written(tmp_path):
    rng, truth = np.random.default_rng(5), {}
    for split, numbers in (("train", (1, 2, 20210)), ("val", (1, 2000))):
        for number in numbers:
            image, label, _ = truth[split, number] = picture(rng, list(range(151)), (40 + number % 3, 56))
            write_ade20k_image(tmp_path, split, number, image, label)
    for root in (tmp_path, tmp_path / "ADEChallengeData2016"):
        train, val = (open_labelled("ade20k", root, split, task="segmentation") for split in ("train", "val"))
        assert train.ids() == ["ADE_train_00000001", "ADE_train_00000002", "ADE_train_00020210"]
        assert val.ids() == ["ADE_val_00000001", "ADE_val_00002000"]
    assert (len(val.classes), val.classes[0], val.classes[149]) == (150, "wall", "flag")
    for source in (train, val):
        for id in source.ids():
            read, (image, label, _) = source.load(id), truth[source.split, int(id[-8:])]
            assert np.abs(read.image.astype(int) - image).mean() < 4  # JPEG
            np.testing.assert_array_equal(read.semantic, label)
    write_ade20k_image(tmp_path, "val", 3, image, np.full(image.shape[:2], 151))
    with pytest.raises(BadFrame, match=r"ADE_val_00000003.png: label id 151 in 2352 pixels; .* accepts 0 to 150"):
        open_labelled("ade20k", tmp_path, "val", task="segmentation").load("ADE_val_00000003")


def test_ade20k_says_what_is_missing_and_what_the_full_set_is(tmp_path):
    folder = tmp_path / "images" / "training" / "a" / "airport_terminal"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match=r"is the full ADE20K \(folders of scene categories\), which is not read"):
        open_labelled("ade20k", tmp_path, "train", task="segmentation")
    (tmp_path / "index_ade20k.mat").touch()
    with pytest.raises(DataError, match=r"is the full ADE20K \(index_ade20k.mat\).*ADEChallengeData2016.zip"):
        open_labelled("ade20k", tmp_path, "train", task="segmentation")
    write_ade20k_image(tmp_path, "train", 1, *picture(np.random.default_rng(0), [1])[:2])
    with pytest.raises(DataError, match=r"no folder 'images/validation', 'annotations/validation'. Expected layout"):
        open_labelled("ade20k", tmp_path, "val", task="segmentation")


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
        ({"min_pixels": 0}, "'data.options.min_pixels' is 0, accepted is a whole number from 1 up"),
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
