"""Does pre-training help downstream, at toy scale? Fine-tuning on rooms from scratch and from toy checkpoints.

Run from a checkout: python -m benchmarks.downstream FOLDER [STUDY ...]

Pre-trains Pri3D view, geo and view+geo on rooms (150 steps each), then runs the studies below, each a sweep over
starts and seeds. Everything is resumable: give the same command again. FOLDER keeps checkpoints, runs and pictures;
numbers go to benchmarks/results/downstream_<study>.json and curves to docs/.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import machine, write_results

STEPS, SEEDS = 100, (0, 1, 2)
PRETRAIN = "train pri3d_{prior}_r18 --toy --set model.width=64 --steps 150 --device cpu --out {out}"
UNET = "finetune rooms_unet_r18 --sweep"
# study: (command, starts besides scratch, further options)
STUDIES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "unet": (UNET, ("view", "geo", "view_geo"), ()),
    "curve": (UNET, ("view",), ("--fraction", "0.25", "--fraction", "0.5", "--fraction", "1")),
    "deeplabv3": ("finetune rooms_deeplabv3_r18 --sweep", ("view",), ()),
    "deeplabv3plus": ("finetune rooms_deeplabv3plus_r18 --sweep", ("view",), ()),
    "pspnet": ("finetune rooms_pspnet_r18 --sweep", ("view",), ()),
    "mask_rcnn": ("finetune rooms_mask_rcnn_r18 --sweep", ("view",), ()),
}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(STUDIES)
    for name in names:
        command, starts, options = STUDIES[name]
        for prior in starts:
            if not (folder / f"pri3d_{prior}" / "config.json").is_file():
                run(PRETRAIN.format(prior=prior, out=folder / f"pri3d_{prior}").split())
        study(folder, name, command.split(), starts, options)


def study(folder: Path, name: str, command: list[str], starts: tuple[str, ...], options: tuple[str, ...]) -> None:
    budget = ["--set", f"optim.steps={STEPS}", "--set", f"evaluate.every_steps={STEPS}", "--device", "cpu"]
    chosen = [part for start in ("scratch", *starts) for part in ("-b", start_path(folder, start))]
    seeds = [part for seed in SEEDS for part in ("--seed", str(seed))]
    out = folder / name
    start = time.perf_counter()
    run([*command, *chosen, *seeds, *options, *budget, "--out", str(out)])
    summary = json.loads((out / "summary.json").read_text())
    results = {"machine": machine(), "minutes of this call": round((time.perf_counter() - start) / 60, 1), **summary}
    if name == "curve":
        shutil.copy(out / "curve.png", Path(__file__).parents[1] / "docs" / "downstream_curve.png")
    write_results(f"downstream_{name}", f"python -m benchmarks.downstream FOLDER {name}", results)


def start_path(folder: Path, start: str) -> str:
    return start if start == "scratch" else str(folder / f"pri3d_{start}")


def run(arguments: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two single-threaded studies are quicker than one with two
    subprocess.run([sys.executable, "-m", "geo_pretrain", *arguments], check=True, env=environment)


if __name__ == "__main__":
    main()
