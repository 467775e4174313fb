"""Single objects: ShapeNetPart and ShapeNetCore from bytes in their layouts, and points drawn from meshes."""

from __future__ import annotations

import numpy as np
import pytest

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.labelled.clouds.shapenetcore import CATEGORIES
from geo_pretrain.training.data.labelled.clouds.shapenetpart import SYNSETS
from geo_pretrain.training.data.labelled.registry import open_labelled, subset
from geo_pretrain.training.data.surfaces.obj import read_obj, sample_mesh
from tests.cloud_layouts import FIGURE, write, write_obj, write_shapenetpart, write_shapenetpart_list

FIRST_PARTS = [0, 4, 6, 8, 12, 16, 19, 22, 24, 28, 30, 36, 38, 41, 44, 47, 50]  # as the data set counts
TRIANGLE = [[0, 0, 0], [2, 0, 0], [0, 1, 0]]


def parts(path, split="train", **options):
    return open_labelled("shapenetpart", path, split, task="parts3d", options=options)


def core(path, split="train", **options):
    return open_labelled("shapenetcore", path, split, task="classification3d", options=options)


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """An object of each category in each split, each with all of its parts."""
    root = tmp_path_factory.mktemp("part") / FIGURE
    for split in ("train", "val", "test"):
        entries = []
        for place, synset in enumerate(SYNSETS):
            numbers = range(FIRST_PARTS[place], FIRST_PARTS[place + 1])
            points = [[place, number, 1] for number in numbers]
            entries.append(write_shapenetpart(root, synset, f"{split}{place}", points, numbers))
        write_shapenetpart_list(root, split, entries)
    return root


def test_parts_are_counted_through_all_categories(figures):
    source = parts(figures.parent, "val")
    assert len(source.classes) == 50
    assert source.classes[12] == "Chair/12"
    assert len(source.ids()) == 16
    for place, id in enumerate(source.ids()):
        cloud = source.load(id)
        numbers = list(range(FIRST_PARTS[place], FIRST_PARTS[place + 1]))
        assert cloud.labels.tolist() == [1 + number for number in numbers]
        assert cloud.category == source.category_of(id) == place + 1
        assert np.allclose(cloud.points, [[place, -1, number] for number in numbers])  # y up became z up
        assert {source.classes[label - 1].split("/")[0] for label in cloud.labels} == {
            source.classes[numbers[0]].split("/")[0]
        }


def test_splits_of_parts(figures):
    assert len(parts(figures).ids()) == 32
    assert len(parts(figures, train="train").ids()) == 16
    assert all("/test" in id for id in parts(figures, "val").ids())
    assert all("/val" in id for id in parts(figures, "val", measure="val").ids())
    assert len(subset(parts(figures), 0.01).ids()) == 16  # one of each category


@pytest.mark.parametrize(
    ("text", "reason"),
    [("1 2 3 0 1 0 7\n", "part 7 at 1 points; Airplane has 0 to 3"), ("1 2 3\n", "row 1 of 1 has 3 numbers"),
     ("1 2 x 0 1 0 0\n", "not made of numbers"), ("1 2 nan 0 1 0 0", "not finite"), ("\n", "no points"),
     ("1e300 2 3 0 1 0 0", r"1e\+300 m from the origin"), ("1 2 3 0 inf 0 0", "normal"), (None, "missing")],
)  # fmt: skip
def test_broken_objects_are_named(tmp_path, text, reason):
    write_shapenetpart_list(tmp_path, "test", ["shape_data/02691156/a"])
    if text is not None:
        write(tmp_path / "02691156/a.txt", text.encode())
    with pytest.raises(BadFrame, match=reason):
        parts(tmp_path, "val").load("02691156/a")


def test_lists_of_parts_are_checked(tmp_path):
    with pytest.raises(DataError, match=r"No list .*shuffled_test_file_list.json"):
        parts(tmp_path, "val")
    write_shapenetpart_list(tmp_path, "test", ["shape_data/12345678/a"])
    with pytest.raises(DataError, match=r"other categories: .*12345678/a"):
        parts(tmp_path, "val")


@pytest.fixture
def shrec(tmp_path):
    """SHREC16's folders: two tables and a chair to train, a chair to validate, one of each to test, two empty files."""
    names = {"train/04379243": (1, 2), "train/03001627": (3,), "val/03001627": (4,), "test": (5, 6)}
    for folder, numbers in names.items():
        for number in numbers:
            corners = np.array(TRIANGLE) * number
            write_obj(tmp_path / folder / f"model_{number:06d}.obj", corners, [[1, 2, 3]])
    write(tmp_path / "train/04090263/model_004004.obj", b"")
    write(tmp_path / "train/04379243/model_000009.obj", b"")
    return tmp_path


SPLIT = "id,synsetId,subSynsetId,modelId,split\n5,4379243,4379243,aa,test\n000006,03001627,3001627,bb,test\n"
SPLIT += "1,4379243,4379243,cc,train\n9,4379243,4379243,dd,train\n7,3001627,3001627,ee,train\n"


