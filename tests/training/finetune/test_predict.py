"""`geo-pretrain predict`: every file has the input's points in the input's order, for data sets and for files."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from geo_pretrain.errors import BadFrame, DataError, InputError, RecipeError, UnknownName
from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D
from geo_pretrain.training.data.labelled.clouds.files import CloudFields, array_columns
from geo_pretrain.training.data.surfaces.ply import read_ply, write_ply
from geo_pretrain.training.evaluation.coco import Detections
from geo_pretrain.training.evaluation.predictions import CloudClass, Detections3D, PointInstances, PointLabels
from geo_pretrain.training.finetune import predict as predicting
from geo_pretrain.training.finetune.cloud_files import CloudFile, cloud_fields
from geo_pretrain.training.finetune.load import load_finetuned
from geo_pretrain.training.finetune.predict import predict
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune.written import Place, cloud_columns, file_stem, write_prediction
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from geo_pretrain.training.geometry3d.boxes import box_corners
from tests.front_door import geo_pretrain
from tests.training.finetune.test_load import Painted
from tests.training.finetune.test_segmentation_clouds import CLASSES, SMALL
from tests.training.painted_clouds import painted

EMPTY = {"labels": None, "instances": None, "boxes": None}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on clouds in three colors."""
    more = ["optim.batch=2", "optim.steps=1", "evaluate.every_steps=1"]
    recipe = load_finetune_recipe("rooms_srunet34", [*SMALL, *more])
    out = tmp_path_factory.mktemp("clouds") / "out"
    finetune(recipe, "scratch", out, sources=(Painted("train"), Painted("val")), device="cpu")
    return out


def save(path, cloud, **more):
    columns = {name: cloud.points[:, k] for k, name in enumerate("xyz")}
    columns |= {name: cloud.colors[:, k] for k, name in enumerate(("red", "green", "blue"))}
    if path.suffix == ".ply":
        write_ply(path, {"vertex": columns | more})
    elif path.suffix == ".npy":
        np.save(path, np.stack([column.astype(np.float64) for column in columns.values()], 1))
    else:
        np.savez(path, points=cloud.points, colors=cloud.colors, **more)
    return path


def test_files_of_every_kind_come_back_point_by_point(run, tmp_path):
    cloud = painted(5)
    number = np.arange(len(cloud), dtype=np.int32)
    files = [save(tmp_path / "a.ply", cloud, number=number), save(tmp_path / "b.npy", cloud)]
    files += [save(tmp_path / "c.npz", cloud, number=number)]
    (tmp_path / "broken.ply").write_bytes(b"ply\nformat")
    result = geo_pretrain("predict", run, *files, tmp_path / "broken.ply", "-o", tmp_path / "out")
    assert "3 predicted, 1 skipped" in result.output
    assert "broken.ply: " in result.output
    labels = [np.load(tmp_path / "out" / f"{name}.labels.npy") for name in "abc"]
    (expected,) = load_finetuned(run).predict([replace(cloud, **EMPTY)])
    for name, found in zip("abc", labels, strict=True):
        assert np.array_equal(found, expected.labels)
        vertices = read_ply(tmp_path / "out" / f"{name}.ply")["vertex"]
        assert np.array_equal(vertices["predicted_label"], expected.labels)
        assert np.allclose(np.stack([vertices[axis] for axis in "xyz"], 1), cloud.points)
        assert np.array_equal(vertices["red"], cloud.colors[:, 0])
        assert vertices["predicted_score"].dtype == np.float32
    assert np.array_equal(read_ply(tmp_path / "out" / "a.ply")["vertex"]["number"], number)  # the file's own columns
    assert (tmp_path / "out" / "classes.txt").read_text().split() == list(CLASSES)
    index = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [item["name"] for item in index["items"]] == ["a", "b", "c"]
    assert sum(index["items"][0]["labels"].values()) == len(cloud)
    assert index["items"][0]["files"] == ["a.labels.npy", "a.scores.npy", "a.ply"]
    assert index["skipped"][0]["path"].endswith("broken.ply")
    with Image.open(tmp_path / "out" / "predictions.png") as picture:
        assert picture.size[0] > 300
    assert (tmp_path / "out" / "predictions.html").is_file()


