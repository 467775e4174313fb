"""The benchmark over pretext tasks: the same budget for all, cells that are kept, failures that stay where they are."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
from pathlib import Path

import pytest
import torch

from geo_pretrain.backbones.resnet_unet import ResNetEncoder, ResNetUNet
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.errors import CheckpointError, DataError, GeoPretrainError, RecipeError, UnknownName
from geo_pretrain.training.bench import measure as measuring
from geo_pretrain.training.bench import plan as planning
from geo_pretrain.training.bench import run as running
from geo_pretrain.training.bench.cell import Job, run_job, twin_key
from geo_pretrain.training.bench.plan import FULL, BenchSpec, Row, plan, rows
from geo_pretrain.training.bench.report import BEGIN, END, markdown, render, summarize, table
from geo_pretrain.training.bench.run import run_bench
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.runs import Interrupted, run_lock
from geo_pretrain.training.tasks import TASKS

ROOT = Path(__file__).parents[3]
SPEC = BenchSpec()
TINY = BenchSpec(
    steps=2,
    batch=2,
    finetune_steps=2,
    finetune_batch=2,
    pairs=2,
    val_scenes=1,
    labelled=1,
    pixels=60,
    overrides=(
        "data.size=[64, 80]",
        "data.options={scenes: 2, frames: 4, width: 80, height: 64}",
        "data.overlap=[0.1, 1.0]",
        "data.max_pairs_per_scene=4",
    ),
)
VIEW = "model.width=8"
CLOUDS = ("unet3d.width=8", "unet3d.voxel_size=0.2", "unet3d.variant=18A")


class Inline:
    """Stands for `subprocess.Popen`: does the cell's job at once, in this process."""

    begun: list[str] = []  # noqa: RUF012

    def __init__(self, command, *, stdout, **options):
        path = Path(command[-1])
        self.begun.append(path.stem)
        self.returncode, self.stdout = 0, stdout
        try:
            run_job(Job.from_json(path.read_text()))
        except GeoPretrainError as error:
            stdout.write(f"loading\nError: {error}\n".encode())
            self.returncode = 1

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        return self.returncode

    def send_signal(self, number):
        self.signaled = number


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(Inline, "begun", [])
    monkeypatch.setattr(running, "Popen", Inline)
    monkeypatch.setattr(running, "POLL", 0.0)
    return Inline


def available():
    return [row for row in rows() if row.recipe is not None]


def test_every_task_has_a_row_and_a_recipe_that_trains_it():
    found = rows()
    assert [row.task for row in found] == list(TASKS)
    for row in found:
        if row.recipe is None:
            assert row.why
            continue
        recipe = load_recipe(row.recipe)
        assert recipe.task["name"] == row.task
        assert row.kind == ("2D" if recipe.model is not None else "3D")
    assert rows(["csc"]) == [Row("csc", "csc_srunet34.rooms", "3D")]
    assert [row.task for row in rows(["csc", "pri3d_geo"])] == ["pri3d_geo", "csc"]
    with pytest.raises(UnknownName, match="pri3d_view"):
        rows(["pri3d_veiw"])


@pytest.mark.parametrize("spec", [SPEC, FULL], ids=["toy", "full"])
def test_all_tasks_get_the_same_rooms_images_and_samples(spec):
    base = planning.base_data(spec)
    for row in available():
        training = plan(row, spec, 1)
        recipe, first = training.recipe, training.stage1
        stages = [recipe] if first is None else [recipe, first.recipe]
        for stage in stages:
            assert (stage.data.source, stage.data.size, stage.data.options) == ("rooms", base.size, base.options)
            assert (stage.optim.batch, stage.seed) == (spec.batch, 1), row.task
        if first is not None and recipe.model is not None:  # one network, in two stages
            assert sum(stage.optim.steps for stage in stages) == spec.steps
            assert first.recipe.optim.steps > recipe.optim.steps
        else:
            assert [stage.optim.steps for stage in stages] == [spec.steps] * len(stages)


