"""Rows of the papers' tables that are no checkpoints: random and ImageNet starts, supervised networks, other methods.

The 2D rows are Pri3D's. The 3D rows are those of PointContrast, PPKT and Janda et al., and of SLidR's README; together
with the entries' results they make the whole tables (tables.py). "text" is a number in a paper's prose.
"""

from __future__ import annotations

from geo_pretrain.catalog.entry import Baseline, Result, results_of
from geo_pretrain.catalog.pointcontrast import DETECTION, SEGMENTATION, janda_row
from geo_pretrain.catalog.pri3d import BASELINES as PRI3D
from geo_pretrain.catalog.slidr import PROBE, SHARE

SRUNET34, SRUNET18 = "SR-UNet34C", "SR-UNet18A"
CLASSES, PARTS = "classification", "part segmentation"
TRAINING = "of the training data"
OTHER_NETWORK = "another network, which this library does not have"


def _pc(table: str, task: str, dataset: str, **values: float | None) -> tuple[Result, ...]:
    """Numbers of one of PointContrast's tables; a metric without a number is left out."""
    names = {"ap50": "mAP@0.5", "ap25": "mAP@0.25", "miou": "mIoU", "macc": "mAcc"}
    found = {names[key]: value for key, value in values.items() if value is not None}
    return results_of(task, dataset, f"PointContrast {table}", found)


def _shares(table: str, task: str, metric: str, values: dict[int, float]) -> tuple[Result, ...]:
    tasks = {share: task if share == 100 else f"{task}, {share} % {TRAINING}" for share in values}
    return tuple(
        Result(tasks[share], "ShapeNet", metric, value, f"PointContrast {table}") for share, value in values.items()
    )


def _ppkt(table: str, task: str, dataset: str, values: dict[str, float]) -> tuple[Result, ...]:
    return results_of(task, dataset, f"PPKT {table}", values)


def _steps(steps: str, value: float) -> Result:
    return Result(f"{SEGMENTATION}, {steps} steps", "S3DIS", "mIoU", value, "PointContrast text")


SCRATCH_34 = (
    *_shares("T2", CLASSES, "accuracy", {1: 62.2, 10: 77.9, 100: 85.1}),
    Result(f"{CLASSES}, 10 rarest classes", "ShapeNet", "accuracy", 65.0, "PointContrast T2"),
    Result(f"{CLASSES}, 30 rarest classes", "ShapeNet", "accuracy", 70.9, "PointContrast T2"),
    *_shares("T3", PARTS, "IoU", {1: 71.8, 5: 79.3, 100: 84.7}),
    *_pc("T4", SEGMENTATION, "S3DIS", miou=68.2, macc=75.5),
    *_pc("T5", DETECTION, "SUN RGB-D", ap50=31.7, ap25=55.6),
    *_pc("T6", SEGMENTATION, "Synthia4D", miou=79.8, macc=91.5),
    *_pc("T7", SEGMENTATION, "ScanNet", miou=72.2, macc=80.7),
    *_pc("T8", DETECTION, "ScanNet", ap50=35.4, ap25=56.7),
    _steps("20,000", 66.7),
    _steps("30,000", 66.1),
    Result(f"{SEGMENTATION}, beside single whole-scene views", "S3DIS", "mIoU", 68.17, "PointContrast text"),
    *_ppkt("T1", SEGMENTATION, "S3DIS", {"mAcc": 73.24, "mIoU": 65.16}),
    *_ppkt("T2", DETECTION, "SUN RGB-D", {"mAP@0.25": 55.21, "mAP@0.5": 32.81}),
    *_ppkt("T3", SEGMENTATION, "ScanNet", {"accuracy": 88.57, "mIoU": 69.49}),
    *_ppkt("T3", DETECTION, "ScanNet", {"mAP@0.25": 56.50, "mAP@0.5": 34.54}),
    *_ppkt("T4", SEGMENTATION, "S3DIS", {"mAcc": 73.24, "mIoU": 65.16}),
    *_ppkt("T5", DETECTION, "SUN RGB-D", {"mAP@0.25": 55.21}),
    *_ppkt("T6", DETECTION, "ScanNet", {"mAP@0.25": 56.50}),
    *_ppkt("T6", DETECTION, "SUN RGB-D", {"mAP@0.25": 55.21}),
    *janda_row(65.1, 53.0, 67.4, 49.0, 35.2, 41.0, 32.0),
    Result(PROBE, "nuScenes", "mIoU", 8.1, "SLidR README"),
    Result(f"{SEGMENTATION}, 1 {SHARE}", "nuScenes", "mIoU", 30.3, "SLidR README"),
    Result(f"{SEGMENTATION}, 1 {SHARE}", "SemanticKITTI", "mIoU", 39.5, "SLidR README"),
)
SCRATCH_18 = _ppkt("T4", SEGMENTATION, "S3DIS", {"mAcc": 71.67, "mIoU": 64.67})


