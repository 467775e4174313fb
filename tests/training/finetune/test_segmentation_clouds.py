"""Segmentation of whole clouds: scores over voxels and points, predictions for every point, broken clouds, input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.training.finetune.registry import backbone_init, build_finetune_task
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from tests.training.painted_clouds import painted
from tests.zoo import write_tiny_3d

CLASSES = ("red", "green", "blue")
SMALL = (
    "data.source=painted",
    "data.options={}",
    "network.unet3d={variant: 18A, width: 8, voxel_size: 0.2}",
    "data.cloud={voxel_size: 0.3, features: rgb, labels: majority}",
)


class Painted:
    """Three clouds, one of which is broken."""

    name, split, classes = "painted", "val", CLASSES

    def ids(self):
        return ["1", "2", "3"]

    def load(self, id):
        if id == "2":
            raise BadFrame("painted/2.ply", "cut short")
        cloud = painted(int(id))
        return cloud if id != "4" else replace(cloud, points=np.where(cloud.points > 0.9, np.nan, cloud.points))


def task_of(*overrides, backbone="scratch", classes=CLASSES):
    recipe = load_finetune_recipe("rooms_srunet34", [*SMALL, *overrides])
    init = backbone_init(recipe, str(backbone), {})
    return build_finetune_task(recipe, init, classes, init.contract())


def answer_by_color(task, monkeypatch):
    """Make the network answer with the brightest channel of a voxel's first point, red, green or blue."""

    def forward(coords, feats):
        return torch.cat([torch.zeros(len(feats), 1), feats * 10], dim=1)

    monkeypatch.setattr(task, "forward", forward)


def slow_scores(cloud, guess, classes=3):
    iou = []
    for c in range(1, classes + 1):
        known = cloud.labels > 0
        both = np.sum(known & (guess == c) & (cloud.labels == c))
        either = np.sum(known & ((guess == c) | (cloud.labels == c)))
        iou.append(both / either)
    return iou


def test_scores_over_voxels_and_points_and_a_broken_cloud_is_counted(monkeypatch):
    task, source = task_of(), Painted()
    answer_by_color(task, monkeypatch)
    found = task.evaluate(source, ["1", "2", "4"])
    cloud = painted(1)
    (labels,) = task.predict([cloud])
    assert found.scores["point_miou"] == pytest.approx(np.mean(slow_scores(cloud, labels.labels)))
    assert found.scores["miou"] == found.scores["voxel_miou"]
    assert found.scores["voxel_miou"] != found.scores["point_miou"]
    unreadable, endless = sorted(found.details["skipped"], key=lambda one: one["path"], reverse=True)
    assert unreadable == {"path": "painted/2.ply", "reason": "cut short"}
    assert endless["path"] == "cloud/4"  # points that cannot be made into voxels
    points = task_of("evaluate.level=points")
    answer_by_color(points, monkeypatch)
    by_point = points.evaluate(source, ["1", "2"])
    assert by_point.scores["miou"] == found.scores["point_miou"]
    assert by_point.per_class["iou"] == {
        name: pytest.approx(value) for name, value in zip(CLASSES, slow_scores(cloud, labels.labels), strict=True)
    }
    with pytest.raises(DataError, match=r"None of 1 clouds of 'painted'.*cut short"):
        task.evaluate(source, ["2"])


def test_predictions_cover_every_point_in_the_clouds_order_without_looking_at_labels(monkeypatch):
    task = task_of("data.cloud={voxel_size: 0.2, features: rgb, points: 200}")
    answer_by_color(task, monkeypatch)
    cloud = painted(1)
    order = np.random.default_rng(0).permutation(len(cloud))
    bare = replace(cloud, labels=None)
    first, again = task.predict([cloud, bare])
    assert np.array_equal(first.labels, again.labels)
    assert len(first.labels) == len(cloud)
    exact = task_of("data.cloud={voxel_size: 0.02, features: rgb}")
    answer_by_color(exact, monkeypatch)
    turned = replace(bare, points=cloud.points[order], colors=cloud.colors[order])
    truth = cloud.colors.argmax(1) + 1
    (straight,), (shuffled,) = exact.predict([bare]), exact.predict([turned])
    assert np.array_equal(straight.labels, truth)
    assert np.array_equal(shuffled.labels, truth[order])
    assert ((straight.scores > 1 / 3) & (straight.scores <= 1)).all()


def test_a_picture_of_whole_clouds_and_a_page(tmp_path):
    task = task_of()
    task.draw(Painted(), ["1", "2", "3", "4"], tmp_path / "predictions.png")
    assert np.asarray(Image.open(tmp_path / "predictions.png")).std() > 10
    assert (tmp_path / "predictions.html").stat().st_size > 1000


def test_the_input_is_reconciled_with_the_checkpoint_loudly(tmp_path):
    folder = write_tiny_3d(tmp_path / "tiny_net_srunet34").folder
    kept = task_of("data.cloud={features: contract}", backbone=folder)
    assert "pre-training are kept" in kept.facts()["input"]
    with pytest.warns(UserWarning, match=r"data\.cloud\.features=ones; the backbone was pre-trained on"):
        changed = task_of("data.cloud={features: ones}", backbone=folder)
    assert changed.contract.channels == ("one", "one", "one")
    with pytest.raises(RecipeError, match=r"1 channels; backbone.*mean \(adds the weights"):
        task_of("data.cloud={features: intensity}", backbone=folder)
    with pytest.warns(UserWarning, match="features=mean"):
        one = task_of("data.cloud={features: mean}", backbone=folder)
    assert one.module.in_chans == 1


def test_a_task_is_built_again_from_the_contract_it_ended_with():
    one = task_of("data.cloud={features: mean, voxel_size: 0.2}")
    init = backbone_init(one.recipe, "scratch", {})
    again = build_finetune_task(one.recipe, init, CLASSES, one.contract)
    again.module.load_state_dict(one.module.state_dict(), strict=True)
    assert again.contract == one.contract
    assert isinstance(one.contract, VoxelContract)
