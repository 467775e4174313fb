"""Cards and tables say what the catalog says, the Hub can read them, their code runs, and those here are up to date."""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image

from geo_pretrain import cards, catalog
from geo_pretrain.backbones.build import build
from geo_pretrain.cards.front_matter import license_fields
from geo_pretrain.catalog import CATALOG, Arch, File, License, Paper, Result, list_backbones
from geo_pretrain.checkpoint import CONFIG, write_checkpoint
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import CheckpointError, GeoPretrainError, UnknownName
from tests.adapters import test_minkowski
from tests.zoo import ARCH, ARCH_3D, CONTRACT, CONTRACT_3D, LICENSE, write_tiny, write_tiny_3d

REPO = Path(__file__).resolve().parents[1]
PUBLISHED = [name for name, entry in CATALOG.items() if entry.status == "published-by-authors"]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROVENANCE = {"steps": 130, "data": {"source": "rooms", "fingerprint": "ab12"}, "skipped": {}, "notes": ""}
ROOMS = "pri3d_view_r18.rooms"  # any name of a real ResNet-18 U-Net
engine = test_minkowski.engine  # a stand-in for MinkowskiEngine


def metadata(card: str) -> dict[str, Any]:
    start, block, body = card.split("---\n", 2)
    assert start == ""
    assert body.startswith("\n# ")
    return yaml.safe_load(block)


def codes(card: str) -> list[str]:
    return PYTHON.findall(card)


def tables(card: str) -> list[list[list[str]]]:
    """Every Markdown table as rows of cells, the head first and without the line of dashes."""
    found = []
    for block in card.split("\n\n"):
        if block.startswith("| "):
            rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().splitlines()]
            assert all(set(cell) == {" ", "-"} for cell in rows[1])
            found.append([[cell.strip() for cell in row] for row in (rows[0], *rows[2:])])
    return found


def section(card: str, heading: str) -> str:
    return card.split(f"\n## {heading}\n\n", 1)[1].split("\n## ", 1)[0]


def converted(name: str, **source: str) -> dict[str, Any]:
    """The provenance of a folder that was made from an authors' file."""
    url = CATALOG[name].authors_files[0].url
    origin = {"url": url, "sha256": "e" * 64, "format": "pri3d", "content": "2D U-Net", "fetched": "2026-11-21"}
    return {"source": origin | source, "foreign": ["omegaconf.DictConfig", "numpy.core.multiarray.scalar"]} | {
        "in_the_file": {"step": 60000, "__author__": "x"},
        "converted_by": "0.1",
    }


def folder_card(name: str, provenance: dict[str, Any], **options: Any) -> str:
    entry = CATALOG[name]
    return cards.render_card(name, entry.arch, entry.contract, entry.license, provenance, **options)


# ---- cards of the catalog ----


@pytest.mark.parametrize("name", list(CATALOG))
def test_a_card_holds_the_entry(name: str):
    entry, card = CATALOG[name], cards.render_entry(CATALOG[name])
    facts = [f"\n# {name}\n", str(entry.arch), entry.description, entry.license.base_model, entry.paper.title]
    facts += [entry.paper.authors, entry.paper.url, entry.data, entry.arch.title]
    facts += [
        f"[{file.content}]({file.url}) | {file.format} | {', '.join(file.roles)} |" for file in entry.authors_files
    ]
    facts += [f"| {r.task} | {r.dataset} | {r.metric} | {r.value:g} | {r.table} |" for r in entry.results]
    for fact in facts:
        assert fact in card
    license = section(card, "License")
    for of, terms in (
        ("the weights", entry.license.weights),
        ("the code that made them", entry.license.code),
        *((f"data: {dataset}", terms) for dataset, terms in entry.license.datasets),
    ):
        assert re.search(rf"^\| {re.escape(of)} \| \[?{re.escape(terms)}[\] ]", license, re.MULTILINE)


