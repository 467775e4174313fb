"""The gallery says what the catalog says, is up to date, shows pictures of a folder, and works in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from geo_pretrain import catalog, cli
from geo_pretrain.cards import gallery
from geo_pretrain.catalog import CATALOG
from geo_pretrain.errors import DataError
from geo_pretrain.hub import cache
from tests.browser import DESKTOP, PHONE, Browser, start_browser

REPO = Path(__file__).resolve().parents[1]
AUTHORS, OURS, CLOUDS = "pri3d_view_geo_r50", "pri3d_geo_r18.rooms", "csc_100k_srunet34"


def rows_of(page: str) -> dict[str, dict[str, Any]]:
    (text,) = re.findall(r'<script id="catalog" type="application/json">(.*?)</script>', page, re.DOTALL)
    return {row["name"]: row for row in json.loads(text)["checkpoints"]}


def test_the_gallery_in_the_repository_is_fresh():
    """`make cards` writes it again."""
    folder = REPO / gallery.PICTURES
    pictures = gallery.find_pictures(folder, REPO / gallery.STORED)[0] if folder.is_dir() else {}
    assert (REPO / gallery.STORED).read_text(encoding="utf-8") == gallery.gallery_page(pictures=pictures)


def test_rows_hold_the_catalog():
    rows = rows_of(gallery.gallery_page())
    assert list(rows) == catalog.list_backbones()
    for name, entry in CATALOG.items():
        row = rows[name]
        assert [row["method"], row["modality"], row["data"]] == [entry.method, entry.modality, entry.data]
        assert row["chain"][0][1] == entry.license.weights.removeprefix("LicenseRef-")
        assert [(r[2], r[3]) for r in row["results"]] == [(r.metric, r.value) for r in entry.results]
        assert not row["offline"]
        for host, code in row["lines"].items():
            assert name in code
            if host != "CLI":
                compile(code, host, "exec")
    assert rows[AUTHORS]["group"] == "non-commercial"
    assert rows[OURS]["group"] == "permissive"
    assert rows["pri3d_view_r50.megadepth"]["group"] == "other"  # unstated
    assert list(rows[AUTHORS]["lines"]) == ["Python", "torch.hub", "timm", "smp", "torchvision", "CLI"]
    assert list(rows[CLOUDS]["lines"]) == ["Python", "torch.hub", "CLI"]
    assert rows[AUTHORS]["lines"]["CLI"] == f"geo-pretrain pull {AUTHORS}"
    assert rows[OURS]["lines"]["CLI"].startswith(f"geo-pretrain train {OURS} --out runs/{OURS}\n")
    miou = next(r for r in rows[AUTHORS]["results"] if r[:3] == ["semantic segmentation", "ScanNet", "mIoU"])
    assert miou[3:6] == [61.7, 39.1, "T1"]  # with what the table states for scratch


def test_a_planned_checkpoint_offers_no_weights():
    entry = replace(CATALOG[CLOUDS], authors_files=(), recipe=None, status="planned")
    lines = gallery.copied_lines(entry)
    assert "pretrained=False" in lines["Python"]
    assert list(lines) == ["Python", "CLI"]


def test_the_command_writes_what_this_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "names_here", lambda: {OURS, "not_of_the_catalog"})
    pictures = tmp_path / "a folder"
    pictures.mkdir()
    for name in (f"{OURS}.features.png", f"{OURS}.matches.webp", f"{OURS}.other.png", "no_such_net.features.png"):
        Image.new("RGB", (8, 8)).save(pictures / name)
    (pictures / f"{OURS}.viewer.html").write_text("x")
    out = tmp_path / "pages" / "gallery.html"
    out.parent.mkdir()
    result = CliRunner().invoke(cli.app, ["gallery", "-o", str(out), "--pictures", str(pictures)])
    assert result.exit_code == 0, result.output
    assert "58 checkpoints, 1 of which load here" in result.output.replace(str(len(CATALOG)), "58")
    for name in (f"{OURS}.other.png", "no_such_net.features.png"):
        assert f"No checkpoint has the picture '{name}'" in result.output
    rows = rows_of(out.read_text(encoding="utf-8"))
    assert [name for name, row in rows.items() if row["offline"]] == [OURS]
    assert rows[OURS]["how"] == "ready offline"
    assert rows[OURS]["pictures"] == {
        "features": f"../a%20folder/{OURS}.features.png",
        "matches": f"../a%20folder/{OURS}.matches.webp",
        "viewer": f"../a%20folder/{OURS}.viewer.html",
    }
    refused = CliRunner().invoke(cli.app, ["gallery", "-o", "gallery.png"])
    assert refused.exit_code == 2
    with pytest.raises(DataError, match=r"no such folder; accepted: a folder with pictures such as NAME\.features"):
        gallery.write_gallery(out, folder=tmp_path / "none")


HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>\u2028"


def hostile_page(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of the catalog whose first entry has texts that try to be code, and of which one has pictures."""
    entry = replace(
        CATALOG[CLOUDS],
        description=HOSTILE,
        data=HOSTILE,
        paper=replace(CATALOG[CLOUDS].paper, title=HOSTILE, url="javascript:window.broken=1"),
    )
    entries = {CLOUDS: entry, **{name: CATALOG[name] for name in CATALOG if name != CLOUDS}}
    monkeypatch.setattr(catalog, "CATALOG", entries)
    Image.new("RGB", (640, 200), "teal").save(path.with_name("features.png"))
    path.write_text(gallery.gallery_page(here={OURS}, pictures={OURS: {"features": "features.png"}}), encoding="utf-8")


