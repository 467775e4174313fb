"""A training step beside busy programs: how OpenMP's threads wait, as our loop has it and as the environment can.

    python -m benchmarks.busy

Four images of 96x128 through a U-Net (ResNet-50), forward, backward and SGD, in a process of its own: alone, and beside
one and two programs that count. ours: `considerate_waiting`, which training runs are in; spinning: PyTorch as it comes;
passive: OMP_WAIT_POLICY=PASSIVE. The three take turns. Writes benchmarks/results/busy.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

from benchmarks.common import machine, spread, write_results

STEP = """
import statistics, sys, time
from contextlib import nullcontext
import torch
from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.threads import considerate_waiting
torch.manual_seed(0)
net = ResNetUNet().to(memory_format=torch.channels_last).train()
optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
images = torch.randn(4, 3, 96, 128)
def step():
    optimizer.zero_grad(set_to_none=True)
    net(images).square().mean().backward()
    optimizer.step()
with considerate_waiting() if sys.argv[1] == "ours" else nullcontext():
    end = time.perf_counter() + 3
    while time.perf_counter() < end:  # the first seconds show the load
        step()
    times = []
    for _ in range(int(sys.argv[2])):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
print(statistics.median(times))
"""
WAYS: dict[str, dict[str, str]] = {"ours": {}, "spinning": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}


def seconds(way: str, steps: int) -> float:
    """Median seconds of a step in a new process."""
    run = subprocess.run(
        [sys.executable, "-c", STEP, way, str(steps)],
        env=os.environ | WAYS[way],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout)


def beside(programs: int, steps: int, repeats: int) -> dict[str, Any]:
    """Measure all ways in turn beside a number of busy programs."""
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        for _ in range(programs):
            counting = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(counting.kill)
        for _ in range(repeats):
            for way, times in taken.items():
                times.append(seconds(way, steps))
    return {way: spread(times) for way, times in taken.items()}


def main() -> None:
    """Print a table and store the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    results = {f"{n} busy programs": beside(n, options.steps, options.repeats) for n in (0, 1, 2)}
    alone = results["0 busy programs"]["spinning"]["median"]
    for name, ways in results.items():
        print(name, {way: f"{times['median']:.2f} s = {times['median'] / alone:.2f}x" for way, times in ways.items()})
    write_results("busy", "python -m benchmarks.busy", {"machine": machine(), "seconds a step": results})


if __name__ == "__main__":
    main()