def test_trainings_are_told_apart_by_what_decides_their_weights():
    view, csc = rows(["pri3d_view"])[0], rows(["csc"])[0]
    keys = {
        plan(view, SPEC, 0).key,
        plan(view, SPEC, 1).key,
        plan(csc, SPEC, 0).key,
        plan(view, dataclasses.replace(SPEC, steps=101), 0).key,
        plan(view, dataclasses.replace(SPEC, overrides=("optim.lr=0.5",)), 0).key,
    }
    assert len(keys) == 5
    assert plan(view, SPEC, 0).key == plan(view, SPEC, 0).key
    with pytest.raises(RecipeError, match="not available: no recipe"):
        plan(Row("csc", None, None, "no recipe"), SPEC, 0)


def test_second_stage_starts_from_the_folder_of_the_first(tmp_path):
    gsc = [row for row in rows(["gsc"]) if row.recipe]
    ppkt = [row for row in rows(["ppkt"]) if row.recipe]
    assert gsc
    assert ppkt
    training = plan(gsc[0], SPEC, 0)
    assert training.stage1 is not None
    assert training.recipe.model.init == "stage1"
    job = Job("folder", 3, TINY, recipe="r.yaml", stage1=str(tmp_path))
    assert Job.from_json(job.to_json()).starts() == {"stage1": tmp_path}
    assert Job("folder", 3, TINY).starts() == {}
    taught = plan(ppkt[0], SPEC, 0)
    assert taught.recipe.task["teacher"] == "stage1"
    # The teacher is what the row of its own task trains, too: it is trained once for both.
    assert taught.stage1.key == plan(rows(["pri3d_view"])[0], SPEC, 0).key


def test_budget_is_checked():
    with pytest.raises(RecipeError, match="'steps' is 0"):
        BenchSpec(steps=0)


