"""Whole scans at their largest: one training step and one evaluation of a scan of a million voxels, and their memory.

    python -m benchmarks.large_scans [--voxels 1000000]

A made scan (floors, walls and shelves of a hall, colored points 2 cm apart) goes through `finetune` with the published
recipe scannet3d_srunet34, its full-size SR-UNet34 and its voxels of 2 cm, in batches of one scan: the limit of voxels
that the recipe sets for a batch is above a million. Writes benchmarks/results/large_scans.json.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import machine, write_results
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune_recipe import load_finetune_recipe

SPACING, HEIGHT, AISLE = 0.02, 3.0, 1.5  # m: between points, of the hall, between shelves


def hall(voxels: int) -> np.ndarray:
    """Points float32 [N, 3] of a floor with parallel shelves of full height, one a voxel: about `voxels` of them."""
    shelves = max(1, round((voxels * SPACING**2 / (AISLE + HEIGHT) / AISLE) ** 0.5))
    width = voxels * SPACING**2 / (AISLE + HEIGHT) / shelves  # of the hall along each shelf
    along, up = np.arange(0, width, SPACING), np.arange(0, HEIGHT, SPACING)
    floor = np.stack(np.meshgrid(along, np.arange(0, shelves * AISLE, SPACING), [0.0], indexing="ij"), axis=-1)
    walls = np.stack(np.meshgrid(along, np.arange(shelves) * AISLE, up[1:], indexing="ij"), axis=-1)
    points = np.concatenate([floor.reshape(-1, 3), walls.reshape(-1, 3)])
    return (points + SPACING / 2).astype(np.float32)


class Halls:
    """One split with one scan."""

    name, classes = "halls", tuple(f"class {k}" for k in range(1, 21))

    def __init__(self, split: str, voxels: int) -> None:
        self.split, self.points = split, hall(voxels)

    def ids(self) -> list[str]:
        return ["hall"]

    def scene_of(self, id: str) -> str:
        return id

    def load(self, id: str) -> LabelledCloud:
        generator = np.random.default_rng(0)
        colors = generator.integers(0, 256, self.points.shape, dtype=np.uint8)
        labels = 1 + (self.points[:, 0] // 0.5).astype(np.int64) % len(self.classes)
        return LabelledCloud(id, self.points, colors, labels)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.points.tobytes()).hexdigest()


def main() -> None:
    """Train one step, evaluate, and store seconds and the largest memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--voxels", type=int, default=1_000_000)
    voxels = parser.parse_args().voxels
    settings = ["optim.batch=1", "optim.epochs=", "optim.steps=1", "workers=0", "evaluate.every_steps=1"]
    recipe = load_finetune_recipe("scannet3d_srunet34", settings)
    marks = {"start": time.perf_counter()}
    begun = memory()
    found: dict[str, Any] = {}

    def after_step(info: Any) -> None:
        marks["step"], found["training_gb"] = time.perf_counter(), memory()

    with tempfile.TemporaryDirectory() as folder:
        finetune(
            recipe,
            "scratch",
            Path(folder, "run"),
            device="cpu",
            sources=(Halls("train", voxels), Halls("val", voxels)),
            on_step=after_step,
        )
    seconds = {"first step": marks["step"] - marks["start"], "evaluation": time.perf_counter() - marks["step"]}
    results = {"points": len(hall(voxels)), "begun_gb": begun, "training_gb": found["training_gb"], "all_gb": memory()}
    results |= {"seconds": {name: round(value, 1) for name, value in seconds.items()}, "machine": machine()}
    write_results("large_scans", f"python -m benchmarks.large_scans --voxels {voxels}", results, timed=False)


def memory() -> float:
    """The largest resident memory of this process so far, GB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


if __name__ == "__main__":
    main()
