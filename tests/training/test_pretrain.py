"""Recipes in two stages: the first one's checkpoint is where the second starts; each can be interrupted and reused."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.cli import app
from geo_pretrain.errors import CheckpointError, RecipeError, UnknownName
from geo_pretrain.training.distributed import World
from geo_pretrain.training.pretrain import load_checked_recipe, needs_stage1, run_recipe
from geo_pretrain.training.recipe import changes, list_recipes, load_recipe, load_stage1
from geo_pretrain.training.runs import run_lock
from tests.training.test_licenses import license_of

ALONE = World(0, 1, torch.device("cpu"))
STILL = {"steps": 1, "lr": 1e-12, "bn_momentum": "floor"}  # leaves the start weights as they are


@pytest.fixture
def staged(tiny_recipe, tmp_path):
    """A recipe that starts from what another one trained; the first takes 2 steps, the second none to speak of."""
    first = tmp_path / "first.yaml"
    first.write_bytes(tiny_recipe(name="pri3d_view_r18.first", optim={"steps": 5}).read_bytes())
    stage1 = {"recipe": str(first), "optim": {"steps": 2}}
    model = {"encoder": "resnet18", "init": "stage1", "width": 8}
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
    assert outcome.checkpoint.license.base_model.startswith("pri3d_view_r18.first (")
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
        RecipeError,
        match=r"out\.stage1 holds a first stage of another recipe; it differs in: optim\.lr: .* -> 0\.01\. ",
    ):
        run_recipe(recipe, tmp_path / "out", ALONE, stage1=other)
    run_recipe(recipe, tmp_path / "out", ALONE, stage1=other, overwrite=True)
    assert (tmp_path / "out.stage1" / "log.jsonl").stat().st_mtime_ns != log


def test_what_the_first_stage_saw_is_compared_whole(staged, recording, tmp_path):
    """Also the values of lists, and the files behind an unchanged recipe."""
    data = [f"data.{item}" for item in ("source=seven_scenes", f"path={recording}", "options={}")]
    recipe, first = both(staged, data)
    run_recipe(recipe, tmp_path / "out", ALONE, stage1=first)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    for key, value in (("frames", (0.0, 0.5)), ("size", (96, 128)), ("overlap", (0.0, 1.0))):
        other = replace(first, data=replace(first.data, **{key: value}))
        with pytest.raises(RecipeError, match=rf"differs in: data\.{key}: \[.*\] -> \[{value[0]}, {value[1]}\]"):
            run_recipe(recipe, tmp_path / "out", ALONE, stage1=other)
    (depth, *_) = sorted(recording.rglob("*.depth.png"))
    os.utime(depth, ns=(1, 1))
    with pytest.raises(RecipeError, match=r"differs in: the files of the data\. "):
        run_recipe(recipe, tmp_path / "out", ALONE, stage1=first)


def test_both_stages_see_the_same_data_in_the_same_network(staged, tiny_recipe):
    """Whether the file or the command line says so, unless stage1 itself says otherwise."""
    chosen = [
        "data.source=scannet",
        "data.path=/scans",
        "data.size=[120, 160]",
        "data.frames=[0, 0.3]",
        "data.overlap=[0.1, 0.9]",
        "data.measure=match_released_code",
        "data.options={labels: label-filt}",
        "data.license=MIT",
        "model.width=16",
    ]
    recipe, first = both(staged, chosen)
    assert (first.data, first.model.width) == (recipe.data, 16)
    assert first.model.init == "scratch"
    _, first = both(staged, [*chosen, "stage1.data.size=[64, 64]", "stage1.model.width=32"])
    assert (first.data.size, first.data.path, first.model.width) == ((64, 64), "/scans", 32)
    _, first = both(staged, ["data.options={}"])
    assert first.data.options == {}  # not those of the first stage's own file
    frames, first = both(staged, ["data.units=frames", "data.overlap=[0.1, 0.9]", "data.size=[64, 64]"])
    assert (first.data.units, first.data.size) == ("pairs", (64, 64))
    assert first.data.overlap != frames.data.overlap
    teacher = both(staged, ["model.width=16", "model.init=scratch", "task.teacher=stage1"])[1]
    assert teacher.model.width == 8  # another network


@pytest.mark.parametrize("toy", [False, True])
@pytest.mark.parametrize("name", list_recipes())
def test_the_stages_of_published_recipes_fit_together(name, toy):
    """What is taken over changes nothing in them: their files agree already."""
    recipe = load_recipe(name, toy=toy)
    if not needs_stage1(recipe):
        return
    alone = load_recipe(recipe.stage1.recipe, toy=toy)
    first = load_stage1(recipe, toy=toy)
    assert set(changes(alone.to_yaml(), first.to_yaml())) <= {f"seed: {alone.seed} -> {recipe.seed}"}


def test_other_start_weights_leave_the_first_stage_out(staged, tmp_path):
    recipe, first = both(staged)
    run_recipe(recipe, tmp_path / "out", ALONE, stage1=first)
    chosen = load_recipe(str(staged), [f"model.init={tmp_path / 'out.stage1'}"])
    assert not needs_stage1(chosen)
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


def test_a_folder_is_trained_by_one_process_at_a_time(staged, tmp_path):
    recipe, first = both(staged)
    with (
        run_lock(tmp_path / "out", "training run"),
        pytest.raises(CheckpointError, match="Another process is at work"),
    ):
        run_recipe(recipe, tmp_path / "out", ALONE, stage1=first)
    assert not (tmp_path / "out.stage1").exists()


def test_a_link_leads_to_the_same_lock_and_a_first_stage_has_its_own(staged, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "above").symlink_to(tmp_path)
    for other in ("link", "above/real", "above/link"):
        busy = pytest.raises(CheckpointError, match="is at work")
        with run_lock(tmp_path / "real", "run"), busy, run_lock(tmp_path / other, "run"):
            pass
    recipe, first = both(staged)
    with run_lock(tmp_path / "out.stage1", "training run"), pytest.raises(CheckpointError, match="on the first stage"):
        run_recipe(recipe, tmp_path / "out", ALONE, stage1=first)
    assert not (tmp_path / "out").exists()


def test_stage1_without_a_first_stage_is_an_error(tiny_recipe, tmp_path):
    recipe = load_recipe(str(tiny_recipe(model={"encoder": "resnet18", "init": "stage1", "width": 8})))
    with pytest.raises(RecipeError, match="no first stage was trained"):
        run_recipe(recipe, tmp_path / "out", ALONE)
    with pytest.raises(RecipeError, match=r"stage1\.recipe"):
        load_recipe(str(tiny_recipe(stage1={"optim": {"steps": 1}})))


def test_a_first_stage_has_none_of_its_own(staged, tiny_recipe):
    recipe = load_recipe(str(staged), [f"stage1.recipe={staged}"])
    with pytest.raises(RecipeError, match="a recipe of one stage"):
        load_stage1(recipe)


def test_the_license_of_two_stages_is_known_before_the_first_is_trained(tiny_recipe):
    chain = {"model": {"encoder": "resnet18", "init": "stage1"}, "stage1": {"recipe": "pri3d_view_r18"}}
    license = license_of(load_recipe(str(tiny_recipe(**chain))))
    assert [name for name, _ in license.datasets[1:]] == ["ScanNet", "ImageNet"]
    assert license.base_model == "pri3d_view_r18 (LicenseRef-ScanNet-ToU)"


@pytest.mark.parametrize(
    "teacher, weights, datasets, named",
    [
        ("imagenet", "LicenseRef-data-owner", ["ImageNet"], "teacher: torchvision ResNet-50 IMAGENET1K_V1"),
        ("pri3d_view_r18.rooms", "LicenseRef-data-owner", ["rooms"], "teacher: pri3d_view_r18.rooms (MIT)"),
    ],
)
def test_the_license_names_the_teacher(tiny_recipe, teacher, weights, datasets, named):
    path = tiny_recipe("pointcontrast_nce", task={"name": "ppkt", "teacher": teacher})
    license = license_of(load_recipe(str(path)))
    assert (license.weights, [name for name, _ in license.datasets[1:]]) == (weights, datasets)
    assert named in license.base_model


def test_a_permissive_data_set_takes_the_terms_of_the_teacher(tiny_recipe):
    path = tiny_recipe("pointcontrast_nce", task={"name": "ppkt", "teacher": "moco_v2"})
    license = license_of(load_recipe(str(path), ["data.license=CC0-1.0"]))
    assert license.weights in ("CC-BY-NC-4.0", "LicenseRef-ImageNet-terms")


def test_changes_between_recipes_are_named_by_key():
    before = "a: 1\nb: {c: [1, 2], d: {}}\nworkers: 2\ndata: {path: x, size: 3}\ngone: null\n"
    now = "a: 1\nb: {c: [2, 2], d: {e: 1}}\nworkers: 4\ndata: {path: y, size: 3}\n"
    assert changes(before, now) == [
        "b.c: [1, 2] -> [2, 2]",
        "b.d.e: (none) -> 1",
        "gone: None -> (none)",
    ]
    assert changes(before, before) == []


def test_mistakes_in_settings_of_task_and_source_are_named_with_the_others():
    wrong = ["task.temprature=1", "task.matches=many", "optim.batch=0", "optim.lrr=1", "data.options={step: 1}"]
    with pytest.raises(RecipeError) as error:
        load_checked_recipe("pri3d_view_r18", wrong)
    first, *lines = str(error.value).splitlines()
    assert first.startswith("5 mistakes")
    for part in (
        "unknown key 'task.temprature'. Closest: 'task.temperature'",
        "'task.matches' is 'many' (str), accepted is a whole number",
        "'optim.batch' is 0",
        "unknown key 'optim.lrr'",
        "unknown key 'data.options.step'. Closest: ",
    ):
        assert len([line for line in lines if line.startswith(f"  - {part}")]) == 1, part


@pytest.mark.parametrize(
    "override, kind, text",
    [
        ("task.temprature=1", RecipeError, "unknown key 'task.temprature'. Closest: "),
        ("task.name=pri3d_veiw", UnknownName, "Unknown task 'pri3d_veiw'. Closest: 'pri3d_view'"),
        ("task.view=true", RecipeError, "recipe pri3d_view_r18: 'task.view' is not free"),
        ("task={}", RecipeError, "'task.name' is {}"),
    ],
)
def test_a_single_mistake_in_a_task_is_told_as_the_task_tells_it(override, kind, text):
    with pytest.raises(kind) as error:
        load_checked_recipe("pri3d_view_r18", [override])
    assert text in str(error.value)
    assert "mistakes" not in str(error.value)
