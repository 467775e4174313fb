"""GSC (Chen et al., CVPR 2022): Pri3D's networks, continued with consistency within geometric sets.

Numbers are the paper's, by table, for its main setting; the ablations (T9, T10 and the text) are of other weights. The
authors released neither code nor weights.
"""

from __future__ import annotations

from functools import partial

from geo_pretrain.catalog.entry import Entry, Paper, Result, limited, new_entry
from geo_pretrain.catalog.license import rooms_license
from geo_pretrain.catalog.pri3d import CONTRACT, RESNET_UNET, SCENES, SEGMENTATION, box_and_mask, miou, scannet_license

PAPER = Paper(
    title="Self-Supervised Image Representation Learning with Geometric Set Consistency",
    authors="Nenglun Chen, Lei Chu, Hao Pan, Yan Lu, Wenping Wang",
    venue="CVPR",
    year=2022,
    url="https://arxiv.org/abs/2203.15361",
)
RESULTS: dict[str, tuple[Result, ...]] = {
    "r18": (miou("ScanNet", "T1", 57.2),),
    "r50": (
        miou("ScanNet", "T1", 63.1),
        *limited(SEGMENTATION, "ScanNet", "mIoU", "T2", SCENES, {20: 54.1, 40: 58.3, 60: 60.4, 80: 61.5}),
        miou("ScanNet", "T2", 63.1),
        miou("ScanNet", "T3", 62.2, f"{SEGMENTATION}, DeepLabV3"),
        miou("ScanNet", "T3", 62.7, f"{SEGMENTATION}, DeepLabV3+"),
        miou("ScanNet", "T3", 63.7, f"{SEGMENTATION}, PSPNet"),
        *box_and_mask("ScanNet", ("T4", "T5"), (45.1, 27.6, 26.9), (36.0, 19.3, 19.5)),
        miou("NYUv2", "T6", 55.4),
        *box_and_mask("NYUv2", ("T7", "T8"), (34.6, 20.5, 19.7), (29.7, 16.3, 16.5)),
    ),
}
TEXT = "contrastive learning between geometric consistency sets of two frames"
_entry = partial(new_entry, method="gsc", paper=PAPER, contract=CONTRACT)


def _scannet(arch: str) -> Entry:
    stage1 = f"pri3d_view_geo_{arch}"
    license = scannet_license(f"{stage1} (LicenseRef-ScanNet-ToU)")
    text = f"{TEXT}, after {stage1}"
    return _entry(f"gsc_{arch}", RESNET_UNET[arch], license, "ScanNet", text, results=RESULTS[arch])


ENTRIES: tuple[Entry, ...] = (
    _scannet("r18"),
    _scannet("r50"),
    _entry(
        "gsc_r18.rooms",
        RESNET_UNET["r18"],
        rooms_license("pri3d_view_geo_r18.rooms (MIT)"),
        "rooms",
        f"{TEXT}, after Pri3D view and geo; full size, for one GPU",
    ),
)
