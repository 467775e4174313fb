"""Training steps with memory kept between them, beside glibc's own way of handing it back: ratios, in turn.

    python -m benchmarks.heap

Each step in processes of its own, by the processor time of one thread: the R18 U-Net on 8 images in bf16 (forward,
backward, SGD), and the SR-UNet34 on one frame of rooms in float32 and bf16, sparse tensor and kernel maps built anew.
kept: `heap.kept_heap`, which training runs are in. Writes benchmarks/results/heap.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from benchmarks.common import machine, spread, write_results
from benchmarks.jobs import THREADS
from benchmarks.sparse_engines import Engine, kept_inputs
from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.heap import kept_heap

IMAGES = {"R18, 96x128": (96, 128), "R18, 240x320": (240, 320)}
ENGINES = {"SR-UNet34, float32": "fast", "SR-UNet34, bfloat16": "fast_bf16"}
STEPS = 8  # of a process; as many before them find their memory


def image_step(size: tuple[int, int]) -> Callable[[], None]:
    """A step of the U-Net."""
    network = ResNetUNet(18).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, fused=True)
    images = torch.randn(8, 3, *size)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            features = network(images)
        features.float().square().mean().backward()
        optimizer.step()

    return step


def child(name: str, way: str, coords: str) -> None:
    """Print median seconds of a step, and the most memory (MB)."""
    inputs = kept_inputs(Path(coords))
    step = image_step(IMAGES[name]) if name in IMAGES else Engine(ENGINES[name], inputs["frame"]).train
    with kept_heap() if way == "kept" else nullcontext():
        for _ in range(STEPS):
            step()
        times = []
        for _ in range(STEPS):
            begin = time.process_time()
            step()
            times.append(time.process_time() - begin)
    print(json.dumps([statistics.median(times), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def measure(name: str, repeats: int, coords: str) -> dict[str, object]:
    """Both ways in turn."""
    taken: dict[str, list[list[float]]] = {"glibc": [], "kept": []}
    for _ in range(repeats):
        for way, found in taken.items():
            command = [sys.executable, "-m", "benchmarks.heap", "--child", name, way, coords]
            run = subprocess.run(command, env=os.environ | THREADS, capture_output=True, text=True, check=True)
            found.append(json.loads(run.stdout.splitlines()[-1]))
    seconds = {way: [time for time, _ in found] for way, found in taken.items()}
    memory = {way: round(max(held for _, held in found)) for way, found in taken.items()}
    ratios = [kept / glibc for glibc, kept in zip(*seconds.values(), strict=True)]
    return {"seconds": {way: spread(times) for way, times in seconds.items()}, "ratio": spread(ratios), "MB": memory}


def main() -> None:
    """Print and store all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child)
    with tempfile.TemporaryDirectory() as folder:
        coords = str(Path(folder) / "coords.pt")
        results = {name: measure(name, options.repeats, coords) for name in (*IMAGES, *ENGINES)}
    write_results("heap", "python -m benchmarks.heap", {"machine": machine(), "steps": results})


if __name__ == "__main__":
    main()
