"""Does 3D pre-training help on whole scans? Fine-tuning on rooms3d from scratch and from checkpoints made on rooms.

Run from a checkout: python -m benchmarks.downstream_3d FOLDER [STUDY ...] [--rate RATE]

Pre-trains each method on 96 rooms (another seed of rooms than the scans), then fine-tunes: a sweep over starts, shares
and seeds for each study and learning rate, the same budget for every start. Everything is resumable: give the same
command again; `--rate` takes one learning rate only, so that two processes can share the work. FOLDER keeps
checkpoints, runs and pictures; numbers go to benchmarks/results/downstream_3d_<study>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cloud_pictures import draw_starts
from benchmarks.common import machine, write_results
from benchmarks.downstream import grid, run
from geo_pretrain.training.finetune.sweep import read_plan
from geo_pretrain.training.networks import SCRATCH

SEEDS = (0, 1, 2)
METHODS = ("csc", "pointcontrast_nce", "pointcontrast_hardest", "ppkt", "img2pc")
STEPS = 1500  # of pre-training, and of the first stage of ppkt and img2pc
PRETRAIN = (
    "train {method}_srunet34.rooms --toy --device cpu --out {out} --set optim.steps={steps} --set save_every=100 "
    "--set data.options.scenes=96 --set data.options.frames=12 --set data.options.width=128 "
    "--set data.options.height=96 --set data.options.renderer=numba --set data.size=[96,128]"
)


@dataclass(frozen=True)
class Study:
    """One recipe from scratch and from checkpoints, the same budget and learning rates for all."""

    recipe: str
    starts: tuple[str, ...]  # methods of pre-training, besides scratch
    steps: int
    rates: tuple[float, ...]
    fractions: tuple[float, ...] = (1.0,)
    settings: tuple[str, ...] = ()


STUDIES = {
    "segmentation": Study("rooms3d_srunet34", METHODS, 240, (0.03, 0.1), (0.1, 1.0), ("optim.batch=2",)),
    "detection": Study(
        "rooms3d_votenet",
        ("csc", "pointcontrast_nce"),
        250,
        (1e-3, 3e-3),
        settings=("optim.batch=2", "optim.milestones=[170, 220]"),
    ),
    # With the released SGD no start finds objects in so few steps (AP50 about 2 %).
    "instances": Study(
        "rooms3d_instances",
        ("csc",),
        240,
        (2e-3, 5e-3),
        settings=("optim.optimizer=adam", "optim.dampening=0", "optim.batch=2"),
    ),
    "classification": Study("rooms3d_classification", ("csc",), 150, (0.01, 0.03), (0.1,)),
    "parts": Study("rooms3d_parts", ("csc",), 150, (0.03, 0.1), (0.1, 1.0)),
}

DRAWN, DRAWN_SCANS = ("segmentation", "detection", "instances"), ("rooms_val_0004", "rooms_val_0008")
DOCS = Path(__file__).parents[1] / "docs"
PROBE = "probe"  # no fine-tuning: a linear layer on frozen features, beside its controls
PROBE_DATA = {"scenes": 64, "val_scenes": 16, "frames": 16, "width": 128, "height": 96, "spacing": 0.025}


def main() -> None:
    """Run what is missing, and store the numbers of each study whose sweeps are complete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join([PROBE, *STUDIES]))
    parser.add_argument("--rate", type=float, help="one learning rate only; nothing is stored")
    options = parser.parse_args()
    for name in options.studies or [PROBE, *STUDIES]:
        if name == PROBE:
            write_results(
                f"downstream_3d_{PROBE}", command(PROBE), {"machine": machine(), **probes(options.folder)}, timed=False
            )
            continue
        study = STUDIES[name]
        rates = study.rates if options.rate is None else tuple(r for r in study.rates if r == options.rate)
        sweeps = {rate: sweep(options.folder, name, study, rate) for rate in rates}
        if options.rate is not None:
            continue
        summaries = {rate: json.loads((out / "summary.json").read_text()) for rate, out in sweeps.items()}
        results: dict[str, Any] = {"machine": machine(), "steps": study.steps, "pre-training steps": STEPS}
        results |= grid(summaries)
        write_results(f"downstream_3d_{name}", command(name), results, timed=False)
        if name in DRAWN:
            draw(DOCS / f"downstream_3d_{name}.png", sweeps, results["best of the learning rates"])


