"""S3DIS' text files: a line is `x y z r g b` (m, 0 to 255); Area_k/ROOM/Annotations/CLASS_n.txt holds one object.

The released files have broken lines. A byte that cannot belong to a number is read as a blank; a line counts if it
then has six numbers with colors from 0 to 255 and a place that can be one in meters. All others are dropped, and told
with file, line and fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from geo_pretrain.errors import BadFrame
from geo_pretrain.sparse.coordinates import voxelize
from geo_pretrain.training.data.files import FARTHEST, points_fault, visible

# In alphabetical order, the raw ids of PointContrast's and CSC's code.
RAW_CLASSES = (
    "clutter", "beam", "board", "bookcase", "ceiling", "chair", "column", "door", "floor", "sofa", "stairs", "table",
    "wall", "window",
)  # fmt: skip
MIXED = 255  # the raw id of a voxel whose points are of several classes
COLUMNS = 6
CHUNK = 1 << 18  # bytes that are parsed together: their words fit into a processor's cache
DIGITS = 15  # a decimal of so many digits is a whole number over a power of ten, both exact in float64
_WANTED = f"not a place up to {FARTHEST:g} m from the origin and colors from 0 to 255"
_OF_NUMBERS = b"0123456789+-.eE \t\r\n"
_CONTROLS = [bytes([byte]) for byte in range(ord(" ")) if byte not in b"\t\r\n"]  # no white space of a text
_BLANKED = bytes(byte if byte in _OF_NUMBERS else ord(" ") for byte in range(256))


@dataclass(frozen=True)
class Room:
    """The points of a room with raw ids of classes and numbers of objects."""

    points: np.ndarray  # float32 [N, 3], m
    colors: np.ndarray  # uint8 [N, 3]
    labels: np.ndarray  # uint8 [N], row of RAW_CLASSES, or MIXED
    instances: np.ndarray  # int32 [N], from 1: the object's rank among the files by name; 0 in mixed voxels


@dataclass(frozen=True)
class Lines:
    """The points of a text file, and what was wrong with it."""

    points: np.ndarray  # float32 [N, 3]
    colors: np.ndarray  # uint8 [N, 3]
    faults: tuple[str, ...]  # such as "line 7: dropped, 5 numbers"


def read_room(folder: Path, voxel_size: float | None = 0.01) -> tuple[Room, list[str]]:
    """Read the objects of a room, one point per voxel (None: all points), and remarks on faults of the files.

    Files are taken by name, so that numbers of objects are the same on every disk (the released code's order is the
    disk's). Raises `BadFrame` for a room without any point.
    """
    parts: list[Room] = []
    remarks: list[str] = []
    number = 0
    for path in visible(folder / "Annotations", "*.txt"):
        name = f"Annotations/{path.name}"
        raw = path.stem.partition("_")[0]
        if any(map(str.isspace, path.stem)):
            remarks.append(f"{name}: left out, a blank in its name marks a copy")
            continue
        if raw not in RAW_CLASSES:
            remarks.append(f"{name}: left out, {raw!r} is none of {', '.join(RAW_CLASSES)}")
            continue
        try:
            lines = parse_lines(path.read_bytes())
        except OSError as error:
            raise BadFrame(path, f"cannot be read ({error.strerror})") from None
        remarks += [f"{name}: {fault}" for fault in lines.faults]
        count, number = len(lines.points), number + 1
        label = np.full(count, RAW_CLASSES.index(raw), np.uint8)
        parts.append(Room(lines.points, lines.colors, label, np.full(count, number, np.int32)))
    if not sum(len(part.points) for part in parts):
        raise BadFrame(folder / "Annotations", "no object with a point; expected CLASS_n.txt with lines x y z r g b")
    room = Room(*(np.concatenate([getattr(part, field) for part in parts]) for field in Room.__dataclass_fields__))
    return (room if voxel_size is None else thin_room(room, voxel_size)), remarks


def thin_room(room: Room, voxel_size: float) -> Room:
    """Keep the first point of each voxel; where its points are of several classes, the class is MIXED and object 0."""
    labels = torch.from_numpy(room.labels).to(torch.int64)
    voxels = voxelize(torch.from_numpy(room.points), labels[:, None], voxel_size)
    first = voxels.index.numpy()
    other = torch.zeros(len(first), dtype=torch.int64)
    other.index_add_(0, voxels.inverse, (labels != labels[voxels.index][voxels.inverse]).to(torch.int64))
    mixed = other.numpy() > 0
    kept = np.where(mixed, MIXED, room.labels[first]).astype(np.uint8)
    return Room(room.points[first], room.colors[first], kept, np.where(mixed, 0, room.instances[first]))


def parse_lines(data: bytes) -> Lines:
    """Parse the bytes of a text file; see the module for what is repaired and what is dropped."""
    tables: list[np.ndarray] = []
    faults: list[str] = []
    line = 1
    for chunk in _chunks(data):
        table = _parse_chunk(chunk)
        if table is None:
            table, found = parse_slowly(chunk, line)
            faults += found
        tables.append(table)
        line += chunk.count(b"\n")
    table = np.concatenate([np.zeros((0, COLUMNS)), *tables])
    return Lines(table[:, :3].astype(np.float32), np.rint(table[:, 3:]).astype(np.uint8), tuple(faults))


def parse_slowly(data: bytes, line: int = 1) -> tuple[np.ndarray, list[str]]:
    """Parse line by line: float64 [N, 6], and what was wrong; `line` is the number of the first one."""
    rows: list[list[float]] = []
    faults: list[str] = []
    for number, raw in enumerate(data.split(b"\n"), line):
        text = raw.translate(_BLANKED)
        words = text.split()
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        colored = all(0 <= value <= 255 for value in values[3:])
        if len(values) == COLUMNS and colored and points_fault(np.array([values[:3]])) is None:
            rows.append(values)
            if text != raw:
                faults.append(f"line {number}: repaired, odd bytes in {raw.strip()!r}")
        elif raw.strip():
            why = f"{len(words)} words" if len(words) != COLUMNS else _WANTED
            faults.append(f"line {number}: dropped, {why}: {raw.strip()[:60]!r}")
    return np.array(rows, np.float64).reshape(-1, COLUMNS), faults


def _chunks(data: bytes) -> Iterator[bytes]:
    """Cut text at ends of lines, into pieces of some `CHUNK` bytes."""
    start = 0
    while start < len(data):
        stop = data.find(b"\n", start + CHUNK) + 1 or len(data)
        yield data[start:stop]
        start = stop


def _parse_chunk(data: bytes) -> np.ndarray | None:
    """Parse lines of six plain decimals each: float64 [N, 6]; None where anything else occurs (blank lines do not)."""
    characters = np.frombuffer(data, np.uint8)
    if any(data.count(byte) for byte in _CONTROLS):
        return None
    inside = characters > ord(" ")
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    ends = np.flatnonzero(characters == ord("\n"))
    words = np.diff(np.searchsorted(starts, ends), prepend=0, append=len(starts))
    if not len(starts) or not np.isin(words, (0, COLUMNS)).all() or lengths.max() > DIGITS + 2:
        return None
    values = _decimals(characters, starts, lengths)
    if values is None:
        return None
    table = values.reshape(-1, COLUMNS)
    sound = table[:, 3:].min() >= 0 and table[:, 3:].max() <= 255 and points_fault(table[:, :3]) is None
    return table if sound else None


def _decimals(characters: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
    """Parse words such as -12.345, all at once and exactly: float64 [N]; None if one is no plain decimal."""
    negative = characters[starts] == ord("-")
    whole = np.zeros(len(starts), np.int64)
    digits, decimals = np.zeros((2, len(starts)), np.int8)
    fractional = np.zeros(len(starts), bool)
    for place in range(int(lengths.max())):
        active = lengths > place
        character = characters[np.where(active, starts + place, starts)]
        digit = character - np.uint8(ord("0"))  # wraps around: other characters become 10 and more
        is_digit = (digit < 10) & active
        is_point = (character == ord(".")) & active & ~fractional
        if (active & ~is_digit & ~is_point & ~(negative if place == 0 else False)).any():
            return None
        whole = np.where(is_digit, whole * 10 + digit, whole)
        digits += is_digit
        decimals += is_digit & fractional
        fractional |= is_point
    if digits.min() == 0 or digits.max() > DIGITS:
        return None
    values = whole / 10.0 ** np.arange(DIGITS + 1)[decimals]
    return np.where(negative, -values, values)