def test_each_cloud_that_is_not_in_meters_is_told_with_the_option(run, tmp_path):
    cloud = painted(5, count=600)
    files = [save(tmp_path / name, replace(cloud, points=cloud.points * 100)) for name in ("a.npz", "b.npz")]
    words = ["predict", run, *files, "-o", tmp_path / "out", "--draw", 0]
    with pytest.warns(UserWarning, match="Cloud 'a': hardly any of the 600 points") as told:
        geo_pretrain(*words)
    texts = [str(one.message) for one in told]
    assert [text.partition(":")[0] for text in texts] == ["Cloud 'a'", "Cloud 'b'"]
    assert all("Centimeters: --option scale=0.01" in text for text in texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        geo_pretrain(*words, "--option", "scale=0.01")


def test_clouds_of_maps_come_back_where_they_were(tmp_path):
    far = np.array([500_000.25, 5_400_000.5, 300.0])
    path = tmp_path / "map.npy"
    np.save(path, far + 0.5 * np.arange(12.0).reshape(4, 3))
    file = CloudFile(path, CloudFields(scale=0.5))
    cloud = file.load()
    assert np.abs(cloud.points).max() < 200
    boxes = Boxes3D(cloud.points[:1], np.ones((1, 3), np.float32), np.zeros(1, np.float32), np.ones(1, np.int64))
    back = file.back(cloud, Detections3D(boxes, np.ones(1, np.float32))).boxes
    assert np.allclose(back.centers, far + 0.5 * np.arange(3.0), atol=1e-3)
    assert np.allclose(back.sizes, 2.0)  # a meter is two units
    assert file.columns(cloud)["y"][0] == far[1] + 0.5


def test_columns_of_foreign_files_come_back_as_a_ply_can_have_them(tmp_path):
    points, number = np.arange(12.0).reshape(4, 3), np.arange(4)
    named = np.rec.fromarrays([*points.T, number, number], names="X,Y,Z,cloud index,Höhe")
    np.save(tmp_path / "named.npy", named)
    arrays = {"coords": points + 50, "points": np.c_[points, number], "rgb": np.zeros((4, 4), np.uint8)}
    np.savez(tmp_path / "arrays.npz", **arrays, x_0=number, **{"x 0": number}, camera=np.eye(3), origin=np.zeros(3))
    boxes = Boxes3D(points[:1], np.ones((1, 3)), np.zeros(1), np.ones(1, np.int64))
    found = Detections3D(boxes, np.ones(1, np.float32))
    for name, more in (("named.npy", "cloud_index H_he"), ("arrays.npz", "coords_0 points_3 red green blue x_0 x_0_2")):
        file = CloudFile(tmp_path / name, CloudFields())
        cloud = file.load()
        assert np.allclose(file.back(cloud, found).boxes.centers, points[:1])
        write_prediction(found, place(tmp_path), file.columns(cloud), CLASSES)
        vertices = read_ply(tmp_path / "one.ply")["vertex"]
        assert np.array_equal(np.stack([vertices[axis] for axis in "xyz"], 1), points)
        assert set(more.split()) <= set(vertices)


def test_a_file_without_the_colors_that_a_network_takes_is_left_out(run, tmp_path):
    save(tmp_path / "a.ply", painted(5))
    np.save(tmp_path / "b.npy", painted(6).points)
    found = predict(run, tmp_path / "out", files=[tmp_path / "b.npy", tmp_path / "a.ply"], draw=0)
    assert [item["name"] for item in found.items] == ["a"]
    assert "neither colors nor remission; the network takes 'R'" in found.skipped[0]["reason"]
    assert "predict: --option color=NAME" in found.skipped[0]["reason"]


def test_files_that_are_not_read_are_told_with_the_way_to_read_them(run, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    save(folder / "a.npz", painted(5))
    for name in ("b.xyz", "c.pcd", "classes.txt", "notes.md"):
        (folder / name).write_text("0 0 0\n")
    with pytest.warns(UserWarning, match=r"left alone.*: b\.xyz, c\.pcd\. .*numpy\.loadtxt\('.*scans/b\.xyz'\)"):
        assert len(predict(run, tmp_path / "out", files=[folder]).items) == 1
    with pytest.raises(DataError, match=r"b\.xyz: the network is for clouds; .*numpy\.save\('.*b\.npy', numpy\.load"):
        predict(run, tmp_path / "out", files=[folder / "b.xyz"])
    (folder / "a.npz").unlink()
    (folder / "b.xyz").unlink()
    with pytest.raises(DataError, match=r"No clouds .* CloudCompare and MeshLab save them as PLY"):
        predict(run, tmp_path / "out", files=[folder])


def test_arrays_with_colors_are_predicted_on_as_files_are(run, tmp_path):
    cloud, network = painted(5), load_finetuned(run)
    wanted = network.predict(save(tmp_path / "a.ply", cloud))
    apart = {"points": torch.from_numpy(cloud.points), "colors": cloud.colors / 255}
    joined = np.concatenate([cloud.points, cloud.colors], 1)
    for found in network.predict([apart, joined, torch.from_numpy(joined)]):
        np.testing.assert_array_equal(found.labels, wanted.labels)
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-6)
    with pytest.raises(InputError, match=r"\[N, 6\] with red, .*'colors': colors"):
        network.predict(3)
    with pytest.raises(BadFrame, match=r"Python: \{'points'"):
        network.predict(cloud.points)
    with pytest.raises(BadFrame, match="color has 399 rows, the points have 400"):
        network.predict({"points": cloud.points, "colors": cloud.colors[1:]})


def test_a_scan_and_its_labels_as_clouds_are_both_predicted_on_and_a_folder_of_the_users_stays(run, tmp_path):
    """As ScanNet has them: NAME.ply and NAME.labels.ply."""
    for name in ("a.ply", "a.labels.ply"):
        save(tmp_path / name, painted(5))
    words = ["predict", run, tmp_path / "a.ply", tmp_path / "a.labels.ply", "-o", tmp_path / "out"]
    geo_pretrain(*words)
    own = tmp_path / "out" / "benchmark" / "scores.txt"
    own.parent.mkdir()
    own.write_text("mine")
    geo_pretrain(*words)
    assert own.read_text() == "mine"
    assert (tmp_path / "out" / "a.labels.labels.npy").is_file()
    said = geo_pretrain("predict", run, tmp_path / "out", "-o", tmp_path / "out", expected=1).errors
    assert "where results go; choose another --out" in said


def test_options_of_files_change_those_of_the_run():
    recipe = load_finetune_recipe("clouds_srunet34", ["data.options={color: none, intensity_scale: 0.5, scale: 2}"])
    found = cloud_fields(recipe, {"scale": 0.001})
    assert (found.color, found.intensity_scale, found.scale) == ("none", 0.5, 0.001)
    with pytest.raises(BadFrame, match="'z' twice"):
        array_columns(Path("a.npy"), np.zeros((3, 4)), CloudFields(columns=("x", "y", "z", "z")))


def test_own_clouds_of_a_data_set_come_back_in_their_files_frame(run, tmp_path):
    (tmp_path / "val").mkdir()
    cloud = painted(5)
    far = replace(cloud, points=1000 * (cloud.points.astype(np.float64) + (4e5, 5e6, 0)))
    save(tmp_path / "val" / "a.ply", far, label=cloud.labels.astype(np.int32))
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    found = predict(run, tmp_path / "out", data="clouds", path=str(tmp_path), options={"scale": 0.001}, draw=0)
    vertices = read_ply(tmp_path / "out" / f"{found.items[0]['name']}.ply")["vertex"]
    assert np.array_equal(np.stack([vertices[axis] for axis in "xyz"], 1), far.points)
    assert np.array_equal(vertices["label"], cloud.labels)


def test_a_prediction_that_was_cut_off_begins_again(run, tmp_path):
    save(tmp_path / "a.ply", painted(5))

    def stop(*progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(run, tmp_path / "out", files=[tmp_path / "a.ply"], draw=0, progress=stop)
    assert len(predict(run, tmp_path / "out", files=[tmp_path / "a.ply"], draw=0).items) == 1


def test_boxes_in_coordinates_of_maps_are_exact(tmp_path):
    boxes = Boxes3D(np.array([[4e5, 5_000_000.125, 1]]), np.ones((1, 3)), np.zeros(1), np.ones(1, np.int64))
    write_prediction(Detections3D(boxes, np.ones(1)), place(tmp_path), {"x": np.zeros(1)}, CLASSES)
    assert np.load(tmp_path / "one.boxes.npy")[0, 1] == 5_000_000.125
    assert read_ply(tmp_path / "one.boxes.ply")["vertex"]["y"].min() == 5_000_000.125 - 0.5


def test_a_data_set_is_predicted_on_without_its_labels(run, tmp_path, monkeypatch):
    class Unlabelled(Painted):
        def load(self, id):
            return replace(super().load(id), **EMPTY)

    asked = {}

    def opened(source, path, split, *, task, options):
        asked.update(source=source, path=str(path), split=split, task=task, options=options)
        return Unlabelled(split)

    monkeypatch.setattr(predicting, "open_labelled", opened)
    found = predict(run, tmp_path / "out", data="clouds", path="somewhere", split="predict", limit=1, draw=0)
    assert asked == {
        "source": "clouds", "path": "somewhere", "split": "predict", "task": "segmentation3d", "options": {},
    }  # fmt: skip
    assert [item["name"] for item in found.items] == ["1"]
    assert not (tmp_path / "out" / "predictions.png").exists()
    predict(run, tmp_path / "out", data="clouds", path="somewhere", draw=0)  # over an earlier prediction
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["items"]) == 2


@pytest.mark.parametrize(
    ("files", "data", "error", "message"),
    [
        ([], None, RecipeError, "either FILES, or --data SOURCE:PATH"),
        (["a.ply"], "rooms3d", RecipeError, "either FILES, or --data SOURCE:PATH"),
        (["a.png"], None, DataError, r"a\.png: the network is for clouds; accepted: files that end in \.ply"),
        (["x/a.ply", "y/a.ply"], None, DataError, "Two inputs are called 'a'"),
        (["a.ply"], None, DataError, "Nothing to predict on: there is no 'a.ply' here"),
    ],
)
def test_what_cannot_be_predicted_on_is_said(run, tmp_path, files, data, error, message):
    with pytest.raises(error, match=message):
        predict(run, tmp_path / "out", files=[Path(file) for file in files], data=data)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_things_is_left_alone(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="exists and holds no prediction"):
        predict(run, tmp_path, data="rooms3d")


def test_files_for_a_benchmark_are_refused_for_other_classes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(predicting, "open_labelled", lambda *_, **__: pytest.fail("rooms would be rendered before"))
    with pytest.raises(RecipeError, match=r"takes classes or instances of points of 20 classes \(wall, floor.* of 3"):
        predict(run, tmp_path / "out", data="rooms3d", benchmark="scannet")
    with pytest.raises(UnknownName, match="Unknown benchmark 'scanet'"):
        predict(run, tmp_path / "out", data="rooms3d", benchmark="scanet")
    labels = PointLabels(np.array([1, 20, 3]), np.ones(3, np.float32))
    predicting._scannet(tmp_path / "scannet", "scans/scene0707_00_vh_clean_2", labels)  # a mesh that is given as a file
    assert (tmp_path / "scannet" / "scene0707_00.txt").read_text().split() == ["1", "39", "3"]


def place(tmp_path, name="one"):
    return Place(tmp_path, name, [])


def test_instances_and_their_masks_in_the_order_of_points(tmp_path):
    cloud = painted(1)
    masks = np.zeros((2, len(cloud)), bool)
    masks[0, :5], masks[1, 3:9] = True, True
    found = PointInstances(masks, np.array([3, 1]), np.array([0.9, 0.5], np.float32))
    facts = write_prediction(found, place(tmp_path), cloud_columns(cloud), CLASSES)
    assert np.load(tmp_path / "one.instances.npy")[:10].tolist() == [1] * 5 + [2] * 4 + [0]
    assert np.array_equal(np.load(tmp_path / "one.masks.npz")["masks"], masks)
    vertices = read_ply(tmp_path / "one.ply")["vertex"]
    assert vertices["predicted_label"][:10].tolist() == [3] * 5 + [1] * 4 + [0]
    assert facts["objects"][1] == {"number": 2, "class": "red", "score": 0.5, "points": 6}
    labels = PointLabels(np.full(len(cloud), 2), np.ones(len(cloud), np.float32))
    write_prediction(replace(found, labels=labels), place(tmp_path), cloud_columns(cloud), CLASSES)
    assert set(read_ply(tmp_path / "one.ply")["vertex"]["predicted_label"]) == {2}


def test_boxes_as_numbers_names_and_edges(tmp_path):
    boxes = Boxes3D(
        np.array([[1, 2, 3], [4, 5, 6]], np.float32),
        np.array([[2, 1, 1], [1, 1, 1]], np.float32),
        np.array([np.pi / 2, 0], np.float32),
        np.array([2, 1]),
    )
    found = Detections3D(boxes, np.array([0.75, 0.25], np.float32))
    assert write_prediction(found, place(tmp_path), cloud_columns(painted(1)), CLASSES) == {"objects": 2}
    table = np.load(tmp_path / "one.boxes.npy")
    assert np.allclose(table[0], [1, 2, 3, 2, 1, 1, np.pi / 2, 2, 0.75])
    named = json.loads((tmp_path / "one.boxes.json").read_text())
    assert named[1] == {"class": "red", "score": 0.25, "center": [4, 5, 6], "size": [1, 1, 1], "heading": 0}
    edges = read_ply(tmp_path / "one.boxes.ply")
    corners = np.stack([edges["vertex"][axis] for axis in "xyz"], 1)
    assert np.allclose(corners[:8], box_corners(torch.tensor([1.0, 2, 3, 2, 1, 1, np.pi / 2])).numpy())
    ends = corners[edges["edge"]["vertex1"]] - corners[edges["edge"]["vertex2"]]
    assert sorted(np.linalg.norm(ends[:12], axis=1).round(4).tolist()) == [1.0] * 8 + [2.0] * 4
    assert edges["edge"]["vertex1"].max() == 15


def test_the_class_of_a_cloud_stands_in_the_index(tmp_path):
    found = CloudClass(2, np.array([0.25, 0.5, 0.25], np.float32))
    facts = write_prediction(found, place(tmp_path), {}, CLASSES)
    assert facts == {"class": "green", "label": 2, "score": 0.5}


def test_detections_in_an_image_with_the_best_on_top(tmp_path):
    masks = np.zeros((2, 4, 6), bool)
    masks[0, :2], masks[1, 1:] = True, True
    found = Detections(np.zeros((2, 4), np.float32), np.array([1, 2]), np.array([0.9, 0.5], np.float32), masks)
    image = np.full((4, 6, 3), 200, np.uint8)
    write_prediction(found, place(tmp_path, "folder/one"), image, CLASSES)
    numbers = np.array(Image.open(tmp_path / "folder" / "one.instances.png"))
    assert numbers[:, 0].tolist() == [1, 1, 2, 2]
    assert (tmp_path / "folder" / "one.png").is_file()


@pytest.mark.parametrize(
    ("id", "stem"),
    [
        ("08/000123", "08/000123"),
        ("../../etc/passwd", "etc/passwd"),
        ("a:b*c", "a_b_c"),
        ("Area_5/office 1", "Area_5/office 1"),
    ],
)
def test_names_of_files_stay_below_the_folder(id, stem):
    assert file_stem(id) == stem
