"""Boxes and masks of your own images as a source: one JSON file a split in COCO's format, with any categories.

CVAT, Label Studio, Roboflow and others write it; docs/own_images.md has the places where it may lie.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.errors import DataError, some
from geo_pretrain.training.data.files import read_photo
from geo_pretrain.training.data.labelled.coco import Coco, CocoOptions
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.data.labelled.own_images import (
    LABELLED,
    OwnImages,
    OwnOptions,
    listed_names,
    open_own_images,
    share_out,
)

OF_SPLIT = (  # below the folder
    "{split}/annotations.json",
    "{split}/_annotations.coco.json",
    "annotations/instances_{split}.json",
    "annotations/{split}.json",
    "{split}.json",
)
OF_ALL = ("annotations.json", "annotations/instances_default.json", "_annotations.coco.json")
LAYOUT = (
    f"JSON in COCO's format as {OF_SPLIT[0]} or {OF_SPLIT[2]} (split: train, val), or {OF_ALL[0]} for all images with "
    "lists train.txt and val.txt, or without lists, of which data.options.val_share validates; images in SPLIT/images, "
    "SPLIT, images or the folder itself"
)


class OwnBoxes(Coco):
    """A split of a folder of images with boxes and masks in COCO's format."""

    name = "folder"
    counted = "objects"
    takes_boxes_alone = True

    def __init__(self, root: Path, split: str, file: Path, options: OwnOptions) -> None:
        self.options = options
        super().__init__(root, split, file=file)
        unknown = [name for name in options.void if name not in self.classes]
        if unknown:
            raise DataError(f"data.options.void: {unknown[0]!r} is no category; {file} has {some(self.classes)}.")
        self._leave_out({k for k, name in enumerate(self.classes, 1) if name in options.void})
        self._check_names()

    def keep(self, ids: set[str]) -> None:
        """Keep these images only."""
        self._images = {id: entry for id, entry in self._images.items() if id in ids}
        self._annotations = {id: found for id, found in self._annotations.items() if id in ids}

    def scene_of(self, id: str) -> str:
        """The image, or with the option scene=folder the folder of its file."""
        name = self.file_name(id)
        return Path(name).parent.as_posix() if self.options.scene == "folder" else name

    def fingerprint(self) -> str:
        """A digest of name, size and time of the annotations and of every image, and of the classes."""
        return hashlib.sha256(f"{super().fingerprint()}\n{self.classes}".encode()).hexdigest()

    def label_keys(self) -> Mapping[str, int]:
        return {str(id): label for id, label in self._class_of.items()}

    def label_counts(self, id: str) -> Mapping[str, int]:
        self._entry(id)
        return Counter(str(annotation["category_id"]) for annotation in self._annotations[id])

    def label_note(self, shares: Mapping[str, float]) -> str | None:
        return None

    def _image_folder(self, root: Path, split: str, config: CocoOptions) -> Path:
        """The first of the usual folders that holds the first image."""
        beside = self.file.parent
        places = [beside / "images", beside, root / split / "images", root / split, root / "images" / split]
        places += [root / "images", root]
        if self.options.images is not None:
            places = [root / self.options.images.replace("{split}", split)]
        first = next(iter(self._images.values()))["file_name"]
        for folder in places:
            if (folder / first).is_file():
                return folder
        looked = some((repr(str(folder)) for folder in dict.fromkeys(places)), 8)
        raise DataError(f"No image {first!r} of {str(self.file)!r} in {looked}. Elsewhere: data.options.images.")

    def _read_image(self, path: Path, entry: Mapping[str, Any]) -> np.ndarray:
        shape = (entry["height"], entry["width"]) if {"height", "width"} <= set(entry) else None
        return read_photo(path, shape)

    def _leave_out(self, void: set[int]) -> None:
        """Take classes away, with their objects."""
        left = [k for k in range(1, len(self.classes) + 1) if k not in void]
        if not left:
            raise DataError(f"{self.file}: every category is in data.options.void.")
        number = {old: new for new, old in enumerate(left, 1)}
        self._class_of = {id: number[k] for id, k in self._class_of.items() if k in number}
        self._annotations = {
            id: [a for a in found if a["category_id"] in self._class_of] for id, found in self._annotations.items()
        }
        self.classes = tuple(self.classes[k - 1] for k in left)
        self.file_ids = tuple(self._class_of)

    def _check_names(self) -> None:
        """Raise `DataError` for categories of one name: which of two is meant would be lost."""
        twice = [name for name in self.classes if self.classes.count(name) > 1]
        if twice:
            raise DataError(f"{self.file}: two categories are called {twice[0]!r}.")


