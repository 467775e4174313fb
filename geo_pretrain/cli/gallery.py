"""The command `gallery`: all checkpoints on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geo_pretrain.cli.options import OUT, file_option
from geo_pretrain.cli.shared import app, console, escape
from geo_pretrain.targets import PAGES

PICTURES_HELP = "A folder with NAME.features.png, NAME.matches.png and NAME.viewer.html; the page links to them."


@app.command()
def gallery(
    out: Annotated[Path, file_option("The page to write.", PAGES, *OUT)] = Path("gallery.html"),
    pictures: Annotated[Path | None, typer.Option(help=PICTURES_HELP)] = None,
) -> None:
    """Write a page of all checkpoints, to search, filter and compare, which knows what loads here without a network.

    Example: `geo-pretrain gallery -o gallery.html`
    """
    from geo_pretrain.cards.gallery import write_gallery
    from geo_pretrain.catalog import CATALOG
    from geo_pretrain.hub.cache import names_here

    here = names_here() & set(CATALOG)
    left = write_gallery(out, here=here, folder=pictures)
    text = f"Wrote {out}: {len(CATALOG)} checkpoints, {len(here)} of which load here without a network."
    console.print(escape(text), highlight=False, soft_wrap=True)
    for name in left:
        console.print(escape(f"No checkpoint has the picture {name!r}."), highlight=False, soft_wrap=True)
