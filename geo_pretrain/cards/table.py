"""The catalog as Markdown tables, for the README."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from geo_pretrain.cards.front_matter import detail_of, task_of
from geo_pretrain.cards.markdown import around_marks, table
from geo_pretrain.cards.sections import WEIGHTS_FROM
from geo_pretrain.catalog import backbone_info, list_backbones
from geo_pretrain.catalog.entry import Entry

BEGIN, END = "<!-- catalog -->", "<!-- /catalog -->"
TABLE_HEAD = ("name", "network", "data", "weights' license", "weights from", "reported")
CAPTIONS = {"2d": "For images", "3d": "For point clouds"}
HEADLINE_TASKS = {"2d": "semantic segmentation", "3d": "3D semantic segmentation"}
SHORT_TASKS = {"detection": "detection", "instance segmentation": "instances", "classification": "classification"}


def catalog_table(names: Iterable[str] | None = None) -> str:
    """The catalog as Markdown tables, one row a checkpoint: those for images, then those for point clouds.

    Each name links to its card in model_cards/.
    """
    entries = [backbone_info(name) for name in (list_backbones() if names is None else names)]
    tables = []
    for modality, caption in CAPTIONS.items():
        rows = [_catalog_row(entry) for entry in entries if entry.modality == modality]
        if rows:
            tables.append(f"**{caption}**\n\n{table(TABLE_HEAD, rows)}")
    return "\n\n".join(tables)


def _catalog_row(entry: Entry) -> tuple[str, ...]:
    return (
        f"[`{entry.name}`](model_cards/{entry.name}.md)",
        entry.arch.title,
        entry.data,
        entry.license.weights.removeprefix("LicenseRef-"),
        WEIGHTS_FROM[entry.status],
        headline(entry) or "-",
    )


def headline(entry: Entry) -> str | None:
    """One reported number with its benchmark, such as "61.7 mIoU, ScanNet"; None when there is none.

    In order of preference: semantic segmentation of ScanNet, any mean IoU, any number, each on all of the benchmark's
    training data; else the first number of all.
    """
    whole = [result for result in entry.results if not detail_of(result)]
    miou = [result for result in whole if result.metric == "mIoU"]
    best = [r for r in miou if (r.task, r.dataset) == (HEADLINE_TASKS[entry.modality], "ScanNet")]
    chosen = next(iter((*best, *miou, *whole, *entry.results)), None)
    if chosen is None:
        return None
    short = next((short for text, short in SHORT_TASKS.items() if text in task_of(chosen)), "")
    where = " ".join(filter(None, (chosen.dataset, short)))
    return ", ".join(filter(None, (f"{chosen.value:g} {chosen.metric}", where, detail_of(chosen))))


def update_readme(path: Path) -> bool:
    """Put the table between the markers of a Markdown file; returns whether the file changed.

    Raises `DataError` when the two markers are not there once each, in order.
    """
    text, (before, after) = path.read_text(encoding="utf-8"), around_marks(path, BEGIN, END)
    updated = f"{before}{BEGIN}\n{catalog_table()}\n{END}{after}"
    if updated != text:
        path.write_text(updated, encoding="utf-8")
    return updated != text
