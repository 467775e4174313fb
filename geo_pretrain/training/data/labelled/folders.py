"""Shared parts of folder layouts: image files with their label files and scenes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, unknown
from geo_pretrain.training.checks import Count, Ranged
from geo_pretrain.training.data import files
from geo_pretrain.training.data.labelled.image import Instances, LabelledImage
from geo_pretrain.training.data.labelled.instances import instances_from_ids
from geo_pretrain.training.data.labelled.mapping import LabelMap


@dataclass(frozen=True)
class Item:
    """The files of one image."""

    id: str
    scene: str
    image: Path
    annotation: Path  # of classes or of instances
    labels: Path | None = None  # of classes, beside instances without them


@dataclass(frozen=True)
class InstanceRule:
    """The rule that selects the objects of an instance image to keep."""

    min_pixels: int = 1000  # smaller objects are left out, measured at the image's full size
    unnumbered: bool = False  # pixels of a class with instance number 0 are an object, as in Pri3D's conversion
    drop_empty: bool = False  # leave out images without any object


@dataclass(frozen=True)
class InstanceOptions(Ranged):
    """Options for detection, see `InstanceRule`."""

    section = "data.options."

    min_pixels: Count = 1000
    drop_empty: bool = False
    match_released_code: bool = False  # Pri3D's conversion: empty images dropped, instance 0 is an object

    def rule(self) -> InstanceRule:
        """The rule for the objects to keep."""
        exact = self.match_released_code
        return InstanceRule(self.min_pixels, unnumbered=exact, drop_empty=self.drop_empty or exact)


@dataclass(eq=False, repr=False)
class Folder:
    """Images and label files below a folder: the base of sources of either task."""

    name: str
    split: str
    root: Path
    items: InitVar[Iterable[Item]]
    labels: LabelMap

    def __post_init__(self, items: Iterable[Item]) -> None:
        self.classes = self.labels.classes
        self._items = {item.id: item for item in items}

    def ids(self) -> list[str]:
        return list(self._items)

    def scene_of(self, id: str) -> str:
        return self._item(id).scene

    def scenes(self) -> list[str]:
        return list(dict.fromkeys(item.scene for item in self._items.values()))

    def file_name(self, id: str) -> str:
        """The image's path below the data set's folder."""
        return self._item(id).image.relative_to(self.root).as_posix()

    def fingerprint(self) -> str:
        """A digest of names, sizes and times of images and labels, and of the label map."""
        paths = [path for item in self._items.values() for path in (item.image, item.annotation, item.labels)]
        found = files.files_fingerprint(self.root, [path for path in paths if path is not None and path.is_file()])
        facts = f"{found}\n{self.name}\n{self.split}\n{self.labels.classes}\n{sorted(self.labels.ids.items())}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def _item(self, id: str) -> Item:
        if id not in self._items:
            raise unknown("image", id, self._items)
        return self._items[id]


@dataclass(eq=False, repr=False)
class SemanticFolder(Folder):
    """A source for segmentation: one image of class ids per image."""

    bits: Sequence[int] = (8,)

    def load(self, id: str) -> LabelledImage:
        item = self._item(id)
        image = files.read_color(item.image)
        ids = files.read_ids(item.annotation, image.shape, bits=self.bits)
        return LabelledImage(id, image, self.labels.apply(ids, item.annotation), None)


@dataclass(eq=False, repr=False)
class InstanceFolder(Folder):
    """A source for detection: an image of label * 1000 + instance, or one of labels and one of instances."""

    rule: InstanceRule
    bits: Sequence[int] = (16,)
    _kept: list[str] | None = field(default=None, init=False)

    def ids(self) -> list[str]:
        """Names of all images; `drop_empty` omits those without objects (reads every label file once)."""
        if self._kept is None:
            names = super().ids()
            self._kept = [id for id in names if self._has_objects(id)] if self.rule.drop_empty else names
            if not self._kept:
                raise DataError(
                    f"None of {len(names)} images of {self.name!r}, split {self.split!r}, has an object of at least "
                    f"{self.rule.min_pixels} pixels (option min_pixels)."
                )
        return list(self._kept)

    def load(self, id: str) -> LabelledImage:
        image = files.read_color(self._item(id).image)
        return LabelledImage(id, image, None, self._instances(id, image.shape))

    def fingerprint(self) -> str:
        """A digest of the files and the rule."""
        return hashlib.sha256(f"{super().fingerprint()}\n{self.rule}".encode()).hexdigest()

    def _instances(self, id: str, shape: Sequence[int] | None) -> Instances:
        item = self._item(id)
        ids = files.read_ids(item.annotation, shape, bits=self.bits)
        if item.labels is not None:
            ids = combine(files.read_ids(item.labels, ids.shape), ids, item.annotation)
        rule = self.rule
        path = item.labels or item.annotation  # the file that holds the label
        return instances_from_ids(ids, self.labels, path, min_pixels=rule.min_pixels, unnumbered=rule.unnumbered)

    def _has_objects(self, id: str) -> bool:
        try:
            return len(self._instances(id, None)) > 0
        except BadFrame:
            return True  # `load` says what is wrong with it


def combine(labels: np.ndarray, instances: np.ndarray, path: object) -> np.ndarray:
    """Combine two images of one size to label * 1000 + instance."""
    if instances.max(initial=0) > 999:
        raise BadFrame(path, f"instance number {int(instances.max())}, accepted are 0 to 999")
    return labels * 1000 + instances


def list_files(folder: Path, pattern: str, layout: str) -> list[Path]:
    """List the files of a folder that match, sorted by name. Raises `DataError` when there are none."""
    found = files.visible(folder, pattern)
    if not found:
        raise DataError(f"No {pattern} in {str(folder)!r}. Expected layout: {layout}")
    return found


def need_folders(root: Path, names: Iterable[str], layout: str) -> None:
    """Raise `DataError` naming the folders that are missing below `root`."""
    if not root.is_dir():
        raise DataError(f"No folder {str(root)!r}. Expected layout: {layout}")
    missing = [name for name in names if not (root / name).is_dir()]
    if missing:
        raise DataError(f"{str(root)!r} has no folder {', '.join(map(repr, missing))}. Expected layout: {layout}")
