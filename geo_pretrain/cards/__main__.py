"""`python -m geo_pretrain.cards`: rewrite model_cards/, tables, types of names and the gallery of this checkout."""

from __future__ import annotations

from pathlib import Path

from geo_pretrain.cards import FEATURED, update_table, write_cards
from geo_pretrain.cards.gallery import PICTURES, STORED, write_gallery
from geo_pretrain.cards.name_types import write_name_types

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    write_cards(ROOT / "model_cards")
    write_name_types(ROOT)
    update_table(ROOT / "README.md", FEATURED)
    update_table(ROOT / "docs" / "checkpoints.md", root="../")
    pictures = ROOT / PICTURES
    write_gallery(ROOT / STORED, folder=pictures if pictures.is_dir() else None)
