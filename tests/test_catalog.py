"""The catalog: names, numbers and licences as published, and entries that cannot be built wrongly."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from geo_pretrain import backbone_info, list_backbones
from geo_pretrain.backbones import ARCHITECTURES
from geo_pretrain.catalog import CATALOG, STATUSES, Arch, Licence
from geo_pretrain.catalog.entry import NON_COMMERCIAL, PERMISSIVE
from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import UnknownName

NAMES_3D = [
    "csc_20k_srunet34",
    "csc_60k_srunet34",
    "csc_100k_srunet34",
    "csc_partition4_srunet34",
    "csc_srunet34.rooms",
    "pointcontrast_hardest_srunet34",
    "pointcontrast_hardest_srunet34.rooms",
    "pointcontrast_nce_srunet34",
    "pointcontrast_nce_srunet34.rooms",
    "slidr_srunet34.nuscenes",
]
NAMES_2D = [
    "pri3d_geo_r18",
    "pri3d_geo_r18.rooms",
    "pri3d_geo_r50",
    "pri3d_unsup_geo_r50",
    "pri3d_unsup_view_geo_r50",
    "pri3d_unsup_view_r50",
    "pri3d_view_geo_r18",
    "pri3d_view_geo_r18.rooms",
    "pri3d_view_geo_r50",
    "pri3d_view_geo_r50.lr001",
    "pri3d_view_r18",
    "pri3d_view_r18.nodepth",
    "pri3d_view_r18.rooms",
    "pri3d_view_r18.rooms_toy",
    "pri3d_view_r50",
    "pri3d_view_r50.kitti",
    "pri3d_view_r50.kitti_180",
    "pri3d_view_r50.megadepth",
    "pri3d_view_r50.nodepth",
]
NAMES = [*NAMES_3D[:-1], *NAMES_2D, NAMES_3D[-1]]


def test_all_names_are_there_in_natural_order():
    assert list_backbones() == NAMES
    assert list_backbones("*_r18*") == [name for name in NAMES if "_r18" in name]


def test_natural_order_compares_numbers():
    from geo_pretrain.catalog import _natural

    assert sorted(["a_10", "a_9", "a_9.b", "a_x", "a_100"], key=_natural) == ["a_9", "a_9.b", "a_10", "a_100", "a_x"]


def test_filters_combine():
    assert list_backbones("pri3d*", license="permissive") == [n for n in NAMES_2D if ".rooms" in n]
    assert list_backbones(license="permissive", modality="3d") == [n for n in NAMES_3D if ".rooms" in n]
    assert list_backbones(license="MIT") == list_backbones(license="permissive")
    assert list_backbones(data="kitti") == ["pri3d_view_r50.kitti", "pri3d_view_r50.kitti_180"]
    assert list_backbones("*_r50*", data="ScanNet", status="planned") == [n for n in NAMES if "unsup" in n]
    assert list_backbones(method="pri3d") == list_backbones(modality="2d") == NAMES_2D
    assert list_backbones(modality="3d") == NAMES_3D
    assert list_backbones(method="csc") == NAMES_3D[:5]
    assert list_backbones(data="nuscenes") == ["slidr_srunet34.nuscenes"]
    assert list_backbones("nothing*") == []


def test_licence_groups_tell_scannet_from_rooms():
    non_commercial = list_backbones(license="non-commercial")
    assert not set(non_commercial) & set(list_backbones(license="permissive"))
    assert len(non_commercial) == 21
    assert not set(PERMISSIVE) & set(NON_COMMERCIAL)
    for name in NAMES:
        licence = CATALOG[name].licence
        trained_on = {dataset for dataset, _ in licence.datasets}
        if "ScanNet" in trained_on:
            assert licence.weights == "LicenseRef-ScanNet-ToU"
        if licence.matches("permissive"):
            assert all(terms in PERMISSIVE for _, terms in licence.datasets)
            assert licence.base_model.startswith("none")


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


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("pri3d_view_r18", ("semantic segmentation", "ScanNet", "mIoU"), 54.4),
        ("pri3d_geo_r18", ("semantic segmentation", "ScanNet", "mIoU"), 55.3),
        ("pri3d_view_geo_r50", ("semantic segmentation", "ScanNet", "mIoU"), 61.7),
        ("pri3d_view_geo_r18", ("semantic segmentation", "NYUv2", "mIoU"), 48.1),
        ("pri3d_geo_r50", ("object detection", "ScanNet", "AP75"), 27.6),
        ("pri3d_view_r50", ("instance segmentation", "NYUv2", "AP"), 15.7),
        ("pri3d_view_geo_r50", ("semantic segmentation, PSPNet", "ScanNet", "mIoU"), 62.8),
        ("pri3d_view_r50.kitti_180", ("semantic segmentation", "Cityscapes", "mIoU"), 56.3),
        ("pri3d_unsup_view_r50", ("semantic segmentation", "ScanNet", "mIoU"), 60.5),
        ("pri3d_view_r18.rooms", ("semantic segmentation", "ScanNet", "mIoU"), None),
        ("pointcontrast_nce_srunet34", ("3D semantic segmentation", "ScanNet", "mIoU"), 74.1),
        ("pointcontrast_hardest_srunet34", ("3D semantic segmentation", "S3DIS", "mAcc"), 77.0),
        ("pointcontrast_nce_srunet34", ("3D object detection", "SUN RGB-D", "mAP@0.5"), 34.8),
        ("pointcontrast_hardest_srunet34", ("3D object detection", "ScanNet", "mAP@0.25"), 59.2),
        ("pointcontrast_hardest_srunet34", ("part segmentation, 1 % of the training data", "ShapeNet", "IoU"), 74.0),
        ("csc_100k_srunet34", ("3D semantic segmentation", "ScanNet", "mIoU"), 73.8),
        ("csc_60k_srunet34", ("3D semantic segmentation, 20 labelled points a scene", "ScanNet", "mIoU"), 53.8),
        ("csc_partition4_srunet34", ("3D object detection", "SUN RGB-D", "mAP@0.5"), 36.4),
        ("csc_20k_srunet34", ("3D instance segmentation", "S3DIS", "mAP@0.5"), 63.4),
        ("slidr_srunet34.nuscenes", ("3D semantic segmentation, linear probing", "nuScenes", "mIoU"), 38.8),
    ],
)
def test_numbers_of_the_paper(name: str, key: tuple[str, str, str], value: float | None):
    assert backbone_info(name).result(*key) == value


def test_no_result_is_stated_twice():
    for entry in CATALOG.values():
        keys = [(result.task, result.dataset, result.metric) for result in entry.results]
        assert len(keys) == len(set(keys)), entry.name


def test_statuses_are_honest():
    by_status = {status: list_backbones(status=status) for status in STATUSES}
    assert by_status["published-here"] == []
    assert len(by_status["published-by-authors"]) == 15
    assert by_status["planned"] == [n for n in NAMES if "unsup" in n]
    assert sum(map(len, by_status.values())) == len(NAMES)
    urls = [file.url for entry in CATALOG.values() for file in entry.authors_files]
    assert len(urls) == len(set(urls)) == 18


def test_contracts_of_3d_networks_are_those_of_the_released_code():
    """Voxel, features and their scaling: ones for PointContrast, shifted colours for CSC, intensity for SLidR."""
    seen = {}
    for name in NAMES_3D:
        contract = CATALOG[name].contract
        seen.setdefault(CATALOG[name].method, set()).add(
            (contract.voxel_size, contract.channels, contract.scale, contract.offset, contract.coordinates)
        )
        assert CATALOG[name].arch.args["in_chans"] == len(contract.channels)
    assert seen == {
        "pointcontrast": {(0.025, ("one", "one", "one"), 1.0, 0.0, "cartesian")},
        "csc": {(0.025, ("R", "G", "B"), 1.0, -0.5, "cartesian")},
        "slidr": {((0.1, 1.0, 0.1), ("intensity",), 1.0, 0.0, "cylindrical")},
    }


CHANNELS = {"ones": ("one", "one", "one"), "rgb": ("R", "G", "B")}  # by the recipe's word for its features


def test_recipes_of_the_catalog_exist_and_have_the_entrys_network():
    recipes = importlib.import_module("geo_pretrain.training.recipe")
    for entry in CATALOG.values():
        if entry.recipe is not None:
            recipe = recipes.load_recipe(entry.recipe)
            assert recipe.name == entry.name
            assert recipe.data.source == entry.data.lower()
            if entry.modality == "2d":
                assert recipe.model.depth == entry.arch.args["depth"]
                assert recipe.model.width == entry.arch.args["width"]
                assert recipe.data.size == entry.contract.size
                assert (recipe.model.init == "scratch") == entry.licence.base_model.startswith("none")
            else:
                for key in ("variant", "width", "in_chans", "out_chans", "stem_kernel"):
                    assert getattr(recipe.unet3d, key) == entry.arch.args[key]
                assert recipe.unet3d.voxel_size == entry.contract.voxel_size
                assert CHANNELS[recipe.task.get("features", "ones")] == entry.contract.channels
                assert entry.licence.base_model.startswith("none")


def test_every_recipe_belongs_to_an_entry():
    recipes = importlib.import_module("geo_pretrain.training.recipe")
    assert set(recipes.list_recipes()) == {entry.recipe for entry in CATALOG.values() if entry.recipe is not None}


def test_architectures_name_existing_classes():
    for target in ARCHITECTURES.values():
        module, name = target.split(":")
        assert isinstance(getattr(importlib.import_module(module), name), type)
    assert {entry.arch.name for entry in CATALOG.values()} <= set(ARCHITECTURES)


ENTRY = CATALOG["pri3d_view_r18.rooms"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Pri3D View"}, "<method>_<variant>_<architecture>"),
        ({"name": "gsc_r18"}, "<method>_<variant>_<architecture>"),
        ({"modality": "2D"}, "modality is '2D'; accepted: 2d, 3d"),
        ({"status": "done"}, "status is 'done'; accepted: published-here"),
        ({"status": "published-here"}, "but none is given"),
        ({"status": "published-by-authors"}, "but none is given"),
        ({"recipe": None}, "but none is given"),
        ({"contract": None}, "a 2d entry needs a contract of type ImageContract"),
        ({"contract": VoxelContract(0.02)}, "a 2d entry needs a contract of type ImageContract"),
        ({"modality": "3d"}, "a 3d entry needs a contract of type VoxelContract"),
    ],
)
def test_wrong_entries_cannot_be_built(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ENTRY, **changes)


@pytest.mark.parametrize("hole", ["code", "weights", "datasets", "base_model"])
def test_an_incomplete_licence_chain_cannot_be_built(hole: str):
    with pytest.raises(ValueError, match=f"nothing given for: {hole}"):
        dataclasses.replace(ENTRY.licence, **{hole: () if hole == "datasets" else ""})
    with pytest.raises(TypeError):
        Licence(code="MIT")  # type: ignore[call-arg]


def test_unknown_architectures_are_refused():
    with pytest.raises(UnknownName, match=r"Unknown architecture 'resnet_unit'\. Closest: 'resnet_unet'"):
        Arch("resnet_unit")


def test_entries_are_values():
    assert dataclasses.replace(ENTRY) == ENTRY
    with pytest.raises(dataclasses.FrozenInstanceError):
        ENTRY.name = "x"  # type: ignore[misc]
