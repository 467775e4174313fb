"""Segmentation of whole scans by recipe with --toy: learns, continues bit for bit, measures, and draws."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
from PIL import Image

from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from tests.training.finetune.killed import run_killed_at
from tests.training.finetune.test_run import assert_same_run

TINY = (
    "data.options={scenes: 2, val_scenes: 1, frames: 2, width: 64, height: 64}",
    "network.unet3d={variant: 18A, width: 8, voxel_size: 0.2}",
    "data.cloud.voxel_size=0.2",
    "optim.batch=2",
    "optim.steps=6",
    "evaluate.every_steps=6",
    "save_every=3",
)


def run(out, *overrides, **options):
    recipe = load_finetune_recipe("rooms3d_srunet34", [*TINY, *overrides], toy=True)
    return finetune(recipe, "scratch", out, device="cpu", **options)


def test_toy_learns_continues_bit_for_bit_measures_and_draws(tmp_path):
    units = []
    whole = run(tmp_path / "whole", on_step=lambda info: units.append(info.unit))
    run_killed_at(4, partial(run, tmp_path / "broken"))
    run(tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert units == ["clouds"] * 6
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    losses = [line["segmentation"] for line in lines if "lr" in line]
    assert np.mean(losses[-2:]) < 0.8 * np.mean(losses[:2])
    data = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert (data["task"], data["data"]["source"], data["data"]["train_images"]) == ("segmentation3d", "rooms3d", 2)
    assert len(data["data"]["classes"]) == 25
    assert whole.score == data["last"]["scores"]["voxel_miou"]
    assert 0 < data["last"]["scores"]["point_miou"] <= 1
    with Image.open(tmp_path / "whole" / "predictions.png") as picture:
        assert np.asarray(picture).std() > 10
    assert (tmp_path / "whole" / "predictions.html").is_file()


def test_toys_are_of_the_recipes_own_kind_of_clouds_and_take_no_options_of_other_sources():
    whole = load_finetune_recipe("semantickitti_slidr_srunet34", toy=True)
    assert (whole.name, whole.data.source) == ("semantickitti_slidr_srunet34.toy", "rooms3d")
    assert "max_range" not in whole.data.options
    assert whole.data.cloud is not None
    assert whole.data.cloud.features == "rgb"
    frames = load_finetune_recipe("rooms_srunet34", toy=True)
    assert (frames.data.source, frames.data.cloud, frames.data.size) == ("rooms", None, (72, 96))
