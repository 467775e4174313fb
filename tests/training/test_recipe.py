"""Recipes: all that ship parse, wrong ones say which key, what was given, what is accepted."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from geo_pretrain.backbones.encoder import HOST_WIDTH
from geo_pretrain.errors import RecipeError, UnknownName
from geo_pretrain.training.config import parse
from geo_pretrain.training.data.samples.sampler import total_steps
from geo_pretrain.training.pretrain import needs_stage1
from geo_pretrain.training.recipe import (
    RECIPES,
    RENAMED,
    TOY,
    Recipe,
    changes,
    list_recipes,
    load_recipe,
    load_stage1,
)
from geo_pretrain.training.tasks import TASKS


def test_the_sweep_sees_every_recipe_file():
    assert len(list_recipes()) == len(list(RECIPES.glob("*.yaml"))) >= 4


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_carries_its_own_name_and_survives_yaml(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.task["name"] in TASKS
    assert parse(Recipe, yaml.safe_load(recipe.to_yaml()), where="again") == recipe


# Thousands of samples in ScanNet as their papers count them: pairs (Pri3D, PointContrast), frames (PPKT), ImageNet's.
SAMPLES = {"csc": 870, "pointcontrast": 870, "img2pc": 100, "ppkt": 100, "ppkd": 100, "global": 100, "gupta": 100,
           "crd": 100, "moco_v2_in_sn_combine": 840 + 1281, "moco_v2_in_sn_mixing": 1281}  # fmt: skip
HEADER = re.compile(r"# Gives ([\d.]+)k steps of (\d+): ([\d.]+) passes through (\d+)k .*\.")


def test_headers_state_the_steps_and_samples_that_recipes_give():
    papers = [name for name in list_recipes() if load_recipe(name).data.source == "scannet"]
    assert len(papers) > 30
    for name in papers:
        recipe = load_recipe(name)
        text = (RECIPES / f"{name}.yaml").read_text()
        given = [HEADER.fullmatch(line) for line in text.splitlines() if line.startswith("# Gives")]
        assert len(given) == 1, name
        steps, batch, passes, count = (float(number) for number in given[0].groups())
        assert count == next((thousands for start, thousands in SAMPLES.items() if name.startswith(start)), 840), name
        own = total_steps(int(count * 1000), recipe.optim.batch, recipe.optim.epochs, recipe.optim.steps)
        assert (steps, batch) == (pytest.approx(own / 1000, abs=0.051), recipe.optim.batch), name
        assert passes == pytest.approx(own * recipe.optim.batch / count / 1000, abs=0.051), name
        assert (recipe.data.units == "pairs") == (recipe.data.measure == "voxels"), name  # the pairs of the papers


def test_the_former_key_depth_still_names_the_encoder(tmp_path, recwarn):
    recipe = load_recipe("pri3d_view_r50")
    former = tmp_path / "former.yaml"
    former.write_text(recipe.to_yaml().replace("encoder: resnet50", "depth: 50"))
    assert "depth: 50" in former.read_text()
    assert load_recipe(str(former)) == recipe
    assert load_recipe(str(former), ["model.depth=18"]).model.encoder == "resnet18"
    assert load_recipe("pri3d_view_r18", ["model.depth=50"]).model == recipe.model
    assert load_recipe("pri3d_view_r18", ["model={depth: 50}"]).model == recipe.model
    assert changes(former.read_text(), recipe.to_yaml()) == changes(recipe.to_yaml(), former.read_text()) == []
    assert changes(former.read_text(), load_recipe("pri3d_view_r50", ["model.depth=18"]).to_yaml()) == [
        "model.encoder: resnet50 -> resnet18"
    ]
    two_stages = load_recipe("gsc_r50", ["stage1.model.depth=18"])
    assert load_stage1(two_stages).model.encoder == "resnet18"
    assert not recwarn.list
    with pytest.raises(RecipeError, match=r"'model.encoder' is 'resnet34', accepted is one of resnet18, resnet50"):
        load_recipe("pri3d_view_r18", ["model.depth=34"])


@pytest.mark.parametrize("name", list_recipes())
def test_toy_overlay_brings_any_recipe_to_cpu_scale(name):
    toy = load_recipe(name, toy=True)
    assert toy.data.source == "rooms"
    assert toy.data.path is None
    assert toy.model is None or toy.model.init in ("scratch", "stage1")
    assert toy.unet3d is None or (toy.unet3d.width == 16 and toy.unet3d.voxel_size >= 0.05)
    assert toy.optim.steps <= 500
    assert toy.precision == "auto"
    full = load_recipe(name)
    changed = {key for key in toy.task if toy.task[key] != full.task.get(key)}
    scale = {"temperature", "matches", "rotation", "frustum", "queue", "momentum", "resize", "bn_groups", "mix"}
    teachers = {"teacher", "dense", "targets"}  # whose files would be downloads, as are the images of "mix"
    assert changed <= scale | teachers  # and not what is learned
    assert toy.task.keys() >= full.task.keys()
    assert [(toy.model is None), (toy.unet3d is None)] == [(full.model is None), (full.unet3d is None)]


def test_a_size_may_be_written_as_size_options_have_it():
    assert load_recipe("pri3d_view_r18", ["data.size=96x128"]).data.size == (96, 128)
    with pytest.raises(RecipeError) as caught:
        load_recipe("pri3d_view_r18", ["data.size=96", "optim.lr=fast"])
    assert str(caught.value).startswith("2 mistakes:")  # of the command line, not of the file


def test_small_sizes_keep_task_and_data_of_any_recipe():
    for name in list_recipes():
        full, small = load_recipe(name), load_recipe(name, small=True)
        assert (small.data.source, small.data.path, small.data.options) == (full.data.source, None, full.data.options)
        assert small.model is None or small.model.init in ("scratch", "stage1")
        assert (small.data.size, small.optim.epochs, small.workers) == ((120, 160), None, 2)
        assert small.optim.steps <= 250
        assert [(small.model is None), (small.unet3d is None)] == [(full.model is None), (full.unet3d is None)]
        if small.stage1 is not None:
            assert load_stage1(small, small=True).data.size == (120, 160)
    view = load_recipe("pri3d_view_r18", small=True)
    assert (view.name, view.task["temperature"], view.task["matches"]) == ("pri3d_view_r18.small", 0.1, 1024)
    assert (view.optim.batch, view.optim.steps, view.optim.lr) == (4, 250, 0.03)  # as the help of --small says


def test_an_encoder_of_timm_that_is_asked_for_has_its_own_width_under_toy():
    assert load_recipe("pri3d_view_r18", ["model.encoder=timm/efficientnet_lite0"], toy=True).model.width == HOST_WIDTH
    assert load_recipe("pri3d_view_r18", toy=True).model.width < HOST_WIDTH


@pytest.mark.parametrize(
    "name", ["gsc_r50", *(f"pri3d_{prior}_r50.continued" for prior in ("view", "geo", "view_geo"))]
)
def test_second_stages_stay_second_stages_under_toy(name):
    """Their BatchNorm momentum is the end of the first stage's schedule; random weights would keep no statistics."""
    full, toy = load_recipe(name), load_recipe(name, toy=True)
    assert (full.model.init, full.optim.bn_momentum) == ("stage1", "floor")
    assert (toy.model.init, needs_stage1(toy), toy.model.width) == ("stage1", True, 32)
    assert load_stage1(toy, toy=True).optim.bn_momentum == "pri3d"
    assert load_recipe("pri3d_view_r50", toy=True).model.init == "scratch"