@pytest.mark.parametrize("name", list(CATALOG))
def test_a_card_shows_what_works_for_its_status(name: str):
    entry, card = CATALOG[name], cards.render_entry(CATALOG[name])
    assert entry.status in ("published-by-authors", "regenerable", "planned")
    has_weights = entry.status != "planned"
    two_d, unet = entry.modality == "2d", "unet" in entry.arch.name and entry.modality == "2d"
    assert (f'gp.load_backbone("{name}")' in card) == has_weights
    assert (f'gp.load_backbone("{name}", pretrained=False)' in card) != has_weights
    assert (f'gp.load_backbone("{name}", decoder=True' in card) == unet
    assert ("torch.hub.load(" in card) == has_weights
    for text in (f'timm.create_model("{name}", pret', f'smp.Unet("tu-{name}"', f'resnet("{name}"'):
        assert (text in card) == (two_d and has_weights)
    assert (f'me_network("{name}")' in card) == (not two_d and has_weights)
    trained = f"geo-pretrain train {entry.recipe}" + (
        " --out" if entry.data == "rooms" else " --data scannet:PATH --out"
    )
    assert (trained in card) == (entry.recipe is not None)
    assert ("downloads their file" in card) == (entry.status == "published-by-authors")
    assert ("GEO_PRETRAIN_HUB=runs" in card) == (entry.status == "regenerable")
    for code in codes(card):  # each block stands alone in this: timm knows the names after our import
        assert ("geo_pretrain.adapters.timm" in code) == ("timm.create_model" in code or '"tu-' in code)
    if entry.status == "published-by-authors":
        by_hand = f"`geo-pretrain convert FILE --from {entry.authors_files[0].format} --name {name} --out DIR`"
        assert by_hand in card


@functools.cache
def every_kind_of_card() -> dict[str, str]:
    known = {name: cards.render_entry(entry) for name, entry in CATALOG.items()}
    measured = (Result("dense matching", "rooms val", "recall at 4 px", 0.61, "eval matching"),)
    known["run"] = cards.render_card("my_net_r18", ARCH, CONTRACT, LICENSE, PROVENANCE, recipe="x", results=measured)
    known["unfinished"] = cards.render_card("my_net", ARCH_3D, CONTRACT_3D, LICENSE, {"seed": None}, finished=False)
    for name in PUBLISHED:
        known[f"converted {name}"] = folder_card(name, converted(name))
    known["here"] = cards.render_entry(published_here())
    return known


def published_here():
    file = {"size": 94_301_232, "sha256": "5" * 64, "sources": (f"hf-hub:someone/{ROOMS}@{'c' * 40}",)}
    files = [File(role, f"{role}.safetensors", **file) for role in ("encoder", "decoder", "golden")]
    return replace(CATALOG[ROOMS], status="published-here", files=tuple(files))


@pytest.mark.parametrize("kind", list(every_kind_of_card()))
def test_a_card_has_no_holes(kind: str):
    card = every_kind_of_card()[kind]
    assert "None" not in PYTHON.sub("", card)  # in code it is an index
    assert "\n\n\n" not in card
    assert card.endswith("\n")
    assert not card.endswith("\n\n")
    assert not re.search(r"[ \t]$", card, re.MULTILINE)
    assert all(character == "\n" or character.isprintable() for character in card)
    for table in tables(card):
        assert len(table) > 1, "a table without rows"
        for row in table:
            assert len(row) == len(table[0])
            assert all(row), row
    headings = re.findall(r"^#+ .*$", card, re.MULTILINE)
    assert len(set(headings)) == len(headings)
    for heading in ("Use", "What goes in", "Limitations", "License"):
        assert section(card, heading).strip()
    assert all(line.startswith("- ") for line in section(card, "Limitations").strip().splitlines())
    for text, target in re.findall(r"\[([^\]\n]*)\]\(([^)\s]*)\)", card):
        assert text
        assert re.fullmatch(r"https?://[\w.-]+/\S*", target), target


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


