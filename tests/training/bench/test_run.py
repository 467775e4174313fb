"""The processes of a benchmark: how they are stopped, what a cell does and how it ends, what is fixed for all."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from geo_pretrain.errors import RecipeError
from geo_pretrain.training.bench import cell as cells
from geo_pretrain.training.bench import plan as planning
from geo_pretrain.training.bench import run as running
from geo_pretrain.training.bench.cell import Job, run_job, twin_key
from geo_pretrain.training.bench.plan import FULL, BenchSpec, Training, plan, rows
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.runs import Interrupted
from tests.zoo import CONTRACT, unsealed, write_tiny

SPEC = BenchSpec()
DEAF = "import signal, time; signal.signal(2, signal.{}); print(1, flush=True); time.sleep(600)"


def get_signal(number):
    os.kill(os.getpid(), number)
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stopped_run_stops_its_processes_and_kills_those_that_go_on(monkeypatch, number):
    def theirs(number, frame):
        raise AssertionError("not what the run listens to")

    monkeypatch.setattr(running, "PATIENCE", 2.0)
    before = signal.signal(number, theirs if number != signal.SIGINT else signal.default_int_handler)
    mine = signal.getsignal(number)
    processes = {}
    for kind in ("SIG_DFL", "SIG_IGN"):
        processes[kind] = subprocess.Popen([sys.executable, "-c", DEAF.format(kind)], stdout=subprocess.PIPE)
        processes[kind].stdout.readline()  # it listens now
    try:
        with pytest.raises(Interrupted, match="same command again"), running._stopped_together(processes):
            get_signal(number)
        assert signal.getsignal(number) is mine
        assert [process.wait(60) for process in processes.values()] == [-signal.SIGINT, -signal.SIGKILL]
    finally:
        signal.signal(number, before)
        for process in processes.values():
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.mark.parametrize("device, jobs, want", [("cpu", None, 6), ("cuda", None, 1), ("cuda", 3, 3)])
def test_a_run_has_a_process_a_core_or_one_on_a_gpu(tmp_path, monkeypatch, device, jobs, want):
    seen = []
    monkeypatch.setattr(running.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(running, "_prepare_rooms", lambda *_: None)
    monkeypatch.setattr(running, "_run_all", lambda bench, threads: seen.append((bench, threads)))
    monkeypatch.chdir(tmp_path)
    results = running.run_bench(rows(["pri3d_view"]), [3, 1, 3], SPEC, Path("out"), jobs=jobs, device=device)
    ((bench, threads),) = seen
    assert (bench.jobs, threads) == (want, 6 // want)
    assert results["seeds"] == bench.seeds == [1, 3]
    assert [cell.job.seed for cell in bench.cells.values()] == [1, 3]
    assert {cell.job.device for cell in bench.cells.values()} == {device}
    assert bench.out == tmp_path / "out"  # recipes name folders in it, and cells are other processes
    assert (tmp_path / "out" / "results.json").is_file()


@pytest.fixture
def told(monkeypatch):
    """What a cell trains and measures, without doing it."""
    found = {}

    def measure(folder, data, spec, **options):
        found["measure"] = (folder, data, spec, options)
        return {"kind": "2D"}

    monkeypatch.setattr(cells, "measure", measure)
    monkeypatch.setattr(cells, "join", lambda device: f"world on {device}")
    monkeypatch.setattr(cells, "run_recipe", lambda *arguments, **_: found.update(train=arguments))
    return found


def test_a_cell_hands_on_what_its_job_says(tmp_path, told):
    folder, result = write_tiny(tmp_path / "tiny_net_r18").folder, tmp_path / "cells" / "x.json"
    job = Job(str(folder), 5, SPEC, result=str(result), pretrained=False, device="cuda")
    run_job(job)
    assert "train" not in told
    *_, options = told["measure"]
    assert told["measure"][:3] == (folder, planning.base_data(SPEC), SPEC)
    assert (options["seed"], options["pretrained"], options["device"]) == (5, False, "cuda")
    tree = json.loads(result.read_text())
    assert (tree["seed"], tree["kind"], tree["twin"]) == (5, "2D", twin_key(folder))
    cell = running.Cell("x", job, "row")
    assert cell.is_done()
    for text in (result.read_text().replace('"2D"', '"3D"'), "", "[]"):
        result.write_text(text)
        with pytest.warns(UserWarning, match=r"x\.json: .* measured anew"):
            assert not cell.is_done()


def test_a_cell_trains_what_is_not_trained_yet(tmp_path, told):
    path = tmp_path / "r.yaml"
    path.write_text(load_recipe("pri3d_view_r18.rooms").to_yaml())
    run_job(Job(str(tmp_path / "empty"), 5, SPEC, recipe=str(path), device="cuda"))
    recipe, folder, world = told.pop("train")
    assert (recipe.name, folder, world) == ("pri3d_view_r18.rooms", tmp_path / "empty", "world on cuda")
    assert "measure" not in told  # a first stage, which no result is asked of
    run_job(Job(str(write_tiny(tmp_path / "tiny_net_r18").folder), 5, SPEC, recipe=str(path)))
    assert told == {}
    unfinished = write_tiny(tmp_path / "other_net_r18", "other_net_r18", finished=False).folder
    run_job(Job(str(unfinished), 5, SPEC, recipe=str(path)))
    assert told["train"][1] == unfinished


@pytest.mark.parametrize("error, code", [(Interrupted("saved"), 130), (RecipeError("wrong"), 1), (OSError("full"), 1)])
def test_a_cell_that_fails_says_why_last(tmp_path, monkeypatch, capsys, error, code):
    def fails(job):
        raise error

    (tmp_path / "job.json").write_text(Job("folder", 0, SPEC).to_json())
    monkeypatch.setattr(cells, "run_job", fails)
    monkeypatch.setattr(sys, "argv", ["cell", str(tmp_path / "job.json")])
    with pytest.raises(SystemExit) as stop:
        cells.main()
    assert stop.value.code == code
    assert capsys.readouterr().out.splitlines()[-1] == f"Error: {error}"


def test_twins_differ_with_the_input_and_the_size_of_the_network(tmp_path):
    one = write_tiny(tmp_path / "tiny_net_r18")
    gray = write_tiny(
        tmp_path / "gray_net_r18", "gray_net_r18", contract=dataclasses.replace(CONTRACT, mean=(0.5, 0.5, 0.5))
    )
    assert twin_key(one.folder) != twin_key(gray.folder)
    config = unsealed(one.folder)
    config["arch"]["args"]["out_chans"] = 7
    (one.folder / "config.json").write_text(json.dumps(config))
    assert twin_key(one.folder) not in (twin_key(gray.folder), twin_key(write_tiny(tmp_path / "again").folder))


@pytest.mark.parametrize(
    "key, instead",
    [
        ("optim.batch", "Give --batch"),
        ("optim.steps", "Give --steps"),
        ("optim.epochs", "Give --steps"),
        ("stage1.optim.steps", "Give --steps"),
        ("seed", "Give --seed"),
        ("data.source", "It compares on rooms"),
    ],
)
def test_no_override_sets_what_the_benchmark_does(key, instead):
    with pytest.raises(RecipeError, match=rf"sets '{key}' for all tasks\. {instead}"):
        BenchSpec(overrides=(f"{key}=2",))


def test_one_network_in_two_stages_has_five_sevenths_of_its_steps_in_the_first():
    """Pri3D's five epochs and two of geometric set consistency; a teacher has all steps beside those of its student."""
    for spec, want in ((SPEC, (57, 23)), (FULL, (1429, 571))):
        training = plan(rows(["gsc"])[0], spec, 0)
        assert (training.stage1.recipe.optim.steps, training.recipe.optim.steps) == want
        assert training.continued
        taught = plan(rows(["ppkt"])[0], spec, 0)
        assert (taught.stage1.recipe.optim.steps, taught.recipe.optim.steps) == (spec.steps, spec.steps)
        assert not taught.continued


def test_a_schedule_of_epochs_becomes_one_of_steps():
    assert load_recipe("moco_v2_unsup_in_sn_r50").optim.schedule == "cosine_epoch"
    optim = plan(rows(["moco_v2"])[0], SPEC, 0).recipe.optim
    assert (optim.schedule, optim.steps, optim.epochs) == ("cosine", 80, None)


def test_a_training_is_another_one_after_another_first_stage():
    recipe = load_recipe("gsc_r18.rooms")
    keys = {planning._key(recipe, first) for first in (None, Training("a", recipe), Training("b", recipe))}
    assert len(keys) == 3
