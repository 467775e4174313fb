"""`geo-pretrain bench`: what would be trained, a whole run in processes of its own, and how it says that one failed."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
from typer.testing import CliRunner

from geo_pretrain import cli, devices
from geo_pretrain.errors import DataError, RecipeError, UnknownName
from geo_pretrain.training.bench import plan as planning
from geo_pretrain.training.bench import run as running
from geo_pretrain.training.bench.plan import FULL, BenchSpec
from geo_pretrain.training.bench.report import BEGIN, END
from geo_pretrain.training.data.labelled import registry as sources
from geo_pretrain.training.tasks import TASKS
from tests.forked import forked_module
from tests.zoo import write_tiny_3d

TINY = [
    "data.size=[64, 80]",
    "data.options={scenes: 2, frames: 4, width: 80, height: 64}",
    "data.overlap=[0.1, 1.0]",
    "model.width=8",
]


def run(*arguments):
    result = CliRunner().invoke(cli.app, ["bench", "pretext", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def sets(*texts):
    return [part for text in texts for part in ("--set", text)]


def test_list_shows_every_task_with_its_recipe_and_first_stage():
    shown = run("--toy", "--list")
    assert shown.exit_code == 0
    lines = {line.split()[0]: line for line in shown.output.splitlines() if line.split()}
    assert set(TASKS) <= set(lines)
    assert "pri3d_view_r18.rooms" in lines["pri3d_view"]
    assert "57 steps" in shown.output
    with pytest.raises(UnknownName, match="pri3d_view"):
        run("--toy", "--list", "--task", "pri3d_veiw")


@pytest.fixture
def few(monkeypatch):
    """The toy measures little: what arrives in the processes is the same, their numbers are not looked at."""
    small = functools.partial(BenchSpec, pairs=4, val_scenes=2, labelled=1, pixels=500)
    monkeypatch.setattr(planning, "BenchSpec", small)


def test_bench_trains_measures_and_prints_one_table(tmp_path, few, monkeypatch):
    monkeypatch.setattr(running, "Popen", forked_module)  # the failure below is that of a new Python
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    command = ["--toy", "--task", "depth_prediction", "--seed", 0, "--steps", 1, "--finetune-steps", 1, *sets(*TINY)]
    first = run(*command, "--out", tmp_path / "bench", "--jobs", 2)
    assert first.exit_code == 0
    assert "cells: 2/2" in first.output
    assert "random weights" in first.output
    again = run(*command, "--out", tmp_path / "bench", "--json", "--render", page)
    results = json.loads(again.output)
    (group,) = results["groups"].values()
    assert group["tasks"]["depth_prediction"]["training"]["steps"] == 1
    assert results["budget"]["finetune_steps"] == 1
    assert "| `depth_prediction` |" in page.read_text()
    with pytest.raises(RecipeError, match="another budget: steps 1 -> 2"):
        run(*[2 if part == 1 else part for part in command], "--out", tmp_path / "bench")


def test_failed_task_is_in_the_table_and_the_exit_code(tmp_path, few):
    options = sets(*TINY, "data.overlap=[0.99999, 1.0]")
    shown = run("--toy", "--task", "depth_prediction", "--seed", 0, "--steps", 1, *options, "--out", tmp_path / "b")
    assert shown.exit_code == 1
    assert all(
        word in shown.output for word in ["No", "pair", "of", "frames", "is", "left"]
    )  # folded in a narrow terminal
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    assert "No pair of frames is left" in results["failed"]["depth_prediction"]["0"]


def test_a_setting_that_a_task_has_not_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(RecipeError, match=r"depth_prediction.*unknown key 'task\.no_such_setting'"):
        run("--toy", "--task", "depth_prediction", "--set", "task.no_such_setting=1", "--out", tmp_path / "b")
    with pytest.raises(RecipeError, match=r"the benchmark sets 'optim\.batch' for all tasks\. Give --batch"):
        run("--toy", "--set", "optim.batch=8", "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_three_dimensional_backbone_is_probed_on_voxels(tmp_path, monkeypatch):
    folder = write_tiny_3d(tmp_path / "tiny_net_srunet34").folder
    options = {"scenes": 2, "val_scenes": 1, "frames": 3, "labelled": 2, "width": 64, "height": 64}
    real = sources.open_labelled
    monkeypatch.setattr(sources, "open_labelled", lambda *given, **named: real(*given, **named | {"options": options}))
    command = ["eval", "probe", str(folder), "--probes", "linear", "--pixels", "200"]
    shown = CliRunner().invoke(cli.app, command, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.exception
    assert "voxel accuracy" in shown.output
    numbers = json.loads(CliRunner().invoke(cli.app, [*command, "--json"]).output)
    assert set(numbers) == {"xyz+color", "random", str(folder)}
    assert numbers["random"]["linear"]["channels"] == 12
    assert numbers["random"]["linear"]["pixels"][0] == 200


def test_every_option_arrives_and_a_missing_task_is_an_exit_code(tmp_path, monkeypatch):
    calls, results = [], {"failed": {}, "not available": {}}

    def bench(*arguments, **options):
        calls.append((arguments, options))
        return results

    monkeypatch.setattr(running, "run_bench", bench)
    monkeypatch.setattr(devices, "device_fault", lambda device: None)
    options = ["--seed", 4, "--seed", 2, "--steps", 9, "--batch", 3, "--finetune-steps", 5, "--jobs", 6]
    more = ["--device", "cuda", "--task", "pri3d_view", "--set", "data.overlap=[0.1, 1.0]", "--json"]
    assert run("--out", tmp_path / "b", "--toy", *options, *more).exit_code == 0
    (rows, seeds, spec, out), named = calls.pop()
    assert [row.task for row in rows] == ["pri3d_view"]
    assert (seeds, out) == ([4, 2], tmp_path / "b")
    changed = {"steps": 9, "batch": 3, "finetune_steps": 5, "overrides": ("data.overlap=[0.1, 1.0]",)}
    assert spec == dataclasses.replace(BenchSpec(), **changed)
    assert (named["jobs"], named["device"]) == (6, "cuda")
    results["not available"] = {"moco": "its data are not rooms"}
    assert run("--json").exit_code == 1
    (rows, seeds, spec, out), named = calls.pop()
    assert {row.task for row in rows} >= set(TASKS)
    assert (seeds, spec, str(out)) == ([0, 1, 2], FULL, "bench")
    assert (named["jobs"], named["device"]) == (None, "cpu")
    with pytest.raises(RecipeError):
        run("--json", "--steps", 0)  # as given, not as if nothing were
    page = tmp_path / "page.md"
    page.write_text("no place for a table")
    with pytest.raises(DataError, match="no lines"):
        run("--json", "--render", page)
    assert not calls
