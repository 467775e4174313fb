"""SLidR (Sautier et al., CVPR 2022): an SR-UNet for driving LiDAR, taught by an image network through superpixels.

Numbers are the README's. The code is Apache-2.0; no separate terms are given for the weights, so their entry states
what nuScenes and the teacher impose.
"""

from __future__ import annotations

from geo_pretrain.catalog.entry import Arch, AuthorsFile, Entry, Paper, Result, limited, new_entry
from geo_pretrain.catalog.license import License
from geo_pretrain.catalog.pointcontrast import SEGMENTATION
from geo_pretrain.contract import VoxelContract

PAPER = Paper(
    title="Image-to-Lidar Self-Supervised Distillation for Autonomous Driving Data",
    authors="Corentin Sautier, Gilles Puy, Spyros Gidaris, Alexandre Boulch, Andrei Bursuc, Renaud Marlet",
    venue="CVPR",
    year=2022,
    url="https://arxiv.org/abs/2203.16258",
)
RELEASES = "https://github.com/valeoai/SLidR/releases/download"
PROBE = f"{SEGMENTATION}, linear probing"
SHARE = "% of the training data"
RESULTS = (
    Result(PROBE, "nuScenes", "mIoU", 38.8, "README"),
    *limited(SEGMENTATION, "nuScenes", "mIoU", "README", SHARE, {1: 38.3, 5: 52.2, 10: 58.8, 25: 66.2}),
    Result(SEGMENTATION, "nuScenes", "mIoU", 74.6, "README"),
    *limited(SEGMENTATION, "SemanticKITTI", "mIoU", "README", SHARE, {1: 44.6}),
)
ARGS = {"variant": "34C", "in_chans": 1, "out_chans": 64, "width": 32, "stem_kernel": 3, "normalize": True}

ENTRIES: tuple[Entry, ...] = (
    new_entry(
        "slidr_srunet34.nuscenes",
        Arch("sr_unet", ARGS),
        License(
            code="Apache-2.0",
            weights="CC-BY-NC-SA-4.0",
            datasets=(("nuScenes", "CC-BY-NC-SA-4.0"), ("ImageNet", "LicenseRef-ImageNet-terms")),
            base_model="random weights; teacher: MoCo v2 ResNet-50 without labels (CC-BY-NC-4.0)",
        ),
        "nuScenes",
        "contrastive distillation from images to LiDAR points through superpixels; intensity in [0, 255]",
        method="slidr",
        paper=PAPER,
        contract=VoxelContract((0.1, 1.0, 0.1), ("intensity",), coordinates="cylindrical"),
        has_recipe=False,
        authors_files=(
            AuthorsFile(f"{RELEASES}/v1.0/minkunet_slidr_1gpu.pt", "slidr", "3D U-Net", ("model",)),
            AuthorsFile(
                f"{RELEASES}/v1.1/minkunet_slidr_1gpu_raw.pt",
                "slidr",
                "3D U-Net, ResNet-50 and image head",
                ("model",),
            ),
        ),
        results=RESULTS,
    ),
)