def test_job_is_a_file():
    job = Job("folder", 3, TINY, recipe="r.yaml", result="r.json", pretrained=False)
    assert Job.from_json(job.to_json()) == job


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Two tasks, 2D and 3D, two seeds for the first, trained and measured at a size that proves nothing."""
    out = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inline, "begun", [])
        patch.setattr(running, "Popen", Inline)
        patch.setattr(running, "POLL", 0.0)
        spec = dataclasses.replace(TINY, overrides=(*TINY.overrides, VIEW))
        seen: list[tuple[int, int, str]] = []
        results = run_bench(rows(["pri3d_view"]), [0, 1], spec, out, jobs=2, report=lambda *found: seen.append(found))
        return out, spec, results, seen, list(Inline.begun)


def test_cells_are_trained_measured_and_told(bench):
    out, _, results, seen, begun = bench
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    (group,) = results["groups"].values()
    row = group["tasks"]["pri3d_view"]
    assert group["kind"] == "2D"
    assert row["seeds"] == group["random"]["seeds"] == [0, 1]
    for measure in ("matching", "probe", "finetuned"):
        assert all(0 <= value <= 1 for value in (*row[measure], *group["random"][measure]))
        assert len(row[measure]) == 2
    assert row["training"]["steps"] == 2
    assert row["training"]["batch"] == 2
    assert row["training"]["views"] == 2
    assert len(row["training"]["seconds"]) == 2
    assert (results["failed"], results["not available"]) == ({}, {})
    assert len(begun) == 4  # two trained, two random
    assert seen[-1][:2] == (4, 4)
    for text in ("pri3d_view, seed 0: done", "pri3d_view, seed 1: done"):
        assert text in [line for *_, line in seen]
    folders = sorted((out / "checkpoints").glob("pri3d_view*-s?-????????"))
    assert [read_checkpoint(folder).provenance["seed"] for folder in folders] == [0, 1]


def test_finished_cells_are_not_repeated(bench, inline):
    out, spec, results, *_ = bench
    again = run_bench(rows(["pri3d_view"]), [0, 1], spec, out, jobs=1)
    assert inline.begun == []
    assert again["groups"] == results["groups"]
    assert results["seconds of all calls"] == results["seconds of this call"]
    assert again["seconds of all calls"] == results["seconds of this call"] + again["seconds of this call"]
    with pytest.raises(RecipeError, match="begun with another budget: steps 2 -> 3"):
        run_bench(rows(["pri3d_view"]), [0], dataclasses.replace(spec, steps=3), out)


def test_failed_task_holds_up_no_other_and_is_tried_again(bench, inline, monkeypatch):
    out, spec, results, *_ = bench
    real = planning.plan

    def broken(row, spec, seed):
        training = real(row, spec, seed)
        if row.task == "depth_prediction":
            recipe = dataclasses.replace(training.recipe, task={**training.recipe.task, "nonsense": 1})
            training = dataclasses.replace(training, key=training.key + "x", recipe=recipe)
        return training

    monkeypatch.setattr(running, "plan", broken)
    chosen = [*rows(["depth_prediction", "pri3d_view"]), Row("gone", None, None, "no recipe")]
    found = run_bench(chosen, [0, 1], spec, out, jobs=2)
    assert found["groups"] == results["groups"]
    assert list(found["failed"]) == ["depth_prediction"]
    assert "unknown key 'task.nonsense'" in found["failed"]["depth_prediction"]["1"]
    assert found["not available"] == {"gone": "no recipe"}
    assert len(inline.begun) == 2
    run_bench(chosen, [0, 1], spec, out, jobs=2)
    assert len(inline.begun) == 4
    shown = table(found)
    assert ["depth_prediction", *["failed (seed 0, 1)"] * 3, found["failed"]["depth_prediction"]["0"]] in shown
    assert ["gone", *["not available"] * 3, "no recipe"] in shown
    assert "| `depth_prediction` | failed |" in markdown(found)


def test_row_whose_first_stage_fails_fails_with_it(tmp_path, inline, monkeypatch):
    real = planning.plan

    def broken(row, spec, seed):
        training = real(row, spec, seed)
        first = training.stage1
        bad = dataclasses.replace(first.recipe, task={**first.recipe.task, "nonsense": 1})
        return dataclasses.replace(training, stage1=dataclasses.replace(first, recipe=bad))

    monkeypatch.setattr(running, "plan", broken)
    found = run_bench(rows(["gsc"]), [0], TINY, tmp_path, jobs=2)
    assert "first stage: " in found["failed"]["gsc"]["0"]
    assert "nonsense" in found["failed"]["first stage of gsc"]["0"]
    assert len(inline.begun) == 1
    assert found["groups"] == {}


def test_points_are_measured_too(tmp_path, inline):
    spec = dataclasses.replace(TINY, steps=1, finetune_steps=1, pairs=1, overrides=(*TINY.overrides, *CLOUDS))
    chosen = rows(["csc"])
    found = run_bench(chosen, [0], spec, tmp_path, jobs=2)
    (group,) = found["groups"].values()
    assert group["kind"] == "3D"
    assert group["threshold"] == "2 voxels"
    assert found["failed"] == {}
    assert [name.partition("-")[0] for name in inline.begun] == ["csc_srunet34.toy", "random"]
    (twin,) = (tmp_path / "cells").glob("random-*.json")
    assert (
        json.loads(twin.read_text())["matching"]
        != json.loads(next((tmp_path / "cells").glob("csc*")).read_text())["matching"]
    )


def test_a_task_with_a_teacher_is_measured_after_it(tmp_path, inline):
    spec = dataclasses.replace(TINY, steps=1, finetune_steps=1, pairs=1, overrides=(*TINY.overrides, *CLOUDS, VIEW))
    found = run_bench(rows(["ppkt"]), [0], spec, tmp_path, jobs=2)
    assert found["failed"] == {}
    assert [name.partition("-")[0] for name in inline.begun] == ["pri3d_view_r18.toy", "ppkt_srunet34.toy", "random"]
    (group,) = found["groups"].values()
    first = group["tasks"]["ppkt"]["training"]["first stage"]
    (teacher,) = (tmp_path / "checkpoints").glob("pri3d_view*")
    assert first["seconds"] == [read_checkpoint(teacher).provenance["seconds"]]
    (job,) = (tmp_path / "jobs").glob("ppkt*")
    assert Job.from_json(job.read_text()).starts() == {"stage1": teacher}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A program that runs in place of Python: the text of a shell script."""

    def set_up(script):
        path = tmp_path / "stand_in"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(running.sys, "executable", str(path))
        monkeypatch.setattr(running, "_prepare_rooms", lambda *_: None)

    return set_up


