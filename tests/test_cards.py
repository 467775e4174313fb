"""Cards and tables say what the catalog says, and those in the repository are up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from geo_pretrain import cards
from geo_pretrain.catalog import CATALOG, Result, list_backbones
from geo_pretrain.errors import GeoPretrainError
from tests.zoo import ARCH, CONTRACT, LICENCE

REPO = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", list(CATALOG))
def test_a_card_holds_the_entry(name: str):
    entry, card = CATALOG[name], cards.render_entry(CATALOG[name])
    facts = [name, str(entry.contract), entry.licence.weights, entry.licence.base_model, entry.paper.title, entry.data]
    facts += [file.url for file in entry.authors_files]
    facts += [f"| {r.task} | {r.dataset} | {r.metric} | {r.value:g} | {r.table} |" for r in entry.results]
    facts += [f"{dataset}: {terms}" for dataset, terms in entry.licence.datasets]
    for fact in facts:
        assert fact in card
    assert f'gp.load_backbone("{name}")' in card


def test_the_card_of_a_checkpoint_holds_its_provenance():
    provenance = {"steps": 130, "data": {"source": "rooms", "fingerprint": "ab12"}, "skipped": {}, "notes": ""}
    results = (Result("dense matching", "rooms val", "recall at 4 px", 0.61, "measured"),)
    card = cards.render_card(
        "my_net_r18", ARCH, CONTRACT, LICENCE, provenance, recipe="my_net_r18", finished=False, results=results
    )
    for fact in (
        "# my_net_r18",
        "**Unfinished**",
        "- steps: 130\n- data:\n  - source: rooms\n  - fingerprint: ab12",
        "ResNet-18 U-Net",
        "geo-pretrain train my_net_r18",
        "| weights | MIT |",
        "| dense matching | rooms val | recall at 4 px | 0.61 | measured |",
    ):
        assert fact in card
    assert "skipped" not in card
    assert "Unfinished" not in cards.render_card("my_net_r18", ARCH, CONTRACT, LICENCE, provenance)


def test_the_table_has_a_row_for_every_name():
    lines = cards.catalog_table().splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == list_backbones()
    row = next(line for line in lines if "`pri3d_view_geo_r50`" in line)
    assert row.startswith("| `pri3d_view_geo_r50` | ResNet-50 U-Net | ScanNet | LicenseRef-ScanNet-ToU |")
    assert row.endswith("| 61.7 |")
    assert len({line.count("|") for line in lines}) == 1


def test_cards_of_3d_networks_say_what_goes_in():
    for name, call in (
        ("pointcontrast_nce_srunet34", "encode_points(points)  # float [N, 3] in metres;"),
        ("csc_100k_srunet34", "encode_points(points, colours)  # float [N, 3] in metres, uint8 [N, 3];"),
        ("slidr_srunet34.nuscenes", "encode_points(points, intensity)  # float [N, 3] in metres, float [N, 1];"),
    ):
        card = cards.render_entry(CATALOG[name])
        assert call in card
        assert "SR-UNet34C" in card
        assert "decoder=True" not in card
    assert "| 74.1 |" in next(
        line for line in cards.catalog_table().splitlines() if "`pointcontrast_nce_srunet34`" in line
    )


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


def test_cards_in_the_repository_are_fresh():
    """`make cards` renders them again."""
    stored = {path.stem: path.read_text(encoding="utf-8") for path in (REPO / "model_cards").glob("*.md")}
    assert stored == {name: cards.render_entry(entry) for name, entry in CATALOG.items()}


def test_the_table_in_the_readme_is_fresh():
    """`make cards` renders it again."""
    assert f"{cards.BEGIN}\n{cards.catalog_table()}\n{cards.END}" in (REPO / "README.md").read_text(encoding="utf-8")
