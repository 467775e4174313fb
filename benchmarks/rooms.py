"""How fast rooms are rendered: frames/s on one core, geometry, color, shadows and the camera included.

Run: python -m benchmarks.rooms [--repeats 5] [--frames 12]; writes benchmarks/results/rooms.json.
Each repeat renders other scenes, from layout to finished arrays; what is cached on disk is not used.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import torch

from benchmarks.common import machine, spread, write_results
from geo_pretrain.rooms import GENERATOR, RoomsConfig
from geo_pretrain.training.data.sources.rooms import Rooms

SIZES = ((160, 120), (320, 240), (640, 480))


def measure(width: int, height: int, difficulty: str, repeats: int, frames: int) -> dict[str, Any]:
    """Frames per second of CPU time and of wall time, median and range over repeats."""
    config = RoomsConfig(seed=99, scenes=repeats + 1, frames=frames, width=width, height=height, difficulty=difficulty)
    source = Rooms(config)
    cpu, wall = [], []
    for index, scene in enumerate(source.scenes()):
        started, spent = time.perf_counter(), time.process_time()
        source.generator.render(scene)
        if index:  # the first one warms up
            wall.append(frames / (time.perf_counter() - started))
            cpu.append(frames / (time.process_time() - spent))
    rates = {"frames_per_cpu_second": spread(cpu), "frames_per_second": spread(wall)}
    return {"width": width, "height": height, "difficulty": difficulty, **rates}


def main() -> None:
    """Measure all sizes at medium difficulty, and 320x240 at the other two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="scenes measured per case")
    parser.add_argument("--frames", type=int, default=12, help="frames per scene")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(*size, "medium") for size in SIZES] + [(320, 240, "easy"), (320, 240, "hard")]
    results = {
        "what": "rooms rendering on one thread, from layout to finished arrays",
        "machine": machine(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "generator": GENERATOR,
        "repeats": options.repeats,
        "frames_per_scene": options.frames,
        "results": [measure(*case, options.repeats, options.frames) for case in cases],
    }
    write_results("rooms", " ".join(["python -m benchmarks.rooms", *sys.argv[1:]]), results)


if __name__ == "__main__":
    main()
