"""The catalog: names, numbers and licenses as published, and entries that cannot be built wrongly."""

from __future__ import annotations

import dataclasses
import importlib
import re
import warnings

import pytest
from packaging.licenses import canonicalize_license_expression

from geo_pretrain import backbone_info, catalog, checkpoint, list_backbones
from geo_pretrain.backbones.architectures import ARCHITECTURES
from geo_pretrain.catalog import (
    CATALOG,
    RENAMED,
    STATUSES,
    Arch,
    AuthorsFile,
    File,
    License,
    Result,
    check_renamed,
    find,
)
from geo_pretrain.catalog.entry import FILE_ROLES, PERCENTAGES, WEIGHT_ROLES
from geo_pretrain.catalog.license import LICENSES, NON_COMMERCIAL, PERMISSIVE, is_license
from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import UnknownName

NAMES_2D = [
    "depth_prediction_r18.rooms",
    "depth_prediction_r50",
    "gsc_r18",
    "gsc_r18.rooms",
    "gsc_r50",
    "img2pc_stage1_r18",
    "img2pc_stage1_r18.rooms",
    "moco_v2_in_sn_combine_r50",
    "moco_v2_in_sn_mixing_r50",
    "moco_v2_r18.rooms",
    "moco_v2_sup_in_sn_r50",
    "moco_v2_unsup_in_sn_r50",
    "pri3d_geo_r18",
    "pri3d_geo_r18.rooms",
    "pri3d_geo_r50",
    "pri3d_geo_r50.continued",
    "pri3d_unsup_geo_r50",
    "pri3d_unsup_view_geo_r50",
    "pri3d_unsup_view_r50",
    "pri3d_view_geo_r18",
    "pri3d_view_geo_r18.rooms",
    "pri3d_view_geo_r50",
    "pri3d_view_geo_r50.continued",
    "pri3d_view_geo_r50.lr001",
    "pri3d_view_r18",
    "pri3d_view_r18.nodepth",
    "pri3d_view_r18.rooms",
    "pri3d_view_r18.rooms_toy",
    "pri3d_view_r50",
    "pri3d_view_r50.continued",
    "pri3d_view_r50.kitti",
    "pri3d_view_r50.kitti_180",
    "pri3d_view_r50.lr001",
    "pri3d_view_r50.megadepth",
    "pri3d_view_r50.nodepth",
    "trivial_correspondence_r18.rooms",
    "trivial_correspondence_r50",
]
NAMES_3D = [
    "crd_srunet34",
    "csc_20k_srunet34",
    "csc_60k_srunet34",
    "csc_100k_srunet34",
    "csc_partition4_srunet34",
    "csc_srunet34.rooms",
    "global_kd_srunet34",
    "gupta_srunet34",
    "img2pc_srunet34",
    "img2pc_srunet34.rooms",
    "pointcontrast_hardest_srunet34",
    "pointcontrast_hardest_srunet34.rooms",
    "pointcontrast_nce_srunet34",
    "pointcontrast_nce_srunet34.rooms",
    "ppkd_srunet34",
    "ppkt_ade_srunet34",
    "ppkt_moco_srunet34",
    "ppkt_srunet18",
    "ppkt_srunet34",
    "ppkt_srunet34.rooms",
    "slidr_srunet34.nuscenes",
]
CSC, PPKT = ([name for name in NAMES_3D if name.startswith(method)] for method in ("csc", "ppkt"))
PRI3D = [name for name in NAMES_2D if name.startswith("pri3d")]


def test_all_names_are_there_in_natural_order():
    assert list_backbones(modality="2d") == NAMES_2D
    assert list_backbones(modality="3d") == NAMES_3D
    assert set(list_backbones()) == {*NAMES_2D, *NAMES_3D} == set(CATALOG)
    assert len(list_backbones()) == 58
    assert list_backbones("*_r18*") == [name for name in NAMES_2D if "_r18" in name]


def test_natural_order_compares_numbers():
    from geo_pretrain.catalog import _natural

    assert sorted(["a_10", "a_9", "a_9.b", "a_x", "a_100"], key=_natural) == ["a_9", "a_9.b", "a_10", "a_100", "a_x"]


def test_filters_combine():
    assert list_backbones("pri3d*", license="permissive") == [n for n in PRI3D if ".rooms" in n]
    assert list_backbones(license="permissive", modality="3d") == [n for n in NAMES_3D if ".rooms" in n]
    assert list_backbones(license="MIT") == list_backbones(license="permissive")
    assert list_backbones(data="kitti") == ["pri3d_view_r50.kitti", "pri3d_view_r50.kitti_180"]
    made = list_backbones("pri3d*_r50*", data="ScanNet", status="regenerable")
    assert made == [n for n in PRI3D if "unsup" in n or n.endswith(("_r50.continued", "_r50.nodepth"))]
    assert list_backbones(method="pri3d") == PRI3D
    assert list_backbones(method="csc") == CSC
    assert list_backbones(method="ppkt") == PPKT
    assert list_backbones(method="img2pc") == [
        "img2pc_srunet34",
        "img2pc_srunet34.rooms",
        "img2pc_stage1_r18",
        "img2pc_stage1_r18.rooms",
    ]
    assert list_backbones(data="nuscenes") == ["slidr_srunet34.nuscenes"]
    assert list_backbones(data="imagenet+scannet") == ["moco_v2_in_sn_combine_r50", "moco_v2_in_sn_mixing_r50"]
    assert list_backbones("nothing*") == []


