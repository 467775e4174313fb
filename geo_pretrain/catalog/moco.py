"""MoCo v2 (Chen et al., 2020) on ScanNet's frames: the baselines of Pri3D that know no geometry.

Numbers are those of Pri3D's tables; its README gives the NYUv2 value for this very file. The released trainer is built
on MoCo's, which is CC-BY-NC-4.0; no separate terms are given for the weights, so their entry states what ScanNet
imposes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from geo_pretrain.catalog.entry import Arch, AuthorsFile, Entry, Paper, Result, new_entry
from geo_pretrain.catalog.license import SCRATCH, License, rooms_license
from geo_pretrain.catalog.pri3d import MOCO_V2, RESNET50, box_and_mask, drive, imagenet, miou, scannet_license
from geo_pretrain.contract import ImageContract

PAPER = Paper(
    title="Improved Baselines with Momentum Contrastive Learning",
    authors="Xinlei Chen, Haoqi Fan, Ross Girshick, Kaiming He",
    venue="arXiv",
    year=2020,
    url="https://arxiv.org/abs/2003.04297",
)
CONTRACT = ImageContract(size=(224, 224), interpolation="bilinear")
BOTH = "ImageNet+ScanNet"
IMAGENET = ("ImageNet", "LicenseRef-ImageNet-terms")
# variant -> (what it started from, what it was trained on, description)
VARIANTS = {
    "sup_in_sn": (imagenet("r50"), "ScanNet", "started from supervised ImageNet weights"),
    "in_sn_combine": (SCRATCH, BOTH, "ImageNet and ScanNet shuffled together"),
    "in_sn_mixing": (SCRATCH, BOTH, "each batch half ImageNet, half ScanNet"),
    "unsup_in_sn": (MOCO_V2, "ScanNet", "started from MoCo v2 weights of ImageNet"),
}
AUTHORS_FILES: dict[str, tuple[AuthorsFile, ...]] = {
    "sup_in_sn": (
        drive("1c6qHEI0fxW6HsZYGmzuGVAfLkEYhuxyt", "ResNet-50 encoder", "moco"),
        drive("1RQzPEiX8oGPev9XmVUT-d8NCEpUInYdX", "ResNet-50 encoder", "detectron2"),
    ),
}
RESULTS: dict[str, tuple[Result, ...]] = {
    "sup_in_sn": (
        miou("ScanNet", "Pri3D T1", 56.6),
        miou("NYUv2", "Pri3D T5", 47.6),
        *box_and_mask("ScanNet", ("Pri3D T2", "Pri3D T3"), (43.5, 26.8, 25.8), (33.9, 18.1, 18.3)),
        *box_and_mask("NYUv2", ("Pri3D T6", "Pri3D T7"), (30.1, 18.1, 17.3), (27.2, 14.7, 14.8)),
    ),
    "in_sn_combine": (miou("ScanNet", "Pri3D T1", 54.9),),
    "in_sn_mixing": (miou("ScanNet", "Pri3D T1", 54.5),),
    "unsup_in_sn": (miou("ScanNet", "Pri3D T9", 55.4),),
}
TEXT = "momentum contrast between augmentations of single images"
_entry = partial(new_entry, method="moco_v2", paper=PAPER, contract=CONTRACT)


def _scannet(variant: str) -> Entry:
    base_model, data, text = VARIANTS[variant]
    files = AUTHORS_FILES.get(variant, ())
    return _entry(
        f"moco_v2_{variant}_r50",
        RESNET50,
        scannet_license(base_model, code="CC-BY-NC-4.0" if files else "MIT"),
        data,
        f"{TEXT}, {text}; a baseline of Pri3D",
        authors_files=files,
        results=RESULTS[variant],
    )


ENTRIES: tuple[Entry, ...] = (
    *(_scannet(variant) for variant in VARIANTS),
    _entry(
        "moco_v2_r18.rooms",
        Arch("resnet", {"depth": 18, "width": 64}),
        rooms_license(),
        "rooms",
        f"{TEXT}, from a random start on procedural rooms only; full size, for one GPU",
    ),
)

# What other networks start from: MoCo's own encoders, which no recipe here makes and nobody asks of us by name.
START_URL = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_{0}ep/moco_v2_{0}ep_pretrain.pth.tar"
MD5_PREFIXES = {"moco_v2": "59fd9945", "moco_v2_800ep": "a04e12f8"}  # MoCo's README


def _start(epochs: int) -> Entry:
    terms = "CC-BY-NC-4.0"  # of code and weights alike
    return _entry(
        f"moco_v2_r50.imagenet_{epochs}ep",
        RESNET50,
        License(code=terms, weights=terms, datasets=(IMAGENET,), base_model=SCRATCH),
        "ImageNet",
        f"momentum contrast on ImageNet without labels, {epochs} epochs: start weights of other networks",
        has_recipe=False,
        authors_files=(AuthorsFile(START_URL.format(epochs), "moco", "ResNet-50 encoder", ("encoder",)),),
    )


# by the word for it in recipes; Pri3D's code names a file of 200 epochs, SLidR's one of 800
IMAGENET_STARTS: Mapping[str, Entry] = {"moco_v2": _start(200), "moco_v2_800ep": _start(800)}