def test_only_the_authors_own_weights_carry_the_authors_numbers_as_metadata():
    with_numbers = {name for name, entry in CATALOG.items() if "model-index" in metadata(cards.render_entry(entry))}
    assert with_numbers == {name for name in PUBLISHED if CATALOG[name].results}
    assert len(with_numbers) >= 15
    assert "pri3d_view_r18" not in with_numbers  # its numbers are known, its weights are not public


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
    assert len(found) == len(CATALOG["pri3d_view_geo_r50"].results)
    assert found["semantic-segmentation", "ScanNet", "mIoU"] == ("mean_iou", 61.7)
    assert found["semantic-segmentation", "ScanNet", "mIoU, PSPNet"] == ("mean_iou", 62.8)
    assert found["semantic-segmentation", "ScanNet", "mIoU, 20 % of the training scenes"] == ("mean_iou", 51.5)
    assert found["object-detection", "NYUv2", "AP75"] == ("ap75", 20.4)
    assert found["instance-segmentation", "ScanNet", "AP"] == ("ap", 18.7)
    three_d = metadata(cards.render_entry(CATALOG["pointcontrast_nce_srunet34"]))["model-index"][0]["results"]
    assert {r["task"]["type"] for r in three_d} >= {"3d-semantic-segmentation", "3d-object-detection", "classification"}
    assert next(r for r in three_d if r["dataset"]["name"] == "SUN RGB-D")["dataset"]["type"] == "sun-rgb-d"


# ---- cards of folders ----


def test_the_card_of_a_run_holds_its_provenance_and_what_was_measured():
    results = (
        Result("dense matching", "rooms val", "recall at 4 px", 0.61, "eval matching"),
        Result("semantic segmentation, 48 images", "rooms val", "mIoU", 6.8, "demo"),
    )
    card = cards.render_card(
        "my_net_r18", ARCH, CONTRACT, LICENSE, PROVENANCE, recipe="my_net_r18", finished=False, results=results
    )
    for fact in (
        "# my_net_r18",
        "**Unfinished**",
        "- steps: 130\n- data:\n  - source: rooms\n  - fingerprint: ab12",
        "ResNet-18 U-Net, width 8",
        "| recipe | `geo-pretrain train my_net_r18` |",
        "| the weights | [MIT](https://spdx.org/licenses/MIT.html) |",
        "## Measured",
        "| dense matching | rooms val | recall at 4 px | 0.61 | eval matching |",
        'gp.load_backbone("path/to/this/folder")',
    ):
        assert fact in card
    assert "skipped" not in card
    assert "notes" not in card
    assert "Reported" not in card
    assert "## Citation" not in card  # nobody's method
    index = metadata(card)["model-index"][0]
    assert [r["metrics"][0] for r in index["results"]] == [
        {"type": "recall-at-4-px", "value": 0.61, "name": "recall at 4 px"},
        {"type": "mean_iou", "value": 6.8, "name": "mIoU, 48 images"},
    ]
    assert all("source" not in result for result in index["results"])
    plain = cards.render_card("my_net_r18", ARCH, CONTRACT, LICENSE, PROVENANCE)
    assert "Unfinished" not in plain
    assert "Measured" not in plain
    assert "model-index" not in plain
    assert "was not measured" in section(plain, "Limitations")
    assert "was not measured" not in section(card, "Limitations")


def test_a_run_under_a_published_name_never_carries_the_authors_numbers():
    card = folder_card("pri3d_view_geo_r50", PROVENANCE)
    assert "model-index" not in metadata(card)
    assert "Reported" not in card
    assert "61.7" not in card
    assert "hou2021pri3d" in card  # its method is theirs
    tagged = cards.render_card("pri3d_view_r18.kitchen", ARCH, CONTRACT, LICENSE, PROVENANCE)
    assert "hou2021pri3d" in tagged
    assert metadata(tagged)["tags"][0] == "pri3d"
    assert "timm" not in section(tagged, "Use")  # no library finds it by its name


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_converted_from_the_authors_file_carries_their_numbers(name: str):
    entry, card = CATALOG[name], folder_card(name, converted(name))
    assert entry.authors_files[0].url in section(card, "Provenance")
    assert "- foreign: omegaconf.DictConfig, numpy.core.multiarray.scalar\n" in card
    for r in entry.results:
        assert f"| {r.task} | {r.dataset} | {r.metric} | {r.value:g} | {r.table} |" in card
    assert ("model-index" in metadata(card)) == bool(entry.results)
    assert "## Measured" not in card


def test_another_file_converted_under_a_published_name_carries_no_numbers():
    name = "pri3d_view_geo_r50"
    elsewhere = folder_card(name, converted(name, url="https://example.org/mine.pth"))
    assert "Reported" not in elsewhere
    assert "model-index" not in metadata(elsewhere)
    renamed = cards.render_card("my_r50", CATALOG[name].arch, CATALOG[name].contract, LICENSE, converted(name))
    assert "Reported" not in renamed
    claimed = folder_card(name, {"source": converted(name)["source"]})  # a run that mentions an address
    assert "Reported" not in claimed


