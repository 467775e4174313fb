"""Point clouds of your own: fine-tune a sparse U-Net on labelled PLY files and predict a scan without labels.

    python examples/own_clouds.py --out clouds

Replace `write_clouds` by your files in the same layout (docs/downstream_3d.md); everything after it stays.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from geo_pretrain.rooms import CLASSES, RoomGenerator, RoomsConfig

KEPT = ("floor", "wall", "ceiling", "bed", "table", "chair")  # of the rooms' classes; points of others have label 0


def write_ply(path: Path, points: np.ndarray, colors: np.ndarray, labels: np.ndarray | None) -> None:
    """A binary PLY with coordinates in meters, colors and, if given, labels."""
    fields = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")]
    fields += [("label", "<i4")] if labels is not None else []
    vertex = np.zeros(len(points), dtype=fields)
    for number, axis in enumerate("xyz"):
        vertex[axis] = points[:, number]
    for number, color in enumerate(("red", "green", "blue")):
        vertex[color] = colors[:, number]
    if labels is not None:
        vertex["label"] = labels
    names = {"<f4": "float", "u1": "uchar", "<i4": "int"}
    lines = "".join(f"property {names[kind]} {name}\n" for name, kind in fields)
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{lines}end_header\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head.encode() + vertex.tobytes())


def write_clouds(folder: Path) -> None:
    """Eight labelled rooms to train on, two to validate with, and a scan without labels beside them."""
    number_of = np.zeros(len(CLASSES), np.int32)
    for label, name in enumerate(KEPT, 1):
        number_of[CLASSES.index(name)] = label
    rooms = RoomGenerator(RoomsConfig(scenes=11, difficulty="easy"))
    for number, name in enumerate(rooms.names()):
        surface = rooms.points(name, density=150)
        labels = number_of[surface.semantic]
        if number == 10:
            write_ply(folder.parent / "scan.ply", surface.points, surface.colors, None)
            continue
        split = "train" if number < 8 else "val"
        write_ply(folder / split / f"{name}.ply", surface.points, surface.colors, labels)
    (folder / "classes.txt").write_text("\n".join(KEPT) + "\n")  # label 1 is the first line


def run(*words: object) -> None:
    """Run a command of geo-pretrain."""
    print("$ geo-pretrain", *words, flush=True)
    subprocess.run([sys.executable, "-m", "geo_pretrain", *map(str, words)], check=True)


def main() -> None:
    """Write, train, predict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("clouds"))
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    data, net = given.out / "data", given.out / "run"
    write_clouds(data)
    small = [
        "--set",
        "data.cloud.voxel_size=0.1",
        "--set",
        f"optim.steps={given.steps}",
        "--set",
        "network.unet3d={variant: 18A, voxel_size: 0.1}",
    ]
    small += ["--set", "optim.batch=2", "--set", "optim.epochs=null"]
    run("finetune", "clouds_srunet34", "--data", f"clouds:{data}", "-b", "scratch", "--out", net, "--overwrite", *small)
    run("predict", net, given.out / "scan.ply", "-o", given.out / "answers")


if __name__ == "__main__":
    main()
