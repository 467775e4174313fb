"""Real frames: train on the first three quarters of a 7-Scenes recording, match on the last, against random weights.

    python -m benchmarks.seven_scenes PATH [--steps 150]

Runs the command line of the README, from random weights, at 120x160, with and without a registration of the color
camera (REGISTRATION below: a fit to the kitchen recording, good to a few pixels). Writes
benchmarks/results/seven_scenes.json. The recording is not part of this repository.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write_results

REGISTRATION = {
    "color_intrinsics": [[527, 0, 322], [0, 527, 238], [0, 0, 1]],
    "depth_to_color": [[1, 0, 0, -0.03], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
}
SETTINGS = ("model.init=scratch", "data.size=[120, 160]", "optim.batch=4", "optim.lr=0.03", "task.temperature=0.1")


def geo_pretrain(*arguments: str) -> str:
    """Run the command line."""
    command = [sys.executable, "-m", "geo_pretrain", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Train and measure, once without and once with registration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="geo_pretrain_seven_scenes_"))
    (folder / "registration.json").write_text(json.dumps(REGISTRATION))
    results: dict[str, Any] = {}
    for name, source in {
        "not registered": "data.options={}",
        "registered": f"data.options={{registration: {folder / 'registration.json'}}}",
    }.items():
        out = str(folder / name.replace(" ", "_"))
        data = ["--data", f"seven_scenes:{options.path}", "--set", source]
        settings = [word for setting in SETTINGS for word in ("--set", setting)]
        begin = time.perf_counter()
        geo_pretrain(
            "train",
            "pri3d_view_r18",
            *data,
            "--frames",
            "0:0.75",
            "--steps",
            str(options.steps),
            "--out",
            out,
            *settings,
        )
        seconds = time.perf_counter() - begin
        measured = geo_pretrain("eval", "matching", out, *data, "--frames", "0.75:1", "--pairs", "60", "--json")
        recall = json.loads(measured[measured.index("{") :])
        results[name] = {
            "recall at 4 px, random weights": round(recall["random"]["recall"], 4),
            "recall at 4 px, trained": round(recall[out]["recall"], 4),
            "pairs": len(recall[out]["per_pair"]),
            "training seconds": round(seconds),
        }
    command = f"python -m benchmarks.seven_scenes PATH --steps {options.steps}"
    write_results("seven_scenes", command, results | {"settings": SETTINGS, "machine": machine()})


if __name__ == "__main__":
    main()
