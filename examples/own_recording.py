"""Pre-train on a recording of your own: a plain folder of color, depth and poses, checked, learned from, matched.

    python examples/own_recording.py --out recording

Replace `write_recording` by your frames in the same layout (docs/data.md); everything after it stays.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from geo_pretrain.rooms import RoomGenerator, RoomsConfig


def write_recording(folder: Path, frames: int = 12) -> None:
    """Frames of one procedural room in the plain layout: color/, depth/ in millimeters, poses.txt, intrinsics.txt."""
    for name in ("color", "depth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rooms = RoomGenerator(RoomsConfig(scenes=1, frames=frames, width=160, height=120, seed=7, renderer="auto"))
    room = rooms.render(rooms.names()[0])
    poses = []
    for number, pose in enumerate(room["poses"]):
        Image.fromarray(room["color"][number]).save(folder / "color" / f"{number:04d}.png")
        millimeters = np.round(room["depth"][number] * 1000).astype(np.uint16)
        Image.fromarray(millimeters).save(folder / "depth" / f"{number:04d}.png")
        poses.append(" ".join(f"{value:.8f}" for value in pose.reshape(-1)))
    (folder / "poses.txt").write_text("\n".join(poses) + "\n")  # camera to world, one row of 16 numbers a frame
    np.savetxt(folder / "intrinsics.txt", room["intrinsics"])


def run(*words: object) -> None:
    """Run a command of geo-pretrain."""
    print("$ geo-pretrain", *words, flush=True)
    subprocess.run([sys.executable, "-m", "geo_pretrain", *map(str, words)], check=True)


def main() -> None:
    """The five commands of docs/data.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("recording"))
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    data = given.out / "frames"
    write_recording(data)
    small = ["--set", "data.size=[96,128]", "--set", "optim.batch=2", "--set", "task.temperature=0.1"]
    run("data", "check", f"folder:{data}", "-o", given.out / "check.png")
    run(
        "train", "pri3d_view_r18", "--data", f"folder:{data}", "--frames", "0:0.75", "--out", given.out / "backbone",
        "--overwrite", "--steps", given.steps, "--set", "model.init=scratch", "--set", "precision=fp32",
        "--set", "workers=0", *small,
    )  # fmt: skip
    held_out = ["--data", f"folder:{data}", "--frames", "0.6:1"]
    run("eval", "matching", given.out / "backbone", *held_out, "--pairs", 6, "--size", "96x128")
    run("visualize", "matches", given.out / "backbone", *held_out, "-o", given.out / "matches.png")


if __name__ == "__main__":
    main()
