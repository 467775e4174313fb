"""Training steps with memory kept between them, beside glibc's own way of handing it back: ratios, in turn.

    python -m benchmarks.heap

Each step in processes of its own, by the processor time of one thread: U-Nets in bf16 (forward, backward, SGD), and
SR-UNet34 on one frame of rooms in float32 and bf16, sparse tensor and kernel maps built anew. kept: `heap.kept_heap`,
which training runs are in. Writes benchmarks/results/heap.json.
"""

from __future__ import annotations

import argparse
import json
import os
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
from benchmarks.sparse import status
from benchmarks.sparse_engines import Engine, kept_inputs
from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.heap import kept_heap

IMAGES = {
    "R18, 8 x 96x128": (18, 8, 96, 128),
    "R18, 8 x 240x320": (18, 8, 240, 320),
    "R50, 2 x 240x320": (50, 2, 240, 320),
}
ENGINES = {"SR-UNet34, float32": "fast", "SR-UNet34, bfloat16": "fast_bf16"}
INPUTS = "inputs"
STEPS = 4  # of a process; as many before them find their memory


def image_step(depth: int, batch: int, height: int, width: int) -> Callable[[], None]:
    """A step of the U-Net."""
    network = ResNetUNet(depth).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, fused=True)
    images = torch.randn(batch, 3, height, width)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            features = network(images)
        features.float().square().mean().backward()
        optimizer.step()

    return step


def child(name: str, way: str, coords: str) -> None:
    """Print median seconds of a step, and by how many MB the process grows."""
    if name == INPUTS:
        kept_inputs(Path(coords))  # in a process of its own: building them takes more memory than a step
        return
    step = (
        image_step(*IMAGES[name]) if name in IMAGES else Engine(ENGINES[name], kept_inputs(Path(coords))["frame"]).train
    )
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    with kept_heap() if way == "kept" else nullcontext():
        for _ in range(STEPS):
            step()
        times = []
        for _ in range(STEPS):
            begin = time.process_time()
            step()
            times.append(time.process_time() - begin)
    print(json.dumps([statistics.median(times), status("VmHWM") - before]))


def run(name: str, way: str, coords: str) -> str:
    """What a child prints."""
    command = [sys.executable, "-m", "benchmarks.heap", "--child", name, way, coords]
    return subprocess.run(command, env=os.environ | THREADS, capture_output=True, text=True, check=True).stdout


def measure(name: str, repeats: int, coords: str) -> dict[str, object]:
    """Both ways in turn."""
    taken: dict[str, list[list[float]]] = {"glibc": [], "kept": []}
    for _ in range(repeats):
        for way, found in taken.items():
            found.append(json.loads(run(name, way, coords).splitlines()[-1]))
    seconds = {way: [time for time, _ in found] for way, found in taken.items()}
    memory = {way: round(max(held for _, held in found)) for way, found in taken.items()}
    ratios = [kept / glibc for glibc, kept in zip(*seconds.values(), strict=True)]
    return {"seconds": {way: spread(times) for way, times in seconds.items()}, "ratio": spread(ratios), "MB": memory}


def main() -> None:
    """Print and store all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child)
    with tempfile.TemporaryDirectory() as folder:
        coords = str(Path(folder) / "coords.pt")
        run(INPUTS, "glibc", coords)
        results = {name: measure(name, options.repeats, coords) for name in (*IMAGES, *ENGINES)}
    write_results("heap", "python -m benchmarks.heap", {"machine": machine(), "steps": results})


if __name__ == "__main__":
    main()