def test_toy_settings_of_tasks_belong_to_tasks_and_reach_their_recipes():
    own = yaml.safe_load(TOY.read_text(encoding="utf-8"))["tasks"]
    assert own.keys() <= TASKS.keys()
    toy = load_recipe("pointcontrast_nce_srunet34", toy=True)
    assert own["pointcontrast_nce"]["task"].items() <= toy.task.items()
    assert toy.optim.lr == own["pointcontrast_nce"]["optim"]["lr"]
    assert load_recipe("csc_100k_srunet34", toy=True).optim.lr == own["csc"]["optim"]["lr"] != toy.optim.lr
    assert load_recipe("pri3d_geo_r18", toy=True).unet3d.voxel_size == 0.1


def test_published_settings_are_those_of_the_released_code():
    """methods.md 5.4, first column."""
    recipe = load_recipe("pri3d_view_r18")
    o = recipe.optim
    assert (o.batch, o.lr, o.momentum, o.dampening, o.weight_decay, o.schedule, o.power, o.epochs) == (
        64, 0.1, 0.9, 0.1, 0.0, "poly", 0.9, 5,
    )  # fmt: skip
    assert (o.bn_momentum, recipe.model.init, recipe.data.size) == ("pri3d", "imagenet", (240, 320))
    assert {"temperature": 0.4, "matches": 1024, "tolerance": 0.05, "depth_proxy": True}.items() <= recipe.task.items()
    assert dataclasses.replace(load_recipe("pri3d_view_r50").model, encoder="resnet18") == recipe.model


