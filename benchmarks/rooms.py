"""How fast rooms are rendered, by numba and by torch: frames/s on one core, from layout to finished arrays.

Run: OMP_NUM_THREADS=1 python -m benchmarks.rooms [--repeats 5] [--frames 12]; writes benchmarks/results/rooms.json.
Each repeat renders another scene with both renderers, one after the other. What is cached on disk is not used; `ready`
is the rate of `RoomGenerator.frame` once a scene's geometry and camera path are there, as in a loader's workers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.common import machine, spread, write_results
from geo_pretrain.rooms import GENERATOR, RoomGenerator, RoomsConfig

SIZES = ((160, 120), (320, 240), (640, 480))
RENDERERS = ("torch", "numba")


def rates(frames: int, run: Callable[[], object]) -> tuple[float, float]:
    """Frames per second of processor time and of wall time."""
    started, spent = time.perf_counter(), time.process_time()
    run()
    return frames / (time.process_time() - spent), frames / (time.perf_counter() - started)


def measure(width: int, height: int, difficulty: str, repeats: int, frames: int) -> dict[str, Any]:
    """Median and range over scenes of both renderers' rates, and how far their frames differ."""
    config = RoomsConfig(seed=99, scenes=repeats + 1, frames=frames, width=width, height=height, difficulty=difficulty)
    both = {name: RoomGenerator(replace(config, renderer=name)) for name in RENDERERS}
    found: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": [], "ready": []} for name in RENDERERS}
    ids, colors, most = [], [], 0
    for number, scene in enumerate(both["numba"].names()):
        rendered = {}
        for name, generator in both.items():
            cpu, wall = rates(frames, lambda: rendered.update({name: generator.render(scene)}))  # noqa: B023 - run at once
            generator.frame(scene, 0)
            ready, _ = rates(frames - 1, lambda: [generator.frame(scene, i) for i in range(1, frames)])  # noqa: B023
            if number:  # the first one warms up
                for key, value in (("cpu", cpu), ("wall", wall), ("ready", ready)):
                    found[name][key].append(value)
        one, two = rendered.values()
        change = np.abs(one["color"].astype(int) - two["color"])
        ids.append(float((one["instance"] == two["instance"]).mean()))
        colors.append(float((change == 0).mean()))
        most = max(most, int(change.max()))
    ratio = statistics.median(found["numba"]["cpu"]) / statistics.median(found["torch"]["cpu"])
    return {
        "width": width,
        "height": height,
        "difficulty": difficulty,
        **{
            name: {
                "frames_per_cpu_second": spread(values["cpu"]),
                "frames_per_second": spread(values["wall"]),
                "ready_frames_per_cpu_second": spread(values["ready"]),
            }
            for name, values in found.items()
        },
        "numba_to_torch": round(ratio, 1),
        "equal_ids": min(ids),
        "equal_color_values": min(colors),
        "largest_color_difference": most,
    }


def main() -> None:
    """Measure all sizes at medium difficulty, and 320x240 at the other two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="scenes measured per case")
    parser.add_argument("--frames", type=int, default=12, help="frames per scene")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(*size, "medium") for size in SIZES] + [(320, 240, "easy"), (320, 240, "hard")]
    load = [round(load, 2) for load in os.getloadavg()]
    results = {
        "what": "rooms rendering on one thread, from layout to finished arrays",
        "machine": machine(),
        "load_average": load,
        "generator": GENERATOR,
        "repeats": options.repeats,
        "frames_per_scene": options.frames,
        "results": [measure(*case, options.repeats, options.frames) for case in cases],
    }
    write_results("rooms", " ".join(["OMP_NUM_THREADS=1 python -m benchmarks.rooms", *sys.argv[1:]]), results)


if __name__ == "__main__":
    main()
