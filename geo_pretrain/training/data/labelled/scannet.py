"""ScanNet's 2D labels, scannet_frames_25k: scene*/{color/*.jpg, label/*.png, instance/*.png}, every 100th frame.

Labels are nyu40 ids; instance images are 16-bit, label * 1000 + instance. Which scenes belong to a split stands in
scannetv2_train.txt and scannetv2_val.txt of the ScanNet repository (folder Tasks/Benchmark).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from geo_pretrain.errors import DataError, some
from geo_pretrain.files import expanded
from geo_pretrain.training.data.files import read_listing, visible
from geo_pretrain.training.data.labelled.folders import InstanceFolder, InstanceOptions, Item, SemanticFolder
from geo_pretrain.training.data.labelled.mapping import label_map

LAYOUT = "scannet_frames_25k/sceneXXXX_XX/{color/*.jpg, label/*.png, instance/*.png}, scannetv2_train.txt and _val.txt"


@dataclass(frozen=True)
class ScanNetOptions(InstanceOptions):
    """Options of the source."""

    split_file: str | None = None  # list of the split's scenes, one a line; None: scannetv2_SPLIT.txt beside the scenes


def open_scannet(path: Path, split: str, task: str, options: ScanNetOptions) -> SemanticFolder | InstanceFolder:
    """Open the labelled frames of the scenes in a split's list; ids such as "scene0000_00/000100"."""
    root = path / "scannet_frames_25k" if (path / "scannet_frames_25k").is_dir() else path
    if not root.is_dir():
        raise DataError(f"No folder {str(path)!r}. Expected layout: {LAYOUT}")
    listed = split_list((path, root, root.parent), split, options.split_file)
    scenes = read_scene_list(listed)
    missing = [scene for scene in scenes if not (root / scene).is_dir()]
    if missing:
        raise DataError(
            f"{str(root)!r} lacks {len(missing)} of the {len(scenes)} scenes of {str(listed)!r}: "
            f"{some(missing, 5)}. Expected layout: {LAYOUT}"
        )
    kind = "label" if task == "segmentation" else "instance"
    for folder in ("color", kind):
        bare = [scene for scene in scenes if not (root / scene / folder).is_dir()]
        if bare:
            raise DataError(
                f"No folder {folder!r} in {len(bare)} of {len(scenes)} scenes of {str(root)!r}: {some(bare, 5)}. "
                f"Expected layout: {LAYOUT}"
            )
    items = [
        Item(f"{scene}/{image.stem}", scene, image, root / scene / kind / f"{image.stem}.png")
        for scene in scenes
        for image in sorted(visible(root / scene / "color", "*.jpg"), key=lambda image: (len(image.stem), image.stem))
    ]
    if not items:
        raise DataError(f"No color/*.jpg in any scene of {str(root)!r}. Expected layout: {LAYOUT}")
    if task == "segmentation":
        return SemanticFolder("scannet", split, root, items, label_map("scannet20"), bits=(8, 16))
    return InstanceFolder("scannet", split, root, items, label_map("scannet18"), options.rule())


def read_scene_list(path: Path, fraction: float | None = None) -> list[str]:
    """Read names of scenes, one per line. In a folder, the official list of a `fraction` of images (0.2: *_20.txt).

    Pri3D's lists are called scannetv2_train_20.txt and so on (1, 5, 10, 20, 40, 60 and 80 percent), those of ScanNet's
    data-efficient benchmark 20.txt (1, 5, 10, 20; of detection 10, 20, 40, 80). The lists of PointContrast's code name
    files, such as train/scene0191_00.ply and Area_1/office_8.ply: their scenes are taken.
    """
    if path.is_dir():
        if fraction is None:
            raise DataError(f"{str(path)!r} is a folder; name one of its lists: {some(_lists(path), 5)}.")
        names = [f"{prefix}{100 * fraction:g}.txt" for prefix in ("scannetv2_train_", "")]
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise DataError(f"No list {names[0]!r} in {str(path)!r}; there are: {some(_lists(path), 5)}.")
        path = found[0]
    names = [_scene_of_file(word) for line in read_listing(path, "list of scenes") for word in line.split()]
    if not names:
        raise DataError(f"{str(path)!r}: the list of scenes is empty.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{str(path)!r}: {some(twice, 5)} more than once.")
    return names


def _scene_of_file(word: str) -> str:
    """The scene that a word of a list names, which may be its file in a released code's own folder."""
    name = re.sub(r"\.(ply|pth)$", "", word)
    return re.sub(r"^.*/(?=scene\d{4}_\d\d$)", "", name)


@overload
def split_list(folders: Sequence[Path], split: str, given: str | None) -> Path: ...
@overload
def split_list(folders: Sequence[Path], split: str, given: str | None, *, required: bool) -> Path | None: ...
def split_list(folders: Sequence[Path], split: str, given: str | None, *, required: bool = True) -> Path | None:
    """Find the list of a split's scenes: `given`, or scannetv2_SPLIT.txt in one of the folders.

    Raises `DataError` where there is none and one is `required`.
    """
    if given is not None:
        return expanded(given)
    name = f"scannetv2_{split}.txt"
    folders = list(dict.fromkeys(folders))
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    if not required:
        return None
    raise DataError(
        f"No list of scenes {name!r} in {' or '.join(repr(str(folder)) for folder in folders)}. It is in ScanNet's "
        "repository, folder Tasks/Benchmark: put it there, or name a list with the option split_file."
    )


def _lists(folder: Path) -> list[str]:
    return [file.name for file in visible(folder, "*.txt")]
