"""The Pri3D training step: images/s, and its ratios to the bare network and to a per-pair loop, in one run.

    python -m benchmarks.training [--precision fp32|bf16|auto]

Writes benchmarks/results/training.json (with bf16: training_bf16.json). The bare network passes the same images forward
and backward from a given gradient, without matching, losses and update; the step's rate counts the loading of its
samples too, by the training process itself. The loop takes the pairs of a batch one by one through the same task and
accumulates gradients; what differs is batching alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.common import machine, spread, write_results
from geo_pretrain.heap import kept_heap
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.distributed import World
from geo_pretrain.training.loop import make_sgd
from geo_pretrain.training.precision import settle_precision
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.tasks import build_task

CASES = (("resnet18", (96, 128), 8), ("resnet18", (240, 320), 8), ("resnet50", (240, 320), 1))  # the last: pairs


def batched(task: Any, batch: dict[str, Any]) -> None:
    """The step as the engine takes it."""
    torch.stack(list(task(batch).values())).sum().backward()


def looped(task: Any, batch: dict[str, Any]) -> None:
    """One pair after the other."""
    pairs = len(batch["seed"])
    for b in range(pairs):
        losses = task({name: value[b : b + 1] for name, value in batch.items() if name != "skipped"})
        (torch.stack(list(losses.values())).sum() / pairs).backward()


def bare(task: Any, batch: dict[str, Any]) -> None:
    """The network alone on both views."""
    images = batch["image1"], batch["image2"]
    with task.autocast(images[0].device):
        maps = [task.backbone(view) for view in images]
    torch.autograd.backward(maps, [torch.full_like(one, 1e-3) for one in maps])


def measure(
    step: Callable[[Any, dict[str, Any]], None], task: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any]
) -> float:
    """Seconds of one step, with update but for the bare network."""
    begin = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    step(task, batch)
    if step is not bare:
        optimizer.step()
    return time.perf_counter() - begin


def measure_case(encoder: str, size: tuple[int, int], pairs: int, precision: str, repeats: int) -> dict[str, Any]:
    """Alternate the steps, so that a busy machine slows all."""
    changes = [f"data.size={list(size)}", f"model.encoder={encoder}", f"precision={precision}"]
    recipe = settle_precision(load_recipe("pri3d_view_r18.rooms_toy", changes), World(0, 1, torch.device("cpu")))
    source = open_source(recipe.data)
    samples = build_task(recipe).dataset(source, find_pairs(source, recipe.data, skips=SkippedFrames()))
    task = build_task(recipe)
    task.to(memory_format=torch.channels_last).train()
    optimizer = make_sgd(recipe.optim, task.parameters())
    steps = {"batched": batched, "bare": bare} | ({"looped": looped} if pairs > 1 else {})
    times: dict[str, list[float]] = {name: [] for name in (*steps, "loading")}
    for repeat in range(repeats + 1):
        begin = time.perf_counter()
        batch = samples.collate([samples[(0, k)] for k in range(pairs)])
        seconds = {"loading": time.perf_counter() - begin}
        seconds |= {name: measure(step, task, optimizer, batch) for name, step in steps.items()}
        for name, value in seconds.items() if repeat > 0 else ():  # the first warms up
            times[name].append(value)
    whole = [step + loading for step, loading in zip(times["batched"], times["loading"], strict=True)]
    found: dict[str, Any] = {
        "pairs": pairs,
        "precision": recipe.precision,
        "images_per_second": spread([2 * pairs / t for t in times["batched"]]),
        "of_bare_network": spread([network / t for network, t in zip(times["bare"], whole, strict=True)]),
        "sample_loading_share_of_step": round(median(times["loading"]) / median(times["batched"]), 3),
    }
    if pairs > 1:
        ratios = [slow / fast for slow, fast in zip(times["looped"], times["batched"], strict=True)]
        found["images_per_second_looped"] = spread([2 * pairs / t for t in times["looped"]])
        found["speed_up"] = spread(ratios)
    return found


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for encoder, size, pairs in CASES:
        name = f"{size[0]}x{size[1]}" + ("" if encoder == "resnet18" else f", {encoder}")
        with kept_heap():  # as runs are; for the bare network, too
            results[name] = measure_case(encoder, size, pairs, options.precision, options.repeats)
        print(name, results[name], flush=True)
    lower = any(found["precision"] == "bf16" for found in results.values())
    command = f"python -m benchmarks.training --precision {options.precision}"
    write_results("training_bf16" if lower else "training", command, results | {"machine": machine()})


if __name__ == "__main__":
    main()
