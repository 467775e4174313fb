"""The losses of the first steps of a tiny run of every task, on the golden recording.

`python -m tests.training.loss_series` writes them to tests/data/loss_series.json, with which later versions of the
code are compared: a change there needs a reason.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from tests.training import conftest
from tests.training.test_engine import logged, run_here

STORED = Path(__file__).parents[1] / "data" / "loss_series.json"
STEPS, LR = 4, 0.001  # so few and small that differences in rounding do not grow to matter


def loss_series(write_recipe, folder: Path, tiny: str) -> dict[str, list[float]]:
    """Every loss of a run of STEPS steps, by name."""
    # the frozen network of the tiny recipes is no classifier
    task = {"task": {"targets": "features"}} if tiny == "global_kd" else {}
    run_here(write_recipe(tiny, optim={"steps": STEPS, "lr": LR}, **task), folder / tiny)
    lines = [{k: v for k, v in line.items() if k not in ("step", "lr")} for line in logged(folder / tiny)]
    return {name: [line[name] for line in lines] for name in lines[0]}


def main() -> None:
    """Store the series of every task."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_recipe = conftest.recipe_writer(folder, conftest.write_recording(folder / "recording"))
        tasks = {tiny: loss_series(write_recipe, folder, tiny) for tiny in conftest.TINY_TASKS}
    stored = {"command": "python -m tests.training.loss_series", "tasks": tasks}
    STORED.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
