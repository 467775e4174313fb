"""PointContrast (Xie et al., ECCV 2020): SR-UNet34 pre-trained by matching points of two views of a scene.

Numbers are the paper's, by table; then those that PPKT and Janda et al. report of PointContrast. Neither says which of
the two losses it fine-tuned: their numbers stand with PointInfoNCE, with a note. The code is MIT; no separate terms are
given for the weights, so their entry states what ScanNet imposes. The released code feeds features of ones (plus a
little noise), whatever its scripts' names say.
"""

from __future__ import annotations

from functools import partial

from geo_pretrain.catalog.entry import Arch, AuthorsFile, Entry, Paper, Result, new_entry, results_of
from geo_pretrain.catalog.license import SCRATCH, License, rooms_license
from geo_pretrain.contract import VoxelContract

PAPER = Paper(
    title="PointContrast: Unsupervised Pre-training for 3D Point Cloud Understanding",
    authors="Saining Xie, Jiatao Gu, Demi Guo, Charles R. Qi, Leonidas Guibas, Or Litany",
    venue="ECCV",
    year=2020,
    url="https://arxiv.org/abs/2007.10985",
)
SRUNET34 = Arch(
    "sr_unet", {"variant": "34C", "in_chans": 3, "out_chans": 32, "width": 32, "stem_kernel": 3, "normalize": True}
)
CONTRACT = VoxelContract(0.025)
SCANNET_LICENSE = License(
    code="MIT", weights="LicenseRef-ScanNet-ToU", datasets=(("ScanNet", "LicenseRef-ScanNet-ToU"),), base_model=SCRATCH
)
ROOMS_LICENSE = rooms_license()

SEGMENTATION, DETECTION = "3D semantic segmentation", "3D object detection"
INSTANCES = "3D instance segmentation"
JANDA_T1 = (
    (SEGMENTATION, "S3DIS"),
    (INSTANCES, "S3DIS"),
    (SEGMENTATION, "ScanNet"),
    (INSTANCES, "ScanNet"),
    (DETECTION, "ScanNet"),
    (SEGMENTATION, "SemanticKITTI"),
    (DETECTION, "SUN RGB-D"),
)
LOSSES = {
    "nce": "PointInfoNCE between points that two views of a scene share",
    "hardest": "hardest-contrastive loss between points that two views of a scene share",
}
URLS = {
    "nce": "https://www.dropbox.com/s/uzr88m1lab0abbl/nce.pth?dl=0",
    "hardest": "https://www.dropbox.com/s/la9ih2w2oavpp2z/hardest_contrastive.pth?dl=0",
}


def _shares(task: str, metric: str, table: str, values: dict[int, float]) -> tuple[Result, ...]:
    return tuple(
        Result(task if share == 100 else f"{task}, {share} % of the training data", "ShapeNet", metric, value, table)
        for share, value in values.items()
    )


def _segmentation(dataset: str, table: str, miou: float, macc: float) -> tuple[Result, ...]:
    return results_of(SEGMENTATION, dataset, table, {"mIoU": miou, "mAcc": macc})


def _detection(dataset: str, table: str, ap50: float, ap25: float) -> tuple[Result, ...]:
    return results_of(DETECTION, dataset, table, {"mAP@0.5": ap50, "mAP@0.25": ap25})


NOTE = "which loss is not said"
# task, data set, metric, value, table
ELSEWHERE = tuple(
    Result(*number, note=NOTE)
    for number in (
        (SEGMENTATION, "S3DIS", "mAcc", 73.97, "PPKT T1"),
        (SEGMENTATION, "S3DIS", "mIoU", 66.86, "PPKT T1"),
        (DETECTION, "SUN RGB-D", "mAP@0.25", 56.14, "PPKT T2"),
        (DETECTION, "SUN RGB-D", "mAP@0.5", 32.70, "PPKT T2"),
        (SEGMENTATION, "ScanNet", "accuracy", 88.63, "PPKT T3"),
        (SEGMENTATION, "ScanNet", "mIoU", 69.22, "PPKT T3"),
        (DETECTION, "ScanNet", "mAP@0.25", 58.30, "PPKT T3"),
        (DETECTION, "ScanNet", "mAP@0.5", 36.26, "PPKT T3"),
    )
)


def janda_row(*values: float, note: str = "", table: str = "Janda T1") -> tuple[Result, ...]:
    """A row of Janda's T1, whose columns are mIoU and mAP@0.5 of seven benchmarks."""
    return tuple(
        Result(task, dataset, "mIoU" if task == SEGMENTATION else "mAP@0.5", value, table, note)
        for (task, dataset), value in zip(JANDA_T1, values, strict=True)
    )


RESULTS: dict[str, tuple[Result, ...]] = {
    "nce": (
        *_segmentation("ScanNet", "T7", 74.1, 81.6),
        *_segmentation("S3DIS", "T4", 70.3, 76.9),
        *_segmentation("Synthia4D", "T6", 83.1, 93.7),
        *_detection("ScanNet", "T8", 38.0, 58.5),
        *_detection("SUN RGB-D", "T5", 34.8, 57.5),
        *_shares("classification", "accuracy", "T2", {1: 65.8, 10: 78.8, 100: 85.7}),
        *_shares("part segmentation", "IoU", "T3", {1: 73.1, 5: 79.9, 100: 85.1}),
        *ELSEWHERE,
        *janda_row(66.2, 54.8, 66.9, 49.1, 36.7, 42.1, 34.2, note=NOTE),
    ),
    "hardest": (
        *_segmentation("ScanNet", "T7", 73.3, 81.0),
        *_segmentation("S3DIS", "T4", 70.9, 77.0),
        *_segmentation("Synthia4D", "T6", 82.6, 93.7),
        *_detection("ScanNet", "T8", 37.3, 59.2),
        *_detection("SUN RGB-D", "T5", 34.5, 57.5),
        *_shares("classification", "accuracy", "T2", {1: 66.2, 10: 79.0, 100: 85.7}),
        Result("classification, 10 rarest classes", "ShapeNet", "accuracy", 70.9, "T2"),
        Result("classification, 30 rarest classes", "ShapeNet", "accuracy", 72.9, "T2"),
        *_shares("part segmentation", "IoU", "T3", {1: 74.0, 5: 79.9, 100: 85.1}),
    ),
}
_entry = partial(new_entry, method="pointcontrast", paper=PAPER, contract=CONTRACT)


def _entries(loss: str) -> tuple[Entry, Entry]:
    name, text = f"pointcontrast_{loss}_srunet34", LOSSES[loss]
    file = AuthorsFile(URLS[loss], "pointcontrast", "3D U-Net, optimizer state; 290 MB", ("model",))
    rooms_text = f"{text}, on procedural rooms only; full size, for one GPU"
    return (
        _entry(name, SRUNET34, SCANNET_LICENSE, "ScanNet", text, authors_files=(file,), results=RESULTS[loss]),
        _entry(f"{name}.rooms", SRUNET34, ROOMS_LICENSE, "rooms", rooms_text),
    )


ENTRIES: tuple[Entry, ...] = (*_entries("nce"), *_entries("hardest"))
