"""A row of the registry of labelled data sets: how a set is opened, its tasks and its published terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

ImageTask = Literal["segmentation", "detection"]
CloudTask = Literal["segmentation3d", "instances3d", "detection3d", "classification3d", "parts3d"]
Task = ImageTask | CloudTask
Opener = Callable[[Path, str, Any, Any], Any]  # called with folder, split, task, options
Progress = Callable[[int, int], None]  # called with (done, total) while an embedded set is made


class LabelledData(Protocol):
    """One split of a labelled data set, for one task: `LabelledSource` (images) and `CloudSource` (clouds)."""

    name: str
    split: str
    classes: tuple[str, ...]  # names of the classes 1..C of the task

    def ids(self) -> list[str]:
        """Names of all items, in a fixed order."""

    def scene_of(self, id: str) -> str:
        """The scene that an item shows; items of one scene stay together in subsets."""

    def load(self, id: str) -> Any:
        """Read one item. Raises `BadFrame` with path and reason when one of its files cannot be used."""

    def fingerprint(self) -> str:
        """A sha256 that changes when the data change."""


@dataclass(frozen=True)
class NoOptions:
    """The options of a data set that has none."""


@dataclass(frozen=True)
class DataSet:
    """A labelled data set of images or of clouds: `LabelledSource` or `CloudSource`, as its tasks say."""

    opener: Opener | None  # None: an embedded set, which has no folder
    tasks: tuple[Task, ...]
    license: str  # SPDX or LicenseRef
    terms: str  # the license in words
    options: type = NoOptions  # dataclass of `data.options`
    splits: tuple[str, ...] = ("train", "val")  # (): whichever its files name
    embedded: Callable[[str, Any, Any, Progress | None], Any] | None = None  # with split, task, options, progress


def plain(opener: Callable[[Path, str], Any]) -> Opener:
    """Make the opener of a data set that has no options and labels for one task only."""

    return lambda path, split, task, options: opener(path, split)
