<<<<<<< HEAD
"""`python -m geo_pretrain.cards`: rewrite model_cards/ and the tables of checkpoints of the checkout this runs from."""
=======
"""`python -m geo_pretrain.cards`: rewrite the checkout's model_cards/, README table and docs/gallery.html."""
>>>>>>> 3a181fb (Gallery: all checkpoints on one page, to search, filter and compare, with lines to copy and pictures of a folder)

from __future__ import annotations

from pathlib import Path

<<<<<<< HEAD
from geo_pretrain.cards import FEATURED, update_table, write_cards
=======
from geo_pretrain.cards import update_readme, write_cards
from geo_pretrain.cards.gallery import PICTURES, STORED, write_gallery
>>>>>>> 3a181fb (Gallery: all checkpoints on one page, to search, filter and compare, with lines to copy and pictures of a folder)

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    write_cards(ROOT / "model_cards")
<<<<<<< HEAD
    update_table(ROOT / "README.md", FEATURED)
    update_table(ROOT / "docs" / "checkpoints.md", root="../")
=======
    update_readme(ROOT / "README.md")
    pictures = ROOT / PICTURES
    write_gallery(ROOT / STORED, folder=pictures if pictures.is_dir() else None)
>>>>>>> 3a181fb (Gallery: all checkpoints on one page, to search, filter and compare, with lines to copy and pictures of a folder)
