"""The classes of a user's own labelled images: a `classes.txt` of names, of ids and names, or of colors and names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, some
from geo_pretrain.training.data.files import read_ids, read_label_colors, read_listing
from geo_pretrain.training.data.labelled.mapping import LabelMap
from geo_pretrain.training.data.labelled.shares import count_values

BITS = (8, 16)  # of label PNGs with ids
MOST_CLASSES = 254  # labels are 8-bit in memory, 0 is ignored
MOST_ID = 65535
IGNORED = (0, 255)  # ids of no class unless they are one: the customs of MMSegmentation and of PASCAL VOC
BLACK = 0
SHOWN = 8  # ids in a hint
FIRST_1 = "Do ids count from 1? --set data.options.first=1."

Color = tuple[int, int, int]


@dataclass(frozen=True)
class ImageClasses:
    """Names of the classes 1..C, and which id or color in a label file is which."""

    names: tuple[str, ...]
    numbers: Mapping[int, int]  # id in a file -> class 1..C, 0 = ignored; empty where labels are colors
    colors: Mapping[Color, int]  # color in a file -> class, 0 = ignored; empty where labels are ids
    path: str = "classes.txt"
    counted: bool = False  # names alone: ids are counted from the first line

    def label_map(self) -> LabelMap:
        """The map of ids; its name stands in errors."""
        return LabelMap(self.path, "", self.names, self.numbers)

    def read(self, path: Path) -> np.ndarray:
        """Read a label file: uint8 [H, W], 0 = ignored, 1..C. Raises `BadFrame` for ids or colors of no class."""
        if not self.colors:
            try:
                return self._map.apply(read_ids(path, bits=BITS), path)
            except BadFrame as bad:
                if not bad.reason.startswith("label id"):
                    raise
                raise BadFrame(path, f"{bad.reason}. {self._hint(read_ids(path, bits=BITS))}") from None
        packed = _packed(read_label_colors(path))
        found, places = np.unique(packed, return_inverse=True)
        known = {_packed(np.array(color)).item(): label for color, label in self.colors.items()}
        wrong = [int(value) for value in found if int(value) not in known]
        if wrong:
            color = _words(wrong[0])
            count = int((packed == wrong[0]).sum())
            raise BadFrame(path, f"color {color} at {count} pixels is no class; {self.path} has {len(known)} colors")
        return np.array([known[int(v)] for v in found], np.uint8)[places.reshape(-1)].reshape(packed.shape)

    def counts(self, path: Path) -> dict[str, int]:
        """Count the pixels of each id or color of a label file, whether it is a class or not. Raises `BadFrame`."""
        if self.colors:
            return {_words(color): count for color, count in count_values(_packed(read_label_colors(path))).items()}
        return {str(id): count for id, count in count_values(read_ids(path, bits=BITS)).items()}

    def keys(self) -> dict[str, int]:
        """Ids or colors as `counts` writes them -> class 1..C, 0 = ignored, in ascending order."""
        if self.colors:
            return {" ".join(map(str, color)): label for color, label in self.colors.items()}
        return {str(id): label for id, label in sorted(self.numbers.items())}

    def palette(self) -> tuple[Color, ...] | None:
        """The color of each class where labels are colors, for pictures of predictions; of several, the first."""
        if not self.colors:
            return None
        first: dict[int, Color] = {}
        for color, label in self.colors.items():
            first.setdefault(label, color)
        return tuple(first[label] for label in range(1, len(self.names) + 1))

    def file_ids(self) -> tuple[int, ...] | None:
        """The id of each class in label files; of several, the first. None where labels are colors."""
        if self.colors or not self.names:
            return None
        first: dict[int, int] = {}
        for number, label in self.numbers.items():
            first.setdefault(label, number)
        return tuple(first[label] for label in range(1, len(self.names) + 1))

    def _hint(self, ids: np.ndarray) -> str:
        """What to say where ids of a file are no class."""
        lacking = [str(id) for id in np.unique(ids).tolist() if id not in self.numbers]
        other = f"Ids of no class: --set data.options.ignore=[{','.join(lacking[:SHOWN])}]"
        return f"{FIRST_1} {other}" if self.starts_late(np.unique(ids).tolist()) else other

    def starts_late(self, ids: Iterable[int]) -> bool:
        """Whether names alone were counted from id 0, and these ids of files seem to count from 1."""
        last, found = max((id for id, label in self.numbers.items() if label), default=0), set(ids)
        return self.counted and bool(self.numbers.get(0)) and last + 1 in found and 0 not in found

    @cached_property
    def _map(self) -> LabelMap:
        return self.label_map()


def read_image_classes(
    path: Path, ignore: Collection[int] = (), void: Collection[str] = (), first: int = 1
) -> ImageClasses:
    """Read a `classes.txt`: on each line a name, or an id and a name, or a color `R G B` and a name.

    Names alone have the ids `first`, `first` + 1, ...; several ids or colors with one name are one class. Ids of
    `ignore` and names of `void` are ignored, and so are the ids 0 and 255, or black, unless they are a class. Empty
    lines and what follows a # are left out. Raises `DataError`.
    """
    if not path.is_file():
        raise DataError(
            f"{str(path)!r} is missing. It names the classes: a name on each line for the ids 1, 2, ..., or an id and "
            "a name ('0 road'), or a color and a name ('128 64 128 road')."
        )
    lines = [line for line in (line.partition("#")[0].strip() for line in read_listing(path, "classes")) if line]
    rows = [_row(line) for line in lines]
    if not rows or len({len(key) for key, _ in rows}) > 1:
        raise DataError(
            f"{str(path)!r}: accepted is a name on each line, or an id and a name on each, or three numbers from 0 to "
            "255 (red, green, blue) and a name on each."
        )
    width = len(rows[0][0])
    keys = [key if width else (first + place,) for place, (key, _) in enumerate(rows)]
    given = [name for _, name in rows]
    unknown = [name for name in void if name not in given]
    if unknown:
        raise DataError(f"data.options.void: {unknown[0]!r} is no name in {path.name}; it has {some(given)}.")
    names = tuple(dict.fromkeys(name for name in given if name not in void))
    labels = [0 if name in void else names.index(name) + 1 for name in given]
    _check(path, keys, given, names, counted=not width)
    if width == 3:
        colors: dict[Color, int] = {(key[0], key[1], key[2]): label for key, label in zip(keys, labels, strict=True)}
        return ImageClasses(names, {}, {(BLACK,) * 3: 0, **colors}, path.name)
    listed = sorted(set(ignore) & {key[0] for key in keys})
    if listed:
        hint = ""
        if not width and first == 1:
            hint = (
                f" Ids count from 1 there: {listed[0]} is {given[listed[0] - 1]!r}. From 0: --set data.options.first=0."
            )
        raise DataError(f"{str(path)!r}: id {listed[0]} is a class and in data.options.ignore.{hint}")
    numbers = {key[0]: label for key, label in zip(keys, labels, strict=True)}
    return ImageClasses(names, dict.fromkeys([*IGNORED, *ignore], 0) | numbers, {}, path.name, counted=not width)


def _row(line: str) -> tuple[tuple[int, ...], str]:
    """The numbers before a name, and the name: three that can be a color, one, or none."""
    words = line.split()
    leading = 0
    while leading < len(words) - 1 and words[leading].isdecimal():
        leading += 1
    if leading >= 3 and all(int(word) <= 255 for word in words[:3]):
        return tuple(map(int, words[:3])), line.split(maxsplit=3)[3]
    if leading:
        return (int(words[0]),), line.split(maxsplit=1)[1]
    return (), line


def _check(path: Path, keys: list[tuple[int, ...]], given: list[str], names: tuple[str, ...], *, counted: bool) -> None:
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise DataError(f"{str(path)!r}: {' '.join(map(str, twice[0]))} stands there twice.")
    if counted and len(set(given)) < len(given):
        raise DataError(f"{str(path)!r}: {next(n for n in given if given.count(n) > 1)!r} stands there twice.")
    if not names or len(names) > MOST_CLASSES:
        raise DataError(f"{str(path)!r}: {len(names)} classes; accepted are 1 to {MOST_CLASSES}.")
    if max(max(key) for key in keys) > MOST_ID:
        raise DataError(f"{str(path)!r}: id {max(max(key) for key in keys)}; ids are at most {MOST_ID}.")


def _words(packed: int) -> str:
    """A packed color as red, green and blue."""
    return " ".join(str(packed >> shift & 255) for shift in (16, 8, 0))


def _packed(colors: np.ndarray) -> np.ndarray:
    """Colors [..., 3] as one number each, [...]."""
    wide = colors.astype(np.int64)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
