"""Recipes: all that ship parse, wrong ones say which key, what was given, what is accepted."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from geo_pretrain.errors import RecipeError, UnknownName
from geo_pretrain.training.recipe import RECIPES, Recipe, list_recipes, load_recipe, parse
from geo_pretrain.training.tasks import TASKS


def test_the_sweep_sees_every_recipe_file():
    assert len(list_recipes()) == len(list(RECIPES.glob("*.yaml"))) >= 4


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_carries_its_own_name_and_survives_yaml(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.task["name"] in TASKS
    assert parse(Recipe, yaml.safe_load(recipe.to_yaml()), where="again") == recipe


@pytest.mark.parametrize("name", list_recipes())
def test_toy_overlay_brings_any_recipe_to_cpu_scale(name):
    toy = load_recipe(name, toy=True)
    assert toy.data.source == "rooms"
    assert toy.data.path is None
    assert toy.model.init == "scratch"
    assert toy.optim.steps <= 500
    assert toy.precision == "fp32"
    assert toy.task == load_recipe(name).task


def test_published_settings_are_those_of_the_released_code():
    """methods.md 5.4, first column."""
    recipe = load_recipe("pri3d_view_r18")
    o = recipe.optim
    assert (o.batch, o.lr, o.momentum, o.dampening, o.weight_decay, o.schedule, o.power, o.epochs) == (
        64, 0.1, 0.9, 0.1, 0.0, "poly", 0.9, 5,
    )  # fmt: skip
    assert (o.bn_momentum, recipe.model.init, recipe.data.size) == ("pri3d", "imagenet", (240, 320))
    assert {"temperature": 0.4, "matches": 1024, "tolerance": 0.05, "depth_proxy": True}.items() <= recipe.task.items()
    assert dataclasses.replace(load_recipe("pri3d_view_r50").model, depth=18) == recipe.model


@pytest.mark.parametrize(
    "override, parts",
    [
        ("optim.lrr=0.1", ["'optim.lrr'", "'optim.lr'", "Accepted: batch, lr"]),
        ("optim.batch=many", ["'optim.batch'", "'many' (str)", "a whole number"]),
        ("optim.batch=true", ["'optim.batch'", "True (bool)"]),
        ("optim.batch=0", ["'optim.batch'", "from 1 up"]),
        ("precision=fp61", ["'precision'", "fp32, bf16", "Closest"]),
        ("data.size=[240]", ["'data.size'", "2 values"]),
        ("data.overlap=[0.8, 0.3]", ["'data.overlap'", "low < high"]),
        ("optim.steps=10", ["optim.steps / optim.epochs", "exactly one"]),
        ("data=5", ["data is 5 (int)", "keys and values"]),
        ("task={}", ["task.name"]),
        ("colour=red", ["'colour'", "Closest"]),
        ("optim.lr", ["not of the form key=value"]),
        ("name.sub=1", ["holds a value"]),
    ],
)
def test_mistake_is_named_with_what_is_accepted(override, parts):
    with pytest.raises(RecipeError) as error:
        load_recipe("pri3d_view_r18", [override])
    for part in parts:
        assert part in str(error.value)


def test_numbers_written_with_an_exponent_are_numbers():
    assert load_recipe("pri3d_view_r18", ["optim.lr=1e-3"]).optim.lr == 1e-3


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UnknownName, match="'pri3d_view_r18'"):
        load_recipe("pri3d_veiw_r18")


def test_file_that_is_not_yaml_is_refused(tmp_path):
    for text, part in (("a: [", "not valid YAML"), ("just words", "expected keys")):
        path = tmp_path / "broken.yaml"
        path.write_text(text)
        with pytest.raises(RecipeError, match=part):
            load_recipe(str(path))


def test_missing_key_is_named(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("task: {name: pri3d_view}\noptim: {steps: 3}\n")
    with pytest.raises(RecipeError, match="'name' is missing"):
        load_recipe(str(path))
