"""Figures of what was found in clouds: boxes' corners, ceilings, colors of objects, files."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D, LabelledCloud
from geo_pretrain.training.evaluation.predictions import CloudClass, Detections3D, PointInstances, PointLabels
from geo_pretrain.training.visualize import clouds
from geo_pretrain.training.visualize.cloud_layers import CloudLayer, _edge_points, shown_height, spacing
from geo_pretrain.training.visualize.clouds import cloud_colors, draw_clouds, prediction_layers

CLASSES = ("wall", "chair", "table")
BOXES = Boxes3D(
    np.array([[1, 2, 0.5], [0, 0, 0]], np.float32),
    np.array([[2, 1, 1], [2, 4, 6]], np.float32),
    np.array([math.pi / 2, 0], np.float32),
    np.array([2, 3]),
)


def cloud(seed: int = 0) -> LabelledCloud:
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 2, (300, 3)).astype(np.float32)
    return LabelledCloud(
        f"scene{seed}",
        points,
        rng.integers(0, 256, (300, 3)).astype(np.uint8),
        labels=rng.integers(0, 4, 300),
        instances=np.repeat([0, 1, 2], 100),
        boxes=BOXES,
    )


def test_edges_join_the_corners_of_a_turned_box():
    one = Boxes3D(BOXES.centers[:1], BOXES.sizes[:1], BOXES.headings[:1], BOXES.classes[:1])
    places, _ = _edge_points(CloudLayer("found", np.zeros((0, 3), np.uint8), boxes=one), size=0.02)
    assert places.min(0) == pytest.approx([0.5, 1, 0], abs=1e-6)  # turned by a quarter: length 2 lies along y
    assert places.max(0) == pytest.approx([1.5, 3, 1], abs=1e-6)
    on_border = np.isclose(places, places.min(0)) | np.isclose(places, places.max(0))
    assert (on_border.sum(1) >= 2).all()  # no diagonals


def test_only_ceilings_are_left_out():
    grid = np.stack(np.meshgrid(np.arange(0, 5, 0.1), np.arange(0, 4, 0.1), indexing="ij"), -1).reshape(-1, 2)
    floor, ceiling = (np.column_stack([grid, np.full(len(grid), z)]) for z in (0, 2.5))
    shelf = ceiling[grid[:, 0] < 0.5]
    assert shown_height(np.concatenate([floor, ceiling])) == pytest.approx(2.0)
    assert shown_height(np.concatenate([floor, shelf])) == math.inf
    assert shown_height(np.concatenate([floor, ceiling]) * 0.4) == math.inf  # a table's top is no ceiling


def test_spacing_is_that_of_a_lattice():
    grid = np.stack(np.meshgrid(np.arange(100), np.arange(100), indexing="ij"), -1).reshape(-1, 2) * 0.05
    flat = np.column_stack([grid + 0.001, np.zeros(len(grid))])
    assert spacing(flat) == pytest.approx(0.05, rel=0.1)
    assert spacing(flat / 100) == pytest.approx(0.0005, rel=0.1)


def test_found_objects_have_the_colors_of_the_true_ones_that_they_cover():
    truth = np.array([0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    found = np.array([3, 3, 1, 1, 1, 0, 1, 2, 2, 2])  # 3 of 5 is object 1, 3 of 4 is object 2, and one of nothing
    renumbered, matched = clouds._in_true_colors(found, truth)
    assert renumbered.tolist() == [3, 3, 1, 1, 1, 0, 1, 2, 2, 2]
    assert matched == 2
    assert clouds._in_true_colors(np.array([2, 2, 0]), np.array([5, 5, 0]))[0].tolist() == [5, 5, 0]
    # two halves of one object: one has its color, the other its own
    halves, matched = clouds._in_true_colors(np.array([1, 1, 2, 2]), np.array([1, 1, 1, 1]))
    assert len(set(halves.tolist())) == 2
    assert matched == 1


def test_points_of_two_objects_belong_to_the_better_one():
    masks = np.array([[0, 1, 1, 0], [0, 0, 1, 1]], bool)
    found = PointInstances(masks, np.array([2, 3]), np.array([0.9, 0.4], np.float32))
    assert found.numbers().tolist() == [0, 1, 1, 2]


def test_captions_count_what_is_right():
    one = cloud()
    labels = np.where(np.arange(300) % 4 == 0, 1 + one.labels % 3, np.maximum(one.labels, 1))
    known = one.labels > 0
    truth, found = prediction_layers(PointLabels(labels, np.ones(300, np.float32)), one, CLASSES)
    assert truth.caption == f"{known.mean():.0%} of points labelled"
    assert found.caption == f"{(labels == one.labels)[known].mean():.0%} of labelled points right"
    assert (truth.colors[~known] == clouds.NONE).all()
    boxes = prediction_layers(Detections3D(BOXES, np.array([0.6, 0.2], np.float32)), one, CLASSES)
    assert [len(layer.boxes) for layer in boxes] == [2, 1]
    assert "1 of 2 boxes" in boxes[1].caption
    with pytest.raises(TypeError, match="str"):
        prediction_layers("chair", one, CLASSES)


def test_legends_name_all_of_few_classes_also_those_that_are_nowhere_found():
    bare = LabelledCloud("a", np.zeros((3, 3), np.float32), None, None)
    found = PointLabels(np.array([2, 2, 2]), np.ones(3, np.float32))
    assert [name for name, _ in clouds.class_legend([(bare, found)], ("floor", "wall", "door"))] == [
        "floor",
        "wall",
        "door",
    ]
    many = [str(number) for number in range(1, 41)]
    assert [name for name, _ in clouds.class_legend([(bare, found)], many)] == ["2"]


def test_a_cloud_without_colors_is_gray_by_intensity_or_colored_by_height():
    one = replace(cloud(), colors=None)
    height = cloud_colors(one)
    lowest, highest = one.points[:, 2].argmin(), one.points[:, 2].argmax()
    assert (height[lowest] != height[highest]).any()
    gray = cloud_colors(replace(one, intensity=np.linspace(0, 1, 300, dtype=np.float32)))
    assert (gray == gray[:, :1]).all()
    assert (np.diff(gray[:, 0].astype(int)) >= 0).all()


@pytest.mark.parametrize("kind", ["labels", "instances", "boxes", "category"])
def test_figures_and_pages_are_written(kind: str, tmp_path: Path):
    found = {
        "labels": PointLabels(np.ones(300, np.int64), np.ones(300, np.float32)),
        "instances": PointInstances(np.ones((1, 300), bool), np.array([2]), np.ones(1, np.float32)),
        "boxes": Detections3D(BOXES, np.ones(2, np.float32)),
        "category": CloudClass(2, np.array([0.2, 0.5, 0.3], np.float32)),
    }[kind]
    bare = LabelledCloud("bare", cloud(1).points, None, None)
    rows = [(replace(cloud(), category=1), found), (bare, found)]
    draw_clouds(rows, CLASSES, tmp_path / "predictions.png")
    picture = Image.open(tmp_path / "predictions.png")
    assert picture.width > 3 * 400
    assert picture.height > 2 * 300
    page = (tmp_path / "predictions.html").read_text()
    scene = json.loads(re.search(r'type="application/json">(.*?)</script>', page)[1])
    assert [layer["name"] for layer in scene["layers"]] == ["found", "truth", "cloud"]
    places = scene["layers"][0].get("places")
    assert (places is not None) == (kind == "boxes")
    if places is not None:  # the edges lie on the hull of the boxes, in the page's centered frame
        ends = np.frombuffer(base64.b64decode(places), "<f4").reshape(-1, 3)
        shift = (rows[0][0].points.min(0) + rows[0][0].points.max(0)) / 2
        assert ends.min(0) + shift == pytest.approx([-1, -2, -3], abs=1e-5)
    draw_clouds(rows[1:], CLASSES, tmp_path / "bare.png", page=False)
    assert not (tmp_path / "bare.html").exists()
