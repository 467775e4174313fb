"""What a run is about to do, told before its first step: steps, batch, size, and on a CPU time and memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from geo_pretrain.backbones.architectures import ARCHITECTURES
from geo_pretrain.progress import duration, is_shown, tell
from geo_pretrain.training.depthwise import quick_depthwise
from geo_pretrain.training.loop import Progress, RecipeTask, StepInfo
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks.base import PretextTask

TRIED = 2  # images of the trial, enough for BatchNorm
TRIALS, PATIENCE = 5, 4.0  # of which the fastest counts: at most so many, and after two no more once so many s are over
BUSY = 1.5  # times its own processor time that even the fastest took: other programs are at work
LONG_STEP, LONG_RUN = 60.0, 24 * 3600.0  # s on a CPU, beyond which the small settings are named
SMALL_BATCH = 4  # of overlays/small.yaml: who has it is not sent there


def announce(task: RecipeTask, progress: Progress, on_step: Callable[[StepInfo], None] | None) -> None:
    """Where a command shows its progress, tell what begins and show step 0: the first step may take minutes."""
    if not is_shown() or progress.finished or not task.world.is_main:
        return
    tell(announcement(task, progress))
    if on_step is not None:
        on_step(StepInfo(progress.step, progress.steps, {}, 0.0, task.unit))


def announcement(task: RecipeTask, progress: Progress) -> str:
    """One line on the steps that are left; of pre-training on a CPU with the time of a step and the memory it needs."""
    recipe, world, budget = task.recipe, task.world, task.budget
    units = recipe.data.units if isinstance(recipe, Recipe) else "samples"
    where = f"{world.size} processes on {world.device.type}" if world.size > 1 else world.device.type
    left = f"steps {progress.step + 1} to {progress.steps}" if progress.step else f"{progress.steps} steps"
    text = f"{recipe.name}: {left} of {budget.batch} {units}"
    text += " at {}x{}".format(*recipe.data.size) if isinstance(recipe, Recipe) else ""
    text += f", on {where}" + (f" with {torch.get_num_threads()} threads" if world.device.type == "cpu" else "")
    text += f"; saved every {budget.save_every} steps."
    return text + (_cost(recipe, task, progress) if isinstance(recipe, Recipe) else "")


def _cost(recipe: Recipe, task: RecipeTask, progress: Progress) -> str:
    """Time and memory on a CPU, of networks of images, by a trial."""
    pretext, world = cast(PretextTask, task.module), task.world
    if world.device.type != "cpu" or ARCHITECTURES[pretext.arch].modality != "2d":
        return ""
    own, wall, kept = trial(pretext, recipe.data.size)
    images = task.views * task.micro_batch / TRIED
    seconds, memory = images * own * task.budget.accumulate, images * kept
    rest = seconds * (progress.steps - progress.step)
    text = f" By a trial with {TRIED} images: about {duration(seconds)} a step, {duration(rest)} in all"
    text += f", {1e-9 * memory:.1f} GB of memory{' a process' if world.size > 1 else ''}."
    if wall > BUSY * own:
        text += f" That is alone on this machine: other programs make it {wall / own:.1f} times as long now."
    free = free_memory()
    if free is not None and memory * world.size > free:
        text += f" Only {1e-9 * free:.1f} GB are free: take a smaller optim.micro_batch or data.size."
    too_long = task.budget.batch > SMALL_BATCH and (seconds > LONG_STEP or rest > LONG_RUN)
    return text + (" That is for GPUs: --small is for a CPU." if too_long else "")


def trial(task: PretextTask, size: tuple[int, int]) -> tuple[float, float, float]:
    """Try a forward and backward pass of the network with `TRIED` images: own seconds, seconds by the clock, bytes.

    A copy of the network is used, and no random number of the run. Of several passes the fastest counts: the first
    prepares kernels, and other programs slow some down. Own seconds are those in which the processor worked for it,
    which other programs hardly change. The bytes are those that autograd keeps.
    """
    network = copy.deepcopy(task.backbone).train()
    device = next(network.parameters()).device
    gradients = quick_depthwise(network)  # as the loop
    images = torch.full((TRIED, 3, *size), 0.5, device=device).to(memory_format=torch.channels_last)
    kept: dict[int, int] = {}
    own, walls = list[float](), list[float]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    while len(walls) < 2 or (len(walls) < TRIALS and sum(walls) < PATIENCE):
        begin = _clocks()
        kept.clear()
        with torch.random.fork_rng(devices=[]):
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with hooks, task.autocast(device), gradients:
                out = network(images)
            total = sum(one.float().mean() for one in _tensors(out))
            total.backward()  # type: ignore[union-attr]
        wall, thread, process = (now - then for now, then in zip(_clocks(), begin, strict=True))
        walls.append(wall)
        # the threads share the work: what one of them needed, or where they are unlike this one, which waits for none
        own.append(min(wall, max(thread, process / torch.get_num_threads())))
    return min(own), min(walls), float(sum(kept.values()))


def _clocks() -> tuple[float, float, float]:
    """Seconds by the clock, and of the processor for this thread and for all of this process."""
    return time.monotonic(), time.thread_time(), time.process_time()


def free_memory() -> float | None:
    """Bytes that programs can still have, None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        facts = dict(line.split(":") for line in lines)
        return 1024.0 * int(facts["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [one for item in (out.values() if isinstance(out, dict) else out) for one in _tensors(item)]
