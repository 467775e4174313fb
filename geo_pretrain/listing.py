"""The catalog as plain lines, and the answer to `geo-pretrain list` without Typer, which loads longer than all else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from geo_pretrain.catalog import backbone_info, list_backbones
from geo_pretrain.catalog.entry import HOW, READY
from geo_pretrain.catalog.lengths import LENGTHS
from geo_pretrain.errors import UnknownName
from geo_pretrain.hub.cache import names_here

COLUMNS = ("name", "weights' license", "how to get it")
FILTERS = ("--method", "--modality", "--license", "--data", "--status")  # of `list_backbones`, each with a value


def answer(arguments: Sequence[str]) -> str | None:
    """The output of `geo-pretrain list ARGUMENTS`; None where there is something to explain, as help or a mistake."""
    filters: dict[str, str] = {}
    patterns: list[str] = []
    offline = False
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option in FILTERS:
            filters[option.removeprefix("--")] = value if equals else next(words, "")
        elif word == "--offline":
            offline = True
        elif word.startswith("-"):
            return None
        else:
            patterns.append(word)
    try:
        names = list_backbones(*patterns, **filters) if len(patterns) < 2 else []
    except UnknownName:
        return None
    names = ready_names(names) if offline else names
    return catalog_lines(names) if names else None


def ready_names(names: Iterable[str]) -> list[str]:
    """Those of the names that load on this machine without a network."""
    here = names_here()
    return [name for name in names if name in here]


def catalog_rows(names: Iterable[str]) -> list[dict[str, str]]:
    """A row of plain texts for each backbone; "how" is what a newcomer can do to load it on this machine."""
    here = names_here()
    rows = []
    for entry in map(backbone_info, names):
        row = {
            "name": entry.name,
            "method": entry.method,
            "modality": entry.modality,
            "network": entry.arch.title,
            "data": entry.data,
            "license": entry.license.weights,
            "status": entry.status,
            "how": READY if entry.name in here else entry.how,
        }
        rows.append(row)
    return rows


def catalog_lines(names: Iterable[str]) -> str:
    """One line a backbone, in 80 columns: its name, license, and how to get it; of recipes their length."""
    rows = []
    for row in catalog_rows(names):
        trained = row["how"] == HOW["regenerable"] and row["name"] in LENGTHS
        how = f"train: {LENGTHS[row['name']]}" if trained else row["how"]
        rows.append((row["name"], row["license"].removeprefix("LicenseRef-"), how))
    return columns([COLUMNS, *rows])


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, one a line, with their columns aligned; nothing is cut, as names are copied from lists."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