def test_the_bytes_of_an_authors_file_are_enough_to_know_it(monkeypatch: pytest.MonkeyPatch):
    name = "pri3d_view_geo_r50"
    entry = CATALOG[name]
    known = replace(entry, authors_files=(replace(entry.authors_files[0], sha256="e" * 64, size=700_000_000),))
    monkeypatch.setattr(cards, "CATALOG", {**CATALOG, name: known})
    by_hand = converted(name, url="view_geo.pth", sha256="e" * 64)
    assert "| semantic segmentation | ScanNet | mIoU | 61.7 | T1 |" in folder_card(name, by_hand)
    assert "Reported" not in folder_card(name, converted(name, url="view_geo.pth", sha256="f" * 64))
    assert f"| 700,000,000 | `{'e' * 64}` |" in cards.render_entry(known)


def test_numbers_measured_here_never_mix_with_reported_ones():
    name = "pri3d_view_geo_r18"
    measured = (Result("semantic segmentation", "ScanNet", "mIoU", 55.1, "eval"),)
    card = folder_card(name, converted(name), results=measured)
    assert "55.1" in section(card, "Measured")
    assert "55.7" not in section(card, "Measured")
    assert "55.1" not in section(card, "Reported by the authors")
    assert [r["metrics"][0]["value"] for r in metadata(card)["model-index"][0]["results"]] == [55.1]


def test_a_folder_without_decoder_shows_none():
    name = "pri3d_view_geo_r18"
    assert "decoder=True" in folder_card(name, converted(name))
    assert "decoder=True" in folder_card(name, converted(name), roles=("encoder", "decoder"))
    assert "decoder=True" not in folder_card(name, converted(name), roles=("encoder",))


def test_where_the_folder_lies_is_said_in_every_snippet():
    here = folder_card(ROOMS, PROVENANCE)
    assert f"`export GEO_PRETRAIN_HUB=PARENT`, the folder that holds this one as `{ROOMS}`" in here
    source = f"hf-hub:someone/{ROOMS}"
    there = folder_card(ROOMS, PROVENANCE, source=source)
    assert f'gp.load_backbone("{source}")' in there
    assert f'resnet("{source}"' in there
    assert "`export GEO_PRETRAIN_HUB=hf:someone`" in there
    assert "this/folder" not in there
    pinned = folder_card(ROOMS, PROVENANCE, source=f"{source}@{'c' * 40}")
    assert "`export GEO_PRETRAIN_HUB=hf:someone`" in pinned
    other = folder_card(ROOMS, PROVENANCE, source="hf-hub:someone/kitchen")
    assert "GEO_PRETRAIN_HUB" not in other
    assert "timm" not in section(other, "Use")


def test_texts_from_other_peoples_files_stay_text():
    """Provenance holds what an authors' file says of itself."""
    hostile = {"in_the_file": {"__author__": "x\n\n# License: MIT\n---\n<script>`*[a](http://b)", "<b>": 1}}
    card = cards.render_card("my_net", ARCH, CONTRACT, LICENSE, hostile | {"foreign": ["os.system\n## Use", "`rm`"]})
    assert card.count("\n# ") == 1
    assert card.count("\n## Use\n") == 1
    provenance = section(card, "Provenance")
    assert re.findall(r"^ *- ", provenance, re.MULTILINE) == ["- ", "  - ", "  - ", "- "]
    for mark in ("<", "`", "*", "["):
        assert not re.search(rf"(?<!\\){re.escape(mark)}", provenance), mark
    assert ModelCard(card).data.to_dict() == metadata(card)


def test_a_published_checkpoint_lists_its_files():
    card = cards.render_entry(published_here())
    source = f"hf-hub:someone/{ROOMS}@{'c' * 40}"
    assert f"| `encoder.safetensors` | encoder | 94,301,232 | `{'5' * 64}` | {source} |" in card
    assert "fetches the files below" in card
    assert "geo-pretrain train" not in card
    assert f'gp.load_backbone("{ROOMS}", decoder=True)' in card


# ---- geo-pretrain card ----


def test_the_card_of_a_name_is_the_catalogs():
    assert cards.card_of("csc_100k_srunet34") == cards.render_entry(CATALOG["csc_100k_srunet34"])


