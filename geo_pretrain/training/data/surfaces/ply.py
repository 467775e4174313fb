"""PLY files: binary in either byte order or ASCII, any elements and properties, lists included.

Written from the format's description (Turk, "The PLY Polygon File Format", 1994).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from geo_pretrain.errors import DataError
from geo_pretrain.files import regular

Columns = dict[str, np.ndarray]

_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float": "f4", "double": "f8", "float32": "f4", "float64": "f8",
}  # fmt: skip
_NAMES = {kind: name for name, kind in reversed(_TYPES.items())}  # the old names, which every program reads


def read_ply(path: Path, elements: Collection[str] | None = None) -> dict[str, Columns]:
    """Read the columns of a file by element and property: {"vertex": {"x": float32 [N], ...}, "face": {...}}.

    A list property is an array [N, K] where all its lists have K items, otherwise an object array of arrays. With
    `elements`, nothing after the last of them is read.

    Raises:
        DataError: the file is missing, cut off, or not a PLY file; the message names it and what is wrong.
    """
    try:
        data = regular(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    order, header, position = _read_header(path, data)
    for element in header:  # a header may state any number of rows; each takes a byte or more
        if element.rows and (not element.properties or element.rows > len(data) - position):
            what = f"in {len(data) - position} bytes" if element.properties else "without properties"
            raise DataError(
                f"{path}: element {element.name!r} states {element.rows} rows {what}; the file is cut off or damaged."
            )
    missing = [repr(name) for name in elements or () if name not in [element.name for element in header]]
    if missing:
        present = ", ".join(repr(element.name) for element in header)
        raise DataError(f"{path}: has no element {', '.join(missing)}; it has {present}.")
    body = _Binary(data, position, order) if order else _Ascii(data, position)
    found: dict[str, Columns] = {}
    for element in header:
        if elements is not None and all(name in found for name in elements):
            break
        try:
            found[element.name] = _read_element(body, element)
        except _BrokenRow as broken:
            raise DataError(
                f"{path}: element {element.name!r}, row {broken.row} of {element.rows}: {broken.reason}."
            ) from None
    return found if elements is None else {name: found[name] for name in elements}


def write_ply(path: Path, elements: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write columns as `read_ply` gives them: {"vertex": {"x": [N], ...}, ...}, binary little endian.

    An array [N, K] becomes a list property of N lists with K items (up to 255). Raises ValueError for columns of
    different length and for types that PLY has not (64-bit integers, bool).
    """
    lines, tables = ["ply", "format binary_little_endian 1.0"], []
    for element, columns in elements.items():
        lengths = {len(column) for column in columns.values()}
        if len(lengths) != 1:
            raise ValueError(f"Columns of element {element!r} have lengths {sorted(lengths)}; accepted: one for all.")
        rows = lengths.pop()
        lines.append(f"element {element} {rows}")
        fields: list[tuple[str, str, tuple[int, ...]]] = []
        for name, column in columns.items():
            kind = _NAMES.get(column.dtype.str[1:])
            if kind is None or column.ndim > 2 or (column.ndim == 2 and column.shape[1] > 255):
                raise ValueError(
                    f"Column {name!r} is {column.dtype} {column.shape}; accepted: [N] or [N, K], K up to 255, of "
                    f"{', '.join(map(str, map(np.dtype, _NAMES)))}."
                )
            if column.ndim == 2:
                fields.append((f"count of {name}", "u1", ()))
            fields.append((name, "<" + column.dtype.str[1:], column.shape[1:]))
            lines.append(f"property {'list uchar ' if column.ndim == 2 else ''}{kind} {name}")
        table = np.empty(rows, np.dtype(fields))
        for name, column in columns.items():
            table[name] = column
            if column.ndim == 2:
                table[f"count of {name}"] = column.shape[1]
        tables.append(table)
    header = "\n".join([*lines, "end_header", ""])
    with path.open("wb") as file:
        file.write(header.encode("ascii"))
        for table in tables:
            file.write(table.tobytes())


def triangle_rows(path: Path, face: Columns, vertices: int) -> np.ndarray:
    """Extract the triangles of the element "face" of a file with `vertices` vertices: int64 [F, 3].

    Raises:
        DataError: faces have no corners, other than three, or corners that are not there.
    """
    names = [name for name in ("vertex_indices", "vertex_index") if name in face]
    if not names:
        raise DataError(f"{path}: faces have no list vertex_indices; they have {', '.join(face) or 'nothing'}.")
    corners = face[names[0]]
    if len(corners) == 0:
        return np.zeros((0, 3), np.int64)
    if corners.ndim != 2 or corners.shape[1] != 3:
        raise DataError(f"{path}: some faces are no triangles; accepted is a mesh of triangles only.")
    if not 0 <= corners.min() <= corners.max() < vertices:
        raise DataError(
            f"{path}: faces name vertices {corners.min()} to {corners.max()}, the file has 0 to {vertices - 1}."
        )
    return corners.astype(np.int64)


@dataclass(frozen=True)
class _Property:
    name: str
    kind: str  # numpy type without byte order
    count: str | None = None  # type of the length, for a list


@dataclass
class _Element:
    name: str
    rows: int
    properties: list[_Property] = field(default_factory=list)