def test_license_groups_tell_scannet_from_rooms():
    non_commercial = list_backbones(license="non-commercial")
    assert not set(non_commercial) & set(list_backbones(license="permissive"))
    assert len(non_commercial) == 43
    for name, entry in CATALOG.items():
        license = entry.license
        trained_on = {dataset for dataset, _ in license.datasets}
        assert trained_on >= set(entry.data.split("+")), name
        if "ScanNet" in trained_on:
            assert license.weights == "LicenseRef-ScanNet-ToU"
        if license.matches("permissive"):
            assert all(terms in PERMISSIVE for _, terms in license.datasets)
            assert license.base_model.startswith("none") or license.base_model.endswith(".rooms (MIT)")


@pytest.mark.parametrize(
    "filters", [{"license": "permisive"}, {"modality": "4d"}, {"status": "done"}, {"method": "prid"}, {"data": "mars"}]
)
def test_unknown_filters_are_named_with_the_nearest(filters: dict[str, str]):
    with pytest.raises(UnknownName, match="Closest"):
        list_backbones(**filters)


def test_an_unknown_name_gets_the_three_nearest():
    with pytest.raises(UnknownName) as caught:
        backbone_info("pri3d_viewgeo_r50")
    assert str(caught.value) == (
        "Unknown backbone 'pri3d_viewgeo_r50'. Closest: 'pri3d_view_geo_r50', 'pri3d_view_r50', 'pri3d_geo_r50'. "
        "All names: list_backbones()."
    )


BY_AUTHORS = {  # name -> (id on Google Drive or end of the URL, format, roles), in order
    "csc_20k_srunet34": [("pretrain/partition8_4096_20k.pth", "csc", "model")],
    "csc_60k_srunet34": [("pretrain/partition8_4096_60k.pth", "csc", "model")],
    "csc_100k_srunet34": [("pretrain/partition8_4096_100k.pth", "csc", "model")],
    "csc_partition4_srunet34": [("pretrain/partition4_4096_100k.pth", "csc", "model")],
    "moco_v2_sup_in_sn_r50": [
        ("1c6qHEI0fxW6HsZYGmzuGVAfLkEYhuxyt", "moco", "encoder"),
        ("1RQzPEiX8oGPev9XmVUT-d8NCEpUInYdX", "detectron2", "encoder"),
    ],
    "pointcontrast_hardest_srunet34": [
        ("www.dropbox.com/s/la9ih2w2oavpp2z/hardest_contrastive.pth?dl=0", "pointcontrast", "model")
    ],
    "pointcontrast_nce_srunet34": [("www.dropbox.com/s/uzr88m1lab0abbl/nce.pth?dl=0", "pointcontrast", "model")],
    "pri3d_geo_r50": [("10gDszrYxy-6JiCkWKs196cLHunW4ucI4", "pri3d", "encoder decoder heads")],
    "pri3d_view_geo_r18": [("1mnDYe-NqC81M71G0ka_wnpJEVZQ3TiVd", "pri3d", "encoder decoder heads")],
    "pri3d_view_geo_r50": [
        ("1Whlny5aSH5tqD2Xe79Q7uUP1QD78Wj8t", "pri3d", "encoder decoder heads"),
        ("1nKng03DqkjREi9_mr2yQ-6uugIIzNzGm", "torchvision", "encoder"),
        ("1tlu0SfyVXbh8nFpaqvXJqx-5RK2bpUca", "detectron2", "encoder"),
    ],
    "pri3d_view_geo_r50.lr001": [("11IeS-RnfdFOmIQEKO2DZ7v-5fiWhKTJl", "pri3d", "encoder decoder heads")],
    "pri3d_view_r50": [("1zdzny9QrJBYsVkrp_GUptsuByaaEWvAT", "pri3d", "encoder decoder heads")],
    "pri3d_view_r50.kitti": [("1vyujfiMRJEQ1IN6nMwWVFmXnl3nMgzYL", "pri3d", "encoder decoder heads")],
    "pri3d_view_r50.kitti_180": [("1npnW7dzhPpT_2FZGte9iT6vQiDBvEXUo", "pri3d", "encoder decoder heads")],
    "pri3d_view_r50.lr001": [("1dtjHrjddramxFLXghjIeeNJYcD0RlhOu", "detectron2", "encoder")],
    "pri3d_view_r50.megadepth": [("1yVR_PFt8DleJXOlKgXV8F2BMjNpQHwJu", "pri3d", "encoder decoder heads")],
    "slidr_srunet34.nuscenes": [
        ("SLidR/releases/download/v1.0/minkunet_slidr_1gpu.pt", "slidr", "model"),
        ("SLidR/releases/download/v1.1/minkunet_slidr_1gpu_raw.pt", "slidr", "model"),
    ],
}