def shared_images(splits: Sequence[object]) -> list[Path]:
    """The images that are in all of several splits of a folder of one's own; none for other data sets."""
    images = []
    for data in splits:
        if not isinstance(data, OwnImages | OwnBoxes):
            return []
        root = data.root if isinstance(data, OwnImages) else data.folder
        images.append({root / data.file_name(id) for id in data.ids()})
    return sorted(set.intersection(*images)) if images else []


def open_own(path: Path, split: str, task: str, options: OwnOptions) -> LabelledData:
    """Open a split of a folder of one's own images, for segmentation or detection. Raises `DataError`."""
    if task == "segmentation" or split not in LABELLED:
        return open_own_images(path, split, options)
    return open_own_boxes(path, split, options)


def open_own_boxes(path: Path, split: str, options: OwnOptions) -> OwnBoxes:
    """Open a split of a folder of images with boxes and masks. Raises `DataError` for what is missing."""
    if not path.is_dir():
        raise DataError(f"No folder {str(path)!r}. Expected layout: {LAYOUT}.")
    file, shared = _annotations(path, split, options)
    source = OwnBoxes(path, split, file, options)
    if shared:
        source.keep(_part(path, split, source, options))
    return source


def _annotations(root: Path, split: str, options: OwnOptions) -> tuple[Path, bool]:
    """The file of a split, and whether it is the one of all images."""
    if options.annotations is not None:
        file = root / options.annotations.replace("{split}", split)
        if not file.is_file():
            raise DataError(f"No file {str(file)!r} (data.options.annotations is {options.annotations!r}).")
        return file, "{split}" not in options.annotations
    # Roboflow says "valid"
    words = (split, "valid") if split == "val" else (split,)
    for name in [name.format(split=word) for word in words for name in OF_SPLIT]:
        if (root / name).is_file():
            return root / name, False
    for name in OF_ALL:
        if (root / name).is_file():
            return root / name, True
    there = some(sorted(p.relative_to(root).as_posix() for p in root.glob("*.json")) or ["no JSON file"], 5)
    raise DataError(
        f"{str(root)!r} has no annotations of split {split!r} (there: {there}). Expected layout: {LAYOUT}. Another "
        "name: --set data.options.annotations=..., where {split} stands for train or val."
    )


def _part(root: Path, split: str, source: OwnBoxes, options: OwnOptions) -> set[str]:
    """The ids of a split's images in the file of all: of the list SPLIT.txt, or a share of them."""
    names = {id: source.file_name(id) for id in source.ids()}
    listed = {name: root / f"{name}.txt" for name in LABELLED}
    there = [name for name in LABELLED if listed[name].is_file()]
    if len(there) == 1:
        raise DataError(f"{str(root)!r} has {there[0]}.txt alone; accepted: train.txt and val.txt, or neither.")
    if there:
        wanted = listed_names(listed[split])
        plain = {name: name.removeprefix("images/") for name in names.values()}
        of = {name: {short, Path(short).with_suffix("").as_posix()} for name, short in plain.items()}
        missing = sorted(set(wanted) - set().union(*of.values()))
        if missing:
            raise DataError(
                f"{listed[split]}: {len(missing)} of {len(wanted)} are no images of the file: {some(missing)}."
            )
        return {id for id, name in names.items() if not of[name].isdisjoint(wanted)}
    scenes = {id: source.scene_of(id) for id in names}
    if len(set(scenes.values())) < 2:
        raise DataError(f"{source.file}: {len(names)} images of one scene; two scenes are needed to hold one out.")
    val = share_out(sorted(set(scenes.values())), options.val_share, options.seed)
    return {id for id, scene in scenes.items() if (scene in val) == (split == "val")}
