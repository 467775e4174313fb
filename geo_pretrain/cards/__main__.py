"""`python -m geo_pretrain.cards`: rewrite model_cards/ and the tables of checkpoints of the checkout this runs from."""

from __future__ import annotations

from pathlib import Path

from geo_pretrain.cards import FEATURED, update_table, write_cards

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    write_cards(ROOT / "model_cards")
    update_table(ROOT / "README.md", FEATURED)
    update_table(ROOT / "docs" / "checkpoints.md", root="../")
