"""The catalog: names, files, contracts and networks as published."""

from __future__ import annotations

import dataclasses
import importlib
import warnings

import pytest

from geo_pretrain import backbone_info, catalog, list_backbones
from geo_pretrain.backbones.architectures import ARCHITECTURES
from geo_pretrain.catalog import CATALOG, RENAMED, STATUSES, check_renamed, find
from geo_pretrain.catalog.license import PERMISSIVE
from geo_pretrain.catalog.shipped import SHIPPED
from geo_pretrain.errors import UnknownName
from tests.catalog_names import NAMES, NAMES_2D, NAMES_3D

CSC, PPKT = ([name for name in NAMES_3D if name.startswith(method)] for method in ("csc", "ppkt"))
PRI3D = [name for name in NAMES_2D if name.startswith("pri3d")]


def listed(pattern: str = "*", **filters: str) -> list[str]:
    """Names of old that `list_backbones` gives; test_catalog_properties judges it over all names, later ones too."""
    return [name for name in list_backbones(pattern, **filters) if name in NAMES]


def test_all_names_are_there_in_natural_order():
    assert listed(modality="2d") == NAMES_2D
    assert listed(modality="3d") == NAMES_3D
    assert set(list_backbones()) == set(CATALOG) >= NAMES
    assert len(list_backbones()) == len(CATALOG)
    assert listed("*_r18*") == [name for name in NAMES_2D if "_r18" in name]


def test_natural_order_compares_numbers():
    from geo_pretrain.catalog import _natural

    assert sorted(["a_10", "a_9", "a_9.b", "a_x", "a_100"], key=_natural) == ["a_9", "a_9.b", "a_10", "a_100", "a_x"]


def test_filters_combine():
    assert listed("pri3d*", license="permissive") == [n for n in PRI3D if ".rooms" in n]
    assert listed(license="permissive", modality="3d") == [n for n in NAMES_3D if ".rooms" in n]
    assert listed(license="MIT") == listed(license="permissive")
    assert listed(data="kitti") == ["pri3d_view_r50.kitti", "pri3d_view_r50.kitti_180"]
    made = listed("pri3d*_r50*", data="ScanNet", status="regenerable")
    assert made == [n for n in PRI3D if "unsup" in n or n.endswith(("_r50.continued", "_r50.nodepth"))]
    assert listed(method="pri3d") == PRI3D
    assert listed(method="csc") == CSC
    assert listed(method="ppkt") == PPKT
    assert listed(method="img2pc") == [
        "img2pc_srunet34",
        "img2pc_srunet34.rooms",
        "img2pc_stage1_r18",
        "img2pc_stage1_r18.rooms",
    ]
    assert listed(data="nuscenes") == ["slidr_srunet34.nuscenes"]
    assert listed(data="imagenet+scannet") == ["moco_v2_in_sn_combine_r50", "moco_v2_in_sn_mixing_r50"]
    assert list_backbones("nothing*") == []


def test_license_groups_tell_scannet_from_rooms():
    assert not set(list_backbones(license="non-commercial")) & set(list_backbones(license="permissive"))
    assert len(listed(license="non-commercial")) == 43
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


MADE_FOR = {entry.name: entry for entry in catalog.ENTRIES}  # before weights of this project were given away
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
    assert set(listed(status="published-by-authors")) == set(BY_AUTHORS)
    for name in NAMES:
        files = CATALOG[name].authors_files
        expected = BY_AUTHORS.get(name, [])
        assert [(file.format, " ".join(file.roles)) for file in files] == [tuple(rest) for _, *rest in expected]
        for file, (place, *_) in zip(files, expected, strict=True):
            drive = f"https://drive.google.com/file/d/{place}/view"
            assert file.url == (file.url[: -len(place)] + place if "/" in place else drive)
            assert (file.size, file.sha256) == (None, None)  # nobody published them
    urls = [file.url for entry in CATALOG.values() for file in entry.authors_files]
    assert len(urls) == len(set(urls)) >= sum(map(len, BY_AUTHORS.values()))
    assert {url.partition("://")[0] for url in urls if "kaldir" in url} == {"http"}  # no https there


