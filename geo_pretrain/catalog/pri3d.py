"""Pri3D (Hou et al., ICCV 2021): ResNet U-Nets pre-trained with view-invariant and geometric priors from RGB-D.

Numbers are the paper's absolute values, by table; the share-of-data rows are the README's. T8's 30.8 % of MegaDepth on
KITTI belongs to no entry: crops of 240x320 were used there, and the published MegaDepth file was trained on 180x360.
The repository's README releases the code under MIT (the file LICENSE it points to is absent); no separate terms are
given for the weights, so their entry states what ScanNet, KITTI and the ImageNet start weights impose.

Two baselines of the paper stand here too: they differ from Pri3D in the loss alone.
"""

from __future__ import annotations

from geo_pretrain.catalog.entry import Arch, AuthorsFile, Entry, Paper, Result, limited, new_entry, results_of
from geo_pretrain.catalog.license import License, rooms_license
from geo_pretrain.contract import ImageContract

PAPER = Paper(
    title="Pri3D: Can 3D Priors Help 2D Representation Learning?",
    authors="Ji Hou, Saining Xie, Benjamin Graham, Angela Dai, Matthias Niessner",
    venue="ICCV",
    year=2021,
    url="https://arxiv.org/abs/2104.11225",
)
RESNET_UNET = {
    "r18": Arch("resnet_unet", {"depth": 18, "width": 64, "out_chans": 32}),
    "r50": Arch("resnet_unet", {"depth": 50, "width": 64, "out_chans": 128}),
}
DEPTHS = {"r18": 18, "r50": 50}
RESNET50 = Arch("resnet", {"depth": 50, "width": 64})
CONTRACT = ImageContract()
WIDE_CONTRACT = ImageContract(size=(180, 360))

Triple = tuple[float, float, float]
SEGMENTATION, DETECTION, INSTANCES = "semantic segmentation", "object detection", "instance segmentation"
SCENES = "% of the training scenes"

ROOMS = rooms_license()
SCANNET_TERMS = (("ScanNet", "LicenseRef-ScanNet-ToU"), ("ImageNet", "LicenseRef-ImageNet-terms"))
PRIORS = {
    "view": "view-invariant contrastive learning between overlapping frames",
    "geo": "contrastive learning between pixels and the scene's 3D surface",
    "view_geo": "view-invariant and geometric contrastive learning together",
}
MOCO_V2 = "MoCo v2 ResNet-50 without labels (CC-BY-NC-4.0; ImageNet terms: non-commercial research)"


def imagenet(arch: str) -> str:
    """The ImageNet weights that nearly all of these networks started from."""
    return f"torchvision ResNet-{DEPTHS[arch]} IMAGENET1K_V1 (BSD-3-Clause; ImageNet terms: non-commercial research)"


def scannet_license(base_model: str, code: str = "MIT") -> License:
    """The license chain of weights trained on ScanNet from ImageNet weights."""
    return License(code=code, weights="LicenseRef-ScanNet-ToU", datasets=SCANNET_TERMS, base_model=base_model)


def drive(file_id: str, content: str, file_format: str, roles: tuple[str, ...] = ("encoder",)) -> AuthorsFile:
    """A file on Google Drive."""
    return AuthorsFile(f"https://drive.google.com/file/d/{file_id}/view", file_format, content, roles)


def _run(file_id: str, content: str = "2D U-Net, 3D U-Net and heads") -> AuthorsFile:
    """A training checkpoint: all networks of the run, and the optimizer."""
    return drive(file_id, content, "pri3d", ("encoder", "decoder", "heads"))


def box_and_mask(dataset: str, tables: tuple[str, str], boxes: Triple, masks: Triple) -> tuple[Result, ...]:
    """Mask R-CNN's results (AP50, AP75, AP) for boxes and for masks."""
    return (*_ap(DETECTION, dataset, tables[0], *boxes), *_ap(INSTANCES, dataset, tables[1], *masks))


def _ap(task: str, dataset: str, table: str, ap50: float, ap75: float, ap: float) -> tuple[Result, ...]:
    return results_of(task, dataset, table, {"AP50": ap50, "AP75": ap75, "AP": ap})


def miou(dataset: str, table: str, value: float, task: str = SEGMENTATION) -> Result:
    """The reported mIoU of semantic segmentation on a data set."""
    return Result(task, dataset, "mIoU", value, table)


