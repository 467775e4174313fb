"""Every task on clouds, from a step on its embedded data to files: a run is loaded again and predicts all points."""

from __future__ import annotations

import json

import numpy as np
import pytest

from geo_pretrain.training.data.surfaces.ply import read_ply
from geo_pretrain.training.finetune import load_finetuned
from geo_pretrain.training.finetune.predict import predict
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from tests.training.finetune.test_toy_runs import CLOUDS

FILES = {
    "rooms3d_instances": ["instances.npy", "labels.npy", "masks.npz", "ply"],
    "rooms3d_votenet": ["boxes.json", "boxes.npy", "boxes.ply", "ply"],
    "rooms3d_parts": ["labels.npy", "ply", "scores.npy"],
    "rooms3d_classification": ["scores.npy"],
}


@pytest.mark.parametrize("name", list(FILES))
def test_a_run_of_every_task_predicts_what_it_measured(name, tmp_path):
    recipe = load_finetune_recipe(name, [*CLOUDS, "optim.warmup=0"], toy=True)
    result = finetune(recipe, "scratch", tmp_path / "out", device="cpu")
    found = predict(tmp_path / "out", tmp_path / "predicted", data="rooms3d", draw=1)
    assert not found.skipped
    (item,) = found.items
    assert sorted(path.removeprefix(item["name"] + ".") for path in item["files"]) == FILES[name]
    assert json.loads((tmp_path / "predicted" / "predictions.json").read_text())["task"] == recipe.task
    assert (tmp_path / "predicted" / "predictions.png").is_file()
    task = load_finetuned(tmp_path / "out")
    assert list(task.classes) == result.data["data"]["classes"]
    labels = tmp_path / "predicted" / f"{item['name']}.labels.npy"
    if labels.exists():
        known = np.load(labels)
        assert set(np.unique(known)) <= set(range(1, 1 + len(task.classes)))
        vertices = read_ply(tmp_path / "predicted" / f"{item['name']}.ply")["vertex"]
        assert np.array_equal(vertices["predicted_label"], known)