class _BrokenRow(Exception):
    row = 0

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _read_header(path: Path, data: bytes) -> tuple[str, list[_Element], int]:
    """Parse the header: byte order ("" for ASCII), elements, and the offset of the body."""
    if data[:4] not in (b"ply\n", b"ply\r"):
        raise DataError(f"{path}: is no PLY file; it begins with {data[:4]!r}, expected b'ply'.")
    order: str | None = None
    elements: list[_Element] = []
    position = 0
    while (end := data.find(b"\n", position)) >= 0:
        line = data[position:end].decode("ascii", errors="replace").strip()
        position = end + 1
        match line.split():
            case ["end_header"]:
                if order is None:
                    raise DataError(f"{path}: the header has no line 'format'.")
                return order, elements, position
            case ["format", name, _] if name in _ORDERS:
                order = _ORDERS[name]
            case ["element", name, rows] if rows.isdecimal() and len(rows) < 19:
                elements.append(_Element(name, int(rows)))
            case ["property", "list", count, kind, name] if elements and _is_whole(count) and kind in _TYPES:
                elements[-1].properties.append(_Property(name, _TYPES[kind], _TYPES[count]))
            case ["property", kind, name] if elements and kind in _TYPES:
                elements[-1].properties.append(_Property(name, _TYPES[kind]))
            case [] | ["ply"] | ["comment" | "obj_info", *_]:
                pass
            case _:
                raise DataError(f"{path}: the header has a line {line[:80]!r} that is not understood.")
    raise DataError(f"{path}: the header has no line 'end_header'; the file is cut off.")


def _is_whole(kind: str) -> bool:
    return _TYPES.get(kind, "f")[0] in "iu"


def _read_element(body: _Binary | _Ascii, element: _Element) -> Columns:
    """Read the next element at once if all its lists are as long as in the first row, else row by row."""
    start, properties = body.position, element.properties
    if element.rows and properties:
        lengths = [len(values) for values in _read_row(body, element, 0)]
        body.position = start
        table = body.table(element, lengths)
        if table is not None:
            return {p.name: column for p, column in zip(properties, table, strict=True)}
    rows = [_read_row(body, element, row) for row in range(element.rows)]
    return {p.name: _ragged([row[k] for row in rows], p) for k, p in enumerate(properties)}


def _read_row(body: _Binary | _Ascii, element: _Element, row: int) -> list[np.ndarray]:
    try:
        return [body.take(p.kind, 1 if p.count is None else int(body.take(p.count, 1)[0])) for p in element.properties]
    except _BrokenRow as broken:
        broken.row = row
        raise


def _ragged(values: list[np.ndarray], item: _Property) -> np.ndarray:
    if item.count is None:
        return np.concatenate([np.empty(0, item.kind), *values]).astype(item.kind)
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


class _Binary:
    """A binary body."""

    def __init__(self, data: bytes, position: int, order: str) -> None:
        self.data, self.position, self.order = data, position, order

    def take(self, kind: str, length: int) -> np.ndarray:
        """Read the next numbers."""
        dtype = np.dtype(self.order + kind)
        if length < 0 or self.position + length * dtype.itemsize > len(self.data):
            raise _BrokenRow("the file is cut off")
        values = np.frombuffer(self.data, dtype, length, self.position)
        self.position += values.nbytes
        return values.astype(kind)

    def table(self, element: _Element, lengths: list[int]) -> list[np.ndarray] | None:
        """Read every column of an element whose lists have these lengths; None when they have others."""
        fields: list[tuple[str, str, tuple[int, ...]]] = []
        for k, (item, length) in enumerate(zip(element.properties, lengths, strict=True)):
            if item.count is not None:
                fields.append((f"count{k}", self.order + item.count, ()))
            fields.append((f"value{k}", self.order + item.kind, () if item.count is None else (length,)))
        dtype = np.dtype(fields)
        if self.position + element.rows * dtype.itemsize > len(self.data):
            return None
        table = np.frombuffer(self.data, dtype, element.rows, self.position)
        for k, (item, length) in enumerate(zip(element.properties, lengths, strict=True)):
            if item.count is not None and (table[f"count{k}"] != length).any():
                return None
        self.position += table.nbytes
        return [table[f"value{k}"].astype(item.kind) for k, item in enumerate(element.properties)]


class _Ascii:
    """An ASCII body."""

    def __init__(self, data: bytes, position: int) -> None:
        self.words, self.position = data[position:].split(), 0

    def take(self, kind: str, length: int) -> np.ndarray:
        """Read the next numbers."""
        words = self.words[self.position : self.position + length]
        if length < 0 or len(words) < length:
            raise _BrokenRow("the file is cut off")
        self.position += length
        return _numbers(words, kind)

    def table(self, element: _Element, lengths: list[int]) -> list[np.ndarray] | None:
        """Read every column of an element whose lists have these lengths; None when they have others."""
        width = sum(length + (item.count is not None) for item, length in zip(element.properties, lengths, strict=True))
        words = self.words[self.position : self.position + width * element.rows]
        if len(words) < width * element.rows:
            return None
        table, columns, start = np.array(words).reshape(element.rows, width), [], 0
        try:
            for item, length in zip(element.properties, lengths, strict=True):
                if item.count is not None:
                    if (_numbers(table[:, start], item.count) != length).any():
                        return None
                    start += 1
                values = _numbers(table[:, start : start + length], item.kind)
                columns.append(values[:, 0] if item.count is None else values)
                start += length
        except _BrokenRow:
            return None  # read again row by row, to name the row
        self.position += len(words)
        return columns


def _numbers(words: list[bytes] | np.ndarray, kind: str) -> np.ndarray:
    try:
        values = np.asarray(words).astype(np.float64)
    except ValueError as error:
        raise _BrokenRow(f"not a number ({error})") from None
    if kind[0] == "f":
        return values.astype(kind)
    limits = np.iinfo(kind)
    if not ((values == np.trunc(values)) & (values >= limits.min) & (values <= limits.max)).all():
        raise _BrokenRow(f"not a whole number from {limits.min} to {limits.max}")
    return values.astype(kind)