def test_processes_share_the_cores_and_stand_apart_from_the_terminal(tmp_path, monkeypatch, stand_in):
    """A Ctrl-C in a terminal goes to the whole process group; the second signal stops a training without saving."""
    second = f"until [ $(grep -c + {tmp_path}/trace) -gt 1 ]; do sleep 0.05; done"  # the first waits for it
    stand_in(f"echo + >> {tmp_path}/trace; {second}; sleep 0.3; ps -o pgid= -p $$; echo - >> {tmp_path}/trace; exit 1")
    monkeypatch.setattr(running.os, "cpu_count", lambda: 6)
    started = []
    monkeypatch.setattr(running, "Popen", lambda *a, **k: started.append(k["env"]) or subprocess.Popen(*a, **k))
    found = run_bench(rows(["pri3d_view"]), range(4), TINY, tmp_path / "out", jobs=2)
    trace = [{"+": 1, "-": -1}[line] for line in (tmp_path / "trace").read_text().split()]
    assert (len(trace), max(itertools.accumulate(trace))) == (8, 2)
    assert [environment["OMP_NUM_THREADS"] for environment in started] == ["3"] * 4
    groups = {int(text) for text in found["failed"]["pri3d_view"].values()}
    assert len(groups) == 4
    assert os.getpgrp() not in groups


def test_a_killed_process_is_called_killed(tmp_path, stand_in):
    stand_in("echo loading; echo training csc: 10/80; kill -9 $$")
    found = run_bench(rows(["csc"]), [0], TINY, tmp_path / "out", jobs=1)
    why = found["failed"]["csc"]["0"]
    assert why == "killed by SIGKILL, as when memory runs out; last said: training csc: 10/80"
    stand_in("kill -15 $$")
    found = run_bench(rows(["csc"]), [0], TINY, tmp_path / "out", jobs=1)
    assert found["failed"]["csc"]["0"] == "killed by SIGTERM; last said: nothing"
    stand_in("exit 3")
    found = run_bench(rows(["csc"]), [0], TINY, tmp_path / "out", jobs=1)
    assert found["failed"]["csc"]["0"] == "exit code 3"
    stand_in("echo all is well")
    found = run_bench(rows(["csc"]), [0], TINY, tmp_path / "out", jobs=1)
    assert found["failed"]["csc"]["0"] == "ended without a result; last said: all is well"


def test_a_folder_has_one_benchmark_at_a_time_and_a_mistyped_one_leaves_it_free(tmp_path, inline):
    mistyped = dataclasses.replace(TINY, overrides=(*TINY.overrides, "optim.lrr=0.1"))
    with pytest.raises(RecipeError, match=r"Closest: 'optim\.lr'"):
        run_bench(rows(["pri3d_view"]), [0], mistyped, tmp_path / "out")
    with (
        run_lock(tmp_path / "out", "benchmark"),
        pytest.raises(CheckpointError, match="at work on the benchmark"),
    ):
        run_bench(rows(["pri3d_view"]), [0], TINY, tmp_path / "out")
    assert not (tmp_path / "out" / "bench.json").exists()
    assert inline.begun == []


@pytest.mark.parametrize(
    "override, instead", [("optim.batch=8", "--batch"), ("optim.steps=1", "--steps"), ("seed=4", "--seed")]
)
def test_what_is_the_same_for_all_is_not_overridden(override, instead):
    with pytest.raises(RecipeError, match=f"{override.partition('=')[0]}.*Give {instead}"):
        BenchSpec(overrides=(override,))


def test_stop_reaches_the_processes_and_keeps_what_is_done(tmp_path, monkeypatch):
    processes = []

    class Endless(Inline):
        def __init__(self, command, *, stdout, **options):
            processes.append(self)
            self.returncode = None

        def poll(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(running, "Popen", Endless)
    with pytest.raises(Interrupted, match="same command again"):
        run_bench(rows(["pri3d_view"]), [0, 1], TINY, tmp_path, jobs=1)
    assert [process.signaled for process in processes] == [2]
    assert not (tmp_path / "results.json").exists()


def test_encoder_gets_the_same_new_decoder_whatever_it_learned():
    torch.manual_seed(1)
    encoders = [ResNetEncoder(18, width=8) for _ in range(2)]
    hosts = [measuring.encoder_segmenter(encoder, 5, seed=3) for encoder in encoders]
    assert all(isinstance(host, ResNetUNet) for host in hosts)
    for host, encoder in zip(hosts, encoders, strict=True):
        assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in host.encoder.state_dict().items())
    decoders = [host.decoder.state_dict() for host in hosts]
    assert all(torch.equal(value, decoders[1][key]) for key, value in decoders[0].items())
    assert not torch.equal(
        measuring.encoder_segmenter(encoders[0], 5, seed=4).decoder.conv0.weight, hosts[0].decoder.conv0.weight
    )