@pytest.mark.parametrize("prior", ["geo", "view_geo"])
@pytest.mark.parametrize("depth", [18, 50])
def test_geometric_prior_is_trained_as_the_view_prior_is(prior, depth):
    view, recipe = load_recipe(f"pri3d_view_r{depth}"), load_recipe(f"pri3d_{prior}_r{depth}")
    assert (recipe.optim, recipe.model, recipe.data) == (view.optim, view.model, view.data)
    assert recipe.task.keys() >= {"temperature", "matches", "geo_tolerance", "depth_proxy"}
    u = recipe.unet3d
    assert (u.variant, u.width, u.in_chans, u.out_chans, u.stem_kernel, u.voxel_size) == ("34C", 32, 3, 96, 5, 0.02)


@pytest.mark.parametrize("depth", [18, 50])
def test_view_without_depth_differs_in_the_depth_proxy_alone(depth):
    with_it, without = load_recipe(f"pri3d_view_r{depth}"), load_recipe(f"pri3d_view_r{depth}.nodepth")
    assert dataclasses.replace(without, name=with_it.name, task=without.task | {"depth_proxy": True}) == with_it


@pytest.mark.parametrize(
    "name, lr, every, first_decay, steps",
    [
        ("pointcontrast_nce_srunet34", 0.05, 250, True, 60000),
        ("pointcontrast_hardest_srunet34", 0.1, 250, True, 60000),
        ("csc_20k_srunet34", 0.1, 1000, False, 20000),
        ("csc_60k_srunet34", 0.1, 1000, False, 60000),
        ("csc_100k_srunet34", 0.1, 1000, False, 100000),
    ],
)
def test_published_settings_of_cloud_pairs_are_those_of_the_released_code(name, lr, every, first_decay, steps):
    """methods.md 5.1 and 5.4."""
    recipe = load_recipe(name)
    o, u = recipe.optim, recipe.unet3d
    assert (o.batch, o.lr, o.momentum, o.dampening, o.weight_decay, o.bn_momentum) == (
        32, lr, 0.8, 0.0, 1e-4, "constant",
    )  # fmt: skip
    assert (o.schedule, o.gamma, o.every, o.first_decay, o.steps) == ("exponential", 0.99, every, first_decay, steps)
    assert (u.variant, u.width, u.out_chans, u.stem_kernel, u.voxel_size, u.bn_momentum) == (
        "34C", 32, 32, 3, 0.025, 0.05,
    )  # fmt: skip
    assert recipe.model is None


def test_toy_overlay_gives_a_recipe_no_network_it_has_not(tmp_path):
    written = tmp_path / "written.yaml"
    written.write_text(load_recipe("pointcontrast_nce_srunet34").to_yaml())  # says "model: null"
    assert load_recipe(str(written), toy=True).model is None
    assert load_recipe("pri3d_view_r18", toy=True).unet3d is None


