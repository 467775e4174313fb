"""What bfloat16 changes in 3D: features of trained weights, and losses of toy runs, beside float32.

    python -m benchmarks.bfloat16 OUT [--jobs 2] [--seeds 3] [--start csc_srunet34.rooms ...]
    python -m benchmarks.bfloat16 OUT --table     # in between: what is there

Every 3D pretext task with --toy, in float32 and bfloat16, over seeds: the mean loss of the last fifth of the steps.
Both precisions see the same samples in the same order. Features: the relative distance (L2) between the outputs of one
network in both, on frames and whole surfaces of rooms that nobody trained on. The same command goes on where it was
stopped. Needs a processor that multiplies bfloat16. Writes benchmarks/results/bfloat16.json, with the losses of the
tasks that are done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, write_results
from benchmarks.jobs import Job, run_jobs, work
from geo_pretrain.checkpoint import CONFIG, read_checkpoint
from geo_pretrain.errors import CheckpointError
from geo_pretrain.hub.cache import names_here
from geo_pretrain.loading import load_backbone
from geo_pretrain.rooms import RoomsConfig
from geo_pretrain.sparse import SparseTensor
from geo_pretrain.sparse.backend import describe
from geo_pretrain.training.data.frame import Surface
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.evaluation.features import cloud_of

RECIPES = (
    "csc_srunet34.rooms",
    "pointcontrast_nce_srunet34.rooms",
    "pointcontrast_hardest_srunet34.rooms",
    "ppkt_srunet34.rooms",
    "img2pc_srunet34.rooms",
    "pri3d_geo_r18.rooms",
)
PRECISIONS = ("fp32", "bf16")
LAST = 0.2  # share of the steps whose mean loss counts
UNSEEN = RoomsConfig(seed=2026, scenes=4, frames=4, width=320, height=240, split="val")  # recipes train on seed 0


def folder_of(out: Path, recipe: str, precision: str, seed: int) -> Path:
    """Where a run lies."""
    return out / recipe / precision / str(seed)


def is_finished(folder: Path) -> bool:
    """Whether a run has taken all its steps."""
    try:
        return (folder / CONFIG).exists() and bool(read_checkpoint(folder).finished)
    except CheckpointError:
        return False


def job(out: Path, recipe: str, precision: str, seed: int) -> Job:
    """One toy run, by the command line."""
    folder = folder_of(out, recipe, precision, seed)
    words = ["--toy", "--set", f"precision={precision}", "--set", f"seed={seed}", "--set", "workers=0"]

    def run() -> None:
        command = [sys.executable, "-m", "geo_pretrain", "train", recipe, "--out", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")

    place = out / f"{recipe}-{precision}-{seed}.job"
    return Job(f"{recipe}, {precision}, seed {seed}", place, partial(is_finished, folder), run)


def last_loss(folder: Path) -> float:
    """The mean of a run's total loss over the last steps."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    terms = read_terms(rows[0])
    totals = [sum(row[term] for term in terms) for row in rows if "step" in row]
    return statistics.fmean(totals[-max(round(LAST * len(totals)), 1) :])


def read_terms(row: dict[str, Any]) -> list[str]:
    """The losses among the fields of a line of the log."""
    others = {"step", "lr", "precision", "epoch", "seconds"}
    return [key for key, value in row.items() if isinstance(value, float) and key not in others and "per_" not in key]


def losses(out: Path, seeds: int) -> dict[str, Any]:
    """Each recipe: losses by precision and seed, and whether their means differ by less than seeds do."""
    found: dict[str, Any] = {}
    for recipe in RECIPES:
        by = {
            precision: [
                last_loss(folder)
                for seed in range(seeds)
                if is_finished(folder := folder_of(out, recipe, precision, seed))
            ]
            for precision in PRECISIONS
        }
        if min(len(values) for values in by.values()) < 2:
            continue
        apart = statistics.fmean(by["bf16"]) - statistics.fmean(by["fp32"])
        deviation = statistics.stdev(by["fp32"])
        found[recipe] = by | {"difference": apart, "std of fp32": deviation, "within": abs(apart) <= deviation}
    return found


def features(names: Sequence[str]) -> dict[str, Any]:
    """Relative distance of the features in both precisions, of each network, on frames and on surfaces."""
    rooms = Rooms(UNSEEN)
    rooms.prepare()
    clouds = {
        "frames": [cloud_of(rooms.load(scene, frame)) for scene in rooms.scenes() for frame in rooms.frame_ids(scene)],
        "surfaces": [rooms.surface(scene) for scene in rooms.scenes()],
    }
    found: dict[str, Any] = {}
    for name in names:
        network = load_backbone(name)
        found[name] = {what: _distances(network, surfaces) for what, surfaces in clouds.items()}
    return found


@torch.no_grad()
def _distances(network: Any, surfaces: Sequence[Surface]) -> dict[str, Any]:
    values = []
    for surface in surfaces:
        voxels = network.transforms(surface.points, surface.colors)
        x = SparseTensor(voxels.coords, voxels.feats)
        exact = network(x).feats
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(x).feats.float()
        values.append(((exact - rounded).norm() / exact.norm()).item())
    return {"clouds": len(values), "mean": statistics.fmean(values), "max": max(values)}


def table(results: dict[str, Any]) -> str:
    """Both parts in Markdown."""
    lines = ["| toy task | float32 | bfloat16 | difference | within a deviation of seeds |", "| --- " * 5 + "|"]
    for recipe, row in results["losses"].items():
        both = [f"{statistics.fmean(row[p]):.3f} ± {statistics.stdev(row[p]):.3f}" for p in PRECISIONS]
        within = "yes" if row["within"] else "no"
        lines.append(f"| {recipe} | {' | '.join(both)} | {row['difference']:+.3f} | {within} |")
    for name, kinds in results["features"].items():
        for what, row in kinds.items():
            shares = f"{100 * row['mean']:.2f} % (at most {100 * row['max']:.2f})"
            lines.append(f"\n{name}: {shares} over {row['clouds']} {what}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of runs; the same command goes on")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="run nothing: a table of what is there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--start", action="append", default=[], help="weights whose features are compared")
    options = parser.parse_args(given)
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [job(options.out, r, p, seed) for seed in range(options.seeds) for r in RECIPES for p in PRECISIONS]
    if options.worker:
        work(jobs, partial(print, flush=True))
        return
    code = 0 if options.table else run_jobs("benchmarks.bfloat16", given, options.jobs)
    names = options.start or [name for name in ("csc_srunet34.rooms",) if name in names_here()]
    facts = {"kernels": describe(torch.bfloat16), "machine": machine()}
    results = {"losses": losses(options.out, options.seeds), "features": features(names), **facts}
    print(table(results))
    if names:
        words = [*(f"--start {name}" for name in names), *(["--table"] if options.table else [])]
        command = f"python -m benchmarks.bfloat16 OUT --seeds {options.seeds} {' '.join(words)}"
        write_results("bfloat16", command, results, timed=False)
    sys.exit(abs(code))


if __name__ == "__main__":
    main()
