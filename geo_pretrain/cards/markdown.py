"""Pieces of Markdown: tables, lists and nested mappings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


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


def tree(data: Mapping[str, Any], indent: str = "") -> str:
    """Render nested mappings as a Markdown list; empty ones are left out."""
    lines = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            inner = tree(value, indent + "  ")
            lines += [f"{indent}- {_plain(key)}:", inner] if inner else []
            continue
        items = list(value) if isinstance(value, list | tuple) else [value]
        text = ", ".join(_plain(item) for item in items if item is not None and item != "")
        lines += [f"{indent}- {_plain(key)}: {text}"] if text else []
    return "\n".join(lines)


def _plain(value: object) -> str:
    """Escape Markdown and put the text on one line: some texts come from other people's files."""
    return re.sub(r"([\\`*<\[\]])", r"\\\1", " ".join(str(value).split()))


def numbers(values: Iterable[float]) -> str:
    """Numbers in a line, with commas between."""
    return ", ".join(f"{value:g}" for value in values)
