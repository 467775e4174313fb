"""SUN RGB-D's 37 classes: image/[SPLIT/]img-000001.jpg and semseg_label37/[SPLIT/]00000001.png.

Labels count the classes from 0, 255 where there is none. (In the toolbox's own images 0 is "none" and the classes are
1 to 37: subtract one, and write 255 for 0.) The official split: images 1 to 5050 test, 5051 to 10335 train.
"""

from __future__ import annotations

from pathlib import Path

from geo_pretrain.errors import DataError
from geo_pretrain.training.data.labelled.folders import Item, SemanticFolder, list_files, need_folders
from geo_pretrain.training.data.labelled.mapping import label_map

LAYOUT = "image/[train|test/]img-000001.jpg, semseg_label37/[train|test/]00000001.png"
LAST_TEST_IMAGE = 5050
_FOLDERS = {"train": ("train",), "val": ("val", "test")}


def open_sunrgbd(path: Path, split: str) -> SemanticFolder:
    """Open the labelled images of a split; ids such as "000001". Scenes are unknown: each image is its own."""
    labels = next((name for name in ("semseg_label37", "semseg-label37") if (path / name).is_dir()), "semseg_label37")
    need_folders(path, ["image", labels], LAYOUT)
    has_splits = any((path / "image" / name).is_dir() for names in _FOLDERS.values() for name in names)
    folder = ""
    if has_splits:
        folder = next((name for name in _FOLDERS[split] if (path / "image" / name).is_dir()), _FOLDERS[split][-1])
        need_folders(path, [f"image/{folder}", f"{labels}/{folder}"], LAYOUT)
    items = []
    for image in list_files(path / "image" / folder, "img-*.jpg", LAYOUT):
        number = image.stem.removeprefix("img-")
        if not number.isdecimal():
            raise DataError(f"{str(image)!r}: the name has no number. Expected layout: {LAYOUT}")
        if has_splits or (split == "train") == (int(number) > LAST_TEST_IMAGE):
            items.append(Item(number, number, image, path / labels / folder / f"{int(number):08d}.png"))
    if not items:
        numbers = "5051 to 10335" if split == "train" else "1 to 5050"
        raise DataError(f"No image of split {split!r} in {str(path / 'image')!r}: those are img-{numbers}.")
    return SemanticFolder("sunrgbd", split, path, items, label_map("sunrgbd37"))
