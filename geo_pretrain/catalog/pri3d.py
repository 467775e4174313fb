"""Pri3D (Hou et al., ICCV 2021): ResNet U-Nets pre-trained with view-invariant and geometric priors from RGB-D.

Numbers are the paper's absolute values, by table; the share-of-data rows are the README's. The repository's README
releases the code under MIT (the file LICENSE it points to is absent); no separate terms are given for the weights, so
their entry states what ScanNet, KITTI and the ImageNet start weights impose.
"""

from __future__ import annotations

from geo_pretrain.catalog.entry import Arch, AuthorsFile, Entry, Licence, Paper, Result
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
CONTRACT = ImageContract()
WIDE_CONTRACT = ImageContract(size=(180, 360))

SEGMENTATION, DETECTION, INSTANCES = "semantic segmentation", "object detection", "instance segmentation"

SCANNET_TERMS = (("ScanNet", "LicenseRef-ScanNet-ToU"), ("ImageNet", "LicenseRef-ImageNet-terms"))
PRIORS = {
    "view": "view-invariant contrastive learning between overlapping frames",
    "geo": "contrastive learning between pixels and the scene's 3D surface",
    "view_geo": "view-invariant and geometric contrastive learning together",
}


def _imagenet(arch: str) -> str:
    return f"torchvision ResNet-{DEPTHS[arch]} IMAGENET1K_V1 (BSD-3-Clause; ImageNet terms: non-commercial research)"


def _scannet_licence(base_model: str) -> Licence:
    return Licence(code="MIT", weights="LicenseRef-ScanNet-ToU", datasets=SCANNET_TERMS, base_model=base_model)


def _drive(file_id: str, content: str, file_format: str = "pri3d") -> AuthorsFile:
    return AuthorsFile(f"https://drive.google.com/file/d/{file_id}/view", file_format, content)


def _ap(task: str, dataset: str, table: str, ap50: float, ap75: float, ap: float) -> tuple[Result, ...]:
    return tuple(
        Result(task, dataset, metric, value, table) for metric, value in (("AP50", ap50), ("AP75", ap75), ("AP", ap))
    )


def _miou(dataset: str, table: str, value: float, task: str = SEGMENTATION) -> Result:
    return Result(task, dataset, "mIoU", value, table)