def _absent(label: str, *results: Result, network: str = "", why: str = OTHER_NETWORK) -> Baseline:
    return Baseline(label, network, results, absent=why)


def _capsules(label: str, one: float, five: float) -> Baseline:
    """A row of PointContrast's T3 on little data."""
    return _absent(label, *_shares("T3", PARTS, "IoU", {1: one, 5: five}))


OTHERS_3D = (
    _absent(
        "DepthContrast (single)",
        *janda_row(64.9, 52.3, 67.4, 48.7, 33.9, 42.0, 32.9),
        network=SRUNET34,
        why="neither its weights nor its pretext task are here",
    ),
    _absent(
        "ScanNet, supervised",
        Result(SEGMENTATION, "S3DIS", "mIoU", 71.2, "PointContrast text"),
        network=SRUNET34,
        why="weights with labels of ScanNet are nobody's to download; fine-tune on ScanNet first",
    ),
    _absent(
        "single whole-scene view",
        Result(f"{SEGMENTATION}, beside single whole-scene views", "S3DIS", "mIoU", 68.35, "PointContrast text"),
        network=SRUNET34,
        why="an ablation of PointContrast's data, which no recipe here repeats",
    ),
    _absent(
        "PPKT on nuScenes",
        Result(PROBE, "nuScenes", "mIoU", 36.4, "SLidR README"),
        Result(f"{SEGMENTATION}, 1 {SHARE}", "nuScenes", "mIoU", 37.8, "SLidR README"),
        Result(f"{SEGMENTATION}, 1 {SHARE}", "SemanticKITTI", "mIoU", 43.9, "SLidR README"),
        network=SRUNET34,
        why="neither its weights nor a recipe for nuScenes are here",
    ),
    _capsules("SO-Net", 64.0, 69.0),
    _capsules("PointCapsNet", 67.0, 70.0),
    _capsules("Multitask", 68.2, 77.7),
    _absent("PointNet", *_pc("T4", SEGMENTATION, "S3DIS", miou=41.1, macc=49.0)),
    _absent("PointCNN", *_pc("T4", SEGMENTATION, "S3DIS", miou=57.3, macc=63.9)),
    _absent(
        "MinkowskiNet32",
        *_pc("T4", SEGMENTATION, "S3DIS", miou=65.4, macc=71.7),
        *_pc("T6", SEGMENTATION, "Synthia4D", miou=78.7, macc=91.5),
    ),
    _absent("VoteNet, geometry", *_pc("T5", DETECTION, "SUN RGB-D", ap25=57.0)),
    _absent("VoteNet, geometry and height", *_pc("T5", DETECTION, "SUN RGB-D", ap50=32.9, ap25=57.7)),
    _absent("VoteNet", *_pc("T8", DETECTION, "ScanNet", ap50=33.5, ap25=58.6)),
    _absent("3D-SIS", *_pc("T8", DETECTION, "ScanNet", ap50=22.5, ap25=40.2)),
    _absent("DSS", *_pc("T8", DETECTION, "ScanNet", ap50=6.8, ap25=15.2)),
)


def _pri3d(results: tuple[Result, ...]) -> tuple[Result, ...]:
    return tuple(Result(r.task, r.dataset, r.metric, r.value, f"Pri3D {r.table}") for r in results)


BASELINES: tuple[Baseline, ...] = (
    *(Baseline(start, network, _pri3d(results), start) for (start, network), results in PRI3D.items()),
    Baseline("scratch", SRUNET34, SCRATCH_34, "scratch"),
    Baseline("scratch", SRUNET18, SCRATCH_18, "scratch"),
    *OTHERS_3D,
)
