"""The Pri3D training step: images/s, and its ratio to a per-pair loop of the same maths, in one run.

    python -m benchmarks.training

Writes benchmarks/results/training.json. The loop takes the pairs of a batch one by one through the same task and
accumulates gradients; what differs is batching alone (the network on 8 images at once, matching, sampling and loss
vectorized over the batch).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import machine, spread, write_results
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.tasks import build_task

PAIRS = 8


def batched(task: Any, batch: dict[str, Any]) -> None:
    """The step as the engine takes it."""
    torch.stack(list(task(batch).values())).sum().backward()


def looped(task: Any, batch: dict[str, Any]) -> None:
    """One pair after the other."""
    for b in range(PAIRS):
        losses = task({name: value[b : b + 1] for name, value in batch.items() if name != "skipped"})
        (torch.stack(list(losses.values())).sum() / PAIRS).backward()


def measure(
    step: Callable[[Any, dict[str, Any]], None], task: Any, optimizer: torch.optim.SGD, batch: dict[str, Any]
) -> float:
    """Seconds of one step with update."""
    begin = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    step(task, batch)
    optimizer.step()
    return time.perf_counter() - begin


def main() -> None:
    """Alternate the two steps, so that a busy machine slows both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    results: dict[str, Any] = {}
    for size in ((96, 128), (240, 320)):
        recipe = load_recipe("pri3d_view_r18.rooms_toy", [f"data.size={list(size)}"])
        source = open_source(recipe.data)
        pairs = find_pairs(source, recipe.data, skips=SkippedFrames())
        samples = build_task(recipe).dataset(source, pairs)
        begin = time.perf_counter()
        batch = samples.collate([samples[(0, k)] for k in range(PAIRS)])
        loading = time.perf_counter() - begin
        task = build_task(recipe)
        task.to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(task.parameters(), lr=0.01, momentum=0.9)
        times: dict[str, list[float]] = {"batched": [], "looped": []}
        for repeat in range(repeats + 1):
            for name, step in (("batched", batched), ("looped", looped)):
                seconds = measure(step, task, optimizer, batch)
                if repeat > 0:  # the first warms up
                    times[name].append(seconds)
        ratios = [slow / fast for slow, fast in zip(times["looped"], times["batched"], strict=True)]
        results[f"{size[0]}x{size[1]}"] = {
            "images_per_second": spread([2 * PAIRS / t for t in times["batched"]]),
            "images_per_second_looped": spread([2 * PAIRS / t for t in times["looped"]]),
            "speed_up": spread(ratios),
            "sample_loading_share_of_step": round(loading / spread(times["batched"])["median"], 3),
        }
    write_results("training", "python -m benchmarks.training", results | {"machine": machine(), "pairs": PAIRS})


if __name__ == "__main__":
    main()