RESULTS: dict[str, tuple[Result, ...]] = {
    "pri3d_view_r18": (_miou("ScanNet", "T1", 54.4), _miou("NYUv2", "T5", 48.2)),
    "pri3d_geo_r18": (_miou("ScanNet", "T1", 55.3), _miou("NYUv2", "T5", 48.6)),
    "pri3d_view_geo_r18": (_miou("ScanNet", "T1", 55.7), _miou("NYUv2", "T5", 48.1)),
    "pri3d_view_r50": (
        _miou("ScanNet", "T1", 61.3),
        _miou("NYUv2", "T5", 54.2),
        *_ap(DETECTION, "ScanNet", "T2", 43.7, 27.0, 26.3),
        *_ap(INSTANCES, "ScanNet", "T3", 34.3, 18.7, 18.3),
        *_ap(DETECTION, "NYUv2", "T6", 33.0, 19.8, 18.9),
        *_ap(INSTANCES, "NYUv2", "T7", 28.1, 15.7, 15.7),
    ),
    "pri3d_geo_r50": (
        _miou("ScanNet", "T1", 61.1),
        _miou("NYUv2", "T5", 54.8),
        *_ap(DETECTION, "ScanNet", "T2", 44.2, 27.6, 26.6),
        *_ap(INSTANCES, "ScanNet", "T3", 34.4, 18.7, 18.3),
        *_ap(DETECTION, "NYUv2", "T6", 33.8, 20.2, 19.1),
        *_ap(INSTANCES, "NYUv2", "T7", 29.0, 15.9, 15.2),
    ),
    "pri3d_view_geo_r50": (
        _miou("ScanNet", "T1", 61.7),
        _miou("NYUv2", "T5", 54.7),
        *_ap(DETECTION, "ScanNet", "T2", 44.5, 27.4, 26.6),
        *_ap(INSTANCES, "ScanNet", "T3", 35.8, 19.3, 18.7),
        _miou("ScanNet", "T4", 61.3, f"{SEGMENTATION}, DeepLabV3"),
        _miou("ScanNet", "T4", 61.6, f"{SEGMENTATION}, DeepLabV3+"),
        _miou("ScanNet", "T4", 62.8, f"{SEGMENTATION}, PSPNet"),
        *_ap(DETECTION, "NYUv2", "T6", 34.0, 20.4, 19.4),
        *_ap(INSTANCES, "NYUv2", "T7", 29.5, 16.3, 15.8),
        *(
            _miou("ScanNet", "README", value, f"{SEGMENTATION}, {share} % of the training scenes")
            for share, value in ((20, 51.5), (40, 56.2), (60, 58.9), (80, 60.3))
        ),
    ),
    "pri3d_view_r50.kitti": (_miou("KITTI", "T8", 33.2),),
    "pri3d_view_r50.kitti_180": (_miou("Cityscapes", "T8", 56.3),),
    "pri3d_view_r50.megadepth": (_miou("Cityscapes", "T8", 55.2),),
    "pri3d_unsup_view_r50": (_miou("ScanNet", "T9", 60.5),),
    "pri3d_unsup_geo_r50": (_miou("ScanNet", "T9", 60.8),),
    "pri3d_unsup_view_geo_r50": (_miou("ScanNet", "T9", 60.8),),
}

AUTHORS_FILES: dict[str, tuple[AuthorsFile, ...]] = {
    "pri3d_view_geo_r50": (
        _drive("1Whlny5aSH5tqD2Xe79Q7uUP1QD78Wj8t", "2D U-Net, 3D U-Net and heads"),
        _drive("1nKng03DqkjREi9_mr2yQ-6uugIIzNzGm", "ResNet-50 encoder without fc", "torchvision"),
        _drive("1tlu0SfyVXbh8nFpaqvXJqx-5RK2bpUca", "ResNet-50 encoder", "detectron2"),
    ),
    "pri3d_view_r50": (_drive("1zdzny9QrJBYsVkrp_GUptsuByaaEWvAT", "2D U-Net and depth head"),),
    "pri3d_geo_r50": (_drive("10gDszrYxy-6JiCkWKs196cLHunW4ucI4", "2D U-Net, 3D U-Net and heads"),),
    "pri3d_view_geo_r18": (_drive("1mnDYe-NqC81M71G0ka_wnpJEVZQ3TiVd", "2D U-Net, 3D U-Net and heads"),),
    "pri3d_view_geo_r50.lr001": (_drive("11IeS-RnfdFOmIQEKO2DZ7v-5fiWhKTJl", "2D U-Net, 3D U-Net and heads"),),
    "pri3d_view_r50.kitti": (_drive("1vyujfiMRJEQ1IN6nMwWVFmXnl3nMgzYL", "2D U-Net and depth head"),),
    "pri3d_view_r50.kitti_180": (_drive("1npnW7dzhPpT_2FZGte9iT6vQiDBvEXUo", "2D U-Net and depth head"),),
    "pri3d_view_r50.megadepth": (_drive("1yVR_PFt8DleJXOlKgXV8F2BMjNpQHwJu", "2D U-Net and depth head"),),
}

RECIPES = (
    *(f"pri3d_{prior}_{arch}" for prior in PRIORS for arch in DEPTHS),
    *(f"pri3d_view_{arch}.nodepth" for arch in DEPTHS),
    *(f"pri3d_{prior}_r18.rooms" for prior in PRIORS),
    "pri3d_view_r18.rooms_toy",
)