def test_what_the_authors_offer_is_listed():
    assert set(list_backbones(status="published-by-authors")) == set(BY_AUTHORS)
    for name, entry in CATALOG.items():
        files = entry.authors_files
        expected = BY_AUTHORS.get(name, [])
        assert [(file.format, " ".join(file.roles)) for file in files] == [tuple(rest) for _, *rest in expected]
        for file, (place, *_) in zip(files, expected, strict=True):
            drive = f"https://drive.google.com/file/d/{place}/view"
            assert file.url == (file.url[: -len(place)] + place if "/" in place else drive)
            assert (file.size, file.sha256) == (None, None)  # nobody published them
    urls = [file.url for entry in CATALOG.values() for file in entry.authors_files]
    assert len(urls) == len(set(urls)) == 21
    assert {url.partition("://")[0] for url in urls if "kaldir" in url} == {"http"}  # no https there


def test_statuses_are_honest():
    by_status = {status: list_backbones(status=status) for status in STATUSES}
    assert by_status["published-here"] == []
    assert len(by_status["published-by-authors"]) == 17
    assert by_status["regenerable"] == [
        "crd_srunet34",
        "csc_srunet34.rooms",
        "depth_prediction_r18.rooms",
        "depth_prediction_r50",
        "global_kd_srunet34",
        "gsc_r18",
        "gsc_r18.rooms",
        "gsc_r50",
        "gupta_srunet34",
        "img2pc_srunet34",
        "img2pc_srunet34.rooms",
        "img2pc_stage1_r18",
        "img2pc_stage1_r18.rooms",
        "moco_v2_in_sn_combine_r50",
        "moco_v2_in_sn_mixing_r50",
        "moco_v2_r18.rooms",
        "moco_v2_unsup_in_sn_r50",
        "pointcontrast_hardest_srunet34.rooms",
        "pointcontrast_nce_srunet34.rooms",
        "ppkd_srunet34",
        "ppkt_ade_srunet34",
        "ppkt_moco_srunet34",
        "ppkt_srunet18",
        "ppkt_srunet34",
        "ppkt_srunet34.rooms",
        "pri3d_geo_r18",
        "pri3d_geo_r18.rooms",
        "pri3d_geo_r50.continued",
        "pri3d_unsup_geo_r50",
        "pri3d_unsup_view_geo_r50",
        "pri3d_unsup_view_r50",
        "pri3d_view_geo_r18.rooms",
        "pri3d_view_geo_r50.continued",
        "pri3d_view_r18",
        "pri3d_view_r18.nodepth",
        "pri3d_view_r18.rooms",
        "pri3d_view_r18.rooms_toy",
        "pri3d_view_r50.continued",
        "pri3d_view_r50.nodepth",
        "trivial_correspondence_r18.rooms",
        "trivial_correspondence_r50",
    ]
    assert len(by_status["planned"]) == 0
    assert sum(map(len, by_status.values())) == len(CATALOG)


def test_contracts_of_2d_networks():
    """Pri3D's, MoCo's crops, and the mean and deviation of monodepth2 for the network of Janda et al."""
    seen = {}
    for name in NAMES_2D:
        contract = CATALOG[name].contract
        key = (contract.size, contract.interpolation, contract.mean[0], contract.std[2])
        seen.setdefault(key, []).append(name)
        assert contract.channels == ("R", "G", "B")
    assert seen.pop(((224, 224), "bilinear", 0.485, 0.225)) == [n for n in NAMES_2D if n.startswith("moco")]
    assert seen.pop(((180, 360), "nearest", 0.485, 0.225)) == ["pri3d_view_r50.kitti_180", "pri3d_view_r50.megadepth"]
    assert seen.pop(((72, 96), "nearest", 0.485, 0.225)) == ["pri3d_view_r18.rooms_toy"]
    assert seen.pop(((240, 320), "bilinear", 0.45, 0.225)) == ["img2pc_stage1_r18", "img2pc_stage1_r18.rooms"]
    assert list(seen) == [((240, 320), "nearest", 0.485, 0.225)]
    assert len(seen.popitem()[1]) == 27
    assert CATALOG["img2pc_stage1_r18"].contract.mean == (0.45, 0.45, 0.45)
    assert CATALOG["img2pc_stage1_r18"].contract.std == (0.225, 0.225, 0.225)


def test_contracts_of_3d_networks_are_those_of_the_released_code():
    """Voxel, features and their scaling: ones for PointContrast, shifted colors for CSC, intensity for SLidR."""
    seen = {}
    for name in NAMES_3D:
        contract = CATALOG[name].contract
        seen.setdefault(CATALOG[name].method, set()).add(
            (contract.voxel_size, contract.channels, contract.scale, contract.offset, contract.coordinates)
        )
    colors = {(0.025, ("R", "G", "B"), 1.0, -0.5, "cartesian")}
    students = ("crd", "csc", "global_kd", "gupta", "img2pc", "ppkd", "ppkt")
    assert seen == dict.fromkeys(students, colors) | {
        "pointcontrast": {(0.025, ("one", "one", "one"), 1.0, 0.0, "cartesian")},
        "slidr": {((0.1, 1.0, 0.1), ("intensity",), 1.0, 0.0, "cylindrical")},
    }