@pytest.mark.parametrize(
    "override, parts",
    [
        ("optim.lrr=0.1", ["'optim.lrr'", "'optim.lr'", "Accepted: kind, batch, lr"]),
        ("optim.batch=many", ["'optim.batch'", "'many' (str)", "a whole number"]),
        ("optim.batch=true", ["'optim.batch'", "True (bool)"]),
        ("optim.batch=0", ["'optim.batch'", "from 1 up"]),
        ("precision=fp61", ["'precision'", "fp32, bf16, auto", "Closest"]),
        ("data.size=[240]", ["'data.size'", "2 values"]),
        ("data.overlap=[0.8, 0.3]", ["'data.overlap'", "low < high"]),
        ("optim.steps=10", ["optim.steps / optim.epochs", "exactly one"]),
        ("data=5", ["data is 5 (int)", "keys and values"]),
        ("task={}", ["task.name"]),
        ("unet3d={voxel_size: 0}", ["'unet3d.voxel_size'", "meters above 0"]),
        ("unet3d={width: 0}", ["'unet3d.width'", "from 1 up"]),
        ("unet3d={variant: 34D}", ["'unet3d.variant'", "Closest: '34C'"]),
        ("data.measure=exact", ["'data.measure'", "projective, match_released_code"]),
        ("color=red", ["'color'", "Closest"]),
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


FORMER = """
name: pri3d_view_r18.old
task: {name: pri3d_view, authors_exact: true}
model: {init: scratch}
data: {licence: CC0-1.0, measure: authors_exact, augment: {grey_prob: 0.25}}
stage1: {recipe: pri3d_view_r18, data: {licence: MIT, augment: {grey_prob: 0.5}}}
optim: {steps: 3}
"""
TODAY = (
    FORMER.replace("licence", "license").replace("authors_exact", "match_released_code").replace("grey_", "grayscale_")
)


def test_former_keys_are_read_in_files_and_overrides_and_written_as_todays(tmp_path):
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(FORMER)
    new.write_text(TODAY)
    recipe = load_recipe(str(old))
    assert recipe == load_recipe(str(new))
    assert recipe == parse(Recipe, yaml.safe_load(FORMER), where="here", renames=RENAMED)
    assert recipe.data.augment.grayscale_prob == 0.25
    assert recipe.data.measure == "match_released_code"
    assert recipe.task["match_released_code"] is True
    first = load_stage1(recipe)
    assert (first.data.license, first.data.augment.grayscale_prob) == ("MIT", 0.5)
    assert yaml.safe_load(recipe.to_yaml())["data"]["license"] == "CC0-1.0"
    former = ["data.licence=MIT", "data.augment={grey_prob: 0.75}", "stage1.data.augment.grey_prob=1"]
    changed = load_recipe(str(new), [*former, "data.measure=authors_exact", "task.authors_exact=false"])
    assert (changed.data.license, changed.data.augment.grayscale_prob) == ("MIT", 0.75)
    assert (changed.data.measure, changed.task["match_released_code"]) == ("match_released_code", False)
    assert changed.stage1.overrides["data"]["augment"] == {"grayscale_prob": 1}


def test_a_stored_recipe_with_former_keys_is_no_other_recipe():
    assert changes(FORMER, TODAY) == []
    assert changes(FORMER, TODAY.replace("0.25", "0.75")) == ["data.augment.grayscale_prob: 0.25 -> 0.75"]


def test_a_key_that_is_given_under_both_names_is_an_error(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(TODAY.replace("{license: CC0-1.0", "{license: CC0-1.0, licence: MIT"))
    with pytest.raises(RecipeError, match=r"'data.license' is given twice, also by its former name 'data.licence'"):
        load_recipe(str(path))


def test_all_mistakes_are_named_at_once():
    wrong = ["optim.lrr=1", "optim.batch=0", "data.size=[240]", "precision=fp61", "data.license=MTI", "optim.steps=3"]
    with pytest.raises(RecipeError) as error:
        load_recipe("pri3d_view_r18", [*wrong, "color=red"])
    first, *lines = str(error.value).splitlines()
    assert first.endswith("pri3d_view_r18.yaml: 7 mistakes:")
    for part in (
        "unknown key 'color'. Closest",
        "unknown key 'optim.lrr'. Closest: 'optim.lr'",
        "'data.size' is [240] (list), accepted is a list of 2 values, such as [96, 128] or 96x128",
        "data.license: Unknown license 'MTI'. Closest: 'MIT'",
        "'precision' is 'fp61' (str), accepted is one of fp32, bf16, auto. Closest: 'bf16'",
        "'optim.steps / optim.epochs' is (3, 5.0), accepted is exactly one of the two",
        "'optim.batch' is 0, accepted is a whole number from 1 up",
    ):
        assert len([line for line in lines if line.startswith(f"  - {part}")]) == 1, part


def test_checks_of_a_wrong_value_are_left_out():
    """What stands in for a value of the wrong type is nobody's mistake."""
    for overrides, count in (
        (["optim.steps=many"], 1),  # and not: exactly one of steps and epochs
        (["optim.epochs=null", "optim.stpes=5"], 1),
        (["optim.accumulate=0", "optim.batch=x"], 2),
        (["nmae=x", "name=null"], 2),
    ):
        with pytest.raises(RecipeError) as error:
            load_recipe("pri3d_view_r18", overrides)
        assert len(error.value.problems) == count, str(error.value)


def test_missing_keys_are_named_together_with_the_rest(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("optim: {steps: 3, batch: 0}\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path))
    texts = [problem.text for problem in error.value.problems]
    assert texts == [
        "key 'name' is missing.",
        "key 'task' is missing.",
        "'optim.batch' is 0, accepted is a whole number from 1 up.",
    ]


def test_overrides_that_cannot_be_applied_are_all_named():
    with pytest.raises(RecipeError) as error:
        load_recipe("pri3d_view_r18", ["optim.lr", "name.sub=1"])
    assert "not of the form key=value" in str(error.value)
    assert "'name' holds a value" in str(error.value)
