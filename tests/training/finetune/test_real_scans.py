"""A real scan of SemanticKITTI from its bytes to a picture: trained five steps, measured, predicted, drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.finetune.registry import backbone_init, build_finetune_task
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from tests.training.data.labelled.twins import sample

STEPS = ("optim.epochs=null", "optim.steps=5", "optim.batch=2", "evaluate.every_epochs=null", "evaluate.every_steps=5")


@pytest.mark.parametrize("name", ["semantickitti_srunet34", "semantickitti_slidr_srunet34"])
def test_a_scan_is_trained_measured_predicted_and_drawn(name, tmp_path):
    path, options = sample("semantickitti_tiny"), {"train": ["00"], "val": ["00"]}
    small = ("network.unet3d={variant: 18A, width: 8, voxel_size: 0.1}", "workers=0", *STEPS)
    recipe = load_finetune_recipe(name, [f"data.path={path}", f"data.options={options}", *small])
    result = finetune(recipe, "scratch", tmp_path / "out", device="cpu")
    assert result.steps == 5
    scores = result.data["last"]["scores"]
    assert scores["miou"] == scores["point_miou"]
    assert result.data["data"]["train_images"] == 1
    assert result.data["data"]["skipped"] == []
    with Image.open(tmp_path / "out" / "predictions.png") as picture:
        assert np.asarray(picture).std() > 10
    source = open_labelled("semantickitti", path, "val", task="segmentation3d", options=options)
    start = backbone_init(recipe, "scratch", {})
    task = build_finetune_task(recipe, start, source.classes, start.contract())
    task.module.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    cloud = source.load("00/000000")
    (found,) = task.predict([cloud])
    assert found.labels.shape == (50,)
    known = cloud.labels > 0
    assert torch.tensor(found.labels[known] == cloud.labels[known]).float().mean() == pytest.approx(scores["accuracy"])


def test_boxes_of_a_scan_are_trained_measured_predicted_and_drawn(tmp_path):
    path = sample("kitti_object")
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("000000\n")
    small = ("network.unet3d={variant: 18A, width: 8, voxel_size: 0.2}", "data.cloud.voxel_size=0.2", "workers=0")
    sizes = ("network.options={seeds: 128, proposals: 32, start: quiet}", "data.cloud.points=4096")
    steps = ("optim.schedule=constant", "optim.milestones=null", "optim.lr=0.01", *STEPS)
    data = (f"data.path={path}", f"data.options.lists={tmp_path}")
    recipe = load_finetune_recipe("kitti_object_votenet", [*data, *small, *sizes, *steps])
    result = finetune(recipe, "scratch", tmp_path / "out", device="cpu")
    assert result.steps == 5
    assert 0 <= result.score <= 1
    assert result.data["data"]["skipped"] == []
    assert (tmp_path / "out" / "predictions.html").is_file()
    source = open_labelled("kitti_object", path, "val", task="detection3d", options=recipe.data.options)
    start = backbone_init(recipe, "scratch", {})
    task = build_finetune_task(recipe, start, source.classes, start.contract())
    task.module.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    cloud = source.load("000000")
    (found,) = task.predict([cloud])
    assert len(found) == len(found.scores)
    assert np.all(np.diff(found.scores) <= 0)
    assert set(found.boxes.classes.tolist()) <= {1, 2, 3}
    typical = task.module.mean_sizes[1].tolist()  # the one pedestrian of the scan is the template of its class
    assert typical == pytest.approx(cloud.boxes.sizes[0].tolist(), rel=1e-5)
