"""The classes of a user's own clouds: `classes.txt`, one a line, with or without the number that files say it by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadLabels, DataError, some


@dataclass(frozen=True)
class FileClasses:
    """Names of the classes 1..C, and which label in a file is which; labels of no class are errors or ignored."""

    names: tuple[str, ...]
    numbers: Mapping[int, int]  # label in a file -> class 1..C, 0 = ignored
    path: str = "classes.txt"
    counted: bool = False  # names alone: labels are counted from the first line

    def apply(self, labels: np.ndarray, path: object) -> np.ndarray:
        """Map labels [N] to classes, int64 [N]. Raises `BadLabels` for a label that is none."""
        found, places = np.unique(labels, return_inverse=True)
        unlisted = [int(label) for label in found if int(label) not in self.numbers]
        if unlisted:
            count = int((labels == unlisted[0]).sum())
            raise BadLabels(
                path,
                f"label {unlisted[0]} at {count} points is no class; {self.path} has "
                f"{some((str(n) for n in sorted(self.numbers)), 30)} (data.options.ignore takes labels to ignore)"
                + (f". {hint.rstrip('.')}" if (hint := self.hint(unlisted)) else ""),
            )
        return np.array([self.numbers[int(label)] for label in found], np.int64)[places.reshape(-1)]

    def hint(self, labels: Collection[int]) -> str:
        """What to ask where files with these labels seem to count from 1, and names alone from 0; else ""."""
        last = max((number for number, label in self.numbers.items() if label), default=0)
        from_0 = self.counted and self.numbers.get(0)
        return "Do labels count from 1? --set data.options.first=1." if from_0 and last + 1 in labels else ""


def read_classes(path: Path, ignore: Collection[int] = (), first: int = 1) -> FileClasses:
    """Read a `classes.txt`: either a name on each line, the classes `first`, `first` + 1, ..., or a number and a name.

    Numbers are the labels in the files; several numbers with one name are one class. Labels of `ignore`, and 0 and -1
    unless they are a class, are ignored. Empty lines and what follows a # are left out. Raises `DataError`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise DataError(
            f"{str(path)!r} {reason}. It names the classes: a name on each line for the labels 1, 2, ..., or a number "
            "and a name on each, such as '0 wall'."
        ) from None
    lines = [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]
    numbered = [_number(line.split()[0]) is not None and len(line.split()) > 1 for line in lines]
    if not lines or any(numbered) != all(numbered):
        raise DataError(f"{str(path)!r}: accepted is a name on each line, or a number and a name on each line.")
    if all(numbered):
        rows = [(int(line.split()[0]), line.split(maxsplit=1)[1]) for line in lines]
    else:
        rows = list(enumerate(lines, start=first))
    names = tuple(dict.fromkeys(name for _, name in rows))
    given = [number for number, _ in rows]
    twice = sorted({n for n in given if given.count(n) > 1}) or ([] if all(numbered) else _twice(lines))
    if twice:
        raise DataError(f"{str(path)!r}: {some(map(repr, twice))} stands there twice.")
    numbers = {number: names.index(name) + 1 for number, name in rows}
    listed = sorted(set(ignore) & set(numbers))
    if listed:
        hint = ""
        if not all(numbered) and first == 1:
            name = lines[listed[0] - 1]
            hint = f" Labels count from 1 there: {listed[0]} is {name!r}. From 0: --set data.options.first=0."
        raise DataError(f"{str(path)!r}: label {listed[0]} is a class and in data.options.ignore.{hint}")
    return FileClasses(names, dict.fromkeys([0, -1, *ignore], 0) | numbers, path.name, counted=not all(numbered))


def _number(word: str) -> int | None:
    try:
        return int(word)
    except ValueError:
        return None


def _twice(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
