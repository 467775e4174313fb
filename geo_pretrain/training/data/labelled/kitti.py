"""KITTI's semantics benchmark: training/{image_2,semantic}/000000_10.png, 200 images with Cityscapes' label ids.

There is no official validation set: as in Pri3D, the first 40 images by name validate and the others train.
"""

from __future__ import annotations

from pathlib import Path

from geo_pretrain.errors import DataError
from geo_pretrain.training.data.labelled.folders import Item, SemanticFolder, list_files, need_folders
from geo_pretrain.training.data.labelled.mapping import label_map

LAYOUT = "training/{image_2,semantic}/000000_10.png"
VALIDATION = 40  # images
SPLITS = {"train": slice(VALIDATION, None), "val": slice(VALIDATION)}


def open_kitti(path: Path, split: str) -> SemanticFolder:
    """Open the labelled images of a split; ids such as "000000_10". Scenes are unknown: each image is its own."""
    root = path / "training" if (path / "training").is_dir() else path
    need_folders(root, ["image_2", "semantic"], LAYOUT)
    images = list_files(root / "image_2", "*.png", LAYOUT)
    if len(images) <= VALIDATION:
        raise DataError(
            f"{len(images)} images in {str(root / 'image_2')!r}: the first {VALIDATION} are for validation."
        )
    items = [Item(image.stem, image.stem, image, root / "semantic" / image.name) for image in images[SPLITS[split]]]
    return SemanticFolder("kitti", split, root, items, label_map("cityscapes19"))
