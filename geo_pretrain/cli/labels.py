"""Tables of what labels in files are, as commands print them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geo_pretrain.cli.shared import console, escape, print_table

if TYPE_CHECKING:
    from geo_pretrain.training.data.labelled.shares import LabelTable

MOST_ROWS = 60  # of a table before training


def show_labels(table: LabelTable) -> None:
    """Print which label is which class, its share, and remarks."""
    looked = "all" if table.looked == table.total else f"{table.looked} of {table.total}"
    console.print(f"Labels in {looked} training files. Does each class have the share you expect?", highlight=False)
    cells = table.cells()
    print_table(("id", "class", table.counted, "in files"), cells[:MOST_ROWS])
    if len(cells) > MOST_ROWS:
        console.print(f"and {len(cells) - MOST_ROWS} more: geo-pretrain data check shows all", highlight=False)
    for note in table.notes():
        console.print(f"[yellow]{escape(note)}", soft_wrap=True, highlight=False)
