"""The losses of the first steps of a tiny run of every task, on the golden recording.

`python -m tests.training.loss_series` writes those of new tasks to tests/data/loss_series.json, with which later
versions of the code are compared: a change there needs a reason.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.front_door import geo_pretrain
from tests.training import conftest

STORED = Path(__file__).parents[1] / "data" / "loss_series.json"
STEPS, LR = 4, 0.001  # so few and small that differences in rounding do not grow to matter


def loss_series(write_recipe, folder: Path, tiny: str, *options: str) -> dict[str, list[float]]:
    """Every loss of a run of STEPS steps, by name; `options` of the command."""
    geo_pretrain("train", recipe_of(write_recipe, folder, tiny), "--out", folder / tiny, "--device", "cpu", *options)
    lines = [json.loads(line) for line in (folder / tiny / "log.jsonl").read_text().splitlines()]
    names = [name for name in lines[0] if name not in ("step", "lr") and not name.endswith("_per_second")]
    return {name: [line[name] for line in lines] for name in names}


def recipe_of(write_recipe, folder: Path, tiny: str) -> Path:
    """The path of the recipe of a short run."""
    changes: dict[str, Any] = {"optim": {"steps": STEPS, "lr": LR}}
    if tiny == "global_kd":
        changes["task"] = {"targets": "features"}  # the frozen network of the tiny recipes is no classifier
    if tiny == "img2pc":
        first = folder / "first.yaml"
        first.write_bytes(write_recipe("pixel_simclr", **changes).read_bytes())
        changes["stage1"] = {"recipe": str(first)}
    return write_recipe(tiny, **changes)


def main() -> None:
    """Store the series of every task that has none yet."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_recipe = conftest.recipe_writer(folder, conftest.write_recording(folder / "recording"))
        tasks = json.loads(STORED.read_text())["tasks"]  # who means to change a series removes it from the file first
        for tiny in conftest.TINY_TASKS:
            if tiny not in tasks:
                tasks[tiny] = loss_series(write_recipe, folder, tiny)
    stored = {"command": "python -m tests.training.loss_series", "tasks": tasks}
    STORED.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