def test_the_card_of_a_folder_is_rendered_from_its_config(tmp_path: Path):
    folder = write_tiny(tmp_path / "tiny").folder
    for given in (folder, str(folder)):
        card = cards.card_of(given)
        assert "\n# tiny_net_r18\n" in card
        assert "- steps: 7\n- seed: 0" in card
        assert "| recipe | `geo-pretrain train path/to/this/folder/recipe.yaml` |" in card
        files = {row[0].strip("`"): row[1:] for row in tables(section(card, "Files"))[0][1:]}
        assert set(files) == {path.name for path in folder.iterdir()} - {CONFIG, "README.md"}
        for name, (role, size, digest) in files.items():
            data = (folder / name).read_bytes()
            assert (int(size.replace(",", "")), digest.strip("`")) == (len(data), hashlib.sha256(data).hexdigest())
            assert name.startswith(role) or role in ("log", "recipe")
    for path in folder.iterdir():
        if path.name != CONFIG:
            path.unlink()
    assert cards.card_of(folder) == card  # of config.json alone


def test_the_card_of_a_converted_folder_has_no_recipe_that_made_it(tmp_path: Path):
    checkpoint = write_tiny(tmp_path / "tiny", recipe_yaml=None, log=None, provenance={"converted_by": "0.1"})
    assert "recipe" not in cards.card_of(checkpoint.folder)
    weights = {"encoder": {"conv1.weight": torch.zeros(1)}}
    alone = write_tiny(tmp_path / "alone", weights=weights)
    assert "decoder=True" not in cards.card_of(alone.folder)


def test_a_folder_wins_over_a_name_and_other_names_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    name = "pri3d_view_r18"
    (tmp_path / name).mkdir()  # somebody's empty folder
    assert cards.card_of(name) == cards.render_entry(CATALOG[name])
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        cards.card_of(Path(name))
    write_tiny(tmp_path / name)
    assert "\n# tiny_net_r18\n" in cards.card_of(name)
    (tmp_path / "notes").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        cards.card_of("notes")
    with pytest.raises(CheckpointError, match="does not exist"):
        cards.card_of("./pri3d_view_r50")
    with pytest.raises(UnknownName, match="'pri3d_view_geo_r50'"):
        cards.card_of("pri3d_viewgeo_r50")


def test_an_old_name_warns_and_gives_the_card_of_the_new_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalog, "RENAMED", {"pri3d_old_r18": "pri3d_view_r18"})
    with pytest.warns(FutureWarning, match="'pri3d_view_r18' now"):
        assert "\n# pri3d_view_r18\n" in cards.card_of("pri3d_old_r18")


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


# ---- code ----


