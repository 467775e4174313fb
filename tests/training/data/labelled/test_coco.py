"""COCO's format against pycocotools' own reader, on real annotations and on written ones."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO

from geo_pretrain.errors import BadFrame, DataError, MissingDependency, UnknownName
from geo_pretrain.training.data.labelled.coco import text_lengths
from geo_pretrain.training.data.labelled.registry import open_labelled
from tests.labelled_layouts import random_image, run_lengths, write_coco_files
from tests.training.data.labelled.twins import sample

CATEGORIES = [(90, "toothbrush"), (1, "person"), (44, "bottle")]  # neither contiguous nor in order


def blob(rng, shape):
    mask = np.zeros(shape, np.uint8)
    top, left = rng.integers(0, shape[0] - 6), rng.integers(0, shape[1] - 6)
    mask[top : top + 5, left : left + 4] = 1
    mask[top, left] = 0
    return mask


@pytest.fixture
def written(tmp_path):
    """(folder, images, {annotation id: mask or None for polygons}); an image of each shape, one of them empty."""
    rng = np.random.default_rng(0)
    images = {7: random_image(rng, 30, 40), 21: random_image(rng, 40, 30), 1000: random_image(rng, 32, 32)}
    runs, text = blob(rng, (30, 40)), blob(rng, (40, 30))
    encoded = masks.encode(np.asfortranarray(text))
    annotations = [
        {"id": 5, "image_id": 21, "category_id": 44, "iscrowd": 0, "bbox": [2.5, 3.25, 10.0, 20.5], "area": 1}
        | {"segmentation": [[2.5, 3.25, 12.5, 3.25, 12.5, 23.75], [20, 30, 28, 30, 28, 38, 20, 38]]},
        {"id": 6, "image_id": 7, "category_id": 90, "iscrowd": 1, "bbox": [0, 0, 40, 30], "area": 1}
        | {"segmentation": {"size": [30, 40], "counts": run_lengths(runs)}},
        {"id": 9, "image_id": 21, "category_id": 1, "iscrowd": 0, "bbox": [-3, 35, 50, 50], "area": 1}
        | {"segmentation": {"size": [40, 30], "counts": encoded["counts"].decode()}},
        {"id": 11, "image_id": 21, "category_id": 1, "iscrowd": 0, "bbox": [4, 4, 0, 3], "area": 0}
        | {"segmentation": [[4, 4, 4, 7, 4, 5]]},
    ]
    write_coco_files(tmp_path, "val2017", images, annotations, CATEGORIES)
    return tmp_path, images, {6: runs, 9: text}


def test_objects_are_what_was_written(written):
    root, images, shapes = written
    source = open_labelled("coco", root, "val2017", task="detection")
    assert source.ids() == ["7", "21", "1000"]
    assert source.classes == ("person", "bottle", "toothbrush")
    assert source.scene_of("21") == "21"
    assert source.file_name("21") == "000000000021.jpg"
    first, second, empty = map(source.load, source.ids())
    assert first.semantic is None
    assert np.abs(first.image.astype(int) - images[7]).max() < 12
    assert first.instances.classes.tolist() == [3]
    assert first.instances.crowd.tolist() == [True]
    np.testing.assert_array_equal(first.instances.masks, [shapes[6]])
    assert second.image.shape == (40, 30, 3)  # portrait
    assert second.instances.classes.tolist() == [2, 1]  # the one without area is left out
    assert second.instances.boxes.tolist() == [[2.5, 3.25, 12.5, 23.75], [0, 35, 30, 40]]  # cut to the image
    assert second.instances.crowd.tolist() == [False, False]
    np.testing.assert_array_equal(second.instances.masks[1], shapes[9])
    union = second.instances.masks[0]
    assert union[5, 10]  # the triangle
    assert union[35, 25]  # the square
    assert not union[20, 4]
    assert not union[28, 20]
    assert (len(empty.instances), empty.instances.masks.shape) == (0, (0, 32, 32))
    for image in (first, second, empty):
        found = image.instances
        types = [found.boxes.dtype, found.classes.dtype, found.masks.dtype, found.crowd.dtype]
        assert types == [np.float32, np.int64, np.bool_, np.bool_]


def test_masks_are_those_of_pycocotools(written, capsys):
    root, _, _ = written
    assert_like_pycocotools(root, "val2017", "val2017", 3)


def assert_like_pycocotools(root, split, file, least):
    theirs = COCO(str(root / "annotations" / f"instances_{file}.json"))
    source = open_labelled("coco", root, split, task="detection")
    numbers = sorted(theirs.getCatIds())
    assert list(source.classes) == [theirs.cats[number]["name"] for number in numbers]
    count = 0
    for id in source.ids():
        found = source.load(id).instances
        annotations = [a for a in theirs.loadAnns(theirs.getAnnIds(int(id))) if a["bbox"][2] and a["bbox"][3]]
        assert len(found) == len(annotations)
        for k, annotation in enumerate(annotations):
            np.testing.assert_array_equal(found.masks[k], theirs.annToMask(annotation))
            assert numbers[found.classes[k] - 1] == annotation["category_id"]
            assert found.crowd[k] == annotation["iscrowd"]
            x, y, w, h = annotation["bbox"]
            shape = found.masks[k].shape
            cut = [max(x, 0), max(y, 0), min(x + w, shape[1]), min(y + h, shape[0])]
            np.testing.assert_allclose(found.boxes[k], cut, atol=1e-4)
            count += 1
    assert count >= least


@pytest.mark.parametrize("split", ["val", "val2017"])
def test_real_annotations_are_read_as_pycocotools_reads_them(split, capsys):
    root = sample("coco")
    assert_like_pycocotools(root, split, "val2017", 47)
    source = open_labelled("coco", root, split, task="detection")
    assert len(source.classes) == 80
    assert source.load("168974").image.shape == (500, 375, 3)  # portrait
    crowd = source.load("357888").instances
    assert crowd.crowd.sum() == 1
    assert source.classes[crowd.classes[crowd.crowd][0] - 1] == "bottle"
    assert crowd.masks[crowd.crowd].sum() == 914  # what the annotation says its area is


def change_json(root, change):
    path = root / "annotations" / "instances_val2017.json"
    tree = json.loads(path.read_text())
    tree = change(tree) or tree
    path.write_text(json.dumps(tree))


def annotate(**changes):
    """Change annotation 5 of image 21."""

    def change(tree):
        tree["annotations"][0].update(changes)

    return change


@pytest.mark.parametrize(
    "change, reason",
    [
        (annotate(category_id=2), "annotation 5 has category_id 2; categories have 1, 44, 90"),
        (annotate(image_id=8), "annotation 5 has image_id 8; no image of the file has it"),
        (lambda tree: tree["annotations"][0].pop("category_id"), r"annotations\[0\] has no 'category_id'"),
        (lambda tree: tree["images"][1].pop("file_name"), r"images\[1\] has no 'file_name'"),
        (lambda tree: tree["images"][1].update(id="a"), r"images\[1\] has 'id' 'a', a wrong type"),
        (lambda tree: tree["images"][2].update(file_name=None), r"images\[2\] has 'file_name' None, a wrong type"),
        (lambda tree: tree.pop("categories") and None, "no list 'categories'"),
        (lambda tree: [tree], "no list 'images'"),
        (lambda tree: tree["images"].append(tree["images"][0]), "4 images with 3 ids"),
        (lambda tree: tree["categories"].append({"id": 1, "name": "x"}), r"category ids are \[1, 1, 44, 90\]"),
        (lambda tree: tree | {"categories": [], "annotations": []}, r"category ids are \[\]"),
        (lambda tree: tree["images"][0].update(file_name="x.jpg"), "No image 'x.jpg' of .* in '.*val2017', "),
    ],
)
def test_a_wrong_annotation_file_is_refused_as_a_whole(written, change, reason):
    change_json(written[0], lambda tree: result if isinstance(result := change(tree), dict | list) else None)
    with pytest.raises(DataError, match=reason) as error:
        open_labelled("coco", written[0], "val2017", task="detection")
    assert "instances_val2017.json" in str(error.value)


def text(counts):
    """Run lengths for image 21."""
    return {"size": [40, 30], "counts": counts}


@pytest.mark.parametrize("seed", range(8))
def test_compressed_run_lengths_are_what_pycocotools_compressed(seed):
    rng = np.random.default_rng(seed)
    mask = (rng.random((37, 300)) < [0, 0.001, 0.02, 0.5, 0.9, 0.999, 1, 0.1][seed]).astype(np.uint8)
    encoded = masks.encode(np.asfortranarray(mask))["counts"].decode()
    assert text_lengths(encoded) == run_lengths(mask)


@pytest.mark.parametrize(
    "change, reason",
    [
        (annotate(bbox=[1, 2, 3]), "annotation 5 has the box [1, 2, 3], expected [x, y, width, height]"),
        (annotate(bbox=[1, 2, "a", 4]), "annotation 5 has the box [1, 2, 'a', 4]"),
        (annotate(bbox=[1, 2, float("nan"), 4]), "annotation 5 has the box [1, 2, nan, 4]"),
        (annotate(bbox=None), "annotation 5 has the box None"),
        (annotate(bbox=[1, 2, -3, 4]), "annotation 5 has a box -3 wide and 4 high"),
        (annotate(bbox=[1, 2, 3, -4]), "annotation 5 has a box 3 wide and -4 high"),
        (annotate(segmentation=[]), "annotation 5 has polygons of [] numbers"),
        (annotate(segmentation=[[1, 2, 3, 4]]), "annotation 5 has polygons of [4] numbers"),
        (annotate(segmentation=[[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]]), "annotation 5 has polygons of [6, 7]"),
        (annotate(segmentation=[1, 2, 3, 4, 5, 6]), "annotation 5 has polygons of [0, 0, 0, 0, 0, 0] numbers"),
        (
            annotate(segmentation=[[1, 2, 3, 4, 5, 1e9]]),
            "annotation 5 has the polygon coordinate 1000000000.0, the image",
        ),
        (
            annotate(segmentation=[[1, 2, 3, 4, -81, 6]]),
            "annotation 5 has the polygon coordinate -81, the image is 30x40",
        ),
        (annotate(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "annotation 5 has the polygon coordinate nan"),
        (annotate(segmentation=[[1, 2, 3, 4, 5, "6"]]), "annotation 5 has the polygon coordinate '6'"),
        (annotate(segmentation=None), "annotation 5 has no segmentation"),
        (annotate(segmentation={"size": [40, 30]}), "annotation 5 has no segmentation"),
        (
            annotate(segmentation={"size": [30, 40], "counts": [1200]}),
            "annotation 5 has run lengths of size [30, 40], the image is [40, 30]",
        ),
        (
            annotate(segmentation={"size": [40, 30], "counts": [0, 1201]}),
            "annotation 5 has run lengths of 1201 pixels, the image has 1200",
        ),
        (annotate(segmentation={"size": [40, 30], "counts": [1300, -100]}), "annotation 5 has run lengths that are"),
        (annotate(segmentation=text("0" * 9)), "annotation 5 has run lengths of 0 pixels, the image has 1200"),
        (annotate(segmentation=text("5")), "annotation 5 has run lengths of 5 pixels"),
        (annotate(segmentation=text("~~")), "annotation 5 has run lengths that are neither whole numbers"),
        (annotate(segmentation=text("0P")), "annotation 5 has run lengths that are neither whole numbers"),
        (annotate(segmentation=text("00O")), "annotation 5 has run lengths that are neither whole numbers"),
        (annotate(segmentation=text([600, "600"])), "annotation 5 has run lengths that are neither whole numbers"),
        (annotate(segmentation=text(None)), "annotation 5 has run lengths that are neither whole numbers"),
        (lambda tree: tree["images"][1].update(width=31), "image is 30x40, its annotation in instances_val2017.json"),
        (lambda tree: tree["images"][1].update(file_name="y.jpg"), "color image is missing"),
    ],
)
def test_a_wrong_annotation_makes_its_image_a_bad_one(written, change, reason):
    change_json(written[0], change)
    source = open_labelled("coco", written[0], "val2017", task="detection")
    with pytest.raises(BadFrame) as error:
        source.load("21")
    assert reason in error.value.reason
    source.load("7")


def test_images_are_found_beside_the_annotations(written):
    root = written[0]
    (root / "images").mkdir()
    (root / "val2017").rename(root / "images" / "val2017")
    for folder in ("images/val2017", "images", "elsewhere"):
        options = {}
        if folder == "images":
            for path in (root / "images" / "val2017").iterdir():
                path.rename(root / "images" / path.name)
        if folder == "elsewhere":
            (root / "images").rename(root / "elsewhere")
            with pytest.raises(DataError, match=r"No image '000000000007.jpg'"):
                open_labelled("coco", root, "val", task="detection")
            options = {"images": str(root / "elsewhere")}
        source = open_labelled("coco", root, "val", task="detection", options=options)
        assert source.folder == root / folder
        assert source.load("7").image.shape == (30, 40, 3)


def test_splits_are_named_by_the_files_that_are_there(written):
    root = written[0]
    with pytest.raises(DataError, match=r"No 'instances_train.json' in .*; there are: instances_val2017.json"):
        open_labelled("coco", root, "train", task="detection")
    (root / "annotations" / "instances_val2014.json").write_text("{}")
    with pytest.raises(DataError, match=r"there are: instances_val2014.json, instances_val2017.json"):
        open_labelled("coco", root, "val", task="detection")
    assert len(open_labelled("coco", root, "val2017", task="detection").ids()) == 3
    with pytest.raises(DataError, match="has no folder 'annotations'"):
        open_labelled("coco", root / "val2017", "val", task="detection")
    (root / "annotations" / "instances_val2017.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        open_labelled("coco", root, "val2017", task="detection")


def test_images_with_nothing_but_crowds_are_dropped_on_demand(written):
    source = open_labelled("coco", written[0], "val", task="detection", options={"drop_empty": True})
    assert source.ids() == ["21"]
    change_json(written[0], lambda tree: tree | {"annotations": tree["annotations"][1:2]})
    source = open_labelled("coco", written[0], "val", task="detection", options={"drop_empty": True})
    with pytest.raises(DataError, match="no image has an object that is not a crowd"):
        source.ids()


def test_gray_images_become_color(written):
    path = written[0] / "val2017" / "000000000007.jpg"
    Image.open(path).convert("L").save(path)
    assert open_labelled("coco", written[0], "val", task="detection").load("7").image.shape == (30, 40, 3)


def test_a_fingerprint_changes_with_annotations_images_and_rule(written):
    root = written[0]

    def digest(**options):
        return open_labelled("coco", root, "val", task="detection", options=options).fingerprint()

    seen = [digest(), digest(drop_empty=True)]
    assert digest() == seen[0]
    change_json(root, annotate(iscrowd=1, area=22))
    seen.append(digest())
    (root / "val2017" / "000000000021.jpg").unlink()
    seen.append(digest())
    assert len(set(seen)) == 4


def test_unknown_images_are_named(written):
    with pytest.raises(UnknownName, match="Unknown image '22'"):
        open_labelled("coco", written[0], "val", task="detection").load("22")


def test_without_pycocotools_the_message_is_the_line_that_installs_it(written, monkeypatch):
    source = open_labelled("coco", written[0], "val", task="detection")
    monkeypatch.delitem(__import__("sys").modules, "pycocotools.mask")
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("pycocotools"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(MissingDependency, match=r"pip install 'geo_pretrain\[training\]'"):
        source.load("7")
