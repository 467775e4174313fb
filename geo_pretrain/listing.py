"""The catalog as plain lines, and the answer to `geo-pretrain list` without Typer, which loads longer than all else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from geo_pretrain.catalog import backbone_info, list_backbones
from geo_pretrain.errors import UnknownName

COLUMNS = ("name", "network", "data", "weights' license", "status")
FILTERS = ("--method", "--modality", "--license", "--data", "--status")  # of `list_backbones`, each with a value


def answer(arguments: Sequence[str]) -> str | None:
    """The output of `geo-pretrain list ARGUMENTS`; None where there is something to explain, as help or a mistake."""
    filters: dict[str, str] = {}
    patterns: list[str] = []
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option in FILTERS:
            filters[option.removeprefix("--")] = value if equals else next(words, "")
        elif word.startswith("-"):
            return None
        else:
            patterns.append(word)
    try:
        names = list_backbones(*patterns, **filters) if len(patterns) < 2 else []
    except UnknownName:
        return None
    return catalog_lines(names) if names else None


def catalog_lines(names: Iterable[str]) -> str:
    """One line a backbone: name, network, data, license and status."""
    rows = []
    for entry in map(backbone_info, names):
        license = entry.license.weights.removeprefix("LicenseRef-")
        rows.append((entry.name, entry.arch.title, entry.data, license, entry.status))
    return columns([COLUMNS, *rows])


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, one a line, with their columns aligned; nothing is cut, as names are copied from lists."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