def test_twins_are_equal_where_architecture_and_input_are(tmp_path):
    from tests.zoo import write_tiny, write_tiny_3d

    one, two = (write_tiny(tmp_path / name, name).folder for name in ("tiny_net_r18", "other_net_r18"))
    other = write_tiny_3d(tmp_path / "tiny_net_srunet34").folder
    assert twin_key(one) == twin_key(two) != twin_key(other)


def made_up(kind, twin, seed, value, **more):
    matching = {"recall": value, "threshold": 4.0, "unit": "px", "chance": 0.007, "of": "dense output"}
    run = {"kind": kind, "twin": twin, "arch": f"{twin}(18)", "input": "ones", "seed": seed, "matching": matching}
    return run | {"probe": value / 2, "finetuned": value / 4} | more


def trained(seconds):
    return {"training": {"recipe": "r", "steps": 100, "batch": 4, "views": 2, "seconds": seconds}}


@pytest.fixture
def summary():
    chosen = [Row("csc", "c", "3D"), Row("pri3d_view", "v", "2D"), Row("gsc", "g", "2D"), Row("ppkt", "p", "3D")]
    values = {0: 0.2, 1: 0.3, 2: 0.7}
    found = {
        ("pri3d_view", seed): made_up("2D", "unet", seed, value, **trained(10.0)) for seed, value in values.items()
    }
    found |= {("unet", seed): made_up("2D", "unet", seed, 0.1) for seed in values}
    stage = {"recipe": "view", "steps": 71, "continued": True}
    for seed, seconds in ((0, 40.0), (1, 60.0)):
        first = {"first stage": stage | {"seconds": seconds}}
        found["gsc", seed] = made_up("2D", "unet", seed, 0.5, **trained(20.0), **first)
    found["csc", 0] = made_up("3D", "sr", 0, 0.4, **trained(30.0))
    return summarize(chosen, [0, 1, 2], SPEC, found, {("ppkt", 1): "no | teacher"}), values


def test_table_has_means_and_deviations_under_random_weights(summary):
    results, values = summary
    lines = {line[0]: line[1:] for line in table(results)}
    assert list(lines) == ["2D, random weights", "pri3d_view", "gsc", "3D, random weights", "csc", "ppkt"]
    assert (lines["2D, random weights"][3], lines["3D, random weights"][3]) == ("unet", "sr")
    assert "| unet(18), ones; matched: dense output, 4 px, chance 0.7 |" in markdown(results)
    mean, std = statistics.mean(values.values()), statistics.stdev(values.values())
    assert lines["pri3d_view"] == [
        f"{100 * mean:.1f} ± {100 * std:.1f}", f"{50 * mean:.1f} ± {50 * std:.1f}",
        f"{25 * mean:.1f} ± {25 * std:.1f}", "100 steps, 10 s",
    ]  # fmt: skip
    assert lines["2D, random weights"][0] == "10.0 ± 0.0"
    assert lines["gsc"][0] == "50.0 ± 0.0 (2 of 3 seeds)"
    assert lines["gsc"][3] == "71 of view, 50 s + 100 steps, 20 s"
    assert lines["3D, random weights"][0] == "-"


def test_page_gets_the_table_between_its_marks(summary, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    render(page, summary[0])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| `pri3d_view` | 40.0 ± 26.5 |" in text
    assert "no / teacher" in text
    render(page, summary[0])
    assert page.read_text() == text
    page.write_text("nothing")
    with pytest.raises(DataError, match="bench pretext: begin"):
        render(page, summary[0])
    with pytest.raises(DataError, match="no such page"):
        render(tmp_path / "other.md", summary[0])


def test_tasks_that_are_not_available_are_on_the_page(summary):
    results = summary[0] | {"not available": {"gone": "no recipe"}}
    assert "| `gone` | not available | not available | not available | no recipe |" in markdown(results)


def test_page_of_the_documentation_shows_the_committed_results(tmp_path):
    page, results = ROOT / "docs" / "pretext.md", ROOT / "benchmarks" / "results" / "pretext_800.json"
    assert BEGIN in page.read_text(encoding="utf-8")
    if results.is_file():
        copy = tmp_path / "page.md"
        copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
        render(copy, json.loads(results.read_text(encoding="utf-8")))
        assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
