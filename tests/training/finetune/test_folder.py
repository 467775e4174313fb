"""The folders of a fine-tuning run: what is in them, what is not replaced, and one process at a time."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from geo_pretrain.checkpoint import sha256
from geo_pretrain.errors import CheckpointError, GeoPretrainError
from geo_pretrain.files import read_sealed
from geo_pretrain.training.data.labelled.registry import data_terms
from geo_pretrain.training.finetune import folder as finetune_folder
from geo_pretrain.training.finetune.folder import class_rows, read_result, result_rows
from geo_pretrain.training.finetune.training import spread_ids
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from geo_pretrain.training.runs import STATE, RunFolder
from tests.training.finetune.test_run import Stop, assert_same_run, run, stop_at
from tests.training.finetune.test_segmentation import recipe_for
from tests.zoo import write_tiny


def test_folder_holds_everything_the_number_depends_on(tmp_path):
    write_tiny(tmp_path / "tiny_net_r18")
    out = tmp_path / "out"
    seen = []
    result = run(
        out, backbone=tmp_path / "tiny_net_r18", on_evaluation=lambda step, found: seen.append((step, found.scores))
    )
    assert {path.name for path in out.iterdir()} == {
        "results.json", "log.jsonl", "recipe.yaml", "model.safetensors", "predictions.png",
        "config.json", "encoder.safetensors", "decoder.safetensors", "golden.safetensors", "README.md",
    }  # fmt: skip
    written = load_finetune_recipe(str(out / "recipe.yaml"))
    assert written == dataclasses.replace(recipe_for(), precision=written.precision)
    assert written.precision == "fp32"  # what `auto` was settled to
    data = read_sealed(out / "results.json")
    assert data == result.data
    assert data["model"] == {"sha256": sha256(out / "model.safetensors")}
    assert data["backbone"]["name"] == str(tmp_path / "tiny_net_r18")
    assert len(data["backbone"]["digest"]) == 64
    assert data["data"]["classes"] == ["ground", "red", "green"]
    assert (data["data"]["train_images"], data["data"]["val_images"], data["steps"]) == (6, 3, 4)
    assert data["recipe"] == "scannet_unet_r18.toy"
    assert (data["data"]["licence"], data["data"]["terms"]) == data_terms("squares")
    assert [(found["step"], found["scores"]) for found in data["evaluations"]] == seen
    assert [step for step, _ in seen] == [2, 4]
    with Image.open(out / "predictions.png") as picture:
        assert len(np.unique(np.array(picture).reshape(-1, 3), axis=0)) > 20
    assert read_result(out) == result
    scratch = run(tmp_path / "scratch")
    assert scratch.data["backbone"]["digest"] != data["backbone"]["digest"]
    assert result_rows([result, dataclasses.replace(scratch, last=None, uses="best", best=0.5, fraction=0.2)]) == [
        {
            "recipe": "scannet_unet_r18.toy",
            "backbone": str(tmp_path / "tiny_net_r18"),
            "data": "100 %",
            "seed": "0",
            "metric": "miou",
            "last": f"{100 * result.last:.1f}",
            "best": f"{100 * result.best:.1f} (step {result.best_step})",
            "table": "last",
        },
        {
            "recipe": "scannet_unet_r18.toy",
            "backbone": "scratch",
            "data": "20 %",
            "seed": "0",
            "metric": "miou",
            "last": "-",
            "best": f"50.0 (step {scratch.best_step})",
            "table": "best",
        },
    ]


def test_finished_result_is_not_replaced_by_accident(tmp_path):
    run(tmp_path / "out")
    with pytest.raises(CheckpointError, match="--overwrite"):
        run(tmp_path / "out")
    assert run(tmp_path / "out", "seed=5", overwrite=True).seed == 5
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thoughts.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no result"):
        run(tmp_path / "notes", overwrite=True)


def test_a_result_that_is_being_replaced_is_gone_before_the_rest_changes(tmp_path, monkeypatch):
    """Killed in between, the folder must not show the old number beside new weights."""
    run(tmp_path / "out", "optim.steps=1")

    def stop(*arguments):
        raise Stop

    monkeypatch.setattr(finetune_folder, "write_weights", stop)
    with pytest.raises(Stop):
        run(tmp_path / "out", "optim.steps=1", "seed=5", overwrite=True)
    with pytest.raises(CheckpointError, match="has not ended"):
        read_result(tmp_path / "out")


def test_a_disk_that_fills_up_with_the_result_is_told_and_the_run_goes_on(tmp_path, monkeypatch):
    write, limits = finetune_folder.write_weights, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, limits[1]))
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_folder, "write_weights", fill)
        try:
            with pytest.raises(GeoPretrainError, match=r"there is no room .* The last saved state is in"):
                run(tmp_path / "out", "optim.steps=1")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run(tmp_path / "out", "optim.steps=1").seed == 0


def test_a_state_that_is_written_halfway_leaves_the_old_one(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "out")
    run.create()
    run.save({"step": 1})

    def break_off(state, path):
        path.write_text("ne")
        raise Stop

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(Stop):
        run.save({"step": 2})
    assert run.load()["step"] == 1


def test_folder_without_a_result_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="has not ended"):
        read_result(tmp_path)
    for text in ("{", "[]", '{"metric": "miou"}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(CheckpointError, match="not a result"):
            read_result(tmp_path)


def test_a_result_that_was_altered_is_named(tmp_path):
    run(tmp_path / "out", "optim.steps=1")
    path = tmp_path / "out" / "results.json"
    path.write_text(path.read_text().replace('"miou": 0', '"miou": 1', 1))
    with pytest.raises(CheckpointError, match=r"results\.json: was altered.*remove its folder to run it again"):
        read_result(tmp_path / "out")


def test_other_weights_in_place_of_the_best_are_refused(tmp_path):
    overrides = "optim.steps=3", "match_released_code=true", "evaluate.every_steps=2"
    with pytest.raises(Stop):
        run(tmp_path / "out", *overrides, on_step=stop_at(3))
    best = tmp_path / "out.run" / "best.safetensors"
    good = best.read_bytes()
    for data, what in ((good[:-1] + b"x", "was altered"), (b"", "is missing or empty")):
        best.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"weights of the best evaluation, {what}"):
            run(tmp_path / "out", *overrides)
    best.write_bytes(good)
    assert run(tmp_path / "out", *overrides).best_step == 2


def test_a_broken_off_line_is_dropped_and_time_counts_all_sittings(tmp_path):
    run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "out", on_step=stop_at(3))
    state = torch.load(tmp_path / "out.run" / STATE, weights_only=True)
    torch.save(state | {"seconds": 5000.0}, tmp_path / "out.run" / STATE)
    log = tmp_path / "out.run" / "log.jsonl"
    kept = [line for line in log.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= state["step"]]
    log.write_text("".join(kept) + '{"step": 4, "loss": 0.')
    result = run(tmp_path / "out")
    assert 5000 <= result.data["seconds"] < 10000  # a quick sitting rounds to nothing
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_values_by_class_are_those_of_the_evaluation_that_is_reported(tmp_path):
    measured = {"step": 2, "scores": {"miou": 0.5}}
    last, best = ({**measured, "per_class": {"iou": {"red": value}}} for value in (0.25, None))
    names = {"recipe": "r", "task": "segmentation", "metric": "miou", "seed": 0, "score": 0.5, "steps": 2}
    data = {**names, "backbone": {"name": "scratch"}, "data": {"fraction": 1.0}, "last": last, "best": best}
    for uses, expected in (("last", 0.25), ("best", None)):
        (tmp_path / "results.json").write_text(json.dumps({**data, "uses": uses}))
        assert read_result(tmp_path).per_class() == {"red": expected}


def test_rows_of_classes_are_of_the_score(tmp_path):
    measured = {"step": 2, "scores": {"ap50": 1.0, "miou": 0.5}}
    per_class = {"iou": {"red": 0.25}, "ap50": {"red": 1.0}}
    evaluation = {**measured, "per_class": per_class}
    names = {"recipe": "r", "task": "instances3d", "seed": 0, "score": 0.5, "steps": 2, "uses": "last"}
    data = {**names, "backbone": {"name": "scratch"}, "data": {"fraction": 1.0}, "last": evaluation, "best": evaluation}
    for metric, row in (("ap50", ("ap50", [("red", "100.0")])), ("miou", ("iou", [("red", "25.0")]))):
        (tmp_path / "results.json").write_text(json.dumps({**data, "metric": metric}))
        assert class_rows(read_result(tmp_path)) == row


def test_images_of_the_figure_are_spread():
    assert spread_ids(list("abcdefgh"), 4) == ["a", "c", "e", "g"]
    assert spread_ids(list("abc"), 2) == ["a", "b"]
    assert spread_ids(list("ab"), 4) == spread_ids(list("ab"), None) == ["a", "b"]


HOLDER = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_holds_is_refused_until_that_ends(tmp_path):
    out = tmp_path / "out"
    held = [sys.executable, "-c", HOLDER, str(tmp_path / ".out.lock")]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=r"at work on the fine-tuning run in '.*out'.*another --out"):
            run(out)
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
        other.kill()
    run(out)  # the dead block nobody
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_holds_its_folder_and_a_second_one_harms_nothing(tmp_path):
    run(tmp_path / "whole")
    refused = []

    def second(info):
        with pytest.raises(CheckpointError, match="at work"):
            run(tmp_path / "out")
        refused.append(info.step)

    run(tmp_path / "out", on_step=second)
    assert refused == [1, 2, 3, 4]
    assert_same_run(tmp_path / "whole", tmp_path / "out")
    with pytest.raises(Stop):
        run(tmp_path / "broken", on_step=stop_at(2))
    run(tmp_path / "broken")  # whatever ended a run, it holds nothing


def test_a_run_that_ended_in_the_meantime_is_not_replaced(tmp_path, monkeypatch):
    """Between the first look at the folder and the lock another process may finish there."""
    from geo_pretrain.training.finetune import run as module

    original = module.open_splits

    def slow(*arguments):
        monkeypatch.undo()
        run(tmp_path / "out")
        return original(*arguments)

    monkeypatch.setattr(module, "open_splits", slow)
    with pytest.raises(CheckpointError, match="already holds a result"):
        run(tmp_path / "out")
    assert read_result(tmp_path / "out").steps == 4