def test_networks_are_those_of_the_papers():
    """Architecture, depth or variant, and channels that come out; for 3D whether rows are divided by their length."""
    seen = {}
    for name, entry in CATALOG.items():
        args = entry.arch.args
        seen.setdefault(
            (entry.arch.name, args.get("depth", args.get("variant")), args.get("out_chans"), args.get("normalize")), []
        ).append(name)
    assert sorted(seen.pop(("resnet", 50, None, None))) == [
        *(name for name in NAMES_2D if name.startswith("moco") and name.endswith("r50")),
        "pri3d_view_r50.lr001",
    ]
    assert seen.pop(("resnet", 18, None, None)) == ["moco_v2_r18.rooms"]
    assert seen.pop(("resnet_depth_unet", 18, 16, None)) == ["img2pc_stage1_r18", "img2pc_stage1_r18.rooms"]
    assert len(seen.pop(("resnet_unet", 18, 32, None))) == 12
    assert len(seen.pop(("resnet_unet", 50, 128, None))) == 17
    assert len(seen.pop(("sr_unet", "34C", 32, True))) == 9
    assert seen.pop(("sr_unet", "34C", 16, True)) == ["img2pc_srunet34", "img2pc_srunet34.rooms"]
    assert seen.pop(("sr_unet", "34C", 64, True)) == ["slidr_srunet34.nuscenes"]
    assert len(seen.pop(("sr_unet", "34C", 128, True))) == 7
    assert seen.pop(("sr_unet", "18A", 128, True)) == ["ppkt_srunet18"]
    assert seen.pop(("sr_unet", "34C", 150, False)) == ["ppkd_srunet34"]
    assert not seen
    assert {entry.arch.args["stem_kernel"] for entry in CATALOG.values() if entry.modality == "3d"} == {3}
    assert {entry.arch.args.get("width") for entry in CATALOG.values()} == {32, 64}


PARAMETERS = {  # of the whole network, by what they are counted for in the papers' code
    "pri3d_view_r18": 20_667_808,
    "pri3d_view_r50": 175_333_824,
    "pri3d_view_r50.lr001": 23_508_032,
    "moco_v2_sup_in_sn_r50": 23_508_032,
    "moco_v2_r18.rooms": 11_176_512,
    "gsc_r18": 20_667_808,
    "gsc_r50": 175_333_824,
    "trivial_correspondence_r50": 175_333_824,
    "img2pc_stage1_r18": 14_842_392 - 513_000,  # the manifest's, less the classifier that monodepth2 never uses
    "pointcontrast_nce_srunet34": 37_847_808,
    "csc_20k_srunet34": 37_847_808,
    "slidr_srunet34.nuscenes": 37_849_184,
    # one output is 96 weights and a bias
    "img2pc_srunet34": 37_847_808 - 16 * 97,
    "ppkt_srunet34": 37_847_808 + 96 * 97,
    "ppkt_srunet18": 15_484_928 + 96 * 97,
    "ppkd_srunet34": 37_847_808 + 118 * 97,
}


def test_networks_have_the_published_number_of_parameters():
    torch = importlib.import_module("torch")
    build = importlib.import_module("geo_pretrain.backbones.build").build
    counted = set()
    for name, expected in PARAMETERS.items():
        arch = CATALOG[name].arch
        with torch.device("meta"):
            network = build(arch, decoder=arch.has_decoder)
        assert sum(parameter.numel() for parameter in network.parameters()) == expected, name
        counted.add(str(arch))
    assert counted == {str(entry.arch) for entry in CATALOG.values()}  # no architecture was left out


def test_what_training_started_from_is_told():
    starts = {name: CATALOG[name].license.base_model for name in CATALOG}
    assert starts["gsc_r18"] == "pri3d_view_geo_r18 (LicenseRef-ScanNet-ToU)"
    assert starts["gsc_r50"] == "pri3d_view_geo_r50 (LicenseRef-ScanNet-ToU)"
    assert starts["gsc_r18.rooms"] == "pri3d_view_geo_r18.rooms (MIT)"
    assert starts["img2pc_srunet34"].endswith("teacher: img2pc_stage1_r18 (LicenseRef-ScanNet-ToU)")
    assert starts["img2pc_srunet34.rooms"].endswith("teacher: img2pc_stage1_r18.rooms (MIT)")
    assert "IMAGENET1K_V1" in starts["moco_v2_sup_in_sn_r50"]
    assert starts["moco_v2_unsup_in_sn_r50"] == starts["pri3d_unsup_view_r50"]
    assert starts["moco_v2_unsup_in_sn_r50"].startswith("MoCo v2 ResNet-50 without labels (CC-BY-NC-4.0;")
    for variant in ("combine", "mixing"):
        assert starts[f"moco_v2_in_sn_{variant}_r50"] == "none (random weights)"
    assert "MoCo" in starts["ppkt_moco_srunet34"]
    for name in ("ppkt_ade_srunet34", "ppkd_srunet34"):
        assert "ADE20K" in starts[name]
        assert ("ADE20K", "LicenseRef-ADE20K-terms") in CATALOG[name].license.datasets
    for name in ("ppkt_srunet34", "ppkt_srunet18", "global_kd_srunet34", "gupta_srunet34", "crd_srunet34"):
        assert starts[name].startswith("random weights; teacher: torchvision ResNet-50 IMAGENET1K_V1 (BSD-3-Clause")
    for name in ("trivial_correspondence_r50", "depth_prediction_r50", "pri3d_view_r50.lr001"):
        assert starts[name] == starts["pri3d_view_r50"]
    assert CATALOG["moco_v2_sup_in_sn_r50"].license.code == "CC-BY-NC-4.0"  # as MoCo's own


