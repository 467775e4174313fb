"""Your own clouds as a labelled source: a folder of PLY, npy, npz, LAS or LAZ files with a `classes.txt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from geo_pretrain.errors import DataError, some
from geo_pretrain.training.checks import Checks
from geo_pretrain.training.data.files import read_listing
from geo_pretrain.training.data.labelled.clouds.classes import FileClasses, read_classes
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.files import CLOUD_SUFFIXES, CloudFields, read_cloud, read_labels
from geo_pretrain.training.data.labelled.clouds.listed import ListedCloud, ListedClouds
from geo_pretrain.training.data.labelled.clouds.scannet3d import object_boxes
from geo_pretrain.training.data.labelled.clouds.unread import conversion, left_alone
from geo_pretrain.training.data.labelled.shares import count_values, names_alone_note

LAYOUT = (
    f"classes.txt, and either lists train.txt and val.txt of files below the folder, or folders train/ and val/ "
    f"of {', '.join(CLOUD_SUFFIXES)} files"
)
LABELLED = ("train", "val")  # clouds of other splits need no labels


@dataclass(frozen=True)
class FolderOptions(CloudFields):
    """Options of your own clouds: the fields of the files, and what labels and objects mean."""

    ignore: tuple[int, ...] = ()  # labels that are of no class, besides 0 and -1
    stuff: tuple[str, ...] = ()  # classes that no object belongs to, for instances3d and detection3d
    scene: Literal["file", "folder"] = "file"  # what stays together in subsets: a file, or all files of a folder
    # label of the first name, where classes.txt has names alone; None: 1. Not in digests, which hold the numbers
    first: Literal[0, 1] | None = field(default=None, repr=False)

    def check_settings(self, check: Checks) -> None:
        """Note options that cannot be."""
        check(self.no_instance in (0, -1), "data.options.no_instance", self.no_instance, "0 or -1")


class CloudFolder(ListedClouds):
    """A split of a folder of clouds. Tasks: segmentation3d; with an instance field instances3d and detection3d.

    Boxes are those around each object's points, along the axes. Clouds of splits other than train and val may be
    without labels: their `labels` are None.
    """

    counted = "points"

    def __init__(
        self,
        split: str,
        root: Path,
        files: Sequence[Path],
        classes: FileClasses | None,
        task: str,
        options: FolderOptions,
    ) -> None:
        names = given = () if classes is None else classes.names
        unknown = [name for name in options.stuff if name not in given]
        if unknown:
            raise DataError(f"data.options.stuff: {unknown[0]!r} is no class; accepted: {', '.join(given)}.")
        self.task, self.options, self.stuff, self.file_classes = task, options, options.stuff, classes
        if task == "detection3d":
            names = tuple(name for name in names if name not in self.stuff)
            self.stuff = ()
        self._class_of = np.array([0, *(names.index(n) + 1 if n in names else 0 for n in given)])
        self._counted = np.array([False, *(name not in options.stuff for name in given)])
        items: dict[str, ListedCloud] = {}
        for path in files:
            id = path.relative_to(root).with_suffix("").as_posix()
            if id in items:
                raise DataError(f"{str(root)!r}: {items[id].points.name} and {path.name} are one cloud, {id!r}.")
            items[id] = ListedCloud(id if options.scene == "file" else path.parent.relative_to(root).as_posix(), path)
        facts = (task, options, None if classes is None else sorted(classes.numbers.items()))
        super().__init__("clouds", split, root, names, items, facts)

    def load(self, id: str) -> LabelledCloud:
        """Read a cloud. Raises `BadFrame`, see `read_cloud`."""
        need = [] if self.split not in LABELLED else ["label"]
        if need and self.task in ("instances3d", "detection3d"):
            need.append("instance")
        cloud = read_cloud(self.item(id).points, self.options, self.file_classes, need=need, id=id)
        if cloud.labels is None:
            return replace(cloud, instances=None)
        labels, instances = self._class_of[cloud.labels], cloud.instances
        if instances is not None:
            instances = one_class_each(labels, np.where(self._counted[cloud.labels], instances, 0))
        boxes = None
        if self.task == "detection3d" and instances is not None:
            boxes = object_boxes(cloud.points, labels, instances)
        return replace(cloud, labels=labels, instances=instances, boxes=boxes)

    def without_labels(self, id: str) -> LabelledCloud:
        """Read a cloud but not its labels, which may be of no class. Raises `BadFrame`."""
        return read_cloud(self.item(id).points, self.options, need=(), id=id)

    def label_keys(self) -> Mapping[str, int]:
        given = {} if self.file_classes is None else self.file_classes.numbers
        return {str(number): int(self._class_of[label]) for number, label in sorted(given.items())}

    def label_counts(self, id: str) -> Mapping[str, int]:
        found = count_values(read_labels(self.item(id).points, self.options))
        return {str(label): count for label, count in found.items()}

    def label_note(self, shares: Mapping[str, float]) -> str | None:
        classes = self.file_classes
        if classes is not None and (hint := classes.hint([int(label) for label in shares])):
            return hint
        if classes is None or not classes.counted or self.options.first is not None or "0" not in shares:
            return None
        return names_alone_note(classes.path, classes.names[0], self.counted, shares["0"])


STRAY = 0.05  # share of the points of a number below which a class is there by mistake


def one_class_each(labels: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Number objects [N] anew where one number stands for objects of several classes, as if each class began at 1.

    Points of one number with different labels are different objects, as they are in the evaluation; a class with less
    than a twentieth of a number's points is there by mistake, and these are of no object.
    """
    of_object, count = instances > 0, int(instances.max(initial=0)) + 1
    pairs, ranks, sizes = np.unique((labels * count + instances)[of_object], return_inverse=True, return_counts=True)
    all_of_it = np.zeros(count, np.int64)
    np.add.at(all_of_it, pairs % count, sizes)
    stray = sizes < STRAY * all_of_it[pairs % count]
    numbers = pairs % count if len(np.unique((pairs % count)[~stray])) == (~stray).sum() else np.arange(len(pairs)) + 1
    anew = np.zeros_like(instances)
    anew[of_object] = np.where(stray, 0, numbers)[ranks]
    return anew


