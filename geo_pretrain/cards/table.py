"""The catalog as Markdown tables: some of it in the README, all of it in docs/checkpoints.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from geo_pretrain.cards.front_matter import detail_of, task_of
from geo_pretrain.cards.markdown import around_marks, table
from geo_pretrain.cards.sections import WEIGHTS_FROM
from geo_pretrain.catalog import backbone_info, list_backbones
from geo_pretrain.catalog.entry import Entry
from geo_pretrain.catalog.shipped import SHIPPED

BEGIN, END = "<!-- catalog -->", "<!-- /catalog -->"
TABLE_HEAD = ("name", "network", "data", "weights' license", "weights from", "reported")
CAPTIONS = {"2d": "For images", "3d": "For point clouds"}
HEADLINE_TASKS = {"2d": "semantic segmentation", "3d": "3D semantic segmentation"}
SHORT_TASKS = {"detection": "detection", "instance segmentation": "instances", "classification": "classification"}


FEATURED = (  # in the README: what packages of this project hold, and the best known of each method
    *SHIPPED,
    "pri3d_view_geo_r50",
    "pri3d_view_geo_r18",
    "gsc_r50",
    "pointcontrast_nce_srunet34",
    "csc_100k_srunet34",
    "ppkt_srunet34",
    "img2pc_srunet34",
    "slidr_srunet34.nuscenes",
)


def catalog_table(names: Iterable[str] | None = None, root: str = "") -> str:
    """The catalog as Markdown tables, one row a checkpoint: those for images, then those for point clouds.

    Each name links to its card in model_cards/; `root` leads from the page to the folder above ("../").
    """
    entries = [backbone_info(name) for name in (list_backbones() if names is None else names)]
    tables = []
    for modality, caption in CAPTIONS.items():
        rows = [_catalog_row(entry, root) for entry in entries if entry.modality == modality]
        if rows:
            tables.append(f"**{caption}**\n\n{table(TABLE_HEAD, rows)}")
    return "\n\n".join(tables)


def _catalog_row(entry: Entry, root: str) -> tuple[str, ...]:
    return (
        f"[`{entry.name}`]({root}model_cards/{entry.name}.md)",
        entry.arch.title,
        entry.data,
        entry.license.weights.removeprefix("LicenseRef-"),
        "a package, offline" if entry.packages else WEIGHTS_FROM[entry.status],
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


def update_table(path: Path, names: Iterable[str] | None = None, root: str = "") -> bool:
    """Put `catalog_table(names, root)` between the markers of a Markdown file; returns whether the file changed.

    Raises `DataError` when the two markers are not there once each, in order.
    """
    text, (before, after) = path.read_text(encoding="utf-8"), around_marks(path, BEGIN, END)
    updated = f"{before}{BEGIN}\n{catalog_table(names, root)}\n{END}{after}"
    if updated != text:
        path.write_text(updated, encoding="utf-8")
    return updated != text
