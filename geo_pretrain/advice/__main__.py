"""`python -m geo_pretrain.advice`: rewrite the tables of docs/which.md and docs/alternatives.md of this checkout."""

from __future__ import annotations

from pathlib import Path

from geo_pretrain.advice.page import write_pages

if __name__ == "__main__":
    write_pages(Path(__file__).resolve().parents[2] / "docs")