def test_statuses_are_honest():
    by_status = {status: listed(status=status) for status in STATUSES}
    assert set(by_status["published-here"]) == set(SHIPPED)
    assert set(by_status["published-by-authors"]) == set(BY_AUTHORS)
    assert [name for name in listed() if name in (*by_status["regenerable"], *SHIPPED)] == [
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
    assert sum(map(len, by_status.values())) == len(NAMES)


def test_contracts_of_2d_networks():
    """Pri3D's, MoCo's crops, and the mean and deviation of monodepth2 for the network of Janda et al."""
    seen = {}
    for name in NAMES_2D:
        contract = MADE_FOR[name].contract
        key = (contract.size, contract.interpolation, contract.mean[0], contract.std[2])
        seen.setdefault(key, []).append(name)
        assert contract.channels == ("R", "G", "B")
    assert seen.pop(((224, 224), "bilinear", 0.485, 0.225)) == [n for n in NAMES_2D if n.startswith("moco")]
    assert seen.pop(((180, 360), "nearest", 0.485, 0.225)) == ["pri3d_view_r50.kitti_180", "pri3d_view_r50.megadepth"]
    assert seen.pop(((72, 96), "nearest", 0.485, 0.225)) == ["pri3d_view_r18.rooms_toy"]
    assert seen.pop(((240, 320), "bilinear", 0.45, 0.225)) == ["img2pc_stage1_r18", "img2pc_stage1_r18.rooms"]
    assert seen.pop(((120, 160), "nearest", 0.485, 0.225)) == ["pri3d_view_r18.rooms"]
    assert list(seen) == [((240, 320), "nearest", 0.485, 0.225)]
    assert len(seen.popitem()[1]) == 26
    assert CATALOG["img2pc_stage1_r18"].contract.mean == (0.45, 0.45, 0.45)
    assert CATALOG["img2pc_stage1_r18"].contract.std == (0.225, 0.225, 0.225)


def test_contracts_of_3d_networks_are_those_of_the_released_code():
    """Voxel, features and their scaling: ones for PointContrast, shifted colors for CSC, intensity for SLidR.

    Our own weights of CSC were trained at twice the voxel size.
    """
    seen = {}
    assert CATALOG["csc_srunet34.rooms"].contract == dataclasses.replace(
        CATALOG["csc_100k_srunet34"].contract, voxel_size=0.05
    )
    for name in set(NAMES_3D) - {"csc_srunet34.rooms"}:
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
    for name in listed():
        entry, args = CATALOG[name], CATALOG[name].arch.args
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
    assert {CATALOG[name].arch.args["stem_kernel"] for name in NAMES_3D} == {3}
    assert {CATALOG[name].arch.args.get("width") for name in NAMES} == {32, 64}


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
    assert counted == {str(CATALOG[name].arch) for name in NAMES}  # no architecture was left out


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
    for entry in MADE_FOR.values():
        if entry.recipe is not None:
            recipe = recipes.load_recipe(entry.recipe)
            assert recipe.name == entry.name
            assert recipe.data.source == entry.data.lower().split("+")[-1]  # what is mixed in is no frames
            if entry.modality == "2d":
                assert recipe.model.encoder == entry.arch.encoder_name
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


# --- ways to get one, and names of old


def test_how_to_get_says_what_a_user_can_do():
    url = "https://drive.google.com/file/d/1zdzny9QrJBYsVkrp_GUptsuByaaEWvAT/view"
    assert backbone_info("pri3d_view_r50").how_to_get() == (
        f"fetch the authors' file by hand ({url}), make a folder of it with "
        "`geo-pretrain convert FILE --from pri3d --name pri3d_view_r50 --out DIR` and load DIR; or make it with "
        "`geo-pretrain train pri3d_view_r50 --data scannet:PATH --out DIR` and load DIR"
    )
    assert MADE_FOR["pri3d_view_r18.rooms"].how_to_get() == (
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
