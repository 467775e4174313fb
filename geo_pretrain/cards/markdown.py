"""Pieces of Markdown: tables, lists and nested mappings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from geo_pretrain.errors import DataError


def join(*parts: str) -> str:
    """Blocks of Markdown with a blank line between; empty ones are left out."""
    return "\n\n".join(part for part in parts if part) + "\n"


def bullets(lines: Iterable[str]) -> str:
    """A bullet list."""
    return "\n".join(f"- {line}" for line in lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; pipes and line breaks in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def around_marks(page: Path, begin: str, end: str) -> tuple[str, str]:
    """Split a page into what comes before and after two marks, each there once and in order. Raises `DataError`."""
    try:
        text = page.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{page}: no such page.") from None
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise DataError(
            f"{page}: no lines {begin!r} and {end!r} around a table; it needs one line of each, in this order."
        )
    return text.partition(begin)[0], text.partition(end)[2]


def tree(data: Mapping[str, Any], indent: str = "") -> str:
    """Render nested mappings as a Markdown list; empty ones are left out."""
    lines = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            inner = tree(value, indent + "  ")
            lines += [f"{indent}- {plain(key)}:", inner] if inner else []
            continue
        items = list(value) if isinstance(value, list | tuple) else [value]
        text = ", ".join(plain(item) for item in items if item is not None and item != "")
        lines += [f"{indent}- {plain(key)}: {text}"] if text else []
    return "\n".join(lines)


def plain(value: object) -> str:
    """Escape Markdown and put the text on one line: some texts come from other people's files."""
    return re.sub(r"([\\`*<\[\]])", r"\\\1", " ".join(str(value).split()))


def numbers(values: Iterable[float]) -> str:
    """Numbers in a line, with commas between."""
    return ", ".join(f"{value:g}" for value in values)
