"""`python -m tests.pins.store` stores what is not stored yet, from the code as it is; what is stored stays."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.pins import commands, finetuning_runs, in_memory, training_runs
from tests.pins.training_runs import DATA
from tests.training.conftest import write_recording


def keep(path: Path, make: Callable[[], Any]) -> None:
    """Write the tree that `make` gives, unless there is one."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(layout(make()) + "\n")


def layout(tree: Any, depth: int = 0) -> str:
    """JSON whose lists, and mappings of nothing but values, are lines."""
    flat = not isinstance(tree, dict) or not any(isinstance(value, dict | list) for value in tree.values())
    if flat or not tree:
        return json.dumps(tree)
    indent = " " * (depth + 1)
    lines = [f"{indent}{json.dumps(key)}: {layout(value, depth + 1)}" for key, value in tree.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


def add_commands(path: Path, folder: Path) -> None:
    """Add the commands and calls that cli.json has not."""
    stored = json.loads(path.read_text()) if path.exists() else {"commands": {}, "exit codes": {}}
    calls = [line for line in commands.CALLS.splitlines() if line and line not in stored["exit codes"]]
    tree = {
        "commands": commands.commands() | stored["commands"],
        "exit codes": stored["exit codes"] | commands.exit_codes(folder, calls),
    }
    path.write_text(layout(tree) + "\n")


def main() -> None:
    """Store what is not stored yet."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["GEO_PRETRAIN_CACHE"] = str(folder / "cache")
        os.environ["GEO_PRETRAIN_MIRROR"] = "http://127.0.0.1:9"
        recording = write_recording(folder / "recording")
        for task in training_runs.TASKS:
            keep(
                DATA / "folders" / f"{task}.json",
                lambda task=task: training_runs.describe(training_runs.train(task, recording, folder / task)),
            )
        for kind in finetuning_runs.KINDS:
            keep(
                DATA / "finetuning" / f"{kind}.json",
                lambda kind=kind: finetuning_runs.describe(finetuning_runs.finetune(kind, folder / kind)),
            )
        keep(DATA / "points.json", in_memory.points)
        keep(DATA / "segmentation.json", in_memory.segmentation)
        add_commands(DATA / "cli.json", folder)


if __name__ == "__main__":
    main()