RESULTS: dict[str, tuple[Result, ...]] = {
    "pri3d_view_r18": (miou("ScanNet", "T1", 54.4), miou("NYUv2", "T5", 48.2)),
    "pri3d_geo_r18": (miou("ScanNet", "T1", 55.3), miou("NYUv2", "T5", 48.6)),
    "pri3d_view_geo_r18": (miou("ScanNet", "T1", 55.7), miou("NYUv2", "T5", 48.1)),
    "pri3d_view_r50": (
        miou("ScanNet", "T1", 61.3),
        miou("NYUv2", "T5", 54.2),
        *box_and_mask("ScanNet", ("T2", "T3"), (43.7, 27.0, 26.3), (34.3, 18.7, 18.3)),
        *box_and_mask("NYUv2", ("T6", "T7"), (33.0, 19.8, 18.9), (28.1, 15.7, 15.7)),
        miou("ScanNet", "T10", 61.3),
    ),
    "pri3d_geo_r50": (
        miou("ScanNet", "T1", 61.1),
        miou("NYUv2", "T5", 54.8),
        *box_and_mask("ScanNet", ("T2", "T3"), (44.2, 27.6, 26.6), (34.4, 18.7, 18.3)),
        *box_and_mask("NYUv2", ("T6", "T7"), (33.8, 20.2, 19.1), (29.0, 15.9, 15.2)),
    ),
    "pri3d_view_geo_r50": (
        miou("ScanNet", "T1", 61.7),
        miou("NYUv2", "T5", 54.7),
        *box_and_mask("ScanNet", ("T2", "T3"), (44.5, 27.4, 26.6), (35.8, 19.3, 18.7)),
        miou("ScanNet", "T4", 61.3, f"{SEGMENTATION}, DeepLabV3"),
        miou("ScanNet", "T4", 61.6, f"{SEGMENTATION}, DeepLabV3+"),
        miou("ScanNet", "T4", 62.8, f"{SEGMENTATION}, PSPNet"),
        *box_and_mask("NYUv2", ("T6", "T7"), (34.0, 20.4, 19.4), (29.5, 16.3, 15.8)),
        *limited(SEGMENTATION, "ScanNet", "mIoU", "README", SCENES, {20: 51.5, 40: 56.2, 60: 58.9, 80: 60.3}),
        miou("ScanNet", "README", 61.7),
        miou("ScanNet", "GSC T10", 61.7),
    ),
    "pri3d_view_r50.nodepth": (miou("ScanNet", "T10", 60.2),),
    # the table says mAP; the README gives the same values as AP at 0.5
    "pri3d_view_r50.lr001": (
        Result(DETECTION, "COCO", "AP50", 60.6, "T8"),
        Result(INSTANCES, "COCO", "AP50", 57.5, "T8"),
    ),
    "pri3d_view_r50.kitti": (miou("KITTI", "T8", 33.2),),
    "pri3d_view_r50.kitti_180": (miou("Cityscapes", "T8", 56.3),),
    "pri3d_view_r50.megadepth": (miou("Cityscapes", "T8", 55.2),),
    "pri3d_unsup_view_r50": (miou("ScanNet", "T9", 60.5),),
    "pri3d_unsup_geo_r50": (miou("ScanNet", "T9", 60.8),),
    "pri3d_unsup_view_geo_r50": (miou("ScanNet", "T9", 60.8),),
    # its two more epochs, beside GSC's second stage
    "pri3d_view_r50.continued": (miou("ScanNet", "GSC T10", 61.4),),
    "pri3d_geo_r50.continued": (miou("ScanNet", "GSC T10", 61.6),),
    "pri3d_view_geo_r50.continued": (miou("ScanNet", "GSC T10", 61.5),),
    "trivial_correspondence_r50": (miou("ScanNet", "Pri3D T1", 56.4),),
    "depth_prediction_r50": (miou("ScanNet", "Pri3D T1", 58.4),),
}

