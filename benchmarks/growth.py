"""Memory, threads and open files of a run over thousands of steps: nothing may grow with the number of steps.

    python -m benchmarks.growth [--steps 20000]

Trains a tiny network (width 8, 48 x 64 pixels, two pairs a step) on rooms, with the log, saved states and everything
else that a run has, and writes benchmarks/results/growth.json. Times say nothing here and are not stored.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, write_results
from geo_pretrain.training.distributed import World
from geo_pretrain.training.loop import StepInfo
from geo_pretrain.training.pretrain import run_recipe
from geo_pretrain.training.recipe import load_recipe

SAMPLES = 30
SETTINGS = ("model.width=8", "model.init=scratch", "data.size=[48, 64]", "optim.batch=2", "optim.epochs=null")


def usage() -> dict[str, int]:
    """Resident memory in kB, threads and open files of this process, and objects that Python knows."""
    status = Path("/proc/self/status").read_text()
    values = dict(line.partition(":")[::2] for line in status.splitlines())
    return {
        "resident_kb": int(values["VmRSS"].split()[0]),
        "threads": int(values["Threads"]),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "objects": len(gc.get_objects()),
    }


def grown(samples: list[dict[str, int]]) -> dict[str, float]:
    """Growth a thousand steps from the middle of the run to its end, by least squares: the start fills caches."""
    late = samples[len(samples) // 2 :]
    steps = torch.tensor([float(sample["step"]) for sample in late])
    steps = steps - steps.mean()
    growth = {}
    for name in ("resident_kb", "threads", "files", "objects"):
        values = torch.tensor([float(sample[name]) for sample in late])
        slope = (steps * (values - values.mean())).sum() / (steps**2).sum()
        growth[f"{name}_per_1000_steps"] = round(float(slope) * 1000, 2)
    return growth


def measure(steps: int) -> list[dict[str, int]]:
    """Samples at even spacing over a run of so many steps."""
    samples: list[dict[str, int]] = []

    def look(info: StepInfo) -> None:
        if info.step % max(1, steps // SAMPLES) == 0:
            samples.append({"step": info.step, **usage()})

    def report(stage: str, done: int, total: int, detail: str) -> None:
        if stage.startswith("training"):
            look(StepInfo(done, total, {}, 0.0, ""))

    recipe = load_recipe("pri3d_view_r18.rooms_toy", [*SETTINGS, f"optim.steps={steps}", "save_every=100", "workers=0"])
    with tempfile.TemporaryDirectory() as folder:
        run_recipe(recipe, Path(folder) / "out", World(0, 1, torch.device("cpu")), report=report)
    return samples


def main() -> None:
    """Twenty thousand steps; half an hour on a core of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    steps = parser.parse_args().steps
    samples = measure(steps)
    results: dict[str, Any] = {
        "steps": steps,
        "growth": grown(samples),
        "threads_of_python_left": threading.active_count(),
        "samples": samples,
        "machine": machine(),
    }
    write_results("growth", "python -m benchmarks.growth", results, timed=False)


if __name__ == "__main__":
    main()
