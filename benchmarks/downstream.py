"""Does pre-training help downstream, at toy scale? Fine-tuning on rooms from scratch and from toy checkpoints.

Run from a checkout: python -m benchmarks.downstream FOLDER [STUDY ...]

Pre-trains Pri3D on rooms for as many steps as a study asks for, then fine-tunes: a sweep over starts and seeds for each
study and learning rate. Everything is resumable: give the same command again. FOLDER keeps checkpoints, runs and
pictures; numbers go to benchmarks/results/downstream_<study>.json, figures to docs/.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write_results
from benchmarks.sweep_pictures import draw_starts

SEEDS = (0, 1, 2)
DOCS = Path(__file__).parents[1] / "docs"
PRETRAIN = "train pri3d_{prior}_r18 --toy --set model.width=64 --steps {steps} --device cpu --out {out}"
DRAWN = 4  # validation images in the picture


@dataclass(frozen=True)
class Study:
    """One recipe from scratch and from toy checkpoints, the same budget for all."""

    recipe: str
    starts: tuple[str, ...]  # priors of Pri3D, besides scratch
    pretraining: int  # steps
    steps: int = 100
    fractions: tuple[float, ...] = (1.0,)
    rates: tuple[float, ...] = ()  # learning rates that every start gets; none: the recipe's
    settings: tuple[str, ...] = ()  # of the recipe


UNET = "rooms_unet_r18"
FALLING = ("optim.bn_momentum=pri3d",)  # BatchNorm's momentum as it was when these were run
STUDIES = {
    "unet": Study(UNET, ("view", "geo", "view_geo"), 150, settings=FALLING),
    "curve": Study(UNET, ("view",), 150, fractions=(0.25, 0.5, 1.0), settings=FALLING),
    "deeplabv3": Study("rooms_deeplabv3_r18", ("view",), 150),
    "deeplabv3plus": Study("rooms_deeplabv3plus_r18", ("view",), 150),
    "pspnet": Study("rooms_pspnet_r18", ("view",), 150),
    "unet_rates": Study(UNET, ("view",), 350, rates=(0.02, 0.05), settings=FALLING),
    "unet_long": Study(UNET, ("view",), 350, 300, settings=FALLING),
    "unet_long_bn": Study(UNET, ("view",), 350, 300),
    "mask_rcnn": Study(
        "rooms_mask_rcnn_r18", ("view",), 350, 600, settings=("optim.batch=2", "optim.milestones=[420, 540]")
    ),
}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(STUDIES)
    for name in names:
        study = STUDIES[name]
        start = time.perf_counter()
        measured = at_its_own_rate(folder, name, study) if not study.rates else at_every_rate(folder, name, study)
        results = {"machine": machine(), "minutes of this call": round((time.perf_counter() - start) / 60, 1)}
        results |= {"pre-training steps": study.pretraining, **measured}
        write_results(f"downstream_{name}", f"python -m benchmarks.downstream FOLDER {name}", results, timed=False)


def at_its_own_rate(folder: Path, name: str, study: Study) -> dict[str, Any]:
    """The summary of one sweep, with the recipe's learning rate."""
    out = sweep(folder, name, study, None)
    if name == "curve":
        shutil.copy(out / "curve.png", DOCS / "downstream_curve.png")
    return {**json.loads((out / "summary.json").read_text()), "scores": scores(out)}


def at_every_rate(folder: Path, name: str, study: Study) -> dict[str, Any]:
    """The summaries of a sweep for each learning rate as one, and a picture at the rate that suits scratch best."""
    sweeps = {rate: sweep(folder, name, study, rate) for rate in study.rates}
    results = grid({rate: json.loads((out / "summary.json").read_text()) for rate, out in sweeps.items()})
    fair: float = next(p["lr"] for p in results["best of the learning rates"] if p["backbone"] == "scratch")
    draw_starts(sweeps[fair], DOCS / "downstream_predictions.png", fraction=1.0, seed=SEEDS[0], images=DRAWN)
    return results


def sweep(folder: Path, name: str, study: Study, rate: float | None) -> Path:
    """Run what is missing of a study at one learning rate; returns the sweep's folder."""
    starts = ["scratch"]
    for prior in study.starts:
        checkpoint = folder / f"pri3d_{prior}_{study.pretraining}"
        if not (checkpoint / "config.json").is_file():
            run(PRETRAIN.format(prior=prior, steps=study.pretraining, out=checkpoint).split())
        starts.append(str(checkpoint))
    settings = [f"optim.steps={study.steps}", f"evaluate.every_steps={study.steps}", *study.settings]
    out = folder / name
    if rate is not None:
        settings, out = [*settings, f"optim.lr={rate}"], out / f"lr{rate}"
    axes = {"-b": starts, "--seed": SEEDS, "--fraction": study.fractions, "--set": settings}
    options = [part for option, values in axes.items() for value in values for part in (option, str(value))]
    run(["finetune", study.recipe, "--sweep", *options, "--device", "cpu", "--out", str(out)])
    return out


def scores(out: Path) -> list[dict[str, Any]]:
    """All scores of each finished run of a sweep, for those that have more than the one in its table."""
    found = []
    for path in sorted(out.glob("runs/*/*/*/results.json")):
        result = json.loads(path.read_text())
        start, share, seed = path.parts[-4:-1]
        found.append({"start": start, "percent": float(share), "seed": seed, **result[result["uses"]]["scores"]})
    return found


def grid(summaries: dict[float, dict[str, Any]]) -> dict[str, Any]:
    """All points with their learning rate, and of each start the learning rate with the highest mean.

    The choice is made on the images that are reported, for every start alike; "gain by seed" is at the same rate.
    """
    points = [{"lr": rate, **point} for rate, summary in summaries.items() for point in summary["measured"]]
    best: dict[tuple[str, float], dict[str, Any]] = {}
    for point in points:
        key = point["backbone"], point["fraction"]
        if key not in best or point["mean"] > best[key]["mean"]:
            best[key] = point
    scratch = {(p["lr"], p["fraction"]): p["seeds"] for p in points if p["backbone"] == "scratch"}
    gains = []
    for point in (point for point in points if point["backbone"] != "scratch"):
        base = scratch[point["lr"], point["fraction"]]
        by_seed = {seed: score - base[seed] for seed, score in point["seeds"].items() if seed in base}
        gains.append(
            {
                **{key: point[key] for key in ("lr", "backbone", "fraction")},
                "gain by seed": by_seed,
                "mean": statistics.mean(by_seed.values()),
                "std": statistics.stdev(by_seed.values()) if len(by_seed) > 1 else None,
            }
        )
    first = next(iter(summaries.values()))
    return {
        **{key: first[key] for key in ("recipe", "metric", "state")},
        "learning rates": list(summaries),
        "measured": points,
        "best of the learning rates": list(best.values()),
        "gains over scratch": gains,
        "missing": [missing for summary in summaries.values() for missing in summary["missing"]],
    }


def run(arguments: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two single-threaded studies are quicker than one with two
    subprocess.run([sys.executable, "-m", "geo_pretrain", *arguments], check=True, env=environment)


if __name__ == "__main__":
    main()
