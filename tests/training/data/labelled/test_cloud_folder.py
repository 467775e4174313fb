"""A folder of one's own clouds: splits by lists or folders, classes by name or number, objects, boxes, no labels."""

from __future__ import annotations

import numpy as np
import pytest

from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.training.data.labelled.clouds.classes import read_classes
from geo_pretrain.training.data.labelled.registry import open_labelled, subset

RNG = np.random.default_rng(1)


def write_cloud(path, points=20, labels=(0, 1, 2), things=(0, 1, 2)):
    """x y z r g b label instance, in a plain array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    xyz = RNG.uniform(-1, 1, (points, 3))
    color = RNG.integers(0, 256, (points, 3))
    np.save(path, np.column_stack([xyz, color, RNG.choice(labels, points), RNG.choice(things, points)]))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "classes.txt").write_text("# my classes\nwall\nchair  # brown ones\n\n")
    for name in ("train/a/one", "train/a/two", "train/b/three", "val/four"):
        write_cloud(tmp_path / f"{name}.npy")
    return tmp_path


def open_clouds(folder, split="train", task="segmentation3d", **options):
    return open_labelled("clouds", folder, split, task=task, options=options)


def test_folders_are_splits_and_files_are_scenes(folder):
    train, val = open_clouds(folder), open_clouds(folder, "val")
    assert (train.name, train.split, train.classes, train.stuff) == ("clouds", "train", ("wall", "chair"), ())
    assert train.ids() == ["train/a/one", "train/a/two", "train/b/three"]
    assert val.ids() == ["val/four"]
    assert train.file_name("train/a/one") == "train/a/one.npy"
    cloud = train.load("train/a/one")
    assert (cloud.id, len(cloud), cloud.boxes) == ("train/a/one", 20, None)
    assert set(cloud.labels) == {0, 1, 2}
    assert train.scenes() == train.ids()
    by_folder = open_clouds(folder, scene="folder")
    assert by_folder.scenes() == ["train/a", "train/b"]
    assert len(subset(by_folder, 0.5).ids()) in (1, 2)
    assert by_folder.fingerprint() != train.fingerprint() != val.fingerprint()
    before = train.fingerprint()
    write_cloud(folder / "train/a/one.npy", 21)
    assert open_clouds(folder).fingerprint() != before


def test_lists_replace_folders(folder):
    (folder / "train.txt").write_text("train/b/three\nval/four.npy  # moved\n\n")
    (folder / "val.txt").write_text("train/a/one\n")
    assert open_clouds(folder).ids() == ["train/b/three", "val/four"]
    assert open_clouds(folder, "val").ids() == ["train/a/one"]
    (folder / "val.txt").write_text("train/a/one\nval/four\n")
    with pytest.raises(DataError, match=r"1 clouds are in train and in val, such as four.npy"):
        open_clouds(folder)
    (folder / "val.txt").write_text("train/a/one\nval/fuor\n")
    with pytest.raises(DataError, match=r"val.txt': 1 of 2 files are missing: val/fuor"):
        open_clouds(folder, "val")
    (folder / "val.txt").write_text("train/a/one\ntrain/a/one.npy\n")
    with pytest.raises(DataError, match=r"one.npy stands there twice"):
        open_clouds(folder, "val")
    (folder / "val.txt").write_text("\n")
    with pytest.raises(DataError, match=r"it names no file"):
        open_clouds(folder, "val")


def test_numbers_in_files_are_named_by_classes(tmp_path):
    (tmp_path / "classes.txt").write_text("2 ground\n5 tree\n4 tree\n-7 traffic sign\n")
    write_cloud(tmp_path / "train/a.npy", 60, labels=(-7, 0, 2, 4, 5, 9))
    write_cloud(tmp_path / "val/b.npy")
    source = open_clouds(tmp_path, ignore=[9])
    assert source.classes == ("ground", "tree", "traffic sign")
    raw = np.load(tmp_path / "train/a.npy")[:, 6]
    want = [{-7: 3, 0: 0, 2: 1, 4: 2, 5: 2, 9: 0}[int(label)] for label in raw]
    assert source.load("train/a").labels.tolist() == want
    with pytest.raises(BadFrame, match=r"label 9 at \d+ points is no class; classes.txt has -7, -1, 0, 2, 4, 5 "):
        open_clouds(tmp_path).load("train/a")
    with pytest.raises(DataError, match=r"label 5 is a class and in data.options.ignore"):
        open_clouds(tmp_path, ignore=[5])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "a name on each line, or a number and a name"),
        ("0 wall\nfloor\n", "a name on each line, or a number and a name"),
        ("wall\nfloor\nwall\n", "'wall' stands there twice"),
        ("1 wall\n1 floor\n", "1 stands there twice"),
    ],
)
def test_wrong_lists_of_classes_are_refused(text, reason, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=reason):
        read_classes(tmp_path / "classes.txt")


def test_marks_of_other_systems_do_not_matter(folder):
    (folder / "train" / "a" / "._one.npy").write_bytes(b"of a Mac")
    (folder / "classes.txt").write_bytes("\ufeffwall\r\nchair\r\n".encode())
    source = open_clouds(folder)
    assert (source.classes, len(source.ids())) == (("wall", "chair"), 3)
    (folder / "train.txt").write_bytes("\ufefftrain/a/one\r\n".encode())
    assert open_clouds(folder).ids() == ["train/a/one"]


def test_zero_based_labels_are_classes_where_the_list_says_so(tmp_path):
    (tmp_path / "classes.txt").write_text("0 wall\n1 floor\n")
    classes = read_classes(tmp_path / "classes.txt")
    assert classes.apply(np.array([[0, 1, -1]]).ravel(), "x").tolist() == [1, 2, 0]


def test_objects_and_boxes(folder):
    source = open_clouds(folder, task="instances3d", stuff=["wall"])
    assert (source.classes, source.stuff) == (("wall", "chair"), ("wall",))
    raw = np.load(folder / "train/a/one.npy")
    cloud = source.load("train/a/one")
    np.testing.assert_array_equal(cloud.instances, np.where(raw[:, 6] == 2, raw[:, 7], 0))
    detection = open_clouds(folder, task="detection3d", stuff=["wall"])
    assert detection.classes == ("chair",)
    found = detection.load("train/a/one")
    np.testing.assert_array_equal(found.labels, raw[:, 6] == 2)
    numbers = [n for n in (1, 2) if ((raw[:, 6] == 2) & (raw[:, 7] == n)).any()]
    assert len(found.boxes) == len(numbers) > 0
    for k, number in enumerate(numbers):
        mine = raw[(raw[:, 6] == 2) & (raw[:, 7] == number), :3]
        np.testing.assert_allclose(found.boxes.centers[k], (mine.min(0) + mine.max(0)) / 2, atol=1e-6)
        np.testing.assert_allclose(found.boxes.sizes[k], np.ptp(mine, axis=0), atol=1e-6)
    assert set(found.boxes.classes) == {1}
    np.save(folder / "train/a/one.npy", raw[:, :7])
    with pytest.raises(BadFrame, match=r"no field instance .*data.options.instance"):
        source.load("train/a/one")
    with pytest.raises(DataError, match=r"data.options.stuff: 'floor' is no class; accepted: wall, chair"):
        open_clouds(folder, stuff=["floor"])


def test_other_splits_need_neither_labels_nor_classes(folder):
    np.save(folder / "new.npy", RNG.uniform(size=(9, 3)))
    (folder / "test.txt").write_text("new\nval/four\n")
    source = open_clouds(folder, "test", task="instances3d")
    cloud = source.load("new")
    assert (len(cloud), cloud.labels, cloud.instances, cloud.colors) == (9, None, None, None)
    assert source.load("val/four").labels is not None
    (folder / "classes.txt").unlink()
    source = open_clouds(folder, "test")
    assert source.classes == ()
    assert source.load("val/four").labels is None


def test_what_is_missing_is_said(folder, tmp_path):
    with pytest.raises(DataError, match=r"No folder .*none'. Expected layout: classes.txt, and either lists train.txt"):
        open_clouds(tmp_path / "none")
    with pytest.raises(DataError, match=r"has neither evening.txt nor a folder evening/"):
        open_clouds(folder, "evening")
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"No .ply, .npy, .npz, .las, .laz file in"):
        open_clouds(folder, "empty")
    with pytest.raises(RecipeError, match=r"data.options.no_instance' is 3, accepted is 0 or -1"):
        open_clouds(folder, no_instance=3)
    np.savez(folder / "train/a/one.npz", points=np.zeros((1, 3)))
    with pytest.raises(DataError, match=r"one.npy and one.npz are one cloud, 'train/a/one'"):
        open_clouds(folder)
    (folder / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"classes.txt' is missing. It names the classes"):
        open_clouds(folder)


def test_a_number_that_each_class_uses_anew_stands_for_an_object_of_each(folder):
    """A chair and a table that are both number 1: two boxes, not one around both."""
    (folder / "classes.txt").write_text("wall\nchair\ntable\n")
    chair, table = RNG.uniform(0, 0.5, (30, 3)), RNG.uniform(2, 2.8, (50, 3))
    second = RNG.uniform(-3, -2.5, (20, 3))
    points = np.concatenate([chair, table, second, RNG.uniform(4, 5, (10, 3))])
    labels, things = np.repeat([2, 3, 2, 1], [30, 50, 20, 10]), np.repeat([1, 1, 2, 0], [30, 50, 20, 10])
    np.save(folder / "val/four.npy", np.column_stack([points, np.zeros((110, 3)), labels, things]))
    cloud = open_clouds(folder, "val", "detection3d", stuff=["wall"]).load("val/four")
    names = open_clouds(folder, "val", "detection3d", stuff=["wall"]).classes
    boxes = zip(cloud.boxes.classes, cloud.boxes.sizes, strict=True)
    found = sorted((names[kind - 1], *np.float32(size)) for kind, size in boxes)
    parts = (("chair", chair), ("chair", second), ("table", table))
    want = sorted((name, *np.float32(np.ptp(part, axis=0))) for name, part in parts)
    assert [row[0] for row in found] == [row[0] for row in want]
    np.testing.assert_allclose([row[1:] for row in found], [row[1:] for row in want], atol=1e-5)
    assert set(cloud.instances) == {0, 1, 2, 3}


def test_what_is_flat_has_a_box_with_a_volume(folder):
    board = np.column_stack([RNG.uniform(0, 2, 40), RNG.uniform(0, 1, 40), np.full(40, 1.5)])
    np.save(folder / "val/four.npy", np.column_stack([board, np.zeros((40, 3)), np.full(40, 2), np.ones(40)]))
    boxes = open_clouds(folder, "val", "detection3d").load("val/four").boxes
    np.testing.assert_allclose(boxes.sizes, [[*np.ptp(board[:, :2], axis=0), 0.01]], atol=1e-6)


def test_a_few_points_of_another_class_make_no_object(folder):
    points, labels, things = RNG.uniform(0, 1, (120, 3)), np.full(120, 2), np.full(120, 1)
    points[:3], labels[:3] = 9, 3  # three points of the chair, labelled as table and far off
    (folder / "classes.txt").write_text("wall\nchair\ntable\n")
    np.save(folder / "val/four.npy", np.column_stack([points, np.zeros((120, 3)), labels, things]))
    source = open_clouds(folder, "val", "detection3d")
    cloud = source.load("val/four")
    assert [source.classes[kind - 1] for kind in cloud.boxes.classes] == ["chair"]
    np.testing.assert_allclose(cloud.boxes.sizes, [np.ptp(points[3:], axis=0)], atol=1e-5)
    assert (cloud.instances > 0).sum() == 117