CHANNELS = {"ones": ("one", "one", "one"), "rgb": ("R", "G", "B")}  # by the recipe's word for its features


def test_recipes_of_the_catalog_exist_and_have_the_entrys_network():
    recipes = importlib.import_module("geo_pretrain.training.recipe")
    for entry in CATALOG.values():
        if entry.recipe is not None:
            recipe = recipes.load_recipe(entry.recipe)
            assert recipe.name == entry.name
            assert recipe.data.source == entry.data.lower().split("+")[-1]  # what is mixed in is no frames
            if entry.modality == "2d":
                assert recipe.model.depth == entry.arch.args["depth"]
                assert recipe.model.width == entry.arch.args["width"]
                assert recipe.data.size == entry.contract.size
                assert (recipe.model.init == "scratch") == entry.license.base_model.startswith("none")
            else:
                for key in ("variant", "width", "in_chans", "out_chans", "stem_kernel"):
                    assert getattr(recipe.unet3d, key) == entry.arch.args[key]
                assert recipe.unet3d.voxel_size == entry.contract.voxel_size
                assert CHANNELS[recipe.task.get("features", "ones")] == entry.contract.channels
                taught = "teacher" in recipe.task or recipe.stage1 is not None
                assert entry.license.base_model.startswith("random weights; teacher" if taught else "none")


def test_every_recipe_belongs_to_an_entry():
    recipes = importlib.import_module("geo_pretrain.training.recipe")
    assert set(recipes.list_recipes()) == {entry.recipe for entry in CATALOG.values() if entry.recipe is not None}


def test_architectures_name_existing_classes():
    for architecture in ARCHITECTURES.values():
        assert isinstance(architecture.load_class(), type)
    assert {entry.arch.name for entry in CATALOG.values()} <= set(ARCHITECTURES)


# --- what cannot be built

