"""PPKT (Liu et al., 2021): an SR-UNet taught by a frozen image network, pixel to point; and the paper's baselines.

Numbers are PPKT's, by table. What T3 calls mean accuracy on ScanNet has the size of an overall accuracy and is stored
as such. The authors released neither code nor weights. The projection of points, 96 to 128 channels and then divided
by its length, is the network's last layer here. Gupta et al., CRD and Global KD compare whole images, so they teach the
encoder alone, beside a decoder of random weights; for CRD the paper cites two different works, of which the one that
bears the name stands here.
"""

from __future__ import annotations

from geo_pretrain.catalog.csc import CONTRACT
from geo_pretrain.catalog.entry import Arch, Entry, Paper, Result, new_entry, results_of
from geo_pretrain.catalog.license import License, rooms_license
from geo_pretrain.catalog.pointcontrast import DETECTION, SEGMENTATION, SRUNET34

PAPER = Paper(
    title="Learning from 2D: Contrastive Pixel-to-Point Knowledge Transfer for 3D Pretraining",
    authors="Yueh-Cheng Liu, Yu-Kai Huang, Hung-Yueh Chiang, Hung-Ting Su, Zhe-Yu Liu, Chin-Tang Chen, Ching-Yu Tseng, "
    "Winston H. Hsu",
    venue="arXiv",
    year=2021,
    url="https://arxiv.org/abs/2104.04687",
)
GLOBAL_KD = Paper(
    title="Distilling the Knowledge in a Neural Network",
    authors="Geoffrey Hinton, Oriol Vinyals, Jeff Dean",
    venue="arXiv",
    year=2015,
    url="https://arxiv.org/abs/1503.02531",
)
GUPTA = Paper(
    title="Cross Modal Distillation for Supervision Transfer",
    authors="Saurabh Gupta, Judy Hoffman, Jitendra Malik",
    venue="CVPR",
    year=2016,
    url="https://arxiv.org/abs/1507.00448",
)
CRD = Paper(
    title="Contrastive Representation Distillation",
    authors="Yonglong Tian, Dilip Krishnan, Phillip Isola",
    venue="ICLR",
    year=2020,
    url="https://arxiv.org/abs/1910.10699",
)

Pair = tuple[float, float]


def _network(variant: str = "34C", out_chans: int = 128, normalize: bool = True) -> Arch:
    return Arch("sr_unet", {**SRUNET34.args, "variant": variant, "out_chans": out_chans, "normalize": normalize})


def _license(teacher: str, teachers_data: tuple[str, str] = ("ImageNet", "LicenseRef-ImageNet-terms")) -> License:
    return License(
        code="MIT",
        weights="LicenseRef-ScanNet-ToU",
        datasets=(("ScanNet", "LicenseRef-ScanNet-ToU"), teachers_data),
        base_model=f"random weights; teacher: {teacher}",
    )


SUPERVISED = _license("torchvision ResNet-50 IMAGENET1K_V1 (BSD-3-Clause; ImageNet terms: non-commercial research)")
MOCO = _license("MoCo v2 ResNet-50 without labels (CC-BY-NC-4.0; ImageNet terms: non-commercial research)")
ADE20K = _license(
    "fully convolutional ResNet of ADE20K (LicenseRef-ADE20K-terms)", ("ADE20K", "LicenseRef-ADE20K-terms")
)


def _detection(dataset: str, table: str, ap25: float, ap50: float | None = None) -> tuple[Result, ...]:
    values = {"mAP@0.25": ap25} | ({} if ap50 is None else {"mAP@0.5": ap50})
    return results_of(DETECTION, dataset, f"PPKT {table}", values)


def _segmentation(dataset: str, table: str, accuracy: str, acc: float, miou: float) -> tuple[Result, ...]:
    return results_of(SEGMENTATION, dataset, f"PPKT {table}", {accuracy: acc, "mIoU": miou})


