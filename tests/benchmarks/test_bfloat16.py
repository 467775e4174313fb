"""What `benchmarks.bfloat16` reads from logs, and when two precisions count as equal."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import bfloat16
from geo_pretrain.rooms import RoomsConfig
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.evaluation.awareness.networks import find_subject
from geo_pretrain.training.evaluation.awareness.run import measure_awareness
from tests.zoo import golden_file, role_weights, write_tiny


def write_log(folder, totals):
    folder.mkdir(parents=True)
    rows = [
        {"step": n, "lr": 0.1, "near": 0.25, "far": total - 0.25, "clouds_per_second": 3.0}
        for n, total in enumerate(totals, 1)
    ]
    rows[0]["precision"] = "bf16"
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_loss_of_a_run_is_the_mean_sum_of_its_terms_over_the_last_fifth(tmp_path):
    write_log(tmp_path / "run", [9.0] * 8 + [2.0, 4.0])
    assert bfloat16.last_loss(tmp_path / "run") == pytest.approx(3.0)
    assert bfloat16.losses(tmp_path, 3) == {}  # no run is finished


@pytest.mark.parametrize(("shift", "within"), [(0.9, True), (-1.1, False)])
def test_precisions_are_equal_within_a_deviation_of_seeds(tmp_path, monkeypatch, shift, within):
    monkeypatch.setattr(bfloat16, "is_finished", lambda folder: folder.is_dir())
    recipe = bfloat16.RECIPES[0]
    for seed in range(3):  # losses 1, 2, 3: their deviation is 1
        write_log(bfloat16.folder_of(tmp_path, recipe, "fp32", seed), [seed + 1.0])
        write_log(bfloat16.folder_of(tmp_path, recipe, "bf16", seed), [seed + 1.0 + shift])
    found = bfloat16.losses(tmp_path, 3)
    assert list(found) == [recipe]
    assert found[recipe]["difference"] == pytest.approx(shift)
    assert found[recipe]["std of fp32"] == pytest.approx(1)
    assert found[recipe]["within"] is within
    assert f"{shift:+.3f} | {'yes' if within else 'no'} |" in bfloat16.table(
        {"losses": found, "recall": {}, "features": {}}
    )


def write_random(folder, seed):
    """A narrow U-Net whose convolutions are drawn."""
    draw, golden = torch.Generator().manual_seed(seed), golden_file()
    weights = {role: role_weights(role, golden) for role in ("encoder", "decoder")}
    for tensors in weights.values():
        tensors |= {k: v + 0.1 * torch.randn(v.shape, generator=draw) for k, v in tensors.items() if v.ndim == 4}
    return write_tiny(folder, weights=weights).folder


def test_recall_is_of_the_networks_of_both_precisions(tmp_path, monkeypatch):
    """Two seeds; one folder stands in both precisions."""
    same, low, high = (write_random(tmp_path / str(seed), seed) for seed in range(3))
    runs = {"fp32": [same, low], "bf16": [same, high]}
    nothing = {"fp32": [], "bf16": []}
    monkeypatch.setattr(bfloat16, "finished", lambda _, recipe, __: runs if recipe == bfloat16.IMAGES[0] else nothing)
    rooms = {"seed": 1, "scenes": 2, "frames": 4, "width": 64, "height": 64}
    monkeypatch.setattr(bfloat16, "UNSEEN_MATCHED", RoomsConfig(**rooms, split="val"))
    spec = replace(bfloat16.MATCHED, size=(64, 64), frames=8, pairs=3)
    monkeypatch.setattr(bfloat16, "MATCHED", spec)
    ((recipe, found),) = bfloat16.recall(tmp_path, 2).items()
    assert recipe == bfloat16.IMAGES[0]
    assert found["fp32"][0] == found["bf16"][0]
    assert found["fp32"][1] != found["bf16"][1]
    measured = measure_awareness([find_subject(str(high))], Rooms(bfloat16.UNSEEN_MATCHED), spec)
    layers = measured.scores[str(high)]["matching"].values()
    assert found["bf16"][1] == pytest.approx(max(scores["recall"][0] for scores in layers))
    assert found["verdict"].startswith("bfloat16 and float32 do not differ beyond chance")
