"""The registry of labelled data sets, opening one, and subsets for the data-efficient protocols."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.errors import DataError, RecipeError, UnknownName, path_without_source, some, unknown
from geo_pretrain.files import expanded
from geo_pretrain.training.config import parse
from geo_pretrain.training.data.labelled.ade20k import open_ade20k
from geo_pretrain.training.data.labelled.cityscapes import open_cityscapes
from geo_pretrain.training.data.labelled.clouds.sets import CLOUD_SETS
from geo_pretrain.training.data.labelled.coco import CocoOptions, open_coco
from geo_pretrain.training.data.labelled.dataset import DataSet, ImageTask, LabelledData, Progress, Task, plain
from geo_pretrain.training.data.labelled.folders import InstanceOptions
from geo_pretrain.training.data.labelled.kitti import open_kitti
from geo_pretrain.training.data.labelled.nyuv2 import open_nyuv2
from geo_pretrain.training.data.labelled.own_boxes import open_own
from geo_pretrain.training.data.labelled.own_images import OwnOptions
from geo_pretrain.training.data.labelled.rooms import LabelledRoomsOptions, open_rooms
from geo_pretrain.training.data.labelled.scannet import ScanNetOptions, open_scannet
from geo_pretrain.training.data.labelled.sunrgbd import open_sunrgbd

SEGMENTATION: tuple[ImageTask, ...] = ("segmentation",)
BOTH: tuple[ImageTask, ...] = ("segmentation", "detection")
IMAGE_SETS = {
    "ade20k": DataSet(
        plain(open_ade20k),
        SEGMENTATION,
        "LicenseRef-ADE20K-terms",
        "images: non-commercial research and education; annotations: BSD-3-Clause",
    ),
    "cityscapes": DataSet(
        plain(open_cityscapes),
        SEGMENTATION,
        "LicenseRef-Cityscapes-terms",
        "non-commercial: research, teaching, publications; on registration",
    ),
    "coco": DataSet(
        open_coco,
        ("detection",),
        "CC-BY-4.0",
        "that is for the annotations; the images are Flickr users', each under its own terms",
        CocoOptions,
        splits=(),
    ),
    "folder": DataSet(
        open_own,
        BOTH,
        "LicenseRef-data-owner",
        "images given by the caller: as their owner says",
        OwnOptions,
        splits=(),
    ),
    "kitti": DataSet(plain(open_kitti), SEGMENTATION, "CC-BY-NC-SA-3.0", "non-commercial, share alike"),
    "nyuv2": DataSet(
        open_nyuv2, BOTH, "LicenseRef-unstated", "published for research without a license", InstanceOptions
    ),
    "rooms": DataSet(None, BOTH, "MIT", "rendered by this package", LabelledRoomsOptions, embedded=open_rooms),
    "scannet": DataSet(
        open_scannet,
        BOTH,
        "LicenseRef-ScanNet-ToU",
        "non-commercial research and education; on a signed agreement",
        ScanNetOptions,
        splits=(),
    ),
    "sunrgbd": DataSet(
        plain(open_sunrgbd),
        SEGMENTATION,
        "LicenseRef-unstated",
        "published for research without a license; holds images of NYUv2, B3DO, SUN3D",
    ),
}
DATA_SETS = {**IMAGE_SETS, **CLOUD_SETS}
# A folder may hold other files than the published ones: its owner knows.
_OTHER = ("LicenseRef-data-owner", "images given by the caller: as their owner says")


def data_terms(source: str, license: str | None = None) -> tuple[str, str]:
    """Look up the license of a labelled data set (SPDX or LicenseRef) and its meaning in words.

    `license`: the one that a recipe states in its stead, as for data of one's own.
    """
    if license is not None:
        return license, "as whoever ran this stated it (data.license)"
    row = DATA_SETS.get(source)
    return _OTHER if row is None else (row.license, row.terms)


def list_labelled(task: Task | None = None) -> list[str]:
    """List the names that `open_labelled` accepts, all or those with labels for `task`."""
    return [name for name, row in sorted(DATA_SETS.items()) if task is None or task in row.tasks]


def open_labelled(
    source: str,
    path: Path | None,
    split: str,
    *,
    task: Task,
    options: Mapping[str, Any] = {},
    progress: Progress | None = None,
) -> Any:
    """Open one split ("train" or "val") of a labelled data set: a `LabelledSource`, for tasks in 3D a `CloudSource`.

    Segmentation gives `semantic`, detection (and instance segmentation) gives `instances`; their classes differ.
    `path` is the data set's folder, None for rooms; `options` are checked by the data set. Raises `UnknownName`,
    `RecipeError` for wrong options, `DataError` saying what is missing where. `progress(done, total)` is called while
    rooms are rendered.
    """
    settings, row = labelled_options(source, task, options), DATA_SETS[source]
    if row.splits and split not in row.splits:
        raise unknown("split", split, row.splits)
    if row.embedded is not None:
        if path is not None:
            raise RecipeError(f"Source {source!r} renders its own scenes and takes no path; see data.options.")
        return row.embedded(split, task, settings, progress)
    if path is None:
        raise RecipeError(f"Source {source!r} needs a folder: {source}:PATH (or data.path=PATH).")
    assert row.opener is not None  # a set is embedded, or on disk
    return row.opener(expanded(path), split, task, settings)


def labelled_options(source: str, task: Task, options: Mapping[str, Any]) -> Any:
    """Parse the options of a data set without opening it. Raises `UnknownName`, `RecipeError`."""
    if source not in DATA_SETS:
        own = "clouds" if task in {one for row in CLOUD_SETS.values() for one in row.tasks} else "folder"
        if meant := path_without_source(source, own):
            raise UnknownName(meant)
        raise unknown("labelled data set", source, list_labelled(), "Write SOURCE or SOURCE:PATH.")
    row = DATA_SETS[source]
    if task not in row.tasks:
        has = " and ".join(row.tasks)
        raise RecipeError(
            f"Source {source!r} has no labels for task {task!r}, only for {has}. "
            f"Sources for it: {', '.join(list_labelled(task)) or 'none; tasks are segmentation and detection'}."
        )
    return parse(row.options, options, where="data.options", prefix="data.options.")


class Subset:
    """The images or clouds of some scenes of a source."""

    category_of: Callable[[str], int]  # only where the source has it: objects

    def __init__(self, source: LabelledData, scenes: Sequence[str]) -> None:
        self.source, self.chosen = source, frozenset(scenes)
        self.name, self.split, self.classes = source.name, source.split, source.classes
        everything = source.ids()
        self._ids = [id for id in everything if source.scene_of(id) in self.chosen]
        self.share = len(self._ids) / len(everything)  # of the images
        if hasattr(source, "category_of"):
            self.category_of = source.category_of

    def ids(self) -> list[str]:
        """Images of the chosen scenes, in the source's order."""
        return list(self._ids)

    def scene_of(self, id: str) -> str:
        return self.source.scene_of(id)

    def file_name(self, id: str) -> str:
        return file_name(self.source, id)

    def load(self, id: str) -> Any:
        return self.source.load(id)

    def fingerprint(self) -> str:
        """A digest of the source and the chosen scenes."""
        chosen = "\n".join([self.source.fingerprint(), *sorted(self.chosen)])
        return hashlib.sha256(chosen.encode()).hexdigest()


