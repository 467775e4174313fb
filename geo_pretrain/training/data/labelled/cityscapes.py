"""Cityscapes, fine labels: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelIds.png."""

from __future__ import annotations

from pathlib import Path

from geo_pretrain.training.data.labelled.folders import Item, SemanticFolder, list_files, need_folders
from geo_pretrain.training.data.labelled.mapping import label_map

LAYOUT = (
    "leftImg8bit/{train,val}/CITY/CITY_000000_000019_leftImg8bit.png, "
    "gtFine/{train,val}/CITY/CITY_000000_000019_gtFine_labelIds.png"
)


def open_cityscapes(path: Path, split: str) -> SemanticFolder:
    """Open the labelled images of a split; ids such as "aachen_000000_000019"; a scene is a city.

    The labels of the split test are not public.
    """
    need_folders(path, [f"leftImg8bit/{split}", f"gtFine/{split}"], LAYOUT)
    items = []
    for image in list_files(path / "leftImg8bit" / split, "*/*_leftImg8bit.png", LAYOUT):
        name, city = image.stem.removesuffix("_leftImg8bit"), image.parent.name
        items.append(Item(name, city, image, path / "gtFine" / split / city / f"{name}_gtFine_labelIds.png"))
    return SemanticFolder("cityscapes", split, path, items, label_map("cityscapes19"))
