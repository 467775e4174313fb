"""Scores that the papers report for a recipe's protocol: of catalog entries, and of baselines without a checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass

from geo_pretrain.catalog import CATALOG, Entry, Result
from geo_pretrain.catalog.pri3d import BASELINES, DETECTION, INSTANCES, SEGMENTATION
from geo_pretrain.training.finetune_recipe import FinetuneRecipe

DATASETS = {"scannet": "ScanNet", "nyuv2": "NYUv2", "cityscapes": "Cityscapes", "kitti": "KITTI", "coco": "COCO"}
PAPERS = {"pri3d": "Pri3D", "gsc": "GSC"}  # whose tables the entries of a method cite without naming the paper
# The benchmark that a network stands for. Other networks were not measured.
SEGMENTERS = {
    "unet": SEGMENTATION,
    "deeplabv3": f"{SEGMENTATION}, DeepLabV3",
    "deeplabv3plus": f"{SEGMENTATION}, DeepLabV3+",
    "pspnet": f"{SEGMENTATION}, PSPNet",
}
SHARE = re.compile(r", (\d+) % of the training scenes$")
METRICS = {
    SEGMENTATION: {"mIoU": "miou"},
    DETECTION: {"AP": "box_ap", "AP50": "box_ap50", "AP75": "box_ap75"},
    INSTANCES: {"AP": "mask_ap", "AP50": "mask_ap50", "AP75": "mask_ap75"},
}


@dataclass(frozen=True)
class PaperRow:
    """One score that a paper reports for a protocol."""

    backbone: str  # name of the catalog, "scratch" or "imagenet"
    fraction: float  # share of the training images
    metric: str  # as fine-tuning calls it: "miou", "box_ap50"
    value: float  # share of 1
    table: str  # such as "Pri3D T1"


def paper_rows(recipe: FinetuneRecipe) -> tuple[PaperRow, ...]:
    """List the papers' scores for the data set, task, network and encoder of a recipe; empty for rooms.

    Baselines first, then the catalog's order; fractions rising. Whether the recipe's other settings are the paper's
    is not looked at.
    """
    dataset = DATASETS.get(recipe.data.source)
    if dataset is None:
        return ()
    encoder, results = recipe.network.encoder, {}
    for (start, baseline_encoder), numbers in BASELINES.items():
        if baseline_encoder == encoder:
            results[start] = [(result, f"Pri3D {result.table}") for result in numbers]
    for entry in CATALOG.values():
        if entry.arch.encoder_name == encoder:
            results[entry.name] = [(result, _table(entry, result)) for result in entry.results]
    rows = []
    for name, numbers_of in results.items():
        found = [_row(name, result, table, recipe, dataset) for result, table in numbers_of]
        rows += sorted((row for row in found if row is not None), key=lambda row: (row.metric, row.fraction))
    return tuple(rows)


def _row(name: str, result: Result, table: str, recipe: FinetuneRecipe, dataset: str) -> PaperRow | None:
    share = SHARE.search(result.task)
    benchmark = SHARE.sub("", result.task)
    kind, task = recipe.network.kind, recipe.task
    if task == "segmentation":
        wanted = {SEGMENTERS[kind]: METRICS[SEGMENTATION]} if kind in SEGMENTERS else {}
    else:  # the papers measured boxes with Mask R-CNN, whose masks they measured as well
        wanted = {} if kind != "mask_rcnn" else {DETECTION: METRICS[DETECTION]}
        wanted |= {INSTANCES: METRICS[INSTANCES]} if task == "instances" else {}
    metric = wanted.get(benchmark, {}).get(result.metric)
    if result.dataset != dataset or metric is None:
        return None
    return PaperRow(name, int(share[1]) / 100 if share else 1.0, metric, round(result.value / 100, 6), table)


def _table(entry: Entry, result: Result) -> str:
    """The label of a table including its paper, unless the entry already names the paper."""
    return result.table if result.table.split()[0] in PAPERS.values() else f"{PAPERS[entry.method]} {result.table}"