ENTRY = CATALOG["pri3d_view_r18.rooms"]
BASE = f"https://host/hub/{ENTRY.name}"
ENCODER = File("encoder", "encoder.safetensors", 3, "0" * 64, (f"{BASE}/encoder.safetensors",))
DECODER = File("decoder", "decoder.safetensors", 3, "1" * 64, (f"{BASE}/decoder.safetensors",))
AUTHORS = AuthorsFile("https://host/file.pth", "pri3d", "all", ("encoder", "decoder"))
LONE_ENCODER = AuthorsFile("https://host/r18.pth", "torchvision", "encoder", ("encoder",))
RESULT = Result("semantic segmentation", "ScanNet", "mIoU", 50.0, "T1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Pri3D View"}, "<method>_<variant>_<architecture>"),
        ({"name": "gsc_r18"}, "<method>_<variant>_<architecture>"),
        ({"name": "pri3d_view_r18.a.b"}, "<method>_<variant>_<architecture>"),
        ({"modality": "2D"}, "modality is '2D'; accepted: 2d, 3d"),
        ({"status": "done"}, "status is 'done'; accepted: published-here"),
        ({"status": "published-here"}, "but none is given"),
        ({"status": "published-by-authors"}, "but none is given"),
        ({"recipe": None}, "but none is given"),
        ({"data": " "}, "data is empty"),
        ({"description": ""}, "description is empty"),
        # a network that is not the contract's
        ({"contract": None}, "a 2d entry needs a contract of type ImageContract"),
        ({"contract": VoxelContract(0.02)}, "a 2d entry needs a contract of type ImageContract"),
        ({"modality": "3d"}, "a 3d entry needs a contract of type VoxelContract"),
        ({"modality": "3d", "contract": VoxelContract(0.02)}, "resnet_unet is not a 3d architecture"),
        ({"arch": Arch("sr_unet")}, "sr_unet is not a 2d architecture"),
        ({"arch": Arch("resnet", {"in_chans": 4})}, "the network takes 4 channels, its contract names 3"),
        # a status that is too modest
        ({"status": "planned"}, "status is 'planned'; with what is given it is 'regenerable'"),
        ({"authors_files": (AUTHORS,)}, "status is 'regenerable'; with what is given it is 'published-by-authors'"),
        (
            {"status": "regenerable", "authors_files": (AUTHORS,), "files": (ENCODER, DECODER)},
            "status is 'regenerable'; with what is given it is 'published-by-authors'",
        ),
        # files here
        ({"files": (ENCODER,), "status": "published-here"}, "no file holds the decoder of resnet_unet"),
        ({"files": (DECODER,), "status": "published-here"}, "no file holds the encoder of resnet_unet"),
        (
            {"files": (ENCODER, dataclasses.replace(DECODER, name=ENCODER.name)), "status": "published-here"},
            "more than one file is called 'encoder.safetensors'",
        ),
        # authors' files
        (
            {"authors_files": (LONE_ENCODER,), "status": "published-by-authors"},
            "no authors' file yields the decoder of resnet_unet",
        ),
        (
            {
                "authors_files": (AUTHORS, dataclasses.replace(AUTHORS, url="http://host/b", roles=("decoder",))),
                "status": "published-by-authors",
            },
            "http://host/b yields decoder; resnet_unet needs its encoder",
        ),
        (
            {"authors_files": (AUTHORS, AUTHORS), "status": "published-by-authors"},
            "https://host/file.pth is given more than once",
        ),
        # results
        (
            {"results": (RESULT, dataclasses.replace(RESULT, value=1.0, table="T2"))},
            "more than one result for semantic segmentation / ScanNet / mIoU",
        ),
    ],
)
def test_wrong_entries_cannot_be_built(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(ENTRY, **changes)


def test_files_on_the_way_do_not_make_an_entry_published():
    """Only what is called published here must be whole."""
    entry = dataclasses.replace(ENTRY, files=(ENCODER,))
    assert entry.status == "regenerable"
    assert dataclasses.replace(entry, files=(ENCODER, DECODER), status="published-here").files == (ENCODER, DECODER)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("source", "accepted"),
    [
        (f"{BASE}/encoder.safetensors", True),
        (f"http://127.0.0.1:8000/{ENTRY.name}/encoder.safetensors", True),
        (f"hf-hub:lab/{ENTRY.name}@{COMMIT}", True),
        (f"hf-hub:lab/{ENTRY.name}@main", False),  # a branch moves
        (f"hf-hub:lab/{ENTRY.name}@{COMMIT[:-1]}", False),
        (f"hf-hub:lab/{ENTRY.name}@{COMMIT.upper()}", False),
        (f"hf-hub:lab/{ENTRY.name}", False),
        (f"hf-hub:{ENTRY.name}@{COMMIT}", False),
        (f"{BASE}/decoder.safetensors", False),
        ("https://host/hub/pri3d_view_r18/encoder.safetensors", False),
        (f"https://host/hub/not_{ENTRY.name}/encoder.safetensors", False),
        (f"ftp://host/{ENTRY.name}/encoder.safetensors", False),
        (f"/data/{ENTRY.name}/encoder.safetensors", False),
        (f"{BASE}/encoder.safetensors?x=1", False),
    ],
)
def test_sources_are_pinned(source: str, accepted: bool):
    files = (dataclasses.replace(ENCODER, sources=(source,)), DECODER)
    if accepted:
        entry = dataclasses.replace(ENTRY, files=files, status="published-here")
        assert source in entry.how_to_get()
    else:
        with pytest.raises(ValueError, match=re.escape(f"source of encoder.safetensors is {source!r}; accepted:")):
            dataclasses.replace(ENTRY, files=files, status="published-here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "encodr"}, "Unknown file role 'encodr'. Closest: 'encoder'"),
        ({"size": 0}, "size is 0"),
        ({"sha256": "0" * 63}, "accepted: 64 lower-case hex digits"),
        ({"sha256": "A" * 64}, "accepted: 64 lower-case hex digits"),
        ({"sources": ()}, "no source is given"),
        ({"name": "../encoder.safetensors"}, "accepted: a plain name that ends in .safetensors"),
        ({"name": "encoder.pth"}, "accepted: a plain name that ends in .safetensors"),
        ({"role": "golden", "name": "golden.bin"}, "accepted: a plain name that ends in .safetensors"),
        ({"role": "card"}, "accepted: a plain name of a file without tensors"),
    ],
)
def test_wrong_files_cannot_be_built(changes: dict[str, object], message: str):
    with pytest.raises((ValueError, UnknownName), match=re.escape(message)):
        dataclasses.replace(ENCODER, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "file.pth"}, "url is 'file.pth'; accepted: an http(s) URL"),
        ({"url": "ftp://host/file.pth"}, "accepted: an http(s) URL"),
        ({"url": "https://host/a file.pth"}, "accepted: an http(s) URL"),
        ({"url": "https://host"}, "accepted: an http(s) URL"),
        ({"format": "pri3"}, "Unknown checkpoint format 'pri3'. Closest: 'pri3d'"),
        ({"roles": ()}, "accepted: one or more, each once"),
        ({"roles": ("encoder", "encoder")}, "accepted: one or more, each once"),
        ({"roles": ("encoder", "golden")}, "Unknown file role 'golden'"),
        ({"format": "torchvision"}, "roles are encoder, decoder; a torchvision file yields encoder."),
        ({"size": -1}, "size is -1"),
        ({"sha256": "x" * 64}, "accepted: 64 lower-case hex digits"),
    ],
)
def test_wrong_authors_files_cannot_be_built(changes: dict[str, object], message: str):
    with pytest.raises((ValueError, UnknownName), match=re.escape(message)):
        dataclasses.replace(AUTHORS, **changes)


