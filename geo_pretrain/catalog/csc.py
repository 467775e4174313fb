"""CSC, Contrastive Scene Contexts (Hou et al., CVPR 2021): negatives are split by position in the scene.

Numbers are the README's: each stands with the checkpoint it was fine-tuned from. Those of Janda et al., who do not say
which of the four they took, stand with the longest run of eight partitions, with a note. The code is MIT; no separate
terms are given for the weights, so their entry states what ScanNet imposes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from geo_pretrain.catalog.entry import AuthorsFile, Entry, Paper, Result, limited, new_entry
from geo_pretrain.catalog.pointcontrast import (
    DETECTION,
    INSTANCES,
    ROOMS_LICENSE,
    SCANNET_LICENSE,
    SEGMENTATION,
    SRUNET34,
    janda_row,
)
from geo_pretrain.contract import VoxelContract

PAPER = Paper(
    title="Exploring Data-Efficient 3D Scene Understanding with Contrastive Scene Contexts",
    authors="Ji Hou, Benjamin Graham, Matthias Niessner, Saining Xie",
    venue="CVPR",
    year=2021,
    url="https://arxiv.org/abs/2012.09165",
)
CONTRACT = VoxelContract(0.025, ("R", "G", "B"), offset=-0.5)
FOLDER = "http://kaldir.vc.in.tum.de/3dsis/contrastive_scene_contexts/pretrain"
TEXT = "PointInfoNCE within spatial partitions around each point"


def _limited(task: str, metric: str, what: str, values: dict[int, float]) -> tuple[Result, ...]:
    return limited(task, "ScanNet", metric, "README", what, values)


def _readme(task: str, dataset: str, metric: str, value: float) -> Result:
    return Result(task, dataset, metric, value, "README")


SCENES, POINTS, BOXES = "% of the scenes", "labelled points a scene", "labelled boxes a scene"
RESULTS: dict[str, tuple[Result, ...]] = {
    "20k": (_readme(INSTANCES, "S3DIS", "mAP@0.5", 63.4),),
    "60k": (
        *_limited(SEGMENTATION, "mIoU", SCENES, {1: 29.3, 5: 45.4, 10: 59.5, 20: 64.1}),
        *_limited(SEGMENTATION, "mIoU", POINTS, {20: 53.8, 50: 62.9, 100: 66.9, 200: 69.0}),
        _readme(INSTANCES, "ScanNet", "mAP@0.5", 59.4),
        *_limited(INSTANCES, "mAP@0.5", SCENES, {1: 12.3, 5: 33.9, 10: 45.3, 20: 49.8}),
        *_limited(INSTANCES, "mAP@0.5", POINTS, {20: 27.2, 50: 35.7, 100: 43.6, 200: 50.4}),
        *_limited(DETECTION, "mAP@0.5", SCENES, {10: 9.9, 20: 21.4, 40: 29.5, 80: 36.3}),
        *_limited(DETECTION, "mAP@0.25", SCENES, {10: 24.7, 20: 41.4, 40: 52.0, 80: 56.3}),
    ),
    "100k": (
        _readme(SEGMENTATION, "ScanNet", "mIoU", 73.8),
        _readme(SEGMENTATION, "S3DIS", "mIoU", 72.2),
        *_limited(DETECTION, "mAP@0.5", BOXES, {1: 10.9, 2: 18.5, 4: 26.1, 7: 30.4}),
        *_limited(DETECTION, "mAP@0.25", BOXES, {1: 24.5, 2: 36.5, 4: 45.9, 7: 52.5}),
        *janda_row(69.0, 57.8, 67.6, 49.3, 36.1, 43.0, 35.1, note="which run is not said"),
    ),
    "partition4": (
        _readme(DETECTION, "ScanNet", "mAP@0.5", 39.3),
        _readme(DETECTION, "ScanNet", "mAP@0.25", 59.1),
        _readme(DETECTION, "SUN RGB-D", "mAP@0.5", 36.4),
        _readme(DETECTION, "SUN RGB-D", "mAP@0.25", 58.9),
    ),
}
# name -> (partitions, thousands of steps)
RUNS = {"20k": (8, 20), "60k": (8, 60), "100k": (8, 100), "partition4": (4, 100)}
_entry = partial(new_entry, method="csc", paper=PAPER, contract=CONTRACT)


def _published(key: str) -> Entry:
    parts, steps = RUNS[key]
    url = f"{FOLDER}/partition{parts}_4096_{steps}k.pth"
    return _entry(
        f"csc_{key}_srunet34",
        SRUNET34,
        SCANNET_LICENSE,
        "ScanNet",
        f"{TEXT} (file partition{parts}), {steps},000 steps",
        authors_files=(AuthorsFile(url, "csc", "3D U-Net, optimizer state", ("model",)),),
        results=RESULTS[key],
    )


ROOMS_TEXT = f"{TEXT}, on procedural rooms only; 5 cm, hours of a CPU"
ROOMS_CONTRACT = replace(CONTRACT, voxel_size=0.05)
ENTRIES: tuple[Entry, ...] = (
    *(_published(key) for key in RUNS),
    _entry("csc_srunet34.rooms", SRUNET34, ROOMS_LICENSE, "rooms", ROOMS_TEXT, contract=ROOMS_CONTRACT),
)