def _entry(
    name: str, arch: str, licence: Licence, data: str, description: str, contract: ImageContract = CONTRACT
) -> Entry:
    recipe = name if name in RECIPES else None
    authors_files = AUTHORS_FILES.get(name, ())
    return Entry(
        name=name,
        method="pri3d",
        modality="2d",
        arch=RESNET_UNET[arch],
        contract=contract,
        licence=licence,
        paper=PAPER,
        data=data,
        description=description,
        status="published-by-authors" if authors_files else "regenerable" if recipe else "planned",
        recipe=recipe,
        authors_files=authors_files,
        results=RESULTS.get(name, ()),
    )


def _scannet_entries() -> tuple[Entry, ...]:
    supervised = [
        _entry(f"pri3d_{prior}_{arch}", arch, _scannet_licence(_imagenet(arch)), "ScanNet", f"{text}, with depth proxy")
        for prior, text in PRIORS.items()
        for arch in DEPTHS
    ]
    plain = [
        _entry(
            f"pri3d_view_{arch}.nodepth", arch, _scannet_licence(_imagenet(arch)), "ScanNet", f"{PRIORS['view']} only"
        )
        for arch in DEPTHS
    ]
    slow = _entry(
        "pri3d_view_geo_r50.lr001",
        "r50",
        _scannet_licence(_imagenet("r50")),
        "ScanNet",
        f"{PRIORS['view_geo']}, with depth proxy and learning rate 0.01",
    )
    moco = "MoCo v2 ResNet-50 without labels (CC-BY-NC-4.0; ImageNet terms: non-commercial research)"
    unsupervised = [
        _entry(f"pri3d_unsup_{prior}_r50", "r50", _scannet_licence(moco), "ScanNet", f"{text}, started without labels")
        for prior, text in PRIORS.items()
    ]
    return (*supervised, *plain, slow, *unsupervised)


def _outdoor_entries() -> tuple[Entry, ...]:
    kitti = Licence(
        code="MIT",
        weights="CC-BY-NC-SA-3.0",
        datasets=(("KITTI", "CC-BY-NC-SA-3.0"), ("ImageNet", "LicenseRef-ImageNet-terms")),
        base_model=_imagenet("r50"),
    )
    megadepth = Licence(
        code="MIT",
        weights="LicenseRef-unstated",  # the authors give none, and the photographs' own terms differ
        datasets=(("MegaDepth", "LicenseRef-MegaDepth-terms"), ("ImageNet", "LicenseRef-ImageNet-terms")),
        base_model=_imagenet("r50"),
    )
    text = f"{PRIORS['view']}, with depth proxy, learning rate 0.01"
    return (
        _entry("pri3d_view_r50.kitti", "r50", kitti, "KITTI", f"{text}, 240x320 crops"),
        _entry("pri3d_view_r50.kitti_180", "r50", kitti, "KITTI", f"{text}, 180x360 crops", WIDE_CONTRACT),
        _entry("pri3d_view_r50.megadepth", "r50", megadepth, "MegaDepth", f"{text}, 180x360 crops", WIDE_CONTRACT),
    )


def _rooms_entries() -> tuple[Entry, ...]:
    licence = Licence(code="MIT", weights="MIT", datasets=(("rooms", "MIT"),), base_model="none (random weights)")
    text = "with depth proxy, from a random start on procedural rooms only"
    toy = ImageContract(size=(72, 96))
    full = [
        _entry(f"pri3d_{prior}_r18.rooms", "r18", licence, "rooms", f"{what}, {text}; full size, for one GPU")
        for prior, what in PRIORS.items()
    ]
    toy_text = f"{PRIORS['view']}, {text}; minutes on a CPU, to see it work"
    return (*full, _entry("pri3d_view_r18.rooms_toy", "r18", licence, "rooms", toy_text, toy))


ENTRIES: tuple[Entry, ...] = (*_scannet_entries(), *_outdoor_entries(), *_rooms_entries())