def names_shown(browser: Browser) -> list[str]:
    code = "[...document.querySelectorAll('.card')].filter(c => c.offsetParent).map(c => c.dataset.name)"
    shown: list[str] = browser.run(code)
    return shown


def shows(browser: Browser, names: Iterable[str]) -> bool:
    """Whether the page shows these names; input that was sent arrives a moment later."""
    wanted = sorted(names)
    code = "[...document.querySelectorAll('.card')].filter(c => c.offsetParent).map(c => c.dataset.name).sort()"
    browser.until(f"JSON.stringify({code}) === JSON.stringify({json.dumps(wanted)})")
    return True


def text_of(browser: Browser, selector: str) -> str:
    return str(browser.run(f"document.querySelector({json.dumps(selector)}).innerText"))


def choose(browser: Browser, select: str, value: str) -> None:
    code = f"(() => {{ const s = document.querySelector('#{select}'); s.value = {json.dumps(value)};"
    browser.run(f"{code} s.dispatchEvent(new Event('change')); return s.value; }})()")


def no_wider_than_the_screen(browser: Browser, size: tuple[int, int]) -> bool:
    wide = "[document.documentElement, ...document.querySelectorAll('dialog[open]')]"
    return bool(browser.run(f"{wide}.every(e => e.scrollWidth <= {size[0]})"))


def test_the_page_in_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Search, filters, copying and comparing at desktop and phone widths; one browser, as its start takes longest."""
    page = tmp_path / "gallery.html"
    hostile_page(page, monkeypatch)
    browser = start_browser()
    try:
        for size in (DESKTOP, PHONE):
            browser.open(page, size)
            assert len(names_shown(browser)) == len(CATALOG)
            assert no_wider_than_the_screen(browser, size)
            browser.run("document.querySelector('.card img').scrollIntoView()")
            browser.until("document.querySelector('.card img').naturalWidth === 640")
            browser.type("#search", "image NET r50 pri3d")
            assert AUTHORS in names_shown(browser)
            assert all("r50" in name for name in names_shown(browser))
            browser.click(f"[data-name='{AUTHORS}'] [data-copy]")
            browser.until("document.querySelector('#said').textContent.startsWith('Copied')")
            assert browser.clipboard() == gallery.copied_lines(CATALOG[AUTHORS])["Python"]
            look_at_one(browser)
            assert no_wider_than_the_screen(browser, size)
            browser.click("#detail [aria-label='Close']")
            compare_two(browser)
            assert no_wider_than_the_screen(browser, size)
        filter_all(browser)
        assert browser.errors == []
        assert {url for url in browser.requests if not url.startswith("file:") and url != "about:blank"} == set()
        assert browser.run("window.broken") is None
    finally:
        browser.close()


def look_at_one(browser: Browser) -> None:
    """Open a checkpoint and copy the lines of two libraries."""
    browser.click(f"[data-name='{AUTHORS}'] .name")
    assert CATALOG[AUTHORS].paper.title in text_of(browser, "#detail")
    for host in ("smp", "CLI"):
        browser.click(f"[data-host='{host}']")
        browser.click("#copy")
        browser.until(f"document.querySelector('#said').textContent === 'Copied: {host} for {AUTHORS}'")
        assert browser.clipboard() == gallery.copied_lines(CATALOG[AUTHORS])[host]


def compare_two(browser: Browser) -> None:
    """Of three that are chosen the last two are compared."""
    for name in ("gsc_r50", AUTHORS, "pri3d_view_r50"):
        browser.click(f"[data-compare='{name}']")
    browser.click("#go")
    table = browser.run(
        "[...document.querySelectorAll('#compare tr')].map(r => [r.className, ...[...r.cells].map(c => c.innerText)])"
    )
    assert table[0] == ["", "", AUTHORS, "pri3d_view_r50"]
    assert ["", "network", "ResNet-50 U-Net", "ResNet-50 U-Net"] in table
    assert ["differs", "semantic segmentation, ScanNet: mIoU", "61.7 (T1)", "61.3 (T1)"] in table
    browser.click("#compare [aria-label='Close']")
    browser.click("#drop")


def filter_all(browser: Browser) -> None:
    """Each filter, two together, what the address keeps, and what stands where nothing fits."""
    browser.click("#more")
    browser.click("#reset")
    assert shows(browser, CATALOG)
    browser.click("[data-modality='3d']")
    assert shows(browser, catalog.list_backbones(modality="3d"))
    choose(browser, "method", "csc")
    csc = catalog.list_backbones(modality="3d", method="csc")
    assert shows(browser, csc)
    assert browser.run("location.hash") == "#modality=3d&method=csc"
    browser.run("window.before = true; location.reload()")
    browser.until("!window.before && document.readyState === 'complete'")
    assert shows(browser, csc)
    browser.click("#more")
    for key, value, names in (
        ("license", "group:permissive", catalog.list_backbones(license="permissive")),
        ("data", "KITTI", catalog.list_backbones(data="KITTI")),
        ("how", "download from authors", catalog.list_backbones(status="published-by-authors")),
    ):
        browser.click("#reset")
        assert shows(browser, CATALOG)
        choose(browser, key, value)
        assert shows(browser, names)
    browser.click("#reset")
    browser.click("#offline")
    assert shows(browser, [OURS])
    browser.type("#search", "no such thing")
    assert shows(browser, [])
    assert "Fewer words" in text_of(browser, "#none")
