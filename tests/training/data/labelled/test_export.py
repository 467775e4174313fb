"""COCO's format made from any source: read back by pycocotools and by our own reader, nothing has changed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as masks
from pycocotools.coco import COCO

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.labelled.export import coco_json, write_coco
from geo_pretrain.training.data.labelled.registry import open_labelled, subset
from tests.labelled_layouts import random_image, random_objects, run_lengths, write_coco_files, write_scannet_frame
from tests.training.data.labelled.twins import NYU40_20, objects

H, W = 30, 40


@pytest.fixture
def scannet(tmp_path):
    root, rng = tmp_path / "scannet", np.random.default_rng(6)
    truth = {}
    for scene in ("scene0000_00", "scene0001_00"):
        for frame in (0, 100):
            label, number = random_objects(rng, H, W, [1, 5, 7, 14, 39])
            truth[f"{scene}/{frame:06d}"] = label, number
            write_scannet_frame(root, scene, frame, random_image(rng, H, W), label, number)
    (root / "scannetv2_train.txt").write_text("scene0000_00\nscene0001_00\n")
    return root, truth


def opened(root, **options):
    return open_labelled("scannet", root, "train", task="detection", options={"min_pixels": 30} | options)


def test_the_file_holds_the_objects_as_pycocotools_reads_them(scannet, tmp_path, capsys):
    root, truth = scannet
    source = opened(root)
    path = write_coco(source, tmp_path / "out")
    assert path == tmp_path / "out" / "annotations" / "instances_train.json"
    theirs = COCO(str(path))
    assert [theirs.cats[k]["name"] for k in sorted(theirs.cats)] == list(source.classes)
    assert sorted(theirs.imgs) == [1, 2, 3, 4]
    count = 0
    for number, id in enumerate(source.ids(), 1):
        entry = theirs.imgs[number]
        assert (entry["source_id"], entry["width"], entry["height"]) == (id, W, H)
        assert (root / entry["file_name"]).is_file()
        expected = objects(*truth[id], NYU40_20[2:], min_pixels=30)
        annotations = theirs.loadAnns(theirs.getAnnIds(number))
        assert [a["category_id"] for a in annotations] == [label for label, _ in expected]
        for annotation, (_, where) in zip(annotations, expected, strict=True):
            mask = theirs.annToMask(annotation)
            assert {(int(r), int(c)) for r, c in np.argwhere(mask)} == set(where)
            assert annotation["area"] == len(where)
            assert annotation["iscrowd"] == 0
            runs = masks.encode(np.asfortranarray(mask))
            assert annotation["bbox"] == masks.toBbox(runs).tolist()
            count += 1
    assert sorted(theirs.anns) == list(range(1, count + 1))
    assert count > 6


def test_written_with_its_images_it_reads_back_as_it_was(scannet, tmp_path):
    source = subset(opened(scannet[0]), 0.5, 1)
    write_coco(source, tmp_path / "out", images=True)
    again = open_labelled("coco", tmp_path / "out", "train", task="detection")
    assert again.ids() == ["1", "2"]
    assert again.classes == source.classes
    assert again.folder == tmp_path / "out" / "train"
    for one, other in zip(source.ids(), again.ids(), strict=True):
        a, b = source.load(one), again.load(other)
        np.testing.assert_array_equal(a.image, b.image)
        for field in ("boxes", "classes", "masks", "crowd"):
            np.testing.assert_array_equal(getattr(a.instances, field), getattr(b.instances, field))


def test_crowds_and_boxes_between_pixels_survive(tmp_path):
    image = random_image(np.random.default_rng(0), H, W)
    mask = np.zeros((H, W), np.uint8)
    mask[3:9, 4:20] = 1
    runs = {"size": [H, W], "counts": run_lengths(mask)}
    annotations = [
        {"id": 4, "image_id": 3, "category_id": 8, "iscrowd": 1, "bbox": [4, 3, 16, 6], "segmentation": runs},
        {"id": 5, "image_id": 3, "category_id": 2, "iscrowd": 0, "bbox": [1.5, 2.25, 8, 9]}
        | {"segmentation": [[1.5, 2.25, 9.5, 2.25, 9.5, 11.25]]},
    ]
    write_coco_files(tmp_path, "val", {3: image}, annotations, [(2, "a"), (8, "b")])
    tree = coco_json(open_labelled("coco", tmp_path, "val", task="detection"))
    crowd, other = tree["annotations"]
    assert (crowd["iscrowd"], crowd["category_id"], crowd["area"]) == (1, 2, 96)
    np.testing.assert_array_equal(masks.decode(crowd["segmentation"]), mask)
    assert (other["iscrowd"], other["bbox"]) == (0, [1.5, 2.25, 8, 9])
    assert tree["categories"] == [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]


def test_without_masks_only_boxes_are_written(scannet):
    source = opened(scannet[0])
    full, bare = coco_json(source), coco_json(source, rle=False)
    assert all("segmentation" in a for a in full["annotations"])
    for annotation in full["annotations"]:
        annotation.pop("segmentation")
    assert bare == full
    assert json.loads(json.dumps(bare)) == bare


def test_a_bad_image_stops_or_is_counted(scannet):
    root = scannet[0]
    source = opened(root)
    (root / "scene0000_00" / "instance" / "000100.png").unlink()
    with pytest.raises(BadFrame, match="annotation is missing"):
        coco_json(source)
    skips = SkippedFrames()
    tree = coco_json(source, skips=skips)
    assert [image["id"] for image in tree["images"]] == [1, 3, 4]  # ids of the others do not move
    assert {a["image_id"] for a in tree["annotations"]} <= {1, 3, 4}
    assert skips.counts() == {"annotation is missing": 1}


def test_images_without_objects_stay_in_the_file(scannet):
    tree = coco_json(opened(scannet[0], min_pixels=H * W))
    assert (len(tree["images"]), tree["annotations"]) == (4, [])


def test_rooms_become_coco(tmp_path):
    options = {"scenes": 1, "val_scenes": 1, "frames": 2, "width": 64, "height": 64}
    source = open_labelled("rooms", None, "val", task="detection", options=options)
    tree = coco_json(source)
    assert [image["file_name"] for image in tree["images"]] == ["rooms_val_0000/0000.png", "rooms_val_0000/0001.png"]
    assert len(tree["annotations"]) > 3


def test_labels_of_pixels_are_not_objects(scannet):
    source = open_labelled("scannet", scannet[0], "train", task="segmentation")
    with pytest.raises(DataError, match="Image 'scene0000_00/000000' of 'scannet' has no objects; open it with task="):
        coco_json(source)
