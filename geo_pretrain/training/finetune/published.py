"""Scores that the papers report for a recipe's protocol: of catalog entries, and of baselines without a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from geo_pretrain.backbones.architectures import Arch
from geo_pretrain.catalog import CATALOG, Result
from geo_pretrain.catalog.baselines import BASELINES, CLASSES, PARTS
from geo_pretrain.catalog.pointcontrast import DETECTION as DETECTION_3D
from geo_pretrain.catalog.pointcontrast import INSTANCES as INSTANCES_3D
from geo_pretrain.catalog.pointcontrast import SEGMENTATION as SEGMENTATION_3D
from geo_pretrain.catalog.pri3d import DETECTION, INSTANCES, SEGMENTATION
from geo_pretrain.catalog.tables import Column, full_table, network_of
from geo_pretrain.training.finetune_recipe import POINT_KINDS, FinetuneRecipe
from geo_pretrain.training.recipe import UNet3DSpec

DATASETS = {"scannet": "ScanNet", "nyuv2": "NYUv2", "cityscapes": "Cityscapes", "kitti": "KITTI", "coco": "COCO"}
DATASETS |= {"s3dis": "S3DIS", "scannet3d": "ScanNet", "sunrgbd3d": "SUN RGB-D", "semantickitti": "SemanticKITTI"}
DATASETS |= {"synthia4d": "Synthia4D", "shapenetcore": "ShapeNet", "shapenetpart": "ShapeNet"}
# The benchmark that a network stands for. Other networks were not measured.
SEGMENTERS = {
    "unet": SEGMENTATION,
    "deeplabv3": f"{SEGMENTATION}, DeepLabV3",
    "deeplabv3plus": f"{SEGMENTATION}, DeepLabV3+",
    "pspnet": f"{SEGMENTATION}, PSPNet",
}
# Tasks on clouds: task of a recipe -> benchmark, and its metrics as fine-tuning calls them
BENCHMARKS_3D = {
    "segmentation3d": (SEGMENTATION_3D, {"mIoU": "miou", "mAcc": "macc", "accuracy": "accuracy"}),
    "instances3d": (INSTANCES_3D, {"mAP@0.5": "ap50", "mAP@0.25": "ap25"}),
    "detection3d": (DETECTION_3D, {"mAP@0.5": "ap50", "mAP@0.25": "ap25"}),
    "parts3d": (PARTS, {"IoU": "instance_miou"}),
    "classification3d": (CLASSES, {"accuracy": "accuracy"}),
}
SHARE = re.compile(r", (\d+) % of the (training scenes|scenes|training data)$")
POINTS = re.compile(r", (\d+) labelled points a scene$")
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

    @property
    def paper(self) -> str:
        """The paper's short name."""
        return self.table.split()[0]


@dataclass(frozen=True)
class Place:
    """Where a recipe's runs give the score of a table's column."""

    metric: str
    fraction: float


def paper_rows(recipe: FinetuneRecipe) -> tuple[PaperRow, ...]:
    """List the papers' scores for the data set, task, network and encoder of a recipe; empty for rooms.

    Baselines first, then the catalog's order; fractions rising. A start may have several: of several papers. Whether
    the recipe's other settings are the paper's is not looked at.
    """
    rows: dict[tuple[str, float, str, str], PaperRow] = {}
    for start, results in _starts(network_title(recipe)):
        found = []
        for result, table in results:
            place = place_of((result.task, result.dataset, result.metric), recipe)
            if place is not None:
                value = round(result.value / 100, 6)
                found.append(PaperRow(start, place.fraction, place.metric, value, table))
        for row in sorted(found, key=lambda row: (row.metric, row.fraction)):
            rows.setdefault((row.backbone, row.fraction, row.metric, row.paper), row)
    return tuple(rows.values())


def place_of(column: Column, recipe: FinetuneRecipe) -> Place | None:
    """Where a recipe's runs give the score of a table's column (task, data set, metric); None: they do not."""
    task, dataset, metric = column
    if DATASETS.get(recipe.data.source) != dataset:
        return None
    points = POINTS.search(task)
    share, benchmark = SHARE.search(task), POINTS.sub("", SHARE.sub("", task))
    cloud = recipe.data.cloud
    if (None if cloud is None else cloud.labelled_points) != (int(points[1]) if points else None):
        return None
    name = _metrics(recipe).get(benchmark, {}).get(metric)
    # of what the reader gives, where the recipe has it take every n-th scan
    fraction = round((int(share[1]) / 100 if share else 1.0) * recipe.data.options.get("every", 1), 6)
    return None if name is None or fraction > 1 else Place(name, fraction)


def network_title(recipe: FinetuneRecipe) -> str:
    """What tables call a recipe's network: the encoder of an image network, the title of a 3D one."""
    if recipe.network.kind in POINT_KINDS:
        return Arch("sr_unet", {"variant": (recipe.network.unet3d or UNet3DSpec()).variant}).title
    return recipe.network.encoder


def _starts(network: str) -> Iterator[tuple[str, list[tuple[Result, str]]]]:
    """Each start of a network with its results and the labels of their tables."""
    for baseline in BASELINES:
        if baseline.network == network and baseline.start:
            yield baseline.start, [(result, result.table) for result in baseline.results]
    for entry in CATALOG.values():
        if network_of(entry) == network:
            yield entry.name, [(result, full_table(entry, result)) for result in entry.results]


def _metrics(recipe: FinetuneRecipe) -> dict[str, dict[str, str]]:
    """Benchmark -> metric of a table -> score of the recipe's runs."""
    task, kind = recipe.task, recipe.network.kind
    if task in BENCHMARKS_3D:
        benchmark, metrics = BENCHMARKS_3D[task]
        rarest = {f"{benchmark}, {n} rarest classes": {"accuracy": f"tail{n}"} for n in (10, 30)}
        return {benchmark: metrics} | (rarest if task == "classification3d" else {})
    if task == "segmentation":
        return {SEGMENTERS[kind]: METRICS[SEGMENTATION]} if kind in SEGMENTERS else {}
    if kind != "mask_rcnn":  # the papers measured boxes with Mask R-CNN, whose masks they measured as well
        return {}
    return {DETECTION: METRICS[DETECTION]} | ({INSTANCES: METRICS[INSTANCES]} if task == "instances" else {})