def test_sizes_and_digests_of_authors_files_may_be_known():
    file = dataclasses.replace(AUTHORS, size=290, sha256="ab" * 32)
    assert (file.size, file.sha256, file.roles) == (290, "ab" * 32, ("encoder", "decoder"))


@pytest.mark.parametrize(
    ("metric", "value", "accepted"),
    [
        ("mIoU", 0.0, True),
        ("mIoU", 100.0, True),
        ("mIoU", 100.1, False),
        ("AP50", -0.1, False),
        ("mAP@0.25", 101.0, False),
        ("accuracy", float("nan"), False),
        ("steps", float("inf"), False),
        ("steps", 60000.0, True),  # not a percentage
    ],
)
def test_results_are_possible_numbers(metric: str, value: float, accepted: bool):
    if accepted:
        assert Result("task", "data", metric, value, "T1").value == value
    else:
        with pytest.raises(ValueError, match=rf"{metric} on data is {value}; accepted: a (finite number|percentage)"):
            Result("task", "data", metric, value, "T1")


def test_all_metrics_of_the_catalog_are_known_percentages():
    assert {result.metric for entry in CATALOG.values() for result in entry.results} == set(PERCENTAGES)


def test_roles_are_those_of_the_checkpoint_folder():
    """They are stated twice, since the folder's format may know the catalog but not the reverse."""
    assert set(FILE_ROLES) == set(checkpoint.ROLES)
    assert set(WEIGHT_ROLES) == set(checkpoint.WEIGHT_ROLES)


def test_unknown_architectures_are_refused():
    with pytest.raises(UnknownName, match=r"Unknown architecture 'resnet_unit'\. Closest: 'resnet_unet'"):
        Arch("resnet_unit")


def test_entries_are_values():
    assert dataclasses.replace(ENTRY) == ENTRY
    with pytest.raises(dataclasses.FrozenInstanceError):
        ENTRY.name = "x"  # type: ignore[misc]


# --- licenses


@pytest.mark.parametrize("hole", ["code", "weights", "datasets", "base_model"])
def test_an_incomplete_license_chain_cannot_be_built(hole: str):
    for nothing in ((), (("rooms", " "),)) if hole == "datasets" else ("", " "):
        with pytest.raises(ValueError, match=f"nothing given for: {hole}"):
            dataclasses.replace(ENTRY.license, **{hole: nothing})
    with pytest.raises(TypeError):
        License(code="MIT")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "closest"),
    [
        ("mit", "MIT"),
        ("Apache 2.0", "Apache-2.0"),
        ("GPL-3.0", "GPL-3.0-only"),
        ("cc-by-nc-4.0", "CC-BY-NC-4.0"),
        ("LicenseRef-scannet tou", "LicenseRef-ScanNet-ToU"),
        ("ScanNet-ToU", "LicenseRef-ScanNet-ToU"),
    ],
)
def test_unknown_licenses_are_refused_with_the_nearest(given: str, closest: str):
    for change in ({"code": given}, {"weights": given}, {"datasets": (("rooms", "MIT"), ("x", given))}):
        with pytest.raises(UnknownName) as caught:
            dataclasses.replace(ENTRY.license, **change)
        assert str(caught.value).startswith(f"Unknown license {given!r}. Closest: {closest!r}, ")
        assert "LicenseRef-<word>" in str(caught.value)


def test_identifiers_are_those_of_spdx():
    for identifier in LICENSES:  # a list kept by others: raises for what is unknown, and corrects the case
        assert canonicalize_license_expression(identifier) == identifier
    own = {identifier for identifier in LICENSES if identifier.startswith("LicenseRef-")}
    assert len(LICENSES) == len(set(LICENSES)) == 53
    assert not set(PERMISSIVE) & set(NON_COMMERCIAL)
    assert all("NC" in identifier.split("-") for identifier in set(NON_COMMERCIAL) - own)
    assert not any({"NC", "ND", "SA", "GPL"} & set(identifier.split("-")) for identifier in PERMISSIVE)
    assert is_license("LicenseRef-data-owner")  # what a folder of unknown frames gets
    for wrong in ("LicenseRef-", "LicenseRef-my terms", "licenseref-x", "LicenseRef-x-", "xLicenseRef-x", ""):
        assert not is_license(wrong)


