"""`geo-pretrain recipes`: every recipe is listed, shown as it is, and copied without harm to what is there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from geo_pretrain.training.finetune_recipe import list_finetune_recipes, load_finetune_recipe
from geo_pretrain.training.recipe import RECIPES, list_recipes, load_recipe
from tests.front_door import geo_pretrain


def test_every_recipe_has_a_line():
    lines = geo_pretrain("recipes", "list").output.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *list_recipes(), *list_finetune_recipes()]
    assert lines == geo_pretrain("recipes").output.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["pri3d_geo_r18"] == ["train", "pri3d_geo", "resnet18", "+", "sr_unet34C", "scannet"]
    assert rows["csc_srunet34.rooms"] == ["train", "csc", "sr_unet34C", "rooms"]
    assert rows["nyuv2_mask_rcnn_r50"] == ["finetune", "instances", "mask_rcnn", "on", "resnet50", "nyuv2"]


def test_the_list_as_json():
    rows = json.loads(geo_pretrain("recipes", "list", "--json").output)
    assert len(rows) == len(list_recipes()) + len(list_finetune_recipes())
    wanted = {"command": "train", "task": "pri3d_view", "network": "resnet18", "data": "rooms"}
    assert {"name": "pri3d_view_r18.rooms", **wanted} in rows


def test_a_recipe_is_shown_as_it_is():
    for name, folder in (("pri3d_view_r18.rooms", RECIPES), ("rooms_unet_r18", RECIPES / "finetune")):
        assert geo_pretrain("recipes", "show", name).output == (folder / f"{name}.yaml").read_text()


def test_a_copy_can_be_loaded(tmp_path):
    mine = tmp_path / "mine.yaml"
    assert str(mine) in geo_pretrain("recipes", "copy", "gsc_r18", mine).output.replace("\n", "")
    assert load_recipe(str(mine)) == load_recipe("gsc_r18")
    geo_pretrain("recipes", "copy", "scannet_unet_r18", tmp_path / "labels.yml")
    assert load_finetune_recipe(str(tmp_path / "labels.yml")) == load_finetune_recipe("scannet_unet_r18")


def test_a_copy_replaces_nothing(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("mine")
    assert "exists already and is left as it is" in geo_pretrain("recipes", "copy", "gsc_r18", mine, expected=1).errors
    assert mine.read_text() == "mine"
    ended = geo_pretrain("recipes", "copy", "gsc_r18", tmp_path / "mine.txt", expected=1)
    assert "accepted is a name that ends in .yaml, such as mine.yaml" in ended.errors
    geo_pretrain("recipes", "copy", "gsc_r18", tmp_path / "nowhere" / "mine.yaml", expected=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("name, nearest", [("pri3d_veiw_r18", "pri3d_view_r18"), ("rooms_unet", "rooms_unet_r18")])
def test_an_unknown_name_is_told_with_the_nearest_of_either_kind(name, nearest, tmp_path):
    for command in (["show", name], ["copy", name, tmp_path / "x.yaml"]):
        errors = geo_pretrain("recipes", *command, expected=1).errors
        assert errors.startswith(f"Error: Unknown recipe {name!r}. Closest: ")
        assert repr(nearest) in errors
    assert not (tmp_path / "x.yaml").exists()


def test_recipes_are_read_without_torch():
    code = "import sys; from geo_pretrain.cli import recipe; recipe.recipes_list(); print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "False"
