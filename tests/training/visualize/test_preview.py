"""Pictures of geometric sets: colors, borders, the view of the surface, and the sheet from the command line."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from geo_pretrain.cli import app
from geo_pretrain.errors import DataError
from geo_pretrain.rooms import RoomsConfig
from geo_pretrain.training.data.sources.rooms import Rooms
from geo_pretrain.training.data.sources.scannet import ScanNet
from geo_pretrain.training.data.surfaces.sets import SceneSets, Sets, label_sets, pixel_sets
from geo_pretrain.training.visualize.colors import class_colors, depth_colors, set_colors
from geo_pretrain.training.visualize.preview import (
    sets_overlay,
    sets_sheet,
    surface_view,
)
from tests.scannet_layout import write_scannet


@pytest.fixture(scope="module")
def rooms():
    return Rooms(RoomsConfig(scenes=1, frames=3, width=96, height=64))


def test_colors_of_sets_are_those_of_hue_saturation_and_value():
    ids = np.array([[-1, 0, 1], [2, 149_999, 12]])
    colors = set_colors(ids)
    assert colors.dtype == np.uint8
    for i, color in zip(ids.flat, colors.reshape(-1, 3), strict=True):
        strong, light = (0.5, 0.8, 0.65)[i % 3], (0.95, 0.75)[i % 2]
        want = (0, 0, 0) if i < 0 else [255 * c for c in colorsys.hsv_to_rgb(i * 0.61803398875 % 1, strong, light)]
        np.testing.assert_allclose(color, want, atol=0.51)
    assert len(np.unique(set_colors(np.arange(200)), axis=0)) > 190


def test_depth_runs_from_yellow_to_blue_between_the_limits_of_its_valid_pixels():
    colors = depth_colors(np.array([[0, 0, 0, 2], [0, 3, 4, 0]], np.float32))
    assert colors[0, 3].tolist() == [253, 231, 110]
    assert np.abs(colors[1, 1].astype(int) - [35, 140, 140]).max() <= 1
    assert colors[1, 2].tolist() == [50, 15, 75]
    assert (colors[[0, 0, 0, 1, 1], [0, 1, 2, 0, 3]] == 0).all()
    assert class_colors(np.array([[-1, 0, 3]], np.int16)).any(axis=2).tolist() == [[False, False, True]]


def test_overlay_has_the_sets_colors_dark_borders_and_gray_where_there_is_no_set():
    color = np.random.default_rng(0).integers(256, size=(4, 6, 3)).astype(np.uint8)
    ids = np.full((4, 6), 3)
    ids[:, 3:] = 8
    ids[3] = -1
    got = sets_overlay(color, ids).astype(float)
    for i, j in np.ndindex(4, 6):
        gray = color[i, j].mean()
        want = 0.5 * gray * np.ones(3) if ids[i, j] < 0 else 0.35 * gray + 0.65 * set_colors(ids)[i, j].astype(float)
        if (j > 0 and ids[i, j] != ids[i, j - 1]) or (i > 0 and ids[i, j] != ids[i - 1, j]):
            want = want * 0.4
        np.testing.assert_allclose(got[i, j], want, atol=0.51)


def level_camera(ahead):
    """At the origin, upright in a world with z up."""
    pose = np.eye(4)
    pose[:3, :3] = np.stack([np.cross(ahead, (0, 0, 1)), (0, 0, -1), ahead], axis=1)
    return pose


def spread(low, high, normal, set_id, rng, count=4000):
    points = rng.random((count, 3)) * (np.array(high) - low) + low
    return points, np.full(count, set_id), np.tile(normal, (count, 1))


def a_room(rng):
    """Floor, far and near wall along y, ceiling, and a table in the middle of the left half."""
    parts = [
        spread((0, 0, 0), (4, 4, 0), (0, 0, 1), 1, rng, 16000),
        spread((0, 4, 0), (4, 4, 2), (0, -1, 0), 2, rng, 8000),
        spread((0, 0, 0), (4, 0, 2), (0, 1, 0), 3, rng, 8000),
        spread((0, 0, 2), (4, 4, 2), (0, 0, -1), 4, rng, 16000),
        spread((0.5, 1.5, 0.7), (1.5, 2.5, 0.7), (0, 0, 1), 5, rng, 4000),
    ]
    points, ids, normals = (np.concatenate(column) for column in zip(*parts, strict=True))
    return SceneSets(points.astype(np.float32), ids, normals.astype(np.float32))


def hues(view):
    """The set that each pixel shows: that whose color has the same ratios of channels; -1 for white."""
    palette = set_colors(np.arange(1, 6)).astype(float)
    palette /= np.linalg.norm(palette, axis=1, keepdims=True)
    pixels = view.reshape(-1, 3).astype(float)
    likeness = pixels @ palette.T / np.linalg.norm(pixels, axis=1)[:, None]
    shown = np.where(likeness.max(1) > 0.999, likeness.argmax(1) + 1, 0)
    return np.where((pixels == 255).all(1), -1, shown).reshape(view.shape[:2])


def test_surface_is_seen_from_above_without_what_faces_away():
    view = surface_view(a_room(np.random.default_rng(0)), (120, 160), [level_camera(np.array([0.0, 1, 0]))])
    assert view.shape == (120, 160, 3)
    shown = hues(view)
    assert set(np.unique(shown)) - {0} == {-1, 1, 2, 5}  # neither the ceiling nor the near wall
    rows = {i: np.argwhere(shown == i) for i in (1, 2, 5)}
    floor_height, floor_width = np.ptp(rows[1], axis=0)
    assert floor_height / floor_width == pytest.approx(
        np.sin(np.deg2rad(55)), abs=0.05
    )  # a square seen from 55 degrees
    assert rows[2][:, 0].mean() < rows[5][:, 0].mean() < rows[1][:, 0].max()  # the far wall is on top
    assert rows[5][:, 1].mean() < 80  # left stays left
    inside = shown[rows[5][:, 0].min() + 3 : rows[5][:, 0].max() - 3, rows[5][:, 1].min() + 3 : rows[5][:, 1].max() - 3]
    assert (inside == 5).all()  # the table covers the floor, and points close the surface
    size = 4 * 4 * np.sin(np.deg2rad(55)) / (1 * 1 * np.sin(np.deg2rad(55)))  # floor and table seen alike
    assert (rows[1].shape[0] + rows[5].shape[0]) / rows[5].shape[0] == pytest.approx(size, rel=0.25)
    turned = hues(surface_view(a_room(np.random.default_rng(0)), (120, 160), [level_camera(np.array([0.0, -1, 0]))]))
    assert 3 in turned
    assert 2 not in turned
    assert np.argwhere(turned == 5)[:, 1].mean() > 80


def test_views_without_points_to_show_are_white_and_without_normals_an_error():
    sets = a_room(np.random.default_rng(0))
    ceiling = SceneSets(sets.points[sets.ids == 4], sets.ids[sets.ids == 4], sets.normals[sets.ids == 4])
    down = np.diag([1.0, -1, -1, 1])  # a camera that looks straight down, x to the right, has no horizon
    assert (surface_view(ceiling, (20, 30), [level_camera(np.array([0.0, 1, 0]))]) == 255).all()
    assert (
        surface_view(sets, (20, 30), [level_camera(np.array([1.0, 0, 0])), level_camera(np.array([-1.0, 0, 0]))]) < 255
    ).any()
    assert surface_view(sets, (20, 30), [down]).shape == (20, 30, 3)
    with pytest.raises(DataError, match="no normals"):
        surface_view(SceneSets(sets.points, sets.ids), (20, 30), [down])


def test_sheet_shows_frames_their_sets_and_the_surface(rooms, tmp_path):
    sets_sheet(rooms, tmp_path / "new" / "sets.png", frames=2, cache_dir=tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "new" / "sets.png"))
    height, gap = 2 * 64 + 4, 4
    assert sheet.shape == (height, 2 * 96 + 2 * gap + round(1.4 * height), 3)
    scene = rooms.scenes()[0]
    sets = Sets(rooms, cache_dir=tmp_path).scene(scene)
    for top, frame_id in ((0, "0000"), (68, "0002")):
        frame = rooms.load(scene, frame_id)
        np.testing.assert_array_equal(sheet[top : top + 64, :96], frame.color)
        np.testing.assert_array_equal(
            sheet[top : top + 64, 100:196], sets_overlay(frame.color, pixel_sets(frame, sets))
        )
    assert (sheet[:, 200:] < 255).any()


def test_sheet_of_a_scan_with_its_own_segments(rooms, tmp_path):
    """Which come without normals; frames wider than 320 are made smaller; a block each scene."""
    (name,) = write_scannet(tmp_path / "scans", Rooms(RoomsConfig(scenes=1, frames=1, width=400, height=64)), lost=())
    source = ScanNet(tmp_path / "scans")
    count = len(source.vertices(name))
    text = '{"sceneId": "x", "segIndices": [' + ", ".join(["7"] * count) + "]}"
    (tmp_path / "scans" / name / f"{name}_vh_clean_2.0.010000.segs.json").write_text(text)
    sets_sheet(source, tmp_path / "x.png", frames=1, cache_dir=tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    assert sheet.shape[0] == round(56 * 320 / 392)
    shown = np.unique(sheet[:, 320 + 4 : 644][sheet[:, 324:644].max(2) > 100].astype(int), axis=0)
    ratio = (set_colors(np.array(7)) * 0.65).astype(int)
    assert (shown.max(0) >= ratio).all()
    with pytest.raises(DataError, match="no frame that can be shown"):
        sets_sheet(source, tmp_path / "y.png", scenes=0)


def test_sheet_of_labels_shows_the_labels(rooms, tmp_path):
    frame = rooms.load(rooms.scenes()[0], "0000")
    for kind in ("semantic", "instance"):
        sets_sheet(rooms, tmp_path / "x.png", frames=1, kind=kind, cache_dir=tmp_path)
        sheet = np.asarray(Image.open(tmp_path / "x.png"))
        np.testing.assert_array_equal(sheet[:64, 100:196], sets_overlay(frame.color, label_sets(frame, kind)))
        assert (sheet[:, 200:] < 255).any()


def test_command_line_draws_the_sets_asked_for(tmp_path, monkeypatch, rooms):
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path))

    def run(*options):
        small = "data.options={scenes: 1, frames: 3, width: 96, height: 64}"
        arguments = ["data", "preview", "rooms", "-o", str(tmp_path / "x.png"), "--frames", "1", "--set", small]
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 0, result.output
        return np.asarray(Image.open(tmp_path / "x.png"))

    assert run().shape == (64, 3 * 96, 3)
    drawn = []
    for options in ({}, {"k_thresh": 3.0}, {"min_vertices": 2000}, {"kind": "instance"}):
        given = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        drawn.append(run("--sets", *given).tobytes())
        sets_sheet(rooms, tmp_path / "y.png", frames=1, cache_dir=tmp_path, **options)
        assert drawn[-1] == np.asarray(Image.open(tmp_path / "y.png")).tobytes()
    assert len(set(drawn)) == 4