def open_clouds(path: Path, split: str, task: str, options: FolderOptions) -> CloudFolder:
    """Open a split of a folder of clouds. Raises `DataError` for what is missing, with the expected layout."""
    if not path.is_dir():
        raise DataError(f"No folder {str(path)!r}. Expected layout: {LAYOUT}.")
    listed = path / "classes.txt"
    classes = None
    if split in LABELLED or listed.is_file():
        classes = read_classes(listed, options.ignore, 1 if options.first is None else options.first)
    files = split_files(path, split)
    other = {"train": "val", "val": "train"}.get(split)
    if other is not None and ((path / f"{other}.txt").is_file() or (path / other).is_dir()):
        shared = sorted(set(files) & set(split_files(path, other)))
        if shared:
            raise DataError(f"{str(path)!r}: {len(shared)} clouds are in train and in val, such as {shared[0].name}.")
    return CloudFolder(split, path, files, classes, task, options)


def split_files(root: Path, split: str) -> list[Path]:
    """The files of a split, of SPLIT.txt (paths below `root`, with or without suffix) or of the folder SPLIT."""
    listed, folder = root / f"{split}.txt", root / split
    if listed.is_file():
        return _listed(root, listed)
    if not folder.is_dir():
        raise DataError(f"{str(root)!r} has neither {split}.txt nor a folder {split}/. Expected layout: {LAYOUT}.")
    names = (path for path in folder.rglob("*") if path.suffix.lower() in CLOUD_SUFFIXES)
    found = sorted(path for path in names if path.is_file() and not path.name.startswith("."))
    if not found:
        raise DataError(f"No {', '.join(CLOUD_SUFFIXES)} file in {str(folder)!r}.{conversion(left_alone(folder))}")
    return found


def _listed(root: Path, listed: Path) -> list[Path]:
    """The files that a list names. Raises `DataError` for those that are not there, or stand twice."""
    names = [line.partition("#")[0].strip() for line in read_listing(listed, "list of clouds")]
    names = [name for name in names if name]
    found: list[Path] = []
    missing = []
    for name in names:
        given = root / name
        ways = (
            [given]
            if given.suffix.lower() in CLOUD_SUFFIXES
            else [given.with_name(given.name + suffix) for suffix in CLOUD_SUFFIXES]
        )
        there = [path for path in ways if path.is_file()]
        missing += [] if there else [name]
        found += there[:1]
    if missing or not names:
        what = f"{len(missing)} of {len(names)} files are missing: {some(missing)}" if names else "it names no file"
        raise DataError(f"{str(listed)!r}: {what}. Paths are below {str(root)!r}, with or without suffix.")
    twice = [path.name for path in found if found.count(path) > 1]
    if twice:
        raise DataError(f"{str(listed)!r}: {twice[0]} stands there twice.")
    return found