def draw(path: Path, sweeps: dict[float, Path], best: list[dict[str, Any]]) -> None:
    """Draw what scratch and the two best starts find in validation scans: the least labels, the first seed."""
    least = sorted((p for p in best if p["fraction"] == min(q["fraction"] for q in best)), key=lambda p: -p["mean"])
    chosen = [p for p in least if p["backbone"] == SCRATCH] + [p for p in least if p["backbone"] != SCRATCH][:2]
    runs = {}
    for point in chosen:
        where = point["backbone"], point["fraction"], SEEDS[0]
        found = (run for run in read_plan(sweeps[point["lr"]])[2] if (run.label, run.fraction, run.seed) == where)
        runs[point["backbone"].partition("_srunet")[0]] = next(found).folder
    draw_starts(runs, DRAWN_SCANS, path)


def command(name: str) -> str:
    """What makes a result again."""
    return f"python -m benchmarks.downstream_3d FOLDER {name}"


def probes(folder: Path) -> dict[str, Any]:
    """Linear probes of each checkpoint and of its controls on rooms3d: mIoU, mean and deviation over seeds."""
    measured = []
    for method in METHODS:
        start = checkpoint(folder, method)
        for fraction in STUDIES["segmentation"].fractions:
            runs = [probe(start, fraction, seed) for seed in SEEDS]
            for row in runs[0]:
                scores = [run[row]["linear"]["miou"] for run in runs]
                spread = {"mean": statistics.mean(scores), "std": statistics.stdev(scores)}
                name = row if row in ("xyz+color", "random") else "pre-trained"
                measured.append({"start": start.name, "row": name, "fraction": fraction, "seeds": scores, **spread})
    return {"probe": "linear", "metric": "miou", "pre-training steps": STEPS, "measured": measured}


def probe(start: Path, fraction: float, seed: int) -> dict[str, Any]:
    """One `eval probe`, kept beside the runs."""
    kept = start.parent / PROBE / f"{start.name}_{100 * fraction:g}_{seed}.json"
    if not kept.is_file():
        options = [part for key, value in PROBE_DATA.items() for part in ("--option", f"{key}={value}")]
        what = ["--probes", "linear", "--fraction", str(fraction), "--seed", str(seed), "--json"]
        call = [sys.executable, "-m", "geo_pretrain", "eval", "probe", str(start), "--data", "rooms3d", *options, *what]
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def checkpoint(folder: Path, method: str) -> Path:
    """The folder of a method's checkpoint, which is pre-trained first where it is missing."""
    out = folder / f"{method}_srunet34_s0"
    if not (out / "config.json").is_file():
        stage1 = ["--set", f"stage1.optim.steps={STEPS}"] if method in ("ppkt", "img2pc") else []
        run([*PRETRAIN.format(method=method, out=out, steps=STEPS).split(), *stage1])
    return out


def sweep(folder: Path, name: str, study: Study, rate: float) -> Path:
    """Run what is missing of a study at one learning rate; returns the sweep's folder."""
    starts = ["scratch", *(str(checkpoint(folder, method)) for method in study.starts)]
    settings = [
        f"optim.steps={study.steps}",
        f"evaluate.every_steps={study.steps}",
        f"optim.lr={rate}",
        *study.settings,
    ]
    out = folder / f"{name}_lr{rate:g}"
    axes = {"-b": starts, "--seed": SEEDS, "--fraction": study.fractions, "--set": settings}
    options = [part for option, values in axes.items() for value in values for part in (option, str(value))]
    run(["finetune", study.recipe, "--sweep", *options, "--device", "cpu", "--out", str(out)])
    return out


if __name__ == "__main__":
    main()
