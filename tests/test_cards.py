"""Cards and tables say what the catalog or a folder says, and those in the repository are up to date."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from geo_pretrain import cards, catalog
from geo_pretrain.cards import name_types
from geo_pretrain.catalog import CATALOG, Arch, Paper, Result, list_backbones
from geo_pretrain.catalog.shipped import SHIPPED
from geo_pretrain.checkpoint import CONFIG
from geo_pretrain.errors import CheckpointError, GeoPretrainError, UnknownName
from tests.cards_reading import (
    PROVENANCE,
    PUBLISHED,
    PYTHON,
    ROOMS,
    codes,
    converted,
    every_kind_of_card,
    folder_card,
    metadata,
    published_here,
    section,
    tables,
)
from tests.zoo import ARCH, ARCH_3D, CONTRACT, LICENSE, write_tiny

REPO = Path(__file__).resolve().parents[1]


def number_row(r: Result) -> str:
    source = f"{r.table}: {r.note}" if r.note else r.table
    return f"| {r.task} | {r.dataset} | {r.metric} | {r.value:g} | {source} |"


# ---- cards of the catalog ----


@pytest.mark.parametrize("name", list(CATALOG))
def test_a_card_holds_the_entry(name: str):
    entry, card = CATALOG[name], cards.render_entry(CATALOG[name])
    facts = [f"\n# {name}\n", str(entry.arch), entry.description, entry.license.base_model, entry.paper.title]
    facts += [entry.paper.authors, entry.paper.url, entry.data, entry.arch.title]
    facts += [
        f"[{file.content}]({file.url}) | {file.format} | {', '.join(file.roles)} |" for file in entry.authors_files
    ]
    facts += [number_row(r) for r in entry.results]
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
    assert entry.status in ("published-by-authors", "regenerable", "planned") or name in SHIPPED
    has_weights = entry.status != "planned"
    two_d, unet = entry.modality == "2d", "unet" in entry.arch.name and entry.modality == "2d"
    assert (f'gp.load_backbone("{name}")' in card) == has_weights
    assert (f'gp.load_backbone("{name}", pretrained=False)' in card) != has_weights
    assert (f'gp.load_backbone("{name}", decoder=True' in card) == unet
    assert ("torch.hub.load(" in card) == has_weights
    for text in (f'timm.create_model("{name}", pret', f'smp.Unet("tu-{name}"', f'resnet("{name}"'):
        assert (text in card) == (two_d and has_weights)
    assert (f'me_network("{name}")' in card) == (not two_d and has_weights)
    source = {"KITTI": "kitti", "MegaDepth": "megadepth"}.get(entry.data, "scannet")
    data = "" if entry.data == "rooms" else f" --data {source}:PATH"
    trained = f"geo-pretrain train {entry.recipe}{data} --out"
    assert (trained in card) == (entry.recipe is not None)
    assert ("downloads their file" in card) == (entry.status == "published-by-authors")
    assert ("GEO_PRETRAIN_HUB=runs" in card) == (entry.status == "regenerable")
    for code in codes(card):  # each block stands alone in this: timm knows the names after our import
        assert ("geo_pretrain.adapters.timm" in code) == ("timm.create_model" in code or '"tu-' in code)
    if entry.status == "published-by-authors":
        by_hand = f"`geo-pretrain convert FILE --from {entry.authors_files[0].format} --name {name} --out DIR`"
        assert by_hand in card


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
        assert number_row(r) in card
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
    assert {row[4] for row in rows.values()} == {
        "the authors",
        "a recipe",
        *(["a package, offline"] if SHIPPED else []),
    }


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
    assert cards.update_table(path)
    assert path.read_text() == f"before\n<!-- catalog -->\n{cards.catalog_table()}\n<!-- /catalog -->\nafter\n"
    assert not cards.update_table(path)
    for text in (
        "nothing",
        "<!-- /catalog --> <!-- catalog -->",
        "<!-- catalog --> <!-- catalog --> <!-- /catalog -->",
    ):
        path.write_text(text)
        with pytest.raises(GeoPretrainError, match="needs one line"):
            cards.update_table(path)


def test_cards_of_removed_names_are_removed(tmp_path: Path):
    (tmp_path / "gone.md").write_text("x")
    (tmp_path / "picture.png").write_bytes(b"x")
    written = cards.write_cards(tmp_path)
    assert len(written) == len(CATALOG)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.md" for name in CATALOG} | {"picture.png"}


def test_make_cards_writes_the_checkout_it_runs_from(tmp_path: Path):
    """And needs neither torch nor the Hub's client for it."""
    shutil.copytree(REPO / "geo_pretrain", tmp_path / "geo_pretrain", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "docs/checkpoints.md"):
        (tmp_path / page).write_text("<!-- catalog -->\n<!-- /catalog -->\n")
    script = (
        "import runpy, sys; runpy.run_module('geo_pretrain.cards', run_name='__main__'); "
        "print(*sorted({'torch', 'numpy', 'huggingface_hub', 'safetensors'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
    assert (tmp_path / "docs/checkpoints.md").read_text().count("../model_cards/") == len(CATALOG)
    assert (tmp_path / "README.md").read_text().count("](model_cards/") == len(cards.FEATURED)
    assert len(list((tmp_path / "model_cards").glob("*.md"))) == len(CATALOG)


def test_types_of_names_are_fresh():
    """`make cards` writes them again."""
    assert (REPO / name_types.NAMES).read_text(encoding="utf-8") == name_types.name_types()


def test_cards_in_the_repository_are_fresh():
    """`make cards` renders them again."""
    stored = {path.stem: path.read_text(encoding="utf-8") for path in (REPO / "model_cards").glob("*.md")}
    assert stored == {name: cards.render_entry(entry) for name, entry in CATALOG.items()}


@pytest.mark.parametrize("page, names, root", [("README.md", cards.FEATURED, ""), ("docs/checkpoints.md", None, "../")])
def test_the_tables_of_checkpoints_are_fresh(page: str, names, root: str):
    """`make cards` renders them again."""
    shown = f"{cards.BEGIN}\n{cards.catalog_table(names, root)}\n{cards.END}"
    assert shown in (REPO / page).read_text(encoding="utf-8")
