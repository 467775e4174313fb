"""Memory, threads and open files of a run over thousands of steps: nothing may grow with the number of steps.

    python -m benchmarks.growth [--steps 3000]
    python -m benchmarks.growth --loop [--steps 20000]

The first trains a tiny network (width 8, 48 x 64 pixels, two pairs a step) on rooms, with the log, saved states and
everything else that a run has, and writes benchmarks/results/growth.json; `--loop` has one layer on numbers in its
place, so that loop, loader, log, states and TensorBoard take twenty thousand steps in a minute: growth_loop.json. Times
say nothing here and are not stored.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import machine, write_results
from geo_pretrain.training.distributed import World
from geo_pretrain.training.loop import RecipeTask, StepInfo, fit, make_optimizer
from geo_pretrain.training.pretrain import run_recipe
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.runs import RunFolder

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


class Numbers:
    """A data set of numbers."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        return torch.full((4,), key[1] / 1000)

    def collate(self, samples: list[Tensor]) -> Tensor:
        """A batch [B, 4]."""
        return torch.stack(samples)


class Line(RecipeTask):
    """One layer that learns to give 1, with the loader, budget, log and states of a recipe."""

    def __init__(self, steps: int, world: World) -> None:
        settings = (f"optim.steps={steps}", "optim.batch=2", "save_every=100", "workers=0")
        recipe = load_recipe("pri3d_view_r18.rooms_toy", settings)
        super().__init__(recipe, nn.Linear(4, 1), Numbers(), world)
        self.optimizer = make_optimizer(recipe.optim, self.module)

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.module(batch) - 1).square().mean()}

    def schedule(self, step: int) -> float:
        return 0.03


def measure_loop(steps: int) -> list[dict[str, int]]:
    """Samples at even spacing over so many steps of `Line`."""
    samples: list[dict[str, int]] = []
    world = World(0, 1, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "out", board=True)
        run.create()
        fit(Line(steps, world), world, run, on_step=lambda info: look(info, steps, samples))
    return samples


def look(info: StepInfo, steps: int, samples: list[dict[str, int]]) -> None:
    """Add a sample to `samples` where one is due."""
    if info.step % max(1, steps // SAMPLES) == 0:
        samples.append({"step": info.step, **usage()})


def measure(steps: int) -> list[dict[str, int]]:
    """Samples at even spacing over a run of so many steps."""
    samples: list[dict[str, int]] = []

    def report(stage: str, done: int, total: int, detail: str) -> None:
        if stage.startswith("training"):
            look(StepInfo(done, total, {}, 0.0, ""), steps, samples)

    recipe = load_recipe("pri3d_view_r18.rooms_toy", [*SETTINGS, f"optim.steps={steps}", "save_every=100", "workers=0"])
    with tempfile.TemporaryDirectory() as folder:
        run_recipe(recipe, Path(folder) / "out", World(0, 1, torch.device("cpu")), report=report)
    return samples


def main() -> None:
    """Three thousand steps of a network, minutes; or twenty thousand of the loop, a minute."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", action="store_true")
    parser.add_argument("--steps", type=int)
    given = parser.parse_args()
    steps = given.steps or (20_000 if given.loop else 3_000)
    samples = measure_loop(steps) if given.loop else measure(steps)
    results: dict[str, Any] = {
        "steps": steps,
        "growth": grown(samples),
        "threads_of_python_left": threading.active_count(),
        "samples": samples,
        "machine": machine(),
    }
    name, option = ("growth_loop", " --loop") if given.loop else ("growth", "")
    write_results(name, f"python -m benchmarks.growth{option}", results, timed=False)


if __name__ == "__main__":
    main()
