"""Your own clouds by recipe: files of several kinds are trained on and measured, broken ones skipped and counted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from tests.front_door import geo_pretrain
from tests.training.painted_clouds import painted

TINY = (
    "network.unet3d={variant: 18A, width: 8, voxel_size: 0.2}",
    "data.cloud.voxel_size=0.3",
    "optim.batch=2",
    "optim.steps=4",
    "evaluate.every_steps=4",
    "workers=0",
)


def write(path, seed):
    cloud = painted(seed)
    path.parent.mkdir(exist_ok=True)
    fields = {"points": cloud.points, "colors": cloud.colors, "label": cloud.labels}
    if path.suffix == ".npz":
        np.savez(path, **fields)
    else:
        np.save(path, np.column_stack(list(fields.values())))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "own"
    root.mkdir()
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    for seed, name in enumerate(("train/a.npz", "train/b.npy", "train/c.npz", "val/d.npy", "val/e.npz")):
        write(root / name, seed)
    return root


def test_own_clouds_are_trained_on_and_broken_ones_counted(folder, tmp_path):
    for name in ("train/c.npz", "val/e.npz"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:900])
    recipe = load_finetune_recipe("clouds_srunet34", [*TINY, f"data.path={folder}"])
    result = finetune(recipe, "scratch", tmp_path / "out", device="cpu")
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (result.metric, data["data"]["classes"]) == ("miou", ["red", "green", "blue"])
    [skipped] = data["last"]["details"]["skipped"]
    assert skipped["path"] == str(folder / "val/e.npz")
    assert "cannot be read" in skipped["reason"]
    log = (tmp_path / "out" / "log.jsonl").read_text()
    assert str(folder / "train/c.npz") in log
    assert (tmp_path / "out" / "predictions.png").is_file()


def test_wrong_data_are_said_in_one_line(folder, tmp_path):
    line = ["finetune", "clouds_srunet34", "--data", f"clouds:{folder}", "-b", "scratch", "--device", "cpu"]
    line += ["--out", tmp_path / "out", *(word for override in TINY for word in ("--set", override))]
    wrong = geo_pretrain(*line, "--set", "data.options.label=klass", expected=1).errors
    assert "no field klass (data.options.label); it has " in wrong
    (folder / "classes.txt").unlink()
    wrong = geo_pretrain(*line, expected=1).errors
    assert "classes.txt' is missing. It names the classes" in wrong
    assert "Traceback" not in wrong
