"""NYUv2 as Pri3D uses it: {train,val}/{color/nyu_rgb_N.png, label/new_nyu_class13_N.png, instance/N.png}.

795 and 654 images of 640x480. `val` may be called `test`. Labels count 13 classes, 0 = none. Instance images hold
the labelled file's own numbers, which count the objects of each of its 894 classes: two objects of one of the 13
classes but of different ones of the 894 may have one number, and are then one object here, as they are in Pri3D.
"""

from __future__ import annotations

from pathlib import Path

from geo_pretrain.errors import DataError
from geo_pretrain.training.data.labelled.folders import (
    InstanceFolder,
    InstanceOptions,
    Item,
    SemanticFolder,
    list_files,
    need_folders,
)
from geo_pretrain.training.data.labelled.mapping import label_map

LAYOUT = "{train,val}/{color/nyu_rgb_0001.png, label/new_nyu_class13_0001.png, instance/0001.png}"
_FOLDERS = {"train": ("train",), "val": ("val", "test")}


def open_nyuv2(path: Path, split: str, task: str, options: InstanceOptions) -> SemanticFolder | InstanceFolder:
    """Open the labelled images of a split; ids such as "0001". Scenes are unknown: each image is its own."""
    _refuse_mat(path)
    root = next((path / name for name in _FOLDERS[split] if (path / name).is_dir()), path / _FOLDERS[split][0])
    kind = "label" if task == "segmentation" else "instance"
    need_folders(root, ["color", "label", *([] if kind == "label" else [kind])], LAYOUT)
    items = []
    for image in list_files(root / "color", "nyu_rgb_*.png", LAYOUT):
        number = image.stem.removeprefix("nyu_rgb_")
        labels, instances = root / "label" / f"new_nyu_class13_{number}.png", root / "instance" / f"{number}.png"
        items.append(Item(number, number, image, *([labels] if kind == "label" else [instances, labels])))
    if kind == "label":
        return SemanticFolder("nyuv2", split, path, items, label_map("nyu13"))
    return InstanceFolder("nyuv2", split, path, items, label_map("nyu9"), options.rule(), bits=(8, 16))


def _refuse_mat(path: Path) -> None:
    bare = path.is_dir() and not (path / "train").is_dir()
    mat = path if path.suffix == ".mat" else next(iter(sorted(path.glob("*.mat"))), None) if bare else None
    if mat is not None:
        raise DataError(
            f"{str(mat)!r} is NYUv2's labelled file (HDF5), which is not read: write its images as PNGs first; "
            f"docs/labelled_data.md says which array goes where. Expected layout: {LAYOUT}"
        )
