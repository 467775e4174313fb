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
