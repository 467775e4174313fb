"""What `benchmarks.bfloat16` reads from logs, and when two precisions count as equal."""

from __future__ import annotations

import json

import pytest

from benchmarks import bfloat16


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
    assert f"{shift:+.3f} | {'yes' if within else 'no'} |" in bfloat16.table({"losses": found, "features": {}})