def test_folders_of_shrec_are_a_split(shrec):
    source = core(shrec)
    assert source.ids() == ["03001627/model_000003", "04379243/model_000001", "04379243/model_000002"]
    assert len(source.classes) == 55 == len(CATEGORIES)
    assert "left out: 2 empty meshes" in source.note
    cloud = source.load("04379243/model_000002")
    assert len(cloud) == 1024
    assert source.classes[cloud.category - 1] == "table"
    assert cloud.labels is None
    x, y, z = cloud.points.T / 2  # (x, y, 0) turned: (x, 0, y)
    assert np.abs(y).max() == 0
    assert x.min() >= 0
    assert z.min() >= 0
    assert (x / 2 + z).max() <= 1.001
    assert np.array_equal(cloud.points, core(shrec).load("04379243/model_000002").points)
    assert not np.array_equal(cloud.points, core(shrec, seed=1).load("04379243/model_000002").points)
    assert core(shrec, "val", measure="val").ids() == ["03001627/model_000004"]
    with pytest.raises(DataError, match=r"Categories of split 'test' stand in all.csv only"):
        core(shrec, "val")
    assert core(shrec, "test").load("test/model_000005").category is None


def test_the_list_gives_the_categories_of_tests(shrec):
    write(shrec / "all.csv", SPLIT.encode())
    source = core(shrec, "val")
    assert source.ids() == ["04379243/model_000005", "03001627/model_000006"]
    assert [source.classes[source.category_of(id) - 1] for id in source.ids()] == ["table", "chair"]
    train = core(shrec)
    assert train.ids() == ["04379243/model_000001"]
    assert "1 empty meshes, 1 that are not there" in train.note
    write(shrec / "all.csv", b"id,synsetId,modelId,split\n1,99,a,train\n")
    with pytest.raises(DataError, match="line 2 has synset '00000099'"):
        core(shrec)
    with pytest.raises(DataError, match="No list"):
        core(shrec, split_file=str(shrec / "none.csv"))


def test_without_a_list_each_category_is_dealt_by_the_seed(tmp_path):
    for number in range(20):
        write_obj(tmp_path / f"02828884/m{number}/models/model_normalized.obj", TRIANGLE, [[1, 2, 3]])
    for number in range(10):
        write_obj(tmp_path / f"04379243/m{number}/model.obj", TRIANGLE, [[1, 2, 3]])
    with pytest.warns(UserWarning, match="70 / 10 / 20 % per category by seed 0"):
        split = {name: core(tmp_path, name).ids() for name in ("train", "test")} | {
            "val": core(tmp_path, "val", measure="val").ids()
        }
    benches = {name: sum(id.startswith("0282") for id in ids) for name, ids in split.items()}
    assert benches == {"train": 14, "val": 2, "test": 4}
    assert {name: len(ids) for name, ids in split.items()} == {"train": 21, "val": 3, "test": 6}
    assert len(set().union(*split.values())) == 30
    with pytest.warns(UserWarning, match="by seed 1"):
        assert core(tmp_path, seed=1).ids() != split["train"]


def test_points_of_a_mesh_are_uniform_by_area():
    """A square of 4 and a triangle of 1 above it; the center of mass and the share follow from the areas."""
    corners = np.array([[0, 0, 0], [2, 0, 0], [2, 2, 0], [0, 2, 0], [0, 0, 5], [2, 0, 5], [0, 1, 5]], float)
    faces = np.array([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 4, 4]])
    points = sample_mesh(corners, faces, 20_000, np.random.default_rng(0))
    above = points[:, 2] > 2.5
    assert abs(above.mean() - 0.2) < 0.01
    assert np.allclose(points[~above].mean(0), [1, 1, 0], atol=0.02)
    assert np.allclose(points[above].mean(0), [2 / 3, 1 / 3, 5], atol=0.02)
    with pytest.raises(ValueError, match="no area"):
        sample_mesh(corners, faces[3:], 1, np.random.default_rng(0))


def test_faces_of_obj_files(tmp_path):
    path = tmp_path / "m.obj"
    write(path, b"v 0 0 0\nv\t1 0 0 1.0\nv 1 1 0\nv 0 1 0\nf 1 2/1 3//1 4/1/1\nvt 0 0\nf -4 -3 -1\nl 1 2\n")
    points, triangles = read_obj(path)
    assert points.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert triangles.tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 3]]
    broken = {b"v 0 0\n": "line 1 is no vertex", b"v 0 0 0\nf 1 2 x\n": "line 2", b"v 0 0 0\n": "no faces"}
    broken |= {b"v 0 0 0\nf 1 1 4\n": "vertex 4 of 1", b"v 0 0 nan\nf 1 1 1\n": "not finite"}
    for data, reason in broken.items():
        write(path, data)
        with pytest.raises(BadFrame, match=reason):
            read_obj(path)