def _tables(s3dis: Pair, sun: Pair, scannet: Pair, scannet_boxes: Pair) -> tuple[Result, ...]:
    """A row of T1 (mAcc, mIoU), T2 (mAP at 0.25, 0.5) and T3 (both)."""
    return (
        *_segmentation("S3DIS", "T1", "mAcc", *s3dis),
        *_detection("SUN RGB-D", "T2", *sun),
        *_segmentation("ScanNet", "T3", "accuracy", *scannet),
        *_detection("ScanNet", "T3", *scannet_boxes),
    )


def _entry(
    name: str,
    description: str,
    results: tuple[Result, ...] = (),
    *,
    method: str = "ppkt",
    arch: Arch | None = None,
    license: License = SUPERVISED,
    data: str = "ScanNet",
    paper: Paper = PAPER,
) -> Entry:
    arch = arch or _network()
    return new_entry(
        name, arch, license, data, description, method=method, paper=paper, contract=CONTRACT, results=results
    )


TEXT = "contrastive transfer from pixels to points"
ENCODER = "taught to the encoder alone; a baseline of PPKT"
ENTRIES: tuple[Entry, ...] = (
    _entry(
        "ppkt_srunet34",
        f"{TEXT}, from a ResNet-50 of ImageNet",
        (
            *_tables((75.19, 68.28), (57.26, 33.92), (88.53, 69.56), (59.67, 38.90)),
            *_segmentation("S3DIS", "T4", "mAcc", 75.19, 68.28),
            *_detection("SUN RGB-D", "T5", 57.26),
            *_detection("ScanNet", "T6", 59.67),
            *_detection("SUN RGB-D", "T6", 57.26),
            Result(f"{SEGMENTATION}, 15 % of the labels", "ScanNet", "mIoU gain", 2.23, "PPKT Fig. 4"),
        ),
    ),
    _entry(
        "ppkt_srunet18",
        f"{TEXT}, from a ResNet-50 of ImageNet",
        _segmentation("S3DIS", "T4", "mAcc", 73.67, 66.40),
        arch=_network("18A"),  # the paper gives no channels; 18A is the narrow one among the released code's
    ),
    _entry(
        "ppkt_moco_srunet34",
        f"{TEXT}, from a MoCo ResNet-50",
        (*_detection("ScanNet", "T6", 59.69), *_detection("SUN RGB-D", "T6", 57.17)),
        license=MOCO,
    ),
    _entry(
        "ppkt_ade_srunet34",
        f"{TEXT}, from a segmentation network of ADE20K",
        _detection("SUN RGB-D", "T5", 58.03),
        license=ADE20K,
    ),
    _entry(
        "ppkt_srunet34.rooms",
        f"{TEXT}, from a network that learned the same procedural rooms; full size, for one GPU",
        license=rooms_license("random weights; teacher: pri3d_view_r18.rooms (MIT)"),
        data="rooms",
    ),
    _entry(
        "global_kd_srunet34",
        f"an image classifier's distribution over ImageNet's classes, {ENCODER}",
        _tables((72.65, 66.56), (56.10, 33.58), (88.63, 70.35), (57.50, 34.81)),
        method="global_kd",
        paper=GLOBAL_KD,
    ),
    _entry(
        "gupta_srunet34",
        f"an image network's pooled features, by mean squared distance over channels, {ENCODER}",
        _tables((72.11, 64.39), (54.42, 31.12), (88.40, 68.71), (56.74, 36.27)),
        method="gupta",
        paper=GUPTA,
    ),
    _entry(
        "crd_srunet34",
        f"an image network's pooled features, by contrast, {ENCODER}",
        _tables((72.70, 65.65), (55.86, 34.30), (88.08, 68.53), (56.82, 36.75)),
        method="crd",
        paper=CRD,
    ),
    _entry(
        "ppkd_srunet34",
        "a segmentation network's distribution over ADE20K's classes, pixel to point; a baseline of PPKT",
        _detection("SUN RGB-D", "T5", 56.07),
        method="ppkd",
        arch=_network(out_chans=150, normalize=False),
        license=ADE20K,
    ),
)
