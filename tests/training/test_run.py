"""Recipes in two stages: the first one's checkpoint is where the second starts; each can be interrupted and reused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.cli import app
from geo_pretrain.errors import CheckpointError, RecipeError
from geo_pretrain.training.distributed import World
from geo_pretrain.training.export import run_licence
from geo_pretrain.training.recipe import load_recipe, load_stage1
from geo_pretrain.training.run import run_recipe

ALONE = World(0, 1, torch.device("cpu"))
STILL = {"steps": 1, "lr": 1e-12, "bn_momentum": "floor"}  # leaves the start weights as they are


@pytest.fixture
def staged(tiny_recipe, tmp_path):
    """A recipe that starts from what another one trained; the first takes 2 steps, the second none to speak of."""
    first = tmp_path / "first.yaml"
    first.write_bytes(tiny_recipe(name="pri3d_view_r18.first", optim={"steps": 5}).read_bytes())
    stage1 = {"recipe": str(first), "optim": {"steps": 2}}
    model = {"depth": 18, "init": "stage1", "width": 8}
    return tiny_recipe(name="pri3d_view_r18.second", model=model, stage1=stage1, optim=STILL, seed=3)


def both(path, overrides=()):
    recipe = load_recipe(str(path), overrides)
    return recipe, load_stage1(recipe)


def weights(folder, role="encoder"):
    return load_file(folder / f"{role}.safetensors")


def test_the_second_stage_starts_from_what_the_first_trained(staged, tmp_path):
    recipe, first = both(staged)
    assert (first.optim.steps, first.seed) == (2, 3)
    outcome = run_recipe(recipe, tmp_path / "out", ALONE, stage1=first)
    stage1 = read_checkpoint(tmp_path / "out.stage1")
    assert (stage1.name, stage1.provenance["steps"]) == ("pri3d_view_r18.first", 2)
    before, after = weights(tmp_path / "out.stage1"), weights(tmp_path / "out")
    torch.testing.assert_close(after["layer1.0.conv1.weight"], before["layer1.0.conv1.weight"], atol=1e-9, rtol=0)
    decoders = weights(tmp_path / "out.stage1", "decoder"), weights(tmp_path / "out", "decoder")
    torch.testing.assert_close(*(d["up1.conv1.weight"] for d in decoders), atol=1e-9, rtol=0)
    assert outcome.checkpoint.licence.base_model.startswith("pri3d_view_r18.first (")
    kept = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert "folder" not in kept["stage1"]  # so that the recipe runs anywhere


def test_a_finished_first_stage_is_used_again_and_one_of_another_recipe_is_not(staged, tmp_path):
    recipe, first = both(staged)
    run_recipe(recipe, tmp_path / "out", ALONE, stage1=first)
    log = (tmp_path / "out.stage1" / "log.jsonl").stat().st_mtime_ns
    run_recipe(recipe, tmp_path / "out", ALONE, stage1=replace(first, workers=2), overwrite=True)
    assert (tmp_path / "out.stage1" / "log.jsonl").stat().st_mtime_ns == log
    other = replace(first, optim=replace(first.optim, lr=0.01))
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    with pytest.raises(
        RecipeError, match=r"out\.stage1 holds a first stage of another recipe; it differs in: lr: 0\.01"
    ):
        run_recipe(recipe, tmp_path / "out", ALONE, stage1=other)
    run_recipe(recipe, tmp_path / "out", ALONE, stage1=other, overwrite=True)
    assert (tmp_path / "out.stage1" / "log.jsonl").stat().st_mtime_ns != log


def test_other_start_weights_leave_the_first_stage_out(staged, tmp_path):
    recipe, first = both(staged)
    run_recipe(recipe, tmp_path / "out", ALONE, stage1=first)
    chosen = load_recipe(str(staged), [f"model.init={tmp_path / 'out.stage1'}"])
    assert not chosen.needs_stage1
    run_recipe(chosen, tmp_path / "chosen", ALONE, stage1=first)
    assert not (tmp_path / "chosen.stage1").exists()
    torch.testing.assert_close(
        weights(tmp_path / "chosen")["conv1.weight"], weights(tmp_path / "out")["conv1.weight"], atol=0, rtol=0
    )


def test_a_finished_checkpoint_is_refused_before_the_first_stage_is_trained(staged, tmp_path):
    recipe, first = both(staged)
    run_recipe(recipe, tmp_path / "out", ALONE, stage1=first)
    (tmp_path / "out.stage1").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        run_recipe(recipe, tmp_path / "out", ALONE, stage1=first)
    assert not (tmp_path / "out.stage1").exists()


def test_the_command_trains_both_stages_on_the_data_it_is_given(staged, recording, tmp_path):
    arguments = ["train", str(staged), "--out", str(tmp_path / "out"), "--data", f"seven_scenes:{recording}"]
    result = CliRunner().invoke(app, [*arguments, "--set", "stage1.optim.steps=1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert read_checkpoint(tmp_path / "out.stage1").name == "pri3d_view_r18.seven_scenes"
    assert read_checkpoint(tmp_path / "out.stage1").provenance["steps"] == 1
    assert read_checkpoint(tmp_path / "out").provenance["init"] == str(tmp_path / "out.stage1")


def test_stage1_without_a_first_stage_is_an_error(tiny_recipe, tmp_path):
    recipe = load_recipe(str(tiny_recipe(model={"depth": 18, "init": "stage1", "width": 8})))
    with pytest.raises(RecipeError, match="no first stage was trained"):
        run_recipe(recipe, tmp_path / "out", ALONE)
    with pytest.raises(RecipeError, match=r"stage1\.recipe"):
        load_recipe(str(tiny_recipe(stage1={"optim": {"steps": 1}})))


def test_a_first_stage_has_none_of_its_own(staged, tiny_recipe):
    recipe = load_recipe(str(staged), [f"stage1.recipe={staged}"])
    with pytest.raises(RecipeError, match="a recipe of one stage"):
        load_stage1(recipe)


def test_the_licence_of_two_stages_is_known_before_the_first_is_trained(tiny_recipe):
    chain = {"model": {"depth": 18, "init": "stage1"}, "stage1": {"recipe": "pri3d_view_r18"}}
    licence = run_licence(load_recipe(str(tiny_recipe(**chain))))
    assert [name for name, _ in licence.datasets[1:]] == ["ScanNet", "ImageNet"]
    assert licence.base_model == "pri3d_view_r18 (LicenseRef-ScanNet-ToU)"


@pytest.mark.parametrize(
    "teacher, weights, datasets, named",
    [
        ("imagenet", "LicenseRef-data-owner", ["ImageNet"], "teacher: torchvision ResNet-50 IMAGENET1K_V1"),
        ("pri3d_view_r18.rooms", "LicenseRef-data-owner", ["rooms"], "teacher: pri3d_view_r18.rooms (MIT)"),
    ],
)
def test_the_licence_names_the_teacher(tiny_recipe, teacher, weights, datasets, named):
    path = tiny_recipe("pointcontrast_nce", task={"name": "ppkt", "teacher": teacher})
    licence = run_licence(load_recipe(str(path)))
    assert (licence.weights, [name for name, _ in licence.datasets[1:]]) == (weights, datasets)
    assert named in licence.base_model


def test_a_permissive_data_set_takes_the_terms_of_the_teacher(tiny_recipe):
    path = tiny_recipe("pointcontrast_nce", task={"name": "ppkt", "teacher": "moco_v2"})
    licence = run_licence(load_recipe(str(path), ["data.licence=CC0-1.0"]))
    assert licence.weights in ("CC-BY-NC-4.0", "LicenseRef-ImageNet-terms")
