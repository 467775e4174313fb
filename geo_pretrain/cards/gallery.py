"""The gallery: all checkpoints on one HTML page that searches, filters and compares; it loads nothing else.

`python -m geo_pretrain.cards` (`make cards`) writes docs/gallery.html, which depends on the catalog and its folder of
pictures alone; `geo-pretrain gallery` writes the page of this machine, which knows what loads here without a network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from geo_pretrain.cards.front_matter import license_page
from geo_pretrain.cards.sections import papers_of
from geo_pretrain.cards.table import headline
from geo_pretrain.cards.usage import CLONE, SMP, TIMM, TORCH_HUB, TORCHVISION
from geo_pretrain.catalog import backbone_info, list_backbones
from geo_pretrain.catalog.entry import READY, Entry, Paper, install_code
from geo_pretrain.catalog.license import LICENSE_GROUPS
from geo_pretrain.catalog.tables import scratch_values
from geo_pretrain.errors import DataError
from geo_pretrain.files import write_text

PAGE = Path(__file__).with_name("gallery.html")
PLACE = "__CATALOG__"  # in the page
STORED, PICTURES = "docs/gallery.html", "docs/gallery"  # of a checkout
KINDS = ("features", "matches")  # NAME.features.png: colors of features; NAME.matches.png: lines between two views
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
VIEWER = "viewer.html"  # NAME.viewer.html: an interactive page of matches


def gallery_page(
    names: Iterable[str] | None = None,
    *,
    here: Collection[str] | None = None,
    pictures: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """The text of the page.

    Args:
        names: of the catalog; None: all.
        here: names that load on this machine without a network; None: the page is for any machine.
        pictures: of each name the addresses of its pictures by kind, as `find_pictures` gives them.
    """
    entries = [backbone_info(name) for name in (list_backbones() if names is None else names)]
    rows = [_row(entry, here or (), (pictures or {}).get(entry.name, {})) for entry in entries]
    lines = ",\n".join(_json(row) for row in rows)  # one a line, for those who read differences
    catalog = f'{{"knows": {_json(here is not None)}, "checkpoints": [\n{lines}\n]}}'
    return PAGE.read_text(encoding="utf-8").replace(PLACE, catalog)


def write_gallery(out: Path, *, here: Collection[str] | None = None, folder: Path | None = None) -> list[str]:
    """Write the page with the pictures of `folder`, to which it links; returns the pictures that fit no name.

    Raises `DataError` where the folder is none.
    """
    pictures, left = find_pictures(folder, out) if folder is not None else ({}, [])
    write_text(out, gallery_page(here=here, pictures=pictures))
    return left


def find_pictures(folder: Path, page: Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Find NAME.features.png, NAME.matches.png (also .webp, .jpg) and NAME.viewer.html of the catalog's names.

    Returns the addresses relative to `page`, by name and kind, and the file names that are pictures of no name.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; accepted: a folder with pictures such as NAME.features.png.")
    names = set(list_backbones())
    found: dict[str, dict[str, str]] = {}
    left: list[str] = []
    for path in sorted(folder.iterdir()):
        name, _, kind = path.name.removesuffix(path.suffix).rpartition(".")
        fits = (path.suffix.lower() in SUFFIXES and kind in KINDS) or path.name.endswith(f".{VIEWER}")
        if name in names and fits and path.is_file():
            address = Path(os.path.relpath(path, page.parent)).as_posix()
            found.setdefault(name, {}).setdefault(kind, quote(address))
        elif path.suffix.lower() in SUFFIXES:
            left.append(path.name)
    return found, left


def _row(entry: Entry, here: Collection[str], pictures: Mapping[str, str]) -> dict[str, Any]:
    """All that the page shows of one checkpoint, as plain data."""
    license, ready = entry.license, entry.name in here
    scratch = scratch_values(entry)
    papers = papers_of(entry)
    chain = [("the weights", license.weights), ("the code that made them", license.code)]
    chain += [(f"data: {name}", terms) for name, terms in license.datasets]
    return {
        "name": entry.name,
        "method": entry.method,
        "modality": entry.modality,
        "network": entry.arch.title,
        "data": entry.data,
        "license": license.weights.removeprefix("LicenseRef-"),
        "group": next((group for group in LICENSE_GROUPS if license.matches(group)), "other"),
        "status": entry.status,
        "how": READY if ready else entry.how,
        "offline": ready,
        "description": entry.description,
        "input": str(entry.contract),
        "base": license.base_model,
        "chain": [[of, terms.removeprefix("LicenseRef-"), license_page(terms)] for of, terms in chain],
        "paper": _paper(entry.paper),
        "headline": headline(entry),
        "results": [
            [r.task, r.dataset, r.metric, r.value, scratch.get(r), r.table, papers[r.table].title]
            for r in entry.results
        ],
        "measured": [[r.task, r.dataset, r.metric, r.value, r.table.partition("#")[0]] for r in entry.measured],
        "lines": copied_lines(entry, ready=ready),
        "note": _note(entry, ready),
        "pictures": dict(pictures),
    }


def copied_lines(entry: Entry, *, ready: bool = False) -> dict[str, str]:
    """The lines to copy, by library: those of cards, so only what works for the checkpoint.

    `ready`: it loads here already, so no line installs, fetches or makes it.
    """
    name, weights = entry.name, entry.status != "planned"
    off = "" if weights else ", pretrained=False"
    python = f'import geo_pretrain as gp\n\nnetwork = gp.load_backbone("{name}"{off})'
    if entry.arch.has_decoder:
        python += f'\nunet = gp.load_backbone("{name}", decoder=True{off})  # with its decoder'
    lines = {"Python": python}
    if weights:
        hosts = {"torch.hub": TORCH_HUB}
        if entry.arch.host_encoder is not None:
            hosts |= {"timm": TIMM, "smp": SMP, "torchvision": TORCHVISION}
        lines |= {host: s.code.format(name=name, where=name, clone=CLONE) for host, s in hosts.items()}
    commands = {
        "published-here": f"geo-pretrain pull {name}",
        "published-by-authors": f"geo-pretrain pull {name}",
        "planned": f"geo-pretrain info {name}",
    }
    if ready:
        lines["CLI"] = f"geo-pretrain verify {name}"
    elif entry.packages:
        lines["CLI"] = f"{install_code(entry.packages[0])}\ngeo-pretrain verify {name}"
    elif entry.status == "regenerable":
        lines["CLI"] = f"{entry.train_command(f'runs/{name}')}\nexport GEO_PRETRAIN_HUB=runs"
    else:
        lines["CLI"] = commands[entry.status]
    return lines


def _note(entry: Entry, ready: bool) -> str:
    """What must be done before the lines work, in a sentence."""
    if ready:
        return "Its files are on this machine: every line works without a network."
    if entry.packages:
        return "Its files come in a Python package: once it is installed, every line works without a network."
    return {
        "published-here": "The first load downloads the files and compares each with its digest; later ones need "
        "no network.",
        "published-by-authors": "The first load downloads the authors' file, reads it without executing anything in "
        "it and converts it; later ones need no network.",
        "regenerable": "Nobody publishes these weights: the CLI lines make them and let all the other lines find them.",
        "planned": "Nobody publishes these weights and no recipe makes them yet: the network starts at random.",
    }[entry.status]


def _paper(paper: Paper) -> dict[str, Any]:
    return {
        "title": paper.title,
        "authors": paper.authors,
        "venue": f"{paper.venue} {paper.year}",
        "url": paper.url,
    }


def _json(value: object) -> str:
    """JSON in which no text ends the element that holds it, whatever it says."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
