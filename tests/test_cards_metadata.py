"""The Hub can read the metadata of cards; contract and limits of a card are those of its network."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from geo_pretrain import cards
from geo_pretrain.cards.front_matter import license_fields
from geo_pretrain.catalog import CATALOG, Arch, License
from geo_pretrain.catalog.entry import Result
from geo_pretrain.contract import ImageContract, VoxelContract
from tests.cards_reading import (
    PUBLISHED,
    ROOMS,
    every_kind_of_card,
    metadata,
    section,
    tables,
)
from tests.zoo import ARCH, ARCH_3D, CONTRACT, LICENSE

# ---- what the Hub reads ----

# The Hub's identifiers (huggingface.co/docs/hub/repositories-licenses), as far as anything here may need them.
HUB_LICENSES = {"mit", "apache-2.0", "bsd-3-clause", "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"}
HUB_LICENSES |= {"unknown", "other"}


@pytest.mark.parametrize(
    "identifier, fields",
    [
        ("MIT", ("mit",)),
        ("Apache-2.0", ("apache-2.0",)),
        ("CC-BY-NC-SA-3.0", ("cc-by-nc-sa-3.0",)),
        ("CC-BY-NC-4.0", ("cc-by-nc-4.0",)),
        ("CC0-1.0", ("cc0-1.0",)),
        ("GPL-3.0-only", ("gpl-3.0",)),
        ("LGPL-2.1-or-later", ("lgpl-2.1",)),
        ("ODbL-1.0", ("odbl",)),
        ("PDDL-1.0", ("pddl",)),
        ("ODC-By-1.0", ("odc-by",)),
        ("LicenseRef-unstated", ("unknown",)),
        ("LicenseRef-ScanNet-ToU", ("other", "scannet-tou", "https://kaldir.vc.in.tum.de/scannet/ScanNet_TOS.pdf")),
        ("LicenseRef-ImageNet-terms", ("other", "imagenet-terms", "https://www.image-net.org/download.php")),
        ("LicenseRef-data-owner", ("other", "data-owner")),
        ("0BSD", ("other", "0bsd", "https://spdx.org/licenses/0BSD.html")),
        ("EUPL-1.2", ("other", "eupl-1.2", "https://spdx.org/licenses/EUPL-1.2.html")),
    ],
)
def test_licenses_are_written_in_the_hubs_words(identifier: str, fields: tuple[str, ...]):
    keys = ("license", "license_name", "license_link")
    assert license_fields(identifier) == dict(zip(keys, fields, strict=False))


@pytest.mark.parametrize("kind", list(every_kind_of_card()))
def test_the_hubs_own_client_reads_and_keeps_the_front_matter(kind: str):
    card = every_kind_of_card()[kind]
    data = metadata(card)
    read = ModelCard(card)
    assert read.data.to_dict() == data
    assert metadata(read.content) == data, "the client writes back what it read"
    assert ModelCardData(**data).to_dict() == data
    assert (
        not set(data)
        - {*["license", "license_name", "license_link", "library_name", "pipeline_tag", "tags"]}
        - {*["datasets", "base_model", "model-index"]}
    )
    assert data["library_name"] == "geo_pretrain"
    assert data["license"] in HUB_LICENSES
    assert (data["license"] == "other") == ("license_name" in data)
    assert re.fullmatch(r"[a-z0-9.-]+", data.get("license_name", "x"))
    assert data.get("pipeline_tag", "image-feature-extraction") == "image-feature-extraction"
    assert ("pipeline_tag" in data) == ("image" in data["tags"]) == ("point-cloud" not in data["tags"])
    assert len(set(data["tags"])) == len(data["tags"])
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]*", tag) for tag in data["tags"])
    assert {"self-supervised", "safetensors"} <= set(data["tags"])
    if "model-index" in data:
        name, results = model_index_to_eval_results(data["model-index"])
        assert eval_results_to_model_index(name, results) == data["model-index"]


@pytest.mark.parametrize(
    "name, license, tags, datasets, base_model",
    [
        (
            "pri3d_view_geo_r50",
            "other",
            "pri3d image resnet unet scannet imagenet rgb-d",
            ["ILSVRC/imagenet-1k"],
            "timm/resnet50.tv_in1k",
        ),
        (
            "pri3d_geo_r18",
            "other",
            "pri3d image resnet unet scannet imagenet rgb-d",
            ["ILSVRC/imagenet-1k"],
            "timm/resnet18.tv_in1k",
        ),
        (
            "pri3d_unsup_geo_r50",
            "other",
            "pri3d image resnet unet scannet imagenet rgb-d",
            ["ILSVRC/imagenet-1k"],
            None,
        ),
        (
            "pri3d_view_r50.kitti",
            "cc-by-nc-sa-3.0",
            "pri3d image resnet unet kitti imagenet lidar",
            ["ILSVRC/imagenet-1k"],
            "timm/resnet50.tv_in1k",
        ),
        (
            "pri3d_view_r50.megadepth",
            "unknown",
            "pri3d image resnet unet megadepth imagenet",
            ["ILSVRC/imagenet-1k"],
            "timm/resnet50.tv_in1k",
        ),
        (ROOMS, "mit", "pri3d image resnet unet rooms rgb-d", None, None),
        ("img2pc_stage1_r18", "other", "img2pc image resnet unet scannet", None, None),
        (
            "pointcontrast_nce_srunet34",
            "other",
            "pointcontrast point-cloud sparse-unet minkowski scannet rgb-d",
            None,
            None,
        ),
        (
            "slidr_srunet34.nuscenes",
            "cc-by-nc-sa-4.0",
            "slidr point-cloud sparse-unet minkowski nuscenes imagenet lidar",
            ["ILSVRC/imagenet-1k"],
            None,  # the image network was its teacher, not its start
        ),
        (
            "ppkt_srunet34",
            "other",
            "ppkt point-cloud sparse-unet minkowski scannet imagenet rgb-d",
            ["ILSVRC/imagenet-1k"],
            None,  # a teacher again, and one that the Hub has
        ),
    ],
)
def test_the_front_matter_of_known_entries(name, license, tags, datasets, base_model):
    data = metadata(cards.render_entry(CATALOG[name]))
    assert data["license"] == license
    if name == "img2pc_stage1_r18":  # whatever else its chain holds
        assert set(tags.split()) <= set(data["tags"])
        return
    assert data["tags"] == [*tags.split(), "self-supervised", "safetensors"]
    assert data.get("datasets") == datasets
    assert data.get("base_model") == base_model


def test_tags_of_two_data_sets_of_one_kind_stand_once():
    license = License(
        code="MIT",
        weights="LicenseRef-ScanNet-ToU",
        datasets=(
            ("ScanNet", "LicenseRef-ScanNet-ToU"),
            ("rooms", "MIT"),
            ("RGB-D folder in 7-Scenes layout", "LicenseRef-data-owner"),
        ),
        base_model="none",
    )
    found = metadata(cards.render_card("my_net_r18", ARCH, CONTRACT, license, {}))["tags"]
    expected = "image resnet unet scannet rooms rgb-d-folder-in-7-scenes-layout rgb-d self-supervised safetensors"
    assert found == expected.split()


def test_start_weights_named_on_the_hub_exist_there():
    timm = pytest.importorskip("timm")
    named = {metadata(card).get("base_model") for card in every_kind_of_card().values()} - {None}
    assert named == {"timm/resnet18.tv_in1k", "timm/resnet50.tv_in1k"}
    assert {name.removeprefix("timm/") for name in named} <= set(timm.list_pretrained("resnet*"))


def test_the_authors_own_weights_carry_their_numbers_as_metadata_and_ours_what_was_measured():
    with_numbers = {name for name, entry in CATALOG.items() if "model-index" in metadata(cards.render_entry(entry))}
    ours = {name for name, entry in CATALOG.items() if entry.measured}
    assert with_numbers == {name for name in PUBLISHED if CATALOG[name].results} | ours
    assert len(with_numbers) >= 15
    assert "pri3d_view_r18" not in with_numbers  # its numbers are known, its weights are not public


def test_what_was_measured_is_in_the_metadata_with_what_stands_beside_it_or_not():
    numbers = [Result("dense matching", "rooms", "recall (%)", 57.8, "x.json", note) for note in ("random: 11.2", "")]
    for number in numbers:
        card = cards.render_entry(replace(CATALOG["pri3d_view_r18.rooms"], measured=(number,)))
        (entry,) = metadata(card)["model-index"]
        assert [result["metrics"][0]["value"] for result in entry["results"]] == [57.8]


def test_no_card_has_an_empty_list_of_numbers():
    for entry in CATALOG.values():
        for index in metadata(cards.render_entry(entry)).get("model-index", []):
            assert index["results"], entry.name


def test_reported_numbers_in_the_metadata_name_their_paper():
    index = metadata(cards.render_entry(CATALOG["pri3d_view_geo_r18"]))["model-index"]
    paper = "Pri3D: Can 3D Priors Help 2D Representation Learning? (ICCV 2021)"

    def expected(dataset: str, kind: str, value: float, table: str) -> dict[str, Any]:
        return {
            "task": {"type": "semantic-segmentation", "name": "Semantic segmentation"},
            "dataset": {"name": dataset, "type": kind},
            "metrics": [{"type": "mean_iou", "value": value, "name": "mIoU"}],
            "source": {"url": "https://arxiv.org/abs/2104.11225", "name": f"{paper}, {table}"},
        }

    results = [expected("ScanNet", "scannet", 55.7, "T1"), expected("NYUv2", "nyuv2", 48.1, "T5")]
    assert index == [{"name": "pri3d_view_geo_r18", "results": results}]


def test_a_number_of_another_paper_is_credited_to_it():
    card = cards.render_entry(CATALOG["moco_v2_sup_in_sn_r50"])  # its method is MoCo v2's, its numbers are Pri3D's
    results = metadata(card)["model-index"][0]["results"]
    assert {result["source"]["url"] for result in results} == {"https://arxiv.org/abs/2104.11225"}
    assert "stated by [Pri3D: Can 3D Priors" in section(card, "Reported by the authors")
    assert "https://arxiv.org/abs/2003.04297" in section(card, "Citation")
    ppkt = section(cards.render_entry(CATALOG["gupta_srunet34"]), "Reported by the authors")
    assert "Contrastive Pixel-to-Point" in ppkt
    assert "which are not public" in ppkt


def test_details_of_a_task_and_several_metrics_stay_apart():
    results = metadata(cards.render_entry(CATALOG["pri3d_view_geo_r50"]))["model-index"][0]["results"]
    found = {
        (r["task"]["type"], r["dataset"]["name"], m["name"]): (m["type"], m["value"])
        for r in results
        for m in r["metrics"]
    }
    stated = {(r.task, r.dataset, r.metric) for r in CATALOG["pri3d_view_geo_r50"].results}
    assert len(found) == len(stated)  # the first of several numbers of a benchmark
    assert found["semantic-segmentation", "ScanNet", "mIoU"] == ("mean_iou", 61.7)
    assert found["semantic-segmentation", "ScanNet", "mIoU, PSPNet"] == ("mean_iou", 62.8)
    assert found["semantic-segmentation", "ScanNet", "mIoU, 20 % of the training scenes"] == ("mean_iou", 51.5)
    assert found["object-detection", "NYUv2", "AP75"] == ("ap75", 20.4)
    assert found["instance-segmentation", "ScanNet", "AP"] == ("ap", 18.7)
    three_d = metadata(cards.render_entry(CATALOG["pointcontrast_nce_srunet34"]))["model-index"][0]["results"]
    assert {r["task"]["type"] for r in three_d} >= {"3d-semantic-segmentation", "3d-object-detection", "classification"}
    assert next(r for r in three_d if r["dataset"]["name"] == "SUN RGB-D")["dataset"]["type"] == "sun-rgb-d"


# ---- what goes in ----


@pytest.mark.parametrize(
    "arch, contract, rows",
    [
        (
            ARCH,
            ImageContract(
                mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225), size=(480, 640), interpolation="bilinear"
            ),
            {
                "channels": "R, G, B, in this order",
                "values": "[0, 1] before normalization; 8-bit images are divided by 255",
                "mean": "0.45, 0.45, 0.45",
                "standard deviation": "0.225, 0.225, 0.225",
                "size": "480x640 (height x width) in pre-training; `.transforms` resizes (bilinear)",
                "tensor": "float [B, 3, H, W], normalized",
            },
        ),
        (
            Arch("sr_unet", {"variant": "34C", "out_chans": 64, "normalize": True}),
            VoxelContract(0.025),
            {
                "voxel edge": "2.5 cm",
                "coordinates": "cartesian: x, y, z in meters",
                "channels": "3 x constant 1",
                "values": "1 everywhere; colors are not taken",
                "points of one voxel": "the first gives the features",
                "output": "64 channels a voxel, of length 1",
            },
        ),
        (
            ARCH_3D,
            VoxelContract(0.05, ("R", "G", "B"), scale=2.0, offset=-1.0, reduce="mean"),
            {
                "voxel edge": "5 cm",
                "coordinates": "cartesian: x, y, z in meters",
                "channels": "R, G, B, in this order",
                "values": "colors in [0, 1] (8-bit ones are divided by 255) * 2 - 1",
                "points of one voxel": "the features are their mean",
                "output": "32 channels a voxel",
            },
        ),
        (
            Arch("sr_unet", {"in_chans": 2}),
            VoxelContract((0.1, 1.0, 0.2), ("intensity", "one"), coordinates="cylindrical"),
            {
                "voxel edge": "0.1 m x 1 degree x 0.2 m",
                "coordinates": "cylindrical: radius, azimuth and height of x, y, z in meters, "
                "with the sensor at the origin",
                "channels": "intensity; 1 x constant 1",
                "values": "intensity",
                "points of one voxel": "the first gives the features",
                "output": "32 channels a voxel",
            },
        ),
    ],
    ids=["image", "ones", "colors", "cylinder"],
)
def test_the_contract_is_a_table(arch: Arch, contract: ImageContract | VoxelContract, rows: dict[str, str]):
    card = cards.render_card("my_net", arch, contract, LICENSE, {})
    assert {row[0]: row[1] for row in tables(section(card, "What goes in"))[0][1:]} == rows


def test_limits_say_what_the_network_was_not_shown():
    def limits(name: str) -> str:
        return section(cards.render_entry(CATALOG[name]), "Limitations")

    assert "Colors are not used" in limits("pointcontrast_nce_srunet34")
    assert "Colors are not used" not in limits("csc_100k_srunet34")
    assert "saw MegaDepth at 180x360 pixels" in limits("pri3d_view_r50.megadepth")
    assert "Rooms are procedural" in limits(ROOMS)
    assert "license limits" not in limits(ROOMS)
    assert "license limits" in limits("pri3d_view_geo_r50")
    assert "the authors report no number" in limits("pri3d_view_geo_r50.lr001")
    assert "was not measured" in limits("pri3d_view_geo_r50")
    assert "reach the numbers above was not measured" in limits("pri3d_view_r18")