# The paper's two baselines are no checkpoints: (start, encoder) -> numbers by table.
BASELINES: dict[tuple[str, str], tuple[Result, ...]] = {
    ("scratch", "resnet18"): (miou("ScanNet", "T1", 37.5), miou("NYUv2", "T5", 22.5)),
    ("scratch", "resnet50"): (
        miou("ScanNet", "T1", 39.1),
        miou("NYUv2", "T5", 24.8),
        *box_and_mask("ScanNet", ("T2", "T3"), (32.7, 17.7, 16.9), (25.8, 13.1, 12.2)),
        *box_and_mask("NYUv2", ("T6", "T7"), (21.3, 10.3, 9.0), (17.2, 9.2, 8.8)),
    ),
    ("imagenet", "resnet18"): (miou("ScanNet", "T1", 51.0), miou("NYUv2", "T5", 44.7)),
    ("imagenet", "resnet50"): (
        miou("ScanNet", "T1", 55.7),
        miou("ScanNet", "T4", 57.0, f"{SEGMENTATION}, DeepLabV3"),
        miou("ScanNet", "T4", 57.8, f"{SEGMENTATION}, DeepLabV3+"),
        miou("ScanNet", "T4", 59.7, f"{SEGMENTATION}, PSPNet"),
        miou("NYUv2", "T5", 50.0),
        miou("Cityscapes", "T8", 54.1),
        miou("KITTI", "T8", 28.5),
        *box_and_mask("ScanNet", ("T2", "T3"), (41.7, 25.9, 25.1), (32.6, 17.8, 17.6)),
        *box_and_mask("NYUv2", ("T6", "T7"), (29.9, 17.3, 16.8), (25.1, 13.9, 13.4)),
        Result(DETECTION, "COCO", "AP50", 59.5, "T8"),
        Result(INSTANCES, "COCO", "AP50", 56.6, "T8"),
    ),
}

AUTHORS_FILES: dict[str, tuple[AuthorsFile, ...]] = {
    "pri3d_view_geo_r50": (
        _run("1Whlny5aSH5tqD2Xe79Q7uUP1QD78Wj8t"),
        drive("1nKng03DqkjREi9_mr2yQ-6uugIIzNzGm", "ResNet-50 encoder without fc", "torchvision"),
        drive("1tlu0SfyVXbh8nFpaqvXJqx-5RK2bpUca", "ResNet-50 encoder", "detectron2"),
    ),
    "pri3d_view_r50": (_run("1zdzny9QrJBYsVkrp_GUptsuByaaEWvAT", "2D U-Net and depth head"),),
    "pri3d_geo_r50": (_run("10gDszrYxy-6JiCkWKs196cLHunW4ucI4"),),
    "pri3d_view_geo_r18": (_run("1mnDYe-NqC81M71G0ka_wnpJEVZQ3TiVd"),),
    "pri3d_view_geo_r50.lr001": (_run("11IeS-RnfdFOmIQEKO2DZ7v-5fiWhKTJl"),),
    "pri3d_view_r50.lr001": (drive("1dtjHrjddramxFLXghjIeeNJYcD0RlhOu", "ResNet-50 encoder", "detectron2"),),
    "pri3d_view_r50.kitti": (_run("1vyujfiMRJEQ1IN6nMwWVFmXnl3nMgzYL", "2D U-Net and depth head"),),
    "pri3d_view_r50.kitti_180": (_run("1npnW7dzhPpT_2FZGte9iT6vQiDBvEXUo", "2D U-Net and depth head"),),
    "pri3d_view_r50.megadepth": (_run("1yVR_PFt8DleJXOlKgXV8F2BMjNpQHwJu", "2D U-Net and depth head"),),
}


def _entry(
    name: str,
    arch: Arch,
    license: License,
    data: str,
    description: str,
    contract: ImageContract = CONTRACT,
    method: str = "pri3d",
    has_recipe: bool = True,
) -> Entry:
    return new_entry(
        name,
        arch,
        license,
        data,
        description,
        method=method,
        paper=PAPER,
        contract=contract,
        has_recipe=has_recipe,
        authors_files=AUTHORS_FILES.get(name, ()),
        results=RESULTS.get(name, ()),
    )


def _scannet(name: str, arch: str, description: str) -> Entry:
    """An entry trained on ScanNet from ImageNet weights, as most are."""
    return _entry(name, RESNET_UNET[arch], scannet_license(imagenet(arch)), "ScanNet", description)