@pytest.mark.parametrize(
    ("data", "base_model", "accepted"),
    [
        ("MIT", "none", True),
        ("MIT", "none (random weights)", True),
        ("CC0-1.0", "pri3d_view_r18.rooms (MIT)", True),
        ("CC-BY-4.0", "one (MIT), another (Apache-2.0; BSD-3-Clause)", True),
        ("LicenseRef-data-owner", "none", False),  # terms that no program can judge
        ("CC-BY-SA-4.0", "none", False),
        ("CC-BY-NC-4.0", "none", False),
        ("MIT", "MoCo (CC-BY-NC-4.0)", False),
        ("MIT", "one (MIT), another (LicenseRef-ImageNet-terms)", False),
        ("MIT", "torchvision ResNet-18 (BSD-3-Clause; ImageNet terms: non-commercial research)", False),
    ],
)
def test_weights_are_as_free_as_the_least_free_link(data: str, base_model: str, accepted: bool):
    def build(weights: str) -> License:
        return License(code="GPL-3.0-only", weights=weights, datasets=(("x", data),), base_model=base_model)

    assert build("LicenseRef-ImageNet-terms").weights == "LicenseRef-ImageNet-terms"
    for weights in ("MIT", "CC-BY-4.0"):
        if accepted:
            assert build(weights).matches("permissive")
        else:
            with pytest.raises(ValueError, match=r"is under .*; accepted: the strictest term of the chain"):
                build(weights)


def test_the_link_that_binds_is_named():
    with pytest.raises(ValueError) as caught:
        License("MIT", "MIT", (("rooms", "MIT"), ("ScanNet", "LicenseRef-ScanNet-ToU")), "none")
    assert str(caught.value) == (
        "the weights' license is 'MIT', but the data set ScanNet is under 'LicenseRef-ScanNet-ToU'; accepted: the "
        "strictest term of the chain."
    )
    with pytest.raises(ValueError, match=r"but the base model 'x \(MIT; CC-BY-NC-4.0\)' is under 'CC-BY-NC-4.0'"):
        License("MIT", "MIT", (("rooms", "MIT"),), "x (MIT; CC-BY-NC-4.0)")


@pytest.mark.parametrize("base_model", ["ResNet-50", "ResNet-50 (from somewhere)", "nonesuch", "none at all ()", "MIT"])
def test_a_base_model_without_license_is_refused(base_model: str):
    with pytest.raises(ValueError, match=r"accepted: 'none', or a text with its license in round brackets"):
        License("MIT", "LicenseRef-x", (("rooms", "MIT"),), base_model)


def test_base_terms_are_what_stands_in_brackets():
    license = License("MIT", "LicenseRef-x", (("rooms", "MIT"),), "a (MIT; a remark), b (CC-BY-NC-4.0)")
    assert license.base_terms() == ("MIT", "a remark", "CC-BY-NC-4.0")
    assert ENTRY.license.base_terms() == ()


# --- ways to get one, and names of old


def test_how_to_get_says_what_a_user_can_do():
    url = "https://drive.google.com/file/d/1zdzny9QrJBYsVkrp_GUptsuByaaEWvAT/view"
    assert backbone_info("pri3d_view_r50").how_to_get() == (
        f"fetch the authors' file by hand ({url}), make a folder of it with "
        "`geo-pretrain convert FILE --from pri3d --name pri3d_view_r50 --out DIR` and load DIR; or make it with "
        "`geo-pretrain train pri3d_view_r50 --data scannet:PATH --out DIR` and load DIR"
    )
    assert backbone_info("pri3d_view_r18.rooms").how_to_get() == (
        "make it with `geo-pretrain train pri3d_view_r18.rooms --out DIR` and load DIR"
    )
    unmade = dataclasses.replace(backbone_info("gsc_r50"), status="planned", recipe=None)
    assert unmade.how_to_get() == "nobody offers it and no recipe makes it yet; pretrained=False builds the network"


def test_find_knows_names_and_nothing_else():
    assert find("gsc_r50") is CATALOG["gsc_r50"]
    assert find("gsc_r5") is None


def test_a_renamed_entry_is_found_with_a_warning_at_the_caller(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalog, "RENAMED", {"pri3d_combine_r50": "pri3d_view_geo_r50"})
    for ask in (find, backbone_info):
        with pytest.warns(FutureWarning) as caught:
            assert ask("pri3d_combine_r50") is CATALOG["pri3d_view_geo_r50"]
        assert [str(warning.message) for warning in caught] == [
            "'pri3d_combine_r50' is called 'pri3d_view_geo_r50' now; the old name will stop working."
        ]
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find("pri3d_view_geo_r50") is not None
        assert "pri3d_combine_r50" not in list_backbones()


def test_old_names_are_free_and_new_names_exist():
    check_renamed(RENAMED, CATALOG)
    check_renamed({"old": "gsc_r50"}, CATALOG)
    with pytest.raises(ValueError, match="'gsc_r18' is renamed to 'gsc_r50', but it is the name of an entry"):
        check_renamed({"gsc_r18": "gsc_r50"}, CATALOG)
    with pytest.raises(UnknownName, match=r"Unknown backbone 'gsc_r5'\. Closest: 'gsc_r50'.* 'old' is renamed to it"):
        check_renamed({"old": "gsc_r5"}, CATALOG)