def subset(source: LabelledData, fraction: float, seed: int = 0, *, scenes: Sequence[str] | None = None) -> Subset:
    """Take whole scenes of a source, at least one, whose share of the images is closest to `fraction`.

    `seed` and the names of the scenes decide their order, so that smaller fractions are subsets of larger ones. An
    official list (`read_scene_list`) given as `scenes` is taken as it is; `Subset.share` tells its share of images.
    Of a source of objects, which has `category_of(id)`, that share is taken of each category, at least one scene.
    """
    if not 0 < fraction <= 1:
        raise RecipeError(f"fraction={fraction!r}; accepted: above 0 and up to 1.")
    images: dict[str, int] = {}
    categories: dict[str, int] = {}
    for id in source.ids():
        scene = source.scene_of(id)
        images[scene] = images.get(scene, 0) + 1
        categories[scene] = source.category_of(id) if hasattr(source, "category_of") else 0
    if not images:
        raise DataError(f"Source {source.name!r} has no image in split {source.split!r}.")
    if scenes is not None:
        known = set(source.scenes()) if hasattr(source, "scenes") else set(images)
        missing = sorted(set(scenes) - known)
        if missing or not scenes:
            raise DataError(
                f"Scenes of the list that split {source.split!r} of {source.name!r} lacks: "
                f"{some(missing, 5) if missing else 'an empty list'}; it has {len(known)}."
            )
        return Subset(source, scenes)
    order = sorted(images, key=lambda scene: hashlib.sha256(f"{seed}\n{scene}".encode()).digest())
    chosen: list[str] = []
    for category in sorted(set(categories.values())):
        members = [scene for scene in order if categories[scene] == category]
        taken = np.cumsum([images[scene] for scene in members])
        nearest = int(np.argmin(np.abs(taken - fraction * taken[-1])))  # the first of equals: fewer images
        chosen += members[: nearest + 1]
    return Subset(source, chosen)


def file_name(source: LabelledData, id: str) -> str:
    """The image's path below the folder of images, or its id if the source has no files."""
    return str(source.file_name(id)) if hasattr(source, "file_name") else f"{id}.png"
