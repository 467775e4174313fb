"""ADE20K's scene parsing challenge, ADEChallengeData2016: images/SPLIT/*.jpg and annotations/SPLIT/*.png.

20,210 images train, 2,000 validate. An annotation is an 8-bit gray PNG: 0 = other objects, which are not counted, 1 to
150 the classes in the order of objectInfo150.txt (CSAILVision/sceneparsing, README.md and objectInfo150.txt). The full
ADE20K, whose *_seg.png hold thousands of classes in their colors, is another layout.
"""

from __future__ import annotations

from pathlib import Path

from geo_pretrain.errors import DataError
from geo_pretrain.training.data.labelled.folders import Item, SemanticFolder, list_files, need_folders
from geo_pretrain.training.data.labelled.mapping import label_map

NAME = "ADEChallengeData2016"
LAYOUT = (
    f"{NAME}/images/{{training,validation}}/ADE_{{train,val}}_00000001.jpg, "
    "annotations/{training,validation}/ADE_{train,val}_00000001.png"
)
_FOLDERS = {"train": "training", "val": "validation"}


def open_ade20k(path: Path, split: str) -> SemanticFolder:
    """Open the labelled images of a split; ids such as "ADE_train_00000001". Each image is a scene of its own.

    `path`: the unpacked folder, or the one that holds it.
    """
    root = path / NAME if (path / NAME).is_dir() else path
    _refuse_full(root)
    need_folders(root, [f"{part}/{_FOLDERS[split]}" for part in ("images", "annotations")], LAYOUT)
    images = list_files(root / "images" / _FOLDERS[split], "ADE_*.jpg", LAYOUT)
    labels = root / "annotations" / _FOLDERS[split]
    items = [Item(image.stem, image.stem, image, labels / f"{image.stem}.png") for image in images]
    return SemanticFolder("ade20k", split, root, items, label_map("ade20k150"))


def _refuse_full(root: Path) -> None:
    """Raise `DataError` for the full ADE20K, which keeps images and *_seg.png in folders of scene categories."""
    full = [name for name in ("index_ade20k.mat", "index_ade20k.pkl") if (root / name).is_file()]
    training = root / "images" / "training"
    letters = not (root / "annotations").is_dir() and training.is_dir() and any(p.is_dir() for p in training.iterdir())
    if full or letters:
        raise DataError(
            f"{str(root)!r} is the full ADE20K ({full[0] if full else 'folders of scene categories'}), which is not "
            f"read: its 150 classes of the challenge are in {NAME}.zip. Expected layout: {LAYOUT}"
        )
