"""Strips: lines where matches are, colors where points are, columns of one height."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from geo_pretrain.errors import DataError
from geo_pretrain.training.data.frame import Frame, Pair
from geo_pretrain.training.evaluation.matching import Matches
from geo_pretrain.training.visualize.results import RIGHT, WRONG
from geo_pretrain.training.visualize.strip import COLUMN, SPACE, VIEW, cloud_column, match_column, save_strip, stacked


def test_matches_are_lines_from_the_upper_view_to_the_lower_one():
    frames = tuple(
        Frame(
            "a", str(k), np.full((120, 160, 3), 90 * k, np.uint8), np.ones((120, 160), np.float32), np.eye(3), np.eye(4)
        )
        for k in (0, 1)
    )
    query = truth = np.array([[40.0, 30], [100, 80]])
    predicted = np.array([[41.0, 30], [20, 100]])
    error = np.linalg.norm(predicted - truth, axis=1)
    column = match_column(Matches(Pair("a", "0", "1", 1.0), frames, query, truth, predicted, error, 0.01), 4.0)
    assert column.size == COLUMN
    for color, above, below in ((RIGHT, (40, 30), (41, 30)), (WRONG, (100, 80), (20, 100))):
        ends = [(2 * above[0] + 1, 2 * above[1] + 1), (2 * below[0] + 1, 2 * below[1] + 1 + VIEW[1] + SPACE)]
        middle = tuple(round((one + other) / 2) for one, other in zip(*ends, strict=True))
        for place in (*ends, middle):
            assert np.abs(np.subtract(column.getpixel(place), color)).max() < 60, (color, place)
    assert column.getpixel((4, 4)) == (0, 0, 0)
    assert column.getpixel((300, COLUMN[1] - 4)) == (90, 90, 90)


def test_views_are_stacked_and_cells_of_small_ones_stay_sharp():
    above, below = np.zeros((3, 4, 3), np.uint8), np.full((480, 640, 3), 200, np.uint8)
    above[0, 0] = 255
    column = stacked(above, below)
    assert [column.getpixel((x, y))[0] for x, y in ((79, 79), (80, 79), (79, 80))] == [255, 0, 0]
    assert column.getpixel((5, VIEW[1] + 3)) == (255, 255, 255)
    assert column.getpixel((5, VIEW[1] + SPACE)) == (200, 200, 200)


def test_a_cloud_is_seen_from_above_without_holes():
    x, y = np.meshgrid(np.arange(150) * 0.02, np.arange(150) * 0.02)
    points = np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], 1)
    colors = np.tile(np.array([[10, 160, 60]], np.uint8), (x.size, 1))
    picture = np.asarray(cloud_column(points, colors, 0.02))
    assert picture.shape == (COLUMN[1], COLUMN[1], 3)
    center = picture[COLUMN[1] // 2 - 40 : COLUMN[1] // 2 + 40, COLUMN[1] // 2 - 40 : COLUMN[1] // 2 + 40]
    assert (center == (10, 160, 60)).all()


def test_columns_stand_side_by_side_under_their_titles(tmp_path):
    red, blue = Image.new("RGB", (50, 70), "red"), Image.new("RGB", (90, 70), "blue")
    save_strip([("a", red), ("b", blue)], tmp_path / "deeper" / "x.png")
    strip = Image.open(tmp_path / "deeper" / "x.png")
    assert strip.width == 50 + 90 + 3 * SPACE
    line = [strip.getpixel((x, strip.height - SPACE - 2)) for x in range(strip.width)]
    assert (line.count((255, 0, 0)), line.count((0, 0, 255))) == (50, 90)
    assert np.asarray(strip)[:40].min() < 60  # the titles
    with pytest.raises(DataError, match=r"heights \[60, 70\]; accepted: one height"):
        save_strip([("a", red), ("b", Image.new("RGB", (9, 60)))], tmp_path / "x.png")
