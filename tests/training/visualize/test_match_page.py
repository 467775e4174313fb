"""The page of matches: its 8-bit features find what whole ones find, and pointing at a pixel shows it."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.evaluation.features import load_extractor
from geo_pretrain.training.evaluation.matching import match_pair, nearest_row
from geo_pretrain.training.visualize.embedded import DIRECTIONS, EXACT, embed, encode_rows
from geo_pretrain.training.visualize.match_page import cloud_views, image_views, match_page, page_pair
from geo_pretrain.training.visualize.matches import _pairs_to_draw, visualize_matches
from geo_pretrain.training.visualize.points import visualize_points
from tests.browser import DESKTOP, PHONE, start_browser
from tests.training.visualize.conftest import SIZE


def scene_of(page: str) -> dict:
    return json.loads(re.search(r'<script id="scene" type="application/json">(.*?)</script>', page).group(1))


def numbers(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


@pytest.mark.parametrize("channels", [8, EXACT + 1], ids=["exact", "iterated"])
def test_embedded_features_keep_their_cosines(channels):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, channels, generator=generator)
    parts = [F.normalize(torch.randn(n, 8, generator=generator) @ mixing) for n in (300, 200)]
    embedded = embed(parts)
    assert len(embedded.scales) == 8  # of 513 channels, too: the features have 8 directions
    assert embedded.energy == pytest.approx(1, abs=1e-5)
    assert all(codes.dtype == np.int8 and codes.max() <= 127 for codes in embedded.codes)
    rows = [F.normalize(embedded.rows(k)) for k in range(2)]
    assert (rows[0] @ rows[1].T - parts[0] @ parts[1].T).abs().max() < 0.02
    assert (nearest_row(rows[0], rows[1]) == nearest_row(*parts)).float().mean() > 0.95


def test_at_most_so_many_directions():
    rows = F.normalize(torch.randn(500, 2 * DIRECTIONS, generator=torch.Generator().manual_seed(0)))
    embedded = embed([rows])
    assert len(embedded.scales) == DIRECTIONS
    assert 0.4 < embedded.energy < 0.8  # half of the directions of noise


def test_row_numbers_are_as_wide_as_they_must_be():
    for largest, dtype in ((0xFFFE, "<u2"), (0xFFFF, "<u4")):
        packed = encode_rows(np.array([[0, largest, -1]]))
        assert packed["wide"] == (dtype == "<u4")
        assert numbers(packed["index"], dtype).tolist() == [0, largest, np.iinfo(dtype).max]


def test_the_page_holds_what_is_measured(tmp_path, image_folder, source, spec):
    found = visualize_matches(image_folder, spec, tmp_path / "m.html", count=2, size=SIZE)
    page = (tmp_path / "m.html").read_text()
    assert not re.search(r"(src|href)=|https?:|@import|fetch\(", page)  # nothing from elsewhere
    scene = scene_of(page)
    assert [c["title"] for c in scene["pairs"][0]["columns"]] == ["image", "random weights"]
    for (title, shares), k in zip(found, (1, 0), strict=True):
        assert [pair["columns"][k]["title"] for pair in scene["pairs"]] == [title] * 2
        assert [pair["columns"][k]["share"] for pair in scene["pairs"]] == shares
    pair = _pairs_to_draw(source, spec, None, 2, SkippedFrames())[0]
    extractor = load_extractor(image_folder)
    matches = match_pair(extractor, source, pair, size=SIZE)
    view = scene["pairs"][0]["columns"][0]["views"][0]
    assert view["grid"] == [SIZE[1] // 2, SIZE[0] // 2]
    places, truths = (numbers(view[key], "<f4").reshape(-1, 2) for key in ("places", "truths"))
    cell = extractor.extract_frame(matches.frames[0]).index
    queries = matches.query.astype(np.int64)
    near = np.linalg.norm(truths[cell[queries[:, 1], queries[:, 0]]] - matches.truth, axis=1)
    assert np.nanmedian(near) <= 2  # a cell's center is at most a pixel beside
    assert np.array_equal(places[cell[10, 20]], [20.5, 10.5])


def test_clouds_know_their_counterparts(cloud_folder, source, spec):
    extractor = load_extractor(cloud_folder)
    matches = match_pair(extractor, source, find_pairs(source, spec, skips=SkippedFrames())[0], size=SIZE)
    first, second = cloud_views(extractor, matches, "camera", 0)
    assert first.grid.max() < len(first.points) == len(first.truths)
    assert (first.grid >= 0).mean() > 0.2
    known = ~np.isnan(first.truths[:, 0])
    near = np.linalg.norm(first.points[known][:, None] - second.points[None], axis=2).min(1)
    assert near.max() < 1.5  # voxels
    assert known.sum() >= len(matches.query)


def test_pointing_at_a_pixel(tmp_path, image_folder, source, spec):
    """At desktop and phone widths the page says what whole features say, and draws it."""
    pair = find_pairs(source, spec, skips=SkippedFrames())[0]
    extractor = load_extractor(image_folder)
    matches = match_pair(extractor, source, pair, size=SIZE)
    views = image_views(extractor, matches)
    path = tmp_path / "m.html"
    title = "</script><script>window.broken = 1</script>"
    path.write_text(match_page(title, "", [page_pair(title, [(title, 0.5, views)])], 4.0, "px"))
    units = [view.features.unit() for view in views]
    row = int(np.flatnonzero(~np.isnan(views[1].truths[:, 0]))[7])
    cosines = units[1][row] @ units[0].T
    best = int(cosines.argmax())
    browser = start_browser()
    try:
        for size in (DESKTOP, PHONE):
            browser.open(path, size)
            browser.until("document.querySelector('.found')?.textContent.startsWith('cosine')")
            assert browser.run("document.documentElement.scrollWidth") <= size[0]
            left, top, width, height = browser.run(
                "(r => [r.x, r.y, r.width, r.height])(document.querySelectorAll('canvas')[1].getBoundingClientRect())"
            )
            u, v = views[1].places[row]
            browser.mouse("mouseMoved", left + (u + 0.5) / SIZE[1] * width, top + (v + 0.5) / SIZE[0] * height)
            browser.until(f"asked[0] === 1 && Math.hypot(asked[1] - {u}, asked[2] - {v}) < 1")
            browser.run(f"window.r = match(shown.pair.read[0], 1, {row}); 0")
            found = browser.run(f"[r.heat[{best}], r.best, r.error, r.mean]")
            assert found[0] == pytest.approx(float(cosines[best]), abs=0.02)
            assert found[3] == pytest.approx(float(cosines.mean()), abs=0.02)
            assert cosines[found[1]] == pytest.approx(float(cosines[best]), abs=0.02)
            away = np.hypot(*(views[0].places[found[1]] - views[1].truths[row]))
            assert found[2] == pytest.approx(away, abs=1e-3)
            says = browser.run("document.querySelector('.found').textContent")
            assert f"{away:.1f} px from the truth: {'right' if away <= 4 else 'wrong'}" in says
            colors = browser.run("new Set(document.querySelector('canvas').getContext('2d')"
                                 ".getImageData(0, 0, 100, 100).data).size")  # fmt: skip
            assert colors > 20
        assert browser.errors == []
        assert browser.run("window.broken") is None
    finally:
        browser.close()


def test_points_and_pixels_of_a_pair_are_linked(tmp_path, geo, spec):
    """A pixel finds the points that whole features find, a point the pixels; drawn at both widths."""
    out = tmp_path / "points.html"
    cloud = visualize_points(geo, spec, out, limit=400, baseline=False)
    link = cloud.link
    depth = len(numbers(link["scales"], "<f4"))
    unit = [
        F.normalize(torch.from_numpy(numbers(text, "i1").reshape(-1, depth) * numbers(link["scales"], "<f4")).float())
        for text in (link["codes"], link["frames"][0]["codes"])
    ]
    across, down = link["frames"][0]["grid"]
    assert across * down == len(unit[1])
    rows = numbers(link["rows"]["index"], "<u2")
    assert len(rows) == len(cloud.points)
    assert set(rows.tolist()) == set(range(len(unit[0])))
    cosines = unit[1][across + 3] @ unit[0].T  # of the cell in row 1, column 3
    browser = start_browser(webgl=True)
    try:
        for size in ((700, 480), PHONE):  # without a GPU, large pictures take long
            browser.open(out, size)
            browser.until("link && link.buttons[0].getAttribute('aria-pressed') === 'true'")
            left, top, width, height = browser.run(
                "(r => [r.x, r.y, r.width, r.height])(document.querySelector('#image').getBoundingClientRect())"
            )
            assert left >= 0
            assert left + width <= size[0]
            browser.mouse("mouseMoved", left + 3.5 / across * width, top + 1.5 / down * height)
            browser.until("link.active")
            assert f"best cosine {float(cosines.max()):.2f}" in browser.run("says.textContent")
            assert cosines[rows[browser.run("link.point")]] == pytest.approx(float(cosines.max()), abs=1e-4)
            x, y = browser.run(
                "cut.value = 0, turn(false), link.place(), ['left', 'top'].map(k => parseFloat(mark.style[k]))"
            )
            browser.run(f"link.fromPoint({x}, {y}); 0")
            point = browser.run("link.point")
            back = unit[0][rows[point]] @ unit[1].T
            assert f"Pixels like this point: best cosine {float(back.max()):.2f}" in browser.run("says.textContent")
        assert browser.errors == []
    finally:
        browser.close()


def test_pages_of_one_network_have_no_images(tmp_path, cloud_folder, spec):
    assert visualize_points(cloud_folder, spec, tmp_path / "p.html", limit=50).link is None
    assert "link" not in scene_of((tmp_path / "p.html").read_text())