def _scannet_entries() -> tuple[Entry, ...]:
    supervised = [
        _scannet(f"pri3d_{prior}_{arch}", arch, f"{text}, with depth proxy")
        for prior, text in PRIORS.items()
        for arch in DEPTHS
    ]
    plain = [_scannet(f"pri3d_view_{arch}.nodepth", arch, f"{PRIORS['view']} only") for arch in DEPTHS]
    slow_text = "with depth proxy and learning rate 0.01"
    slow = _scannet("pri3d_view_geo_r50.lr001", "r50", f"{PRIORS['view_geo']}, {slow_text}")
    slow_encoder = _entry(
        "pri3d_view_r50.lr001",
        RESNET50,  # nobody offers its decoder
        scannet_license(imagenet("r50")),
        "ScanNet",
        f"{PRIORS['view']}, {slow_text}; the encoder alone",
        has_recipe=False,
    )
    unsupervised = [
        _entry(
            f"pri3d_unsup_{prior}_r50",
            RESNET_UNET["r50"],
            scannet_license(MOCO_V2),
            "ScanNet",
            f"{text}, started without labels",
        )
        for prior, text in PRIORS.items()
    ]
    continued = [
        _entry(
            f"pri3d_{prior}_r50.continued",
            RESNET_UNET["r50"],
            scannet_license("pri3d_view_geo_r50 (LicenseRef-ScanNet-ToU)"),
            "ScanNet",
            f"pri3d_view_geo_r50 trained two epochs more: {text}; a baseline of GSC",
        )
        for prior, text in PRIORS.items()
    ]
    return (*supervised, *plain, slow, slow_encoder, *unsupervised, *continued)


def _outdoor_entries() -> tuple[Entry, ...]:
    kitti = License(
        code="MIT",
        weights="CC-BY-NC-SA-3.0",
        datasets=(("KITTI", "CC-BY-NC-SA-3.0"), ("ImageNet", "LicenseRef-ImageNet-terms")),
        base_model=imagenet("r50"),
    )
    megadepth = License(
        code="MIT",
        weights="LicenseRef-unstated",  # the authors give none, and the photographs' own terms differ
        datasets=(("MegaDepth", "LicenseRef-MegaDepth-terms"), ("ImageNet", "LicenseRef-ImageNet-terms")),
        base_model=imagenet("r50"),
    )
    text = f"{PRIORS['view']}, with depth proxy, learning rate 0.01"
    arch, wide = RESNET_UNET["r50"], f"{text}, 180x360 crops"
    return (
        _entry("pri3d_view_r50.kitti", arch, kitti, "KITTI", f"{text}, 240x320 crops"),
        _entry("pri3d_view_r50.kitti_180", arch, kitti, "KITTI", wide, WIDE_CONTRACT),
        _entry("pri3d_view_r50.megadepth", arch, megadepth, "MegaDepth", wide, WIDE_CONTRACT),
    )


def _rooms_entries() -> tuple[Entry, ...]:
    text = "with depth proxy, from a random start on procedural rooms only"
    arch = RESNET_UNET["r18"]
    half, toy = ImageContract(size=(120, 160)), ImageContract(size=(72, 96))
    hours = {"view": ("120x160, hours on two CPU cores", half)}  # what our own weights of this name were trained with
    full = [
        _entry(f"pri3d_{prior}_r18.rooms", arch, ROOMS, "rooms", f"{what}, {text}; {size}", contract)
        for prior, what in PRIORS.items()
        for size, contract in [hours.get(prior, ("full size, for one GPU", CONTRACT))]
    ]
    toy_text = f"{PRIORS['view']}, {text}; minutes on a CPU, to see it work"
    return (*full, _entry("pri3d_view_r18.rooms_toy", arch, ROOMS, "rooms", toy_text, toy))


def _baseline_entries() -> tuple[Entry, ...]:
    texts = {
        "trivial_correspondence": "contrastive learning between equal pixels of two color augmentations of one frame",
        "depth_prediction": "depth prediction alone, with Pri3D's depth proxy",
    }
    small = "from a random start on procedural rooms only; full size, for one GPU"
    return tuple(
        entry
        for method, text in texts.items()
        for entry in (
            _entry(
                f"{method}_r50",
                RESNET_UNET["r50"],
                scannet_license(imagenet("r50")),
                "ScanNet",
                f"{text}; a baseline of Pri3D",
                method=method,
            ),
            _entry(f"{method}_r18.rooms", RESNET_UNET["r18"], ROOMS, "rooms", f"{text}, {small}", method=method),
        )
    )


ENTRIES: tuple[Entry, ...] = (*_scannet_entries(), *_outdoor_entries(), *_rooms_entries(), *_baseline_entries())
