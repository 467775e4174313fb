"""`python -m geo_pretrain.cards`: rewrite model_cards/ and the README's table of the checkout this runs from."""

from __future__ import annotations

from pathlib import Path

from geo_pretrain.cards import update_readme, write_cards

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    write_cards(ROOT / "model_cards")
    update_readme(ROOT / "README.md")
