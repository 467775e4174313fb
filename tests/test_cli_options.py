"""What commands on data tell of the options that a run read the same recordings by."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from geo_pretrain.cli.options import data_spec, warn_of_other_options
from tests.front_door import geo_pretrain

RECIPE = """name: mine
task: {{name: pri3d_view}}
model: {{encoder: resnet18, init: scratch}}
data: {{source: folder, path: {path}, size: [60, 80], options: {{pose_convention: world_to_camera}}}}
optim: {{batch: 2, lr: 0.01, schedule: poly, steps: 2}}
"""


def test_other_options_of_the_same_recordings_are_told(tmp_path: Path):
    run, place = tmp_path / "run", tmp_path / "rec"
    run.mkdir()
    (run / "recipe.yaml").write_text(RECIPE.format(path=place))
    said = r"was trained on these recordings.*: --set data\.options='\{pose_convention: world_to_camera\}'\."
    with pytest.warns(UserWarning, match=said):
        warn_of_other_options(str(run), data_spec(f"folder:{place}", None, []))
    same = ["data.options={pose_convention: world_to_camera}"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_options(str(run), data_spec(f"folder:{place}", "0.75:1", same))
        warn_of_other_options(str(run), data_spec(f"folder:{tmp_path}", None, []))
        warn_of_other_options(str(run), data_spec("rooms", None, []))
        warn_of_other_options("pri3d_view_r18", data_spec(f"folder:{place}", None, []))
        (run / "recipe.yaml").write_text("task: segmentation\nnetwork: {}\n")
        warn_of_other_options(str(run), data_spec(f"folder:{place}", None, []))


def test_a_mistake_that_two_parts_of_a_recipe_find_is_told_once():
    words = ("finetune", "folder_unet", "--backbone", "scratch", "--data", "folder:x", "--out", "x")
    ended = geo_pretrain(*words, "--set", "optim.steps=2", expected=1)
    said = "accepted is exactly one of the two (null for the other). Given by --set optim.steps=2."
    assert " ".join(ended.errors.split()) == f"Error: 'optim.steps / optim.epochs' is (2, 60.0), {said}"
