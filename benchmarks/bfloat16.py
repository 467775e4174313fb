"""What bfloat16 changes: features of trained weights, losses and matching recall of toy runs, beside float32.

    python -m benchmarks.bfloat16 OUT [--jobs 2] [--seeds 3] [--start csc_srunet34.rooms ...]
    python -m benchmarks.bfloat16 OUT --table     # in between: what is there

3D pretext tasks and those on two images with --toy, in float32 and bfloat16, over seeds: the mean loss of the last
fifth of the steps. Both precisions see the same samples in the same order. Recall: the image networks of these runs,
in float32, match frames of rooms that nobody trained on, best layer. Features: the relative distance (L2) between the
outputs of one network in both, on frames and whole surfaces of such rooms. The same command goes on where it was
stopped. Needs a processor that multiplies bfloat16. Writes benchmarks/results/bfloat16.json, with the tasks that are
done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import machine, write_results
from benchmarks.jobs import Job, run_jobs, work
from geo_pretrain.checkpoint import CONFIG, read_checkpoint
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import CheckpointError
from geo_pretrain.hub.cache import names_here
from geo_pretrain.loading import load_backbone
from geo_pretrain.rooms import RoomsConfig
from geo_pretrain.sparse import SparseTensor
from geo_pretrain.sparse.backend import describe
from geo_pretrain.training.data.frame import SkippedFrames, Surface
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.evaluation.awareness.networks import find_subject
from geo_pretrain.training.evaluation.awareness.run import measure_awareness
from geo_pretrain.training.evaluation.awareness.spec import AwarenessSpec
from geo_pretrain.training.evaluation.features import cloud_of
from geo_pretrain.training.evaluation.metrics import Spread
from geo_pretrain.training.evaluation.verdict import over_seeds, sentence

IMAGES = ("pri3d_view_r18.rooms", "gsc_r18.rooms", "pri3d_geo_r18.rooms")
RECIPES = (  # the quick ones first
    "pri3d_view_r18.rooms",
    "csc_srunet34.rooms",
    "pointcontrast_nce_srunet34.rooms",
    "pointcontrast_hardest_srunet34.rooms",
    "ppkt_srunet34.rooms",
    "img2pc_srunet34.rooms",
    "pri3d_geo_r18.rooms",
    "ppkd_srunet34",  # from here on with a first stage
    "global_kd_srunet34",
    "gupta_srunet34",
    "crd_srunet34",
    "gsc_r18.rooms",  # of view+geo
)
SHIPPED = ("pri3d_view_r18.rooms", "csc_srunet34.rooms")
PRECISIONS = ("fp32", "bf16")
LAST = 0.2  # share of the steps whose mean loss counts
UNSEEN = RoomsConfig(seed=2026, scenes=4, frames=4, width=320, height=240, split="val")  # recipes train on seed 0
UNSEEN_MATCHED = RoomsConfig(seed=2026, scenes=8, frames=8, width=160, height=120, split="val")
MATCHED = AwarenessSpec(size=(120, 160), frames=64, pairs=20, seeds=1, measures=("matching",))


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
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "geo_pretrain", "train", recipe, "--out", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")

    place = out / f"{recipe}-{precision}-{seed}.job"
    return Job(f"{recipe}, {precision}, seed {seed}", place, partial(is_finished, folder), run)


def finished(out: Path, recipe: str, seeds: int) -> dict[str, list[Path]]:
    """The runs of a recipe in each precision, of the seeds that are finished in both."""
    by = [{p: folder_of(out, recipe, p, seed) for p in PRECISIONS} for seed in range(seeds)]
    whole = [folders for folders in by if all(map(is_finished, folders.values()))]
    return {precision: [folders[precision] for folders in whole] for precision in PRECISIONS}


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
        folders = finished(out, recipe, seeds)
        if len(folders["fp32"]) < 2:
            continue
        by = {precision: [last_loss(folder) for folder in own] for precision, own in folders.items()}
        apart = statistics.fmean(by["bf16"]) - statistics.fmean(by["fp32"])
        deviation = statistics.stdev(by["fp32"])
        found[recipe] = by | {"difference": apart, "std of fp32": deviation, "within": abs(apart) <= deviation}
    return found


def recall(out: Path, seeds: int) -> dict[str, Any]:
    """Matching recall of each image recipe by precision and seed, and in words whether bfloat16 is worse."""
    folders = {recipe: finished(out, recipe, seeds) for recipe in IMAGES}
    subjects = [find_subject(str(folder)) for by in folders.values() for own in by.values() for folder in own]
    if not subjects:
        return {}
    rooms = Rooms(UNSEEN_MATCHED)
    rooms.prepare()
    measured = measure_awareness(subjects, rooms, MATCHED, skips=SkippedFrames())

    def of(folder: Path) -> float:
        name = str(folder)
        return measured.spread(name, "matching", measured.best(name, "matching"), "recall").mean

    found: dict[str, Any] = {}
    for recipe, by in folders.items():
        if by["fp32"]:
            values = {precision: [of(folder) for folder in own] for precision, own in by.items()}
            gain = over_seeds(values["bf16"], values["fp32"])
            found[recipe] = values | {"verdict": sentence("bfloat16", "float32", gain)}
    return found


def features(names: Sequence[str]) -> dict[str, Any]:
    """Relative distance of the features in both precisions, of each network, on frames and on surfaces."""
    rooms = Rooms(UNSEEN)
    rooms.prepare()
    frames = [rooms.load(scene, frame) for scene in rooms.scenes() for frame in rooms.frame_ids(scene)]
    surfaces = [rooms.surface(scene) for scene in rooms.scenes()]
    found: dict[str, Any] = {}
    for name in names:
        network: Any = load_backbone(name)
        if isinstance(network.contract, ImageContract):
            found[name] = {"frames": _distances(network, [network.transforms(frame.color)[None] for frame in frames])}
        else:
            clouds = {"frames": [cloud_of(frame) for frame in frames], "surfaces": surfaces}
            found[name] = {what: _distances(network, _voxels(network, of)) for what, of in clouds.items()}
    return found


def _voxels(network: Any, surfaces: Sequence[Surface]) -> list[SparseTensor]:
    voxels = [network.transforms(surface.points, surface.colors) for surface in surfaces]
    return [SparseTensor(one.coords, one.feats) for one in voxels]


def _numbers(output: Any) -> Tensor:
    """All numbers of an output, float32: features of voxels, or the maps of an encoder one after the other."""
    if isinstance(output, SparseTensor):
        return output.feats.float()
    return torch.cat([one.flatten().float() for one in output])


@torch.no_grad()
def _distances(network: Callable[[Any], Any], inputs: Sequence[Any]) -> dict[str, Any]:
    values = []
    for given in inputs:
        exact = _numbers(network(given))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = _numbers(network(given))
        values.append(((exact - rounded).norm() / exact.norm()).item())
    return {"inputs": len(values), "mean": statistics.fmean(values), "max": max(values)}


def table(results: dict[str, Any]) -> str:
    """All parts in Markdown."""
    lines = ["| toy task | float32 | bfloat16 | difference | within a deviation of seeds |", "| --- " * 5 + "|"]
    for recipe, row in results["losses"].items():
        both = [f"{statistics.fmean(row[p]):.3f} ± {statistics.stdev(row[p]):.3f}" for p in PRECISIONS]
        within = "yes" if row["within"] else "no"
        lines.append(f"| {recipe} | {' | '.join(both)} | {row['difference']:+.3f} | {within} |")
    for recipe, row in results["recall"].items():
        float32, bfloat16 = (f"{Spread(tuple(row[p]))} %" for p in PRECISIONS)
        lines.append(f"\n{recipe}: recall {float32} and {bfloat16}. {row['verdict']}")
    for name, kinds in results["features"].items():
        for what, row in kinds.items():
            shares = f"{100 * row['mean']:.2f} % (at most {100 * row['max']:.2f})"
            lines.append(f"\n{name}: {shares} over {row['inputs']} {what}")
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
    jobs = [job(options.out, r, p, seed) for r in RECIPES for seed in range(options.seeds) for p in PRECISIONS]
    if options.worker:
        work(jobs, partial(print, flush=True))
        return
    code = 0 if options.table else run_jobs("benchmarks.bfloat16", given, options.jobs)
    names = options.start or [name for name in SHIPPED if name in names_here()]
    facts = {"kernels": describe(torch.bfloat16), "machine": machine()}
    runs = {"losses": losses(options.out, options.seeds), "recall": recall(options.out, options.seeds)}
    results = {**runs, "features": features(names), **facts}
    print(table(results))
    if names:
        words = [*(f"--start {name}" for name in names), *(["--table"] if options.table else [])]
        command = f"python -m benchmarks.bfloat16 OUT --seeds {options.seeds} {' '.join(words)}"
        write_results("bfloat16", command, results, timed=False)
    sys.exit(abs(code))


if __name__ == "__main__":
    main()
