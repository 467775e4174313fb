"""Stand-ins for the data that pages name, and small sizes, so that `make snippets` runs their commands in seconds."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from examples.own_clouds import write_ply
from examples.own_recording import write_recording
from geo_pretrain.rooms import CLASSES, RoomGenerator, RoomsConfig
from tests.front_door import geo_pretrain
from tests.scan_release import write_release
from tests.zoo import write_tiny, write_tiny_3d

# What a command gets besides its own words: two steps, small images, random start weights.
TRAIN = (
    "--steps 2 --set model.init=scratch --set model.width=16 --set data.size=[48,64] --set optim.batch=2 "
    "--set workers=0"
)
IMAGES = (
    "--steps 2 --set network.encoder=resnet18 --set network.width=16 --set data.size=[48,64] "
    "--set optim.batch=2 --set evaluate.images=2 --set workers=0"
)
CLOUDS = (
    "--set optim.steps=2 --set optim.epochs=null --set optim.batch=2 --set data.cloud.voxel_size=0.2 --set workers=0 "
    "--set 'network.unet3d={variant: 18A, voxel_size: 0.2, width: 8}'"
)
SMALL = {
    "train": TRAIN,
    "train toy": "--steps 2 --set data.options.scenes=2 --set data.options.frames=6 --set workers=0",
    "finetune": IMAGES,
    "finetune clouds": CLOUDS,
    "finetune toy": "--steps 2 --set data.options.scenes=2 --set data.options.val_scenes=1",
    "eval matching": "--pairs 4 --size 48x64",
    "eval awareness": "--views 6 --pairs 1 --seeds 2 --size 48x64",
    "eval pixel-to-voxel": "--pairs 2 --set data.options.scenes=1 --set data.options.frames=4",
    "visualize matches": "--pairs 1 --size 48x64",
    "visualize features": "--count 2 --size 48x64",
    "visualize points": "--points 2000 --size 48x64",
}


def small(words: Sequence[str]) -> list[str]:
    """A command with stand-ins for its data and start weights, and small sizes."""
    name = " ".join(words[: 2 if words[0] in ("data", "eval", "visualize") else 1])
    if name == "train" and "--toy" in words:
        name += " toy"
    if name == "finetune":
        clouds = words[1].startswith(("clouds", "scannet3d"))  # the recipe
        name += " toy" if "--toy" in words else " clouds" if clouds else ""
    labelled = words[0] in ("finetune", "predict") or "--task" in words
    stand_ins = {
        "folder:PATH": "folder:images" if labelled else "folder:frames",
        "folder:MORE": "folder:images",
        "folder:MINE": "folder:frames",
        "clouds:PATH": "clouds:clouds",
        "scannet:PATH": "scannet:scannet",
        "scannet3d:PATH": "scannet3d:scannet",
        "IMAGES": "images/val/images",
        "SCANS": "clouds/val",
        "SUGGESTED": "",
        "timm/convnext_tiny": "resnet18=scratch",
    }
    found = [stand_ins.get(word, word) for word in words]
    for at, word in enumerate(words[:-1]):
        if word in ("-b", "--backbone") and not found[at + 1].startswith("runs/"):
            found[at + 1] = "scratch"
    stages = any(word.startswith(("gsc", "ppkt", "img2pc")) for word in words) and words[0] == "train"
    return [
        *(word for word in found if word),
        *shlex.split(SMALL.get(name, "")),
        *(["--set", "stage1.optim.steps=2"] if stages else []),
    ]


def run_command(line: str, *, small_sizes: bool) -> None:
    """Run a line of a page in this process; one that ends with another exit code than 0 raises."""
    words = shlex.split(line, comments=True)
    if words[:1] != ["geo-pretrain"]:
        raise ValueError(f"Only geo-pretrain is run from pages: {line}")
    arguments = small(words[1:]) if small_sizes else words[1:]
    print("$ geo-pretrain", shlex.join(arguments), flush=True)
    print(geo_pretrain(*arguments).output, flush=True)


def write_images(folder: Path) -> None:
    """Labelled images of two rooms, in the layout of docs/own_images.md."""
    rooms = RoomGenerator(RoomsConfig(scenes=2, frames=4, width=64, height=64, seed=3))
    for split, name in zip(("train", "val"), rooms.names(), strict=True):
        room = rooms.render(name)
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(room["color"][number]).save(folder / split / "images" / f"{number}.jpg")
            labels = room["semantic"][number].astype(np.uint8)
            Image.fromarray(labels).save(folder / split / "labels" / f"{number}.png")
    (folder / "classes.txt").write_text("\n".join(CLASSES[1:]) + "\n")  # id 0 is no class


def write_clouds(folder: Path) -> None:
    """Points of three rooms, in the layout of docs/downstream_3d.md."""
    rooms = RoomGenerator(RoomsConfig(scenes=3, difficulty="easy"))
    for number, name in enumerate(rooms.names()):
        surface = rooms.points(name, density=60)
        write_ply(
            folder / ("val" if number == 2 else "train") / f"{name}.ply",
            surface.points,
            surface.colors,
            surface.semantic,
        )
    (folder / "classes.txt").write_text("\n".join(CLASSES[1:]) + "\n")


def write_scans(folder: Path) -> None:
    """Two scans without labels."""
    rng = np.random.default_rng(0)
    for name in ("scan1.ply", "scan2.ply"):
        write_ply(folder / name, rng.random((2000, 3)) * 2, rng.integers(0, 255, (2000, 3)), None)


STAND_INS: dict[str, Callable[[Path], None]] = {
    "frames": lambda folder: write_recording(folder, frames=8),
    "images": write_images,
    "clouds": write_clouds,
    "scannet": lambda folder: write_release(folder, scenes=2, frames=6),
}


def make_stand_ins(code: str) -> None:
    """Write into this folder the data that `code`, the blocks of a page, names."""
    os.environ.setdefault("COLUMNS", "100")
    named = {
        "frames": ("folder:PATH", "folder:MINE", "frames"),
        "images": ("finetune folder", "IMAGES", "images"),
        "clouds": ("clouds:PATH", "SCANS"),
        "scannet": ("scannet:PATH", "scannet3d:PATH"),
    }
    for name, words in named.items():
        if any(word in code for word in words):
            STAND_INS[name](Path(name))
    for run in ("view", "geo", "kitchen"):
        if f"runs/{run}" in code:
            write_tiny(Path("runs", run), name=f"{run}_net_r18")
    if "runs/pointcontrast" in code:
        write_tiny_3d(Path("runs/pointcontrast"))
    if "scan1" in code:
        write_scans(Path())
    if "photo.jpg" in code:
        Image.fromarray(np.full((48, 64, 3), 128, np.uint8)).save("photo.jpg")