@pytest.mark.parametrize("kind", list(every_kind_of_card()))
def test_code_compiles_and_the_names_it_uses_exist(kind: str):
    blocks = codes(every_kind_of_card()[kind])
    assert blocks
    known = set(dir(builtins))
    modules: dict[str, Any] = {}
    for code in blocks:
        for node in ast.walk(tree := ast.parse(code)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if importlib.util.find_spec(alias.name.split(".")[0]) is None:
                        assert alias.name == "MinkowskiEngine"
                        continue
                    bound = alias.asname or alias.name.split(".")[0]
                    module = importlib.import_module(alias.name)
                    modules[bound] = module if alias.asname else sys.modules[bound]
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)
        for statement in tree.body:
            used = [n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
            assert set(used) <= known, f"{set(used) - known} is not defined before {ast.unparse(statement)}"
            known |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            if isinstance(statement, ast.Import | ast.ImportFrom):
                known |= {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
            for n in ast.walk(statement):  # gp.load_backbone, timm.create_model, np.load
                if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in modules:
                    assert hasattr(modules[n.value.id], n.attr), ast.unparse(n)


def run(card: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Execute a card's code, all of it, from top to bottom, as a reader would."""
    names = {} if names is None else names
    for code in codes(card):
        exec(compile(code, "card", "exec"), names)
    return names


def comment(card: str, line: str) -> str:
    return re.search(rf"^{re.escape(line)}.*  # (.*)$", card, re.MULTILINE)[1]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the snippets name: an image, a cloud, a clone of this project."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save("image.jpg")
    points = rng.uniform(0, 1, (200, 3)).astype(np.float32)
    colors = rng.integers(0, 256, (200, 3), dtype=np.uint8)
    np.savez("cloud.npz", points=points, colors=colors, intensity=rng.random((200, 1), dtype=np.float32))
    (tmp_path / "path" / "to" / "this").mkdir(parents=True)
    (tmp_path / "path" / "to" / "geo_pretrain").symlink_to(REPO)
    return tmp_path


def test_the_code_of_a_tiny_2d_card_runs(place: Path):
    checkpoint = write_tiny(place / "path" / "to" / "this" / "folder")
    card = cards.card_of(checkpoint.folder)
    names = run(card)
    channels, strides = re.fullmatch(r"(.*) channels at strides (.*)", comment(card, "maps = ")).groups()
    assert [str(m.shape[1]) for m in names["maps"]] == channels.split(", ")
    assert [str(64 // m.shape[2]) for m in names["maps"]] == strides.split(", ")
    assert str(list(names["features"].shape)) == comment(card, "features = ") == "[1, 32, 32, 48]"
    assert len(codes(card)) == 1  # it fits no other library: its width is 8


@pytest.mark.parametrize(
    "arch, size",
    [
        (Arch("resnet_unet", {"depth": 18, "width": 8}), (33, 50)),
        (Arch("resnet_unet", {"depth": 50, "width": 8}), (64, 90)),
        (Arch("resnet_depth_unet", {"depth": 18, "width": 8}), (33, 50)),
        (Arch("resnet_depth_unet", {"depth": 18, "width": 8, "out_chans": 5}), (64, 32)),
        (Arch("resnet", {"depth": 34, "width": 8}), (32, 64)),
    ],
    ids=str,
)
def test_shapes_in_2d_cards_are_those_of_the_networks(arch: Arch, size: tuple[int, int]):
    contract = ImageContract(size=size)
    card = cards.render_card("my_net", arch, contract, LICENSE, {})
    network = build(arch, decoder="unet" in arch.name).eval()
    image = torch.zeros(1, 3, *size)
    encoder = getattr(network, "encoder", network)
    channels = ", ".join(str(info["num_chs"]) for info in encoder.feature_info)
    assert comment(card, "maps = ").startswith(f"{channels} channels at")
    assert ("features = " in card) == ("unet" in arch.name)
    if "unet" in arch.name:
        with torch.no_grad():
            assert comment(card, "features = ") == str(list(network(image).shape))


@pytest.mark.parametrize(
    "contract",
    [
        CONTRACT_3D,
        VoxelContract(0.05),
        VoxelContract((0.1, 5.0, 0.1), ("intensity", "one", "one"), coordinates="cylindrical"),
    ],
    ids=["colors", "ones", "intensity"],
)
def test_the_code_of_a_3d_card_runs(place: Path, contract: VoxelContract, engine):
    checkpoint = write_tiny_3d(place / "path" / "to" / "this" / "folder", contract=contract)
    card = cards.card_of(checkpoint.folder)
    names = run(card)
    assert names["features"].shape == (200, sum(m.feats.shape[1] for m in names["maps"]))
    assert f"[{len(names['points'])}, {names['network'].final.kernel.shape[1]}]" == str([200, 32])
    assert comment(card, "output = network.encode_points(") == "[N, 32]: what the loss saw"
    assert names["output"].F.shape == (len(names["voxels"].coords), 32)
    assert list(names["weights"]) == list(names["network"].state_dict())
    assert ("intensity" in names) == ("intensity" in contract.channels)
    assert ("colors" in names) == ("R" in contract.channels)


@pytest.fixture(scope="module")
def real_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub folder with a ResNet-18 U-Net of the real width, as `geo-pretrain train --out runs/NAME` leaves it."""
    entry, hub = CATALOG[ROOMS], tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    network = build(entry.arch, decoder=True)
    write_checkpoint(
        hub / ROOMS,
        name=ROOMS,
        arch=entry.arch,
        contract=entry.contract,
        weights={"encoder": network.encoder.state_dict(), "decoder": network.decoder.state_dict()},
        golden={"input": torch.zeros(1)},
        license=entry.license,
        provenance={},
        recipe_yaml="name: x\n",
        log="",
        card="# x\n",
    )
    return hub


@pytest.mark.parametrize("of", ["name", "folder"])
def test_the_code_of_a_real_2d_card_runs_in_every_library(place: Path, real_hub: Path, of: str, monkeypatch):
    """The catalog's card after its recipe was run, and the folder's own card."""
    for library in ("timm", "segmentation_models_pytorch"):
        pytest.importorskip(library)
    if of == "name":
        card = cards.card_of(ROOMS)
        variable, hub = re.search(r"^export (\w+)=(\w+)$", card, re.MULTILINE).groups()
        (place / hub).symlink_to(real_hub)
    else:
        (place / "path" / "to" / "this" / "folder").symlink_to(real_hub / ROOMS)
        card = cards.card_of(real_hub / ROOMS)
        variable, parent = re.search(r"`export (\w+)=(PARENT)`", card).groups()
        hub = str(real_hub)
        assert parent == "PARENT"
    monkeypatch.setenv(variable, hub)
    assert len(codes(card)) == 5
    seen: dict[str, Any] = {}
    image = torch.rand(1, 3, 64, 64)
    stem = None
    for code in codes(card):
        names = run(f"```python\n{code}\n```", {"image": seen.get("image")})
        seen |= names
        found = [value for value in names.values() if isinstance(value, torch.nn.Module)]
        for network in found:  # each one has the checkpoint's weights
            weight = next(iter(network.state_dict().values()))
            stem = weight if stem is None else stem
            assert weight.shape == (64, 3, 7, 7)
            assert torch.equal(weight, stem)
            with torch.no_grad():
                network.eval()(image)
        assert found
    assert str(list(seen["maps"][0].shape)) == "[1, 64, 120, 160]"


# ---- tables ----


def test_the_table_has_a_row_for_every_name():
    text = cards.catalog_table()
    images, points = text.split("\n\n**For point clouds**\n\n")
    assert images.startswith("**For images**\n\n| name |")
    rows = {}
    for block, modality in ((images, "2d"), (points, "3d")):
        head, *body = tables(block)[0]
        assert head == ["name", "network", "data", "weights' license", "weights from", "reported"]
        assert [row[0].split("`")[1] for row in body] == list_backbones(modality=modality)
        rows |= {row[0].split("`")[1]: row for row in body}
    assert rows["pri3d_view_geo_r50"] == [
        "[`pri3d_view_geo_r50`](model_cards/pri3d_view_geo_r50.md)",
        "ResNet-50 U-Net",
        "ScanNet",
        "ScanNet-ToU",
        "the authors",
        "61.7 mIoU, ScanNet",
    ]
    assert rows["slidr_srunet34.nuscenes"][1:] == [
        "SR-UNet34C",
        "nuScenes",
        "CC-BY-NC-SA-4.0",
        "the authors",
        "74.6 mIoU, nuScenes",
    ]
    assert rows[ROOMS][1:] == ["ResNet-18 U-Net", "rooms", "MIT", "a recipe", "-"]
    assert rows["gsc_r50"][4:] == ["a recipe", "63.1 mIoU, ScanNet"]
    assert cards.catalog_table(["gsc_r50"]).startswith("**For images**")
    assert "point clouds" not in cards.catalog_table(["gsc_r50"])
    assert {row[4] for row in rows.values()} == {"the authors", "a recipe"}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("pointcontrast_nce_srunet34", "74.1 mIoU, ScanNet"),
        ("csc_20k_srunet34", "63.4 mAP@0.5, S3DIS instances"),
        ("csc_60k_srunet34", "59.4 mAP@0.5, ScanNet instances"),
        ("csc_partition4_srunet34", "39.3 mAP@0.5, ScanNet detection"),
        ("ppkt_srunet34", "69.56 mIoU, ScanNet"),  # not the accuracy that stands before it
        ("ppkt_srunet18", "66.4 mIoU, S3DIS"),
        ("pri3d_view_r50.kitti_180", "56.3 mIoU, Cityscapes"),
        ("pri3d_view_geo_r50.lr001", None),
    ],
)
def test_the_headline_names_its_benchmark(name: str, expected: str | None):
    assert cards.headline(CATALOG[name]) == expected


def test_a_headline_on_part_of_the_data_says_so():
    entry = CATALOG["csc_60k_srunet34"]
    parts = tuple(result for result in entry.results if "," in result.task)
    assert cards.headline(replace(entry, results=parts)) == "29.3 mIoU, ScanNet, 1 % of the scenes"


@pytest.mark.parametrize(
    "arch, title",
    [
        (Arch("resnet", {"depth": 50, "width": 64}), "ResNet-50"),
        (Arch("resnet", {}), "ResNet-18"),
        (Arch("resnet_unet", {"depth": 18, "width": 64}), "ResNet-18 U-Net"),
        (Arch("resnet_unet", {"depth": 18, "width": 8}), "ResNet-18 U-Net, width 8"),
        (Arch("resnet_depth_unet", {"depth": 18}), "ResNet-18 depth U-Net"),
        (Arch("sr_unet", {"variant": "18A"}), "SR-UNet18A"),
        (Arch("sr_unet", {}), "SR-UNet34C"),
        (ARCH_3D, "SR-UNet"),
    ],
    ids=str,
)
def test_networks_have_short_names(arch: Arch, title: str):
    assert arch.title == title


def test_citations_are_bibtex():
    paper = Paper("Points & Pixels: a Study", "Marc-André Côté, Ann van Dijk", "CVPR", 2023, "https://x.org/a")
    assert cards.bibtex(paper).splitlines() == [
        "@inproceedings{cote2023points,",
        r"  title = {{Points \& Pixels: a Study}},",
        "  author = {Marc-André Côté and Ann van Dijk},",
        "  year = {2023},",
        "  url = {https://x.org/a},",
        "  booktitle = {CVPR},",
        "}",
    ]
    arxiv = cards.bibtex(CATALOG["moco_v2_sup_in_sn_r50"].paper)
    assert arxiv.startswith("@misc{chen2020improved,")
    assert "  eprint = {2003.04297},\n  archiveprefix = {arXiv}," in arxiv
    keys = {entry.paper.title: cards.bibtex(entry.paper).split("{", 1)[1].split(",")[0] for entry in CATALOG.values()}
    assert len(set(keys.values())) == len(keys)


def test_the_table_goes_between_the_markers(tmp_path: Path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- catalog -->\nold\n<!-- /catalog -->\nafter\n")
    assert cards.update_readme(path)
    assert path.read_text() == f"before\n<!-- catalog -->\n{cards.catalog_table()}\n<!-- /catalog -->\nafter\n"
    assert not cards.update_readme(path)
    for text in (
        "nothing",
        "<!-- /catalog --> <!-- catalog -->",
        "<!-- catalog --> <!-- catalog --> <!-- /catalog -->",
    ):
        path.write_text(text)
        with pytest.raises(GeoPretrainError, match="needs one line"):
            cards.update_readme(path)


def test_cards_of_removed_names_are_removed(tmp_path: Path):
    (tmp_path / "gone.md").write_text("x")
    (tmp_path / "picture.png").write_bytes(b"x")
    written = cards.write_cards(tmp_path)
    assert len(written) == len(CATALOG)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.md" for name in CATALOG} | {"picture.png"}


def test_make_cards_writes_the_checkout_it_runs_from(tmp_path: Path):
    """And needs neither torch nor the Hub's client for it."""
    shutil.copytree(REPO / "geo_pretrain", tmp_path / "geo_pretrain", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "README.md").write_text("<!-- catalog -->\n<!-- /catalog -->\n")
    script = (
        "import runpy, sys; runpy.run_module('geo_pretrain.cards', run_name='__main__'); "
        "print(*sorted({'torch', 'numpy', 'huggingface_hub', 'safetensors'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
    assert (tmp_path / "README.md").read_text().count("model_cards/") == len(CATALOG)
    assert len(list((tmp_path / "model_cards").glob("*.md"))) == len(CATALOG)


def test_cards_in_the_repository_are_fresh():
    """`make cards` renders them again."""
    stored = {path.stem: path.read_text(encoding="utf-8") for path in (REPO / "model_cards").glob("*.md")}
    assert stored == {name: cards.render_entry(entry) for name, entry in CATALOG.items()}


def test_the_table_in_the_readme_is_fresh():
    """`make cards` renders it again."""
    assert f"{cards.BEGIN}\n{cards.catalog_table()}\n{cards.END}" in (REPO / "README.md").read_text(encoding="utf-8")
