"""`python -m geo_pretrain.advice`: rewrite the tables of two pages of docs, and the lengths that `list` says."""

from __future__ import annotations

from pathlib import Path

from geo_pretrain.advice.lengths import write_lengths
from geo_pretrain.advice.page import write_pages

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    write_lengths(root)
    write_pages(root / "docs")
