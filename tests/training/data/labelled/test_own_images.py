"""Images with labels of one's own: layouts, classes by id and by color, COCO's JSON, and what is refused."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from PIL import Image

from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.training.data.files import read_label_colors
from geo_pretrain.training.data.labelled.export import coco_json
from geo_pretrain.training.data.labelled.own_boxes import shared_images
from geo_pretrain.training.data.labelled.own_classes import read_image_classes
from geo_pretrain.training.data.labelled.registry import open_labelled
from tests.labelled_layouts import chunk, png_bytes, random_image, save

HEIGHT, WIDTH = 12, 16
IDS = np.array([[0, 0, 1, 2], [3, 255, 1, 2]]).repeat(6, 0).repeat(4, 1)  # [12, 16]
GRAY, RGB, PALETTE = 0, 2, 3  # color types of PNG


def write_image(path, number=0):
    save(path, random_image(np.random.default_rng(number), HEIGHT, WIDTH))


def write_label(path, ids, bits=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [struct.pack(f">{len(row)}{'BH'[bits // 16]}", *row.tolist()) for row in ids]
    path.write_bytes(png_bytes(rows, ids.shape[1], bits, GRAY))


def write_flat(root, count=10, ids=IDS, names="wall\nchair\ntable\n"):
    for number in range(count):
        write_image(root / "images" / f"{number}.jpg", number)
        write_label(root / "labels" / f"{number}.png", ids)
    (root / "classes.txt").write_text(names)


def opened(root, split="train", task="segmentation", **options):
    return open_labelled("folder", root, split, task=task, options=options)


def test_folders_of_splits_with_subfolders_and_16_bits(tmp_path):
    for split, name in (("train", "b/2"), ("train", "a"), ("val", "c")):
        write_image(tmp_path / split / "images" / f"{name}.png")
        write_label(tmp_path / split / "labels" / f"{name}.png", np.where(IDS == 3, 300, IDS), bits=16)
    (tmp_path / "classes.txt").write_text("# my classes\n1 wall\n2 chair # with arms\n\n300 table\n")
    train, val = opened(tmp_path), opened(tmp_path, "val")
    assert (train.ids(), val.ids(), train.classes) == (["a", "b/2"], ["c"], ("wall", "chair", "table"))
    image = train.load("b/2")
    assert np.array_equal(image.semantic, np.where(IDS == 255, 0, IDS))
    assert (image.image.shape, image.semantic.dtype, train.file_ids) == ((HEIGHT, WIDTH, 3), np.uint8, (1, 2, 300))
    assert [opened(tmp_path, scene="folder").scene_of(id) for id in train.ids()] == [".", "b"]


def test_a_flat_folder_is_shared_out_and_an_image_more_moves_no_other(tmp_path):
    write_flat(tmp_path)
    train, val = opened(tmp_path, val_share=0.3).ids(), opened(tmp_path, "val", val_share=0.3).ids()
    assert (len(val), sorted(train + val)) == (3, [str(n) for n in range(10)])
    assert opened(tmp_path, "val", val_share=0.3, seed=1).ids() != val
    write_image(tmp_path / "images" / "new.jpg")
    (tmp_path / "train.txt").write_text("images/1.jpg\n2\n# a remark\nnew")
    (tmp_path / "val.txt").write_text("3.jpg\n")
    with pytest.warns(UserWarning, match="1 of 3 images have no label file, such as"):
        source = opened(tmp_path, first=1)
    assert source.ids() == ["1", "2"]
    assert opened(tmp_path, "val").ids() == ["3"]
    (tmp_path / "val.txt").unlink()
    with pytest.raises(DataError, match=r"has train\.txt and no val\.txt"):
        opened(tmp_path, "val")


def test_other_names_by_options_as_camvid_has_them(tmp_path):
    for split in ("train", "val"):
        write_image(tmp_path / split / "x.jpg")
        write_label(tmp_path / f"{split}annot" / "x_L.png", IDS)
    (tmp_path / "names").write_text("0 sky\n1 road\n2 car\n3 void\n")
    named = {"images": "{split}", "labels": "{split}annot", "label_suffix": "_L", "classes": "names"}
    write_label(tmp_path / "valannot" / "y_L.png", IDS)
    with pytest.warns(UserWarning, match=r"1 label files have no image, such as '.*y_L\.png': not used"):
        source = opened(tmp_path, "val", **named, void=["void"])
    assert source.classes == ("sky", "road", "car")
    assert np.array_equal(source.load("x").semantic, np.select([IDS == 0, IDS == 1, IDS == 2], [1, 2, 3], 0))
    with pytest.raises(RecipeError, match="a path below the folder"):
        opened(tmp_path, images="../elsewhere")


def test_names_alone_ask_where_ids_may_count_from_0(tmp_path):
    write_flat(tmp_path, ids=np.where(IDS == 3, 2, IDS))  # 0, 1, 2 and 255, of three names
    with pytest.raises(DataError, match=r"id 0 occurs in labels and 3 in none of \d.*first=0 or =1"):
        opened(tmp_path)
    assert np.array_equal(
        np.unique(opened(tmp_path, first=0).load(opened(tmp_path, first=0).ids()[0]).semantic), range(4)
    )
    assert opened(tmp_path, first=1).file_ids == (1, 2, 3)


def test_labels_are_colors_of_pixels_or_of_a_palette(tmp_path):
    colors = {0: (0, 0, 0), 1: (128, 64, 128), 2: (0, 0, 192), 3: (4, 5, 6), 255: (7, 7, 7)}
    pixels = np.array([[colors[int(id)] for id in row] for row in IDS], np.uint8)
    for split in ("train", "val"):
        write_image(tmp_path / split / "images" / "x.png")
    rgb = png_bytes([row.tobytes() for row in pixels], WIDTH, 8, RGB)
    known = np.array(list(colors.values()), np.uint8)
    places = np.array([[list(colors).index(int(id)) for id in row] for row in IDS], np.uint8)
    palette = png_bytes([row.tobytes() for row in places], WIDTH, 8, PALETTE, chunk(b"PLTE", known.tobytes()))
    for split, data in (("train", rgb), ("val", palette)):
        (tmp_path / split / "labels").mkdir()
        (tmp_path / split / "labels" / "x.png").write_bytes(data)
    names = "128 64 128 road\n0 0 192 pavement\n4 5 6 road\n7 7 7 Void\n"
    (tmp_path / "classes.txt").write_text(names)
    for split in ("train", "val"):
        source = opened(tmp_path, split, void=["Void"])
        expected = np.select([IDS == 1, IDS == 2, IDS == 3], [1, 2, 1], 0)
        assert np.array_equal(source.load("x").semantic, expected)
    assert (source.colors, source.file_ids) == (((128, 64, 128), (0, 0, 192)), None)
    (tmp_path / "classes.txt").write_text(names.replace("4 5 6 road\n", ""))
    with pytest.raises(BadFrame, match=r"color 4 5 6 at 24 pixels is no class; classes\.txt has 4 colors"):
        opened(tmp_path).load("x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "accepted is a name on each line"),
        ("wall\n3 chair\n", "accepted is a name on each line"),
        ("1 wall\n1 chair\n", "1 stands there twice"),
        ("wall\nwall\n", "'wall' stands there twice"),
        ("70000 wall\n", "id 70000; ids are at most 65535"),
        ("".join(f"c{n}\n" for n in range(255)), "255 classes; accepted are 1 to 254"),
    ],
)
def test_a_wrong_list_of_classes_is_named(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_image_classes(tmp_path / "classes.txt")


def test_what_is_missing_or_wrong_is_named(tmp_path):
    with pytest.raises(DataError, match=r"No folder .*nowhere'"):
        opened(tmp_path / "nowhere", first=1)
    (tmp_path / "classes.txt").write_text("1 wall\n")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(
        DataError, match=r"neither train/images nor images; it has: classes.txt, pictures.*options.images"
    ):
        opened(tmp_path)
    write_image(tmp_path / "images" / "x.jpg")
    write_image(tmp_path / "images" / "y.jpg")
    with pytest.raises(DataError, match=r"No folder .*labels"):
        opened(tmp_path)
    (tmp_path / "labels").mkdir()
    with pytest.raises(DataError, match=r"None of 1 images in .* has labels, such as"):
        opened(tmp_path)
    for name in "xy":
        write_label(tmp_path / "labels" / f"{name}.png", IDS)
    source = opened(tmp_path)
    with pytest.raises(BadFrame, match=r"label id 2 in \d+ pixels; .*data.options.ignore="):
        source.load(source.ids()[0])
    assert opened(tmp_path, ignore=[2, 3]).load(source.ids()[0]).semantic.max() == 1
    write_label(tmp_path / "labels" / f"{source.ids()[0]}.png", IDS[:6])
    with pytest.raises(BadFrame, match="annotation is 16x6, the image 16x12"):
        opened(tmp_path, ignore=[2, 3]).load(source.ids()[0])


def test_a_turned_photo_has_its_labels_as_a_viewer_shows_it_or_as_it_is_stored(tmp_path):
    (tmp_path / "classes.txt").write_text("1 wall\n2 chair\n3 table\n")
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, ids in (("seen", IDS.T), ("stored", IDS)):
        path = tmp_path / "train" / "images" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(path, exif=exif)
        write_label(tmp_path / "train" / "labels" / f"{name}.png", ids)
    source = opened(tmp_path)
    assert source.load("seen").image.shape == (WIDTH, HEIGHT, 3)
    assert source.load("stored").image.shape == (HEIGHT, WIDTH, 3)


def boxes_json(count=4, **more):
    images = [{"id": n, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH} for n in range(count)]
    objects = [
        {"id": n, "image_id": n % count, "category_id": (3, 90)[n % 2], "bbox": [2, 3, 5, 4], "iscrowd": 0,
         "segmentation": [[2, 3, 7, 3, 7, 7, 2, 7]]}
        for n in range(2 * count)
    ]  # fmt: skip
    return {
        "images": images,
        "annotations": objects,
        "categories": [{"id": 90, "name": "mug"}, {"id": 3, "name": "pen"}],
    } | more


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("{split}/_annotations.coco.json", "{split}"),
        ("annotations/instances_{split}.json", "images"),
        ("{split}/annotations.json", "{split}/images"),
    ],
)
def test_boxes_of_any_classes_where_tools_write_them(tmp_path, file, folder):
    for there in ("train", "valid" if "_ann" in file else "val"):
        path = tmp_path / file.format(split=there)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(boxes_json()))
        for number in range(4):
            write_image(tmp_path / folder.format(split=there) / f"{number}.jpg")
    for split in ("train", "val"):
        source = opened(tmp_path, split, task="detection")
        assert (source.name, source.classes, source.file_ids) == ("folder", ("pen", "mug"), (3, 90))
        found = source.load("1").instances
        assert (found.boxes.tolist(), found.classes.tolist()) == ([[2, 3, 7, 7]] * 2, [2, 2])
        assert found.masks.sum(axis=(1, 2)).tolist() == [20, 20]
    only = opened(tmp_path, task="detection", void=["pen"])
    assert (only.classes, only.file_ids, [len(only.load(i).instances) for i in "0123"]) == (
        ("mug",),
        (90,),
        [0, 2, 0, 2],
    )


def test_one_file_of_boxes_is_shared_out_or_divided_by_lists(tmp_path):
    (tmp_path / "annotations.json").write_text(json.dumps(boxes_json()))
    for number in range(4):
        write_image(tmp_path / "images" / f"{number}.jpg")
    parts = [opened(tmp_path, split, task="detection", val_share=0.25).ids() for split in ("train", "val")]
    assert ([len(part) for part in parts], sorted(parts[0] + parts[1])) == ([3, 1], list("0123"))
    (tmp_path / "train.txt").write_text("# mine\n0.jpg\nimages/2\n")
    (tmp_path / "val.txt").write_text("3\n")
    train, val = (opened(tmp_path, split, task="detection") for split in ("train", "val"))
    assert (train.ids(), val.ids(), shared_images([train, val])) == (["0", "2"], ["3"], [])
    (tmp_path / "val.txt").write_text("3\n2.jpg\n")
    shared = shared_images([train, opened(tmp_path, "val", task="detection")])
    assert [path.name for path in shared] == ["2.jpg"]
    (tmp_path / "val.txt").write_text("3\nnone\n")
    with pytest.raises(DataError, match="1 of 2 are no images of the file: none"):
        opened(tmp_path, "val", task="detection")
    inside = boxes_json()
    for image in inside["images"]:
        image["file_name"] = f"images/{image['file_name']}".replace("1.jpg", "1#b.jpg")
    (tmp_path / "images" / "1.jpg").rename(tmp_path / "images" / "1#b.jpg")
    (tmp_path / "annotations.json").write_text(json.dumps(inside))
    (tmp_path / "train.txt").write_text("images/0.jpg # first\n1#b.jpg\n")
    assert opened(tmp_path, task="detection").ids() == ["0", "1"]
    twice = boxes_json(categories=[{"id": 3, "name": "pen"}, {"id": 90, "name": "pen"}])
    (tmp_path / "annotations.json").write_text(json.dumps(twice))
    with pytest.raises(DataError, match="two categories are called 'pen'"):
        opened(tmp_path, task="detection")
    (tmp_path / "annotations.json").unlink()
    with pytest.raises(DataError, match=r"has no annotations of split 'train'.*options.annotations"):
        opened(tmp_path, task="detection")


def test_boxes_alone_are_for_networks_without_masks(tmp_path):
    objects = boxes_json()["annotations"]
    objects[0].pop("segmentation")
    objects[1]["segmentation"] = []
    (tmp_path / "annotations.json").write_text(json.dumps(boxes_json(annotations=objects)))
    for number in range(4):
        write_image(tmp_path / "images" / f"{number}.jpg")
    source = opened(tmp_path, task="detection", val_share=0.25)
    found = {id: source.load(id).instances for id in source.ids()}
    assert {id: one.boxes_alone for id, one in found.items()} == {id: int(id in "01") for id in found}
    for one in found.values():
        assert one.boxes.tolist() == [[2, 3, 7, 7]] * 2
        assert one.masks.sum(axis=(1, 2)).tolist() == [20, 20]
    with pytest.raises(BadFrame, match="1 of 2 objects have a box and no mask; boxes alone are for --set task=detect"):
        coco_json(source, ["1" if "1" in found else "0"])
    assert len(coco_json(source, rle=False)["annotations"]) == 6


def test_images_that_differ_in_their_suffix_alone_are_refused_without_labels_too(tmp_path):
    write_flat(tmp_path)
    for suffix in ("jpg", "png"):
        write_image(tmp_path / "test" / "images" / f"a.{suffix}")
    with pytest.raises(DataError, match=r"a\.jpg and a\.png differ in their suffix alone"):
        opened(tmp_path, "test")


@pytest.mark.parametrize("id", [-100, 70_000])
def test_ids_to_ignore_are_those_that_files_can_hold(tmp_path, id):
    write_flat(tmp_path)
    with pytest.raises(RecipeError, match=r"data\.options\.ignore.* from 0 to 65535"):
        opened(tmp_path, ignore=[id])


def test_labels_that_are_colors_have_8_bits(tmp_path):
    write_label(tmp_path / "a.png", IDS, bits=16)
    with pytest.raises(BadFrame, match="has 16 bits a pixel"):
        read_label_colors(tmp_path / "a.png")
