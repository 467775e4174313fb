"""Janda et al. (CoRL workshop 2022): pixels learned on single images, then handed to an SR-UNet, one scan at a time.

Numbers are the paper's T1. The authors of the paper published no weights. It leaves the depth of the image network and
what "16-dimensional" means open: ResNet-18 and 16 outputs at full resolution here.
"""

from __future__ import annotations

from functools import partial

from geo_pretrain.catalog.csc import CONTRACT
from geo_pretrain.catalog.entry import Arch, Entry, Paper, Result, new_entry
from geo_pretrain.catalog.license import License, rooms_license
from geo_pretrain.catalog.pointcontrast import ROOMS_LICENSE, SRUNET34, janda_row
from geo_pretrain.catalog.pri3d import SCANNET_TERMS, imagenet, scannet_license
from geo_pretrain.contract import ImageContract

PAPER = Paper(
    title="Self-Supervised Pre-training of 3D Point Cloud Networks with Image Data",
    authors="Andrej Janda, Brandon Wagstaff, Edwin G. Ng, Jonathan Kelly",
    venue="CoRL workshop on pre-training robot learning",
    year=2022,
    url="https://arxiv.org/abs/2211.11801",
)
STAGE1, STAGE2 = "img2pc_stage1_r18", "img2pc_srunet34"
DESCRIPTIONS = {
    STAGE1: "contrastive learning between equal pixels of two augmentations of one image; teacher of stage 2",
    STAGE2: "contrastive transfer from the pixels of the first stage to the points of the same scan",
}
ROOMS_TEXT = ", on procedural rooms only; full size, for one GPU"
RESULTS = janda_row(66.5, 55.8, 67.7, 48.5, 37.7, 42.0, 33.1, table="T1")
_entry = partial(new_entry, method="img2pc", paper=PAPER)
IMAGE_NETWORK = Arch("resnet_depth_unet", {"depth": 18, "width": 64, "out_chans": 16})
POINT_NETWORK = Arch("sr_unet", {**SRUNET34.args, "out_chans": 16})
IMAGE_CONTRACT = ImageContract(mean=(0.45,) * 3, std=(0.225,) * 3, interpolation="bilinear")
STAGE2_LICENSE = License(
    code="MIT",
    weights="LicenseRef-ScanNet-ToU",
    datasets=SCANNET_TERMS,
    base_model=f"random weights; teacher: {STAGE1} (LicenseRef-ScanNet-ToU)",
)


def _stage1(name: str, license: License, data: str, description: str) -> Entry:
    return _entry(name, IMAGE_NETWORK, license, data, description, contract=IMAGE_CONTRACT)


def _stage2(name: str, license: License, data: str, description: str, results: tuple[Result, ...] = ()) -> Entry:
    return _entry(name, POINT_NETWORK, license, data, description, contract=CONTRACT, results=results)


ROOMS_TEACHER = rooms_license(f"random weights; teacher: {STAGE1}.rooms (MIT)")
ENTRIES: tuple[Entry, ...] = (
    _stage1(STAGE1, scannet_license(imagenet("r18")), "ScanNet", DESCRIPTIONS[STAGE1]),
    _stage2(STAGE2, STAGE2_LICENSE, "ScanNet", DESCRIPTIONS[STAGE2], RESULTS),
    _stage1(f"{STAGE1}.rooms", ROOMS_LICENSE, "rooms", f"{DESCRIPTIONS[STAGE1]}{ROOMS_TEXT}"),
    _stage2(f"{STAGE2}.rooms", ROOMS_TEACHER, "rooms", f"{DESCRIPTIONS[STAGE2]}{ROOMS_TEXT}"),
)
