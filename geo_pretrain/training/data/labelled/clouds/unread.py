"""Files beside clouds that are not read, and the line that makes them files that are."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from geo_pretrain.training.data.labelled.clouds.files import CLOUD_SUFFIXES, PLAIN

ASIDE, LISTS = (".json", ".yaml", ".yml", ".md", ""), ("classes.txt", "train.txt", "val.txt", "test.txt")
TEXT_CLOUDS = {".txt", ".xyz", ".asc", ".csv"}
OTHER_CLOUDS = {".pcd", ".e57", ".pts", ".ptx", ".obj", ".stl", ".off"}
LOOKED_AT = 40  # lines of a text file


def left_alone(folder: Path, suffixes: Sequence[str] = CLOUD_SUFFIXES) -> list[Path]:
    """The files below a folder that end in none of `suffixes`, but lists, notes and hidden ones; sorted."""
    there = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return [p for p in there if p.suffix.lower() not in (*suffixes, *ASIDE) and p.name not in LISTS]


def conversion(paths: Iterable[Path]) -> str:
    """How clouds in other formats are brought into one that is read, after a space; "" where there are none."""
    ending = {path.suffix.lower(): path for path in paths}
    for suffix in ending.keys() & TEXT_CLOUDS:
        path = ending[suffix]
        layout = text_layout(path)
        if layout is not None:
            line = f"numpy.save({str(path.with_suffix('.npy'))!r}, numpy.loadtxt({str(path)!r}{layout.arguments()}))"
            return f" Columns of numbers: {line}{layout.columns()}."
    return " CloudCompare and MeshLab save them as PLY." if ending.keys() & OTHER_CLOUDS else ""


@dataclass(frozen=True)
class TextLayout:
    """How a text file of points is laid out."""

    delimiter: str | None  # None: blanks
    skip: int  # lines above the numbers
    names: tuple[str, ...]  # of the columns; () where no line says them
    width: int  # columns
    marked: bool = False  # the file begins with a byte order mark

    def arguments(self) -> str:
        """What `numpy.loadtxt` is told besides the path."""
        told = "" if self.delimiter is None else f", delimiter={self.delimiter!r}"
        told += f", skiprows={self.skip}" if self.skip else ""
        return told + (", encoding='utf-8-sig'" if self.marked else "")

    def columns(self) -> str:
        """The option that names the columns of an array, where their number does not; "" where it does."""
        if self.names and tuple(map(str.lower, self.names)) != PLAIN.get(self.width, ()):
            return f", with the option columns=[{', '.join(self.names)}]"
        return "" if self.width in PLAIN else f", with the option columns=[...], a name for each of {self.width}"


def text_layout(path: Path) -> TextLayout | None:
    """Delimiter, header and columns of a text file of numbers; None where its lines are none, or cannot be read."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = [line.strip() for line in islice(file, LOOKED_AT)]
    except (OSError, UnicodeDecodeError):
        return None
    body = [line for line in lines if line and not line.startswith("#")]
    if not body:
        return None
    delimiter = next((mark for mark in (",", ";") if mark in body[-1]), None)
    width = len(body[-1].split(delimiter))
    if width < 3 or not _numbers(body[-1], delimiter, width):
        return None
    wrong = [k for k, line in enumerate(lines) if line in body and not _numbers(line, delimiter, width)]
    skip = wrong[-1] + 1 if wrong else 0
    with path.open("rb") as file:
        marked = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    return TextLayout(delimiter, skip, _names(lines[:skip], delimiter, width), width, marked)


def _numbers(line: str, delimiter: str | None, width: int) -> bool:
    """Whether a line is so many numbers."""
    cells = line.split(delimiter)
    try:
        return len([float(cell) for cell in cells]) == width
    except ValueError:
        return False


def _names(header: Sequence[str], delimiter: str | None, width: int) -> tuple[str, ...]:
    """The names of the columns, of the last line above the numbers that has so many words; () without one."""
    for line in reversed(header):
        words = tuple(word.strip().strip('"') for word in line.lstrip("/# ").split(delimiter))
        if len(words) == width and all(word.isidentifier() for word in words):
            return words
    return ()
