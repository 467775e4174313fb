"""Reading cards: their metadata, code, tables and sections; and cards of every kind to read."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import Any

import yaml

from geo_pretrain import cards
from geo_pretrain.catalog import CATALOG, File, Result
from tests.zoo import ARCH, ARCH_3D, CONTRACT, CONTRACT_3D, LICENSE

PUBLISHED = [name for name, entry in CATALOG.items() if entry.status == "published-by-authors"]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROVENANCE = {"steps": 130, "data": {"source": "rooms", "fingerprint": "ab12"}, "skipped": {}, "notes": ""}
ROOMS = "pri3d_geo_r18.rooms"  # any name of a real ResNet-18 U-Net


def metadata(card: str) -> dict[str, Any]:
    start, block, body = card.split("---\n", 2)
    assert start == ""
    assert body.startswith("\n# ")
    return yaml.safe_load(block)


def codes(card: str) -> list[str]:
    return PYTHON.findall(card)


def tables(card: str) -> list[list[list[str]]]:
    """Every Markdown table as rows of cells, the head first and without the line of dashes."""
    found = []
    for block in card.split("\n\n"):
        if block.startswith("| "):
            rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().splitlines()]
            assert all(set(cell) == {" ", "-"} for cell in rows[1])
            found.append([[cell.strip() for cell in row] for row in (rows[0], *rows[2:])])
    return found


def section(card: str, heading: str) -> str:
    return card.split(f"\n## {heading}\n\n", 1)[1].split("\n## ", 1)[0]


def converted(name: str, **source: str) -> dict[str, Any]:
    """The provenance of a folder that was made from an authors' file."""
    url = CATALOG[name].authors_files[0].url
    origin = {"url": url, "sha256": "e" * 64, "format": "pri3d", "content": "2D U-Net", "fetched": "2026-11-21"}
    return {"source": origin | source, "foreign": ["omegaconf.DictConfig", "numpy.core.multiarray.scalar"]} | {
        "in_the_file": {"step": 60000, "__author__": "x"},
        "converted_by": "0.1",
    }


def folder_card(name: str, provenance: dict[str, Any], **options: Any) -> str:
    entry = CATALOG[name]
    return cards.render_card(name, entry.arch, entry.contract, entry.license, provenance, **options)


@functools.cache
def every_kind_of_card() -> dict[str, str]:
    known = {name: cards.render_entry(entry) for name, entry in CATALOG.items()}
    measured = (Result("dense matching", "rooms val", "recall at 4 px", 0.61, "eval matching"),)
    known["run"] = cards.render_card("my_net_r18", ARCH, CONTRACT, LICENSE, PROVENANCE, recipe="x", results=measured)
    known["unfinished"] = cards.render_card("my_net", ARCH_3D, CONTRACT_3D, LICENSE, {"seed": None}, finished=False)
    for name in PUBLISHED:
        known[f"converted {name}"] = folder_card(name, converted(name))
    known["here"] = cards.render_entry(published_here())
    return known


def published_here():
    file = {"size": 94_301_232, "sha256": "5" * 64, "sources": (f"hf-hub:someone/{ROOMS}@{'c' * 40}",)}
    files = [File(role, f"{role}.safetensors", **file) for role in ("encoder", "decoder", "golden")]
    return replace(CATALOG[ROOMS], status="published-here", files=tuple(files))
