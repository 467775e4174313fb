"""The pictures: what stands where in them, and that they show what is measured."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import BadFrame, CheckpointError, DataError
from geo_pretrain.training.data.frame import Pair, SkippedFrames, Surface, resize_frame
from geo_pretrain.training.data.surfaces.fusing import Surfaces, frame_cloud
from geo_pretrain.training.data.surfaces.ply import read_ply
from geo_pretrain.training.evaluation.features import load_extractor
from geo_pretrain.training.evaluation.matching import match_pair
from geo_pretrain.training.recipe import DataSpec
from geo_pretrain.training.visualize import matches as matches_module
from geo_pretrain.training.visualize import points as points_module
from geo_pretrain.training.visualize.colors import shared_pca
from geo_pretrain.training.visualize.columns import RANDOM_TITLE, find_backbone, load_columns
from geo_pretrain.training.visualize.common import NOTHING, drawing_spec, fill_rows, paint
from geo_pretrain.training.visualize.frames import draw_features
from geo_pretrain.training.visualize.grids import GAP, HEADER
from geo_pretrain.training.visualize.matches import _pairs_to_draw, project_matches, visualize_matches
from geo_pretrain.training.visualize.points import visualize_points
from geo_pretrain.training.visualize.splat import behind_camera, splat
from geo_pretrain.training.visualize.viewer import viewer_page
from tests.training.visualize.conftest import pixels
from tests.zoo import write_tiny, write_tiny_3d

SIZE = (48, 64)


def panel(picture, row, column, shape, columns, row_height):
    """A cell of the grid as it was before it was enlarged."""
    height, width = shape
    factor = round(256 / width)
    top, left = HEADER + row * row_height, GAP + column * (width * factor + GAP)
    assert picture.shape[1] == columns * (width * factor + GAP) + GAP
    return picture[top : top + height * factor : factor, left : left + width * factor : factor]


def test_features_share_their_colors_over_all_frames(tmp_path, image_folder, cloud_folder, source, spec):
    out = tmp_path / "new" / "features.png"
    titles = draw_features([image_folder, cloud_folder], spec, out, count=2, size=SIZE)
    assert titles == ["image", "image", "cloud", RANDOM_TITLE]
    assert [path.name for path in out.parent.iterdir()] == ["features.png"]
    picture, scene = pixels(out), source.scenes()[0]
    frames = [resize_frame(source.load(scene, frame), SIZE) for frame in ("000000", "000050")]
    row_height = (picture.shape[0] - HEADER - 30) // 2
    for column, folder in ((1, image_folder), (2, cloud_folder)):
        (column_of,) = load_columns(find_backbone(folder), None)
        features = [column_of.pixel_features(frame) for frame in frames]
        for row, colors in enumerate(shared_pca([f.unit() for f in features])):
            shown = panel(picture, row, column, SIZE, 4, row_height)
            assert np.array_equal(shown, paint(colors, features[row].index))
    for row, frame in enumerate(frames):
        assert np.array_equal(panel(picture, row, 0, SIZE, 4, row_height), frame.color)
    twin = panel(picture, 0, 3, SIZE, 4, row_height)
    assert not np.array_equal(twin, panel(picture, 0, 1, SIZE, 4, row_height))


def test_pixels_and_voxels_are_drawn_in_one_color_space(tmp_path, geo, source, spec):
    out = tmp_path / "features.png"
    assert draw_features([geo], spec, out, count=1, baseline=False) == ["image", "geo: pixels", "geo: voxels"]
    picture, frame = pixels(out), resize_frame(source.load(source.scenes()[0], "000000"), SIZE)
    features = [d.pixel_features(frame) for d in load_columns(find_backbone(geo), Surfaces(source))]
    row_height = picture.shape[0] - HEADER - 30
    for column, colors in enumerate(shared_pca([f.unit() for f in features]), start=1):
        shown = panel(picture, 0, column, SIZE, 3, row_height)
        assert np.array_equal(shown, paint(colors, features[column - 1].index))
    alone = paint(shared_pca([features[1].unit()])[0], features[1].index)
    assert not np.array_equal(shown, alone)


def test_the_twin_is_of_the_map_and_the_seed_asked_for(tmp_path, image_folder, source, spec):
    out, seen = tmp_path / "x.png", []
    draw_features(
        [image_folder], spec, out, count=2, size=SIZE, level=1, seed=3, progress=lambda *at: seen.append(at)
    )  # fmt: skip
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]
    frames = [resize_frame(source.load(source.scenes()[0], frame), SIZE) for frame in ("000000", "000050")]
    for column, random in ((1, False), (2, True)):
        (column_of,) = load_columns(find_backbone(image_folder), None, level=1, random_init=random, seed=3)
        features = [column_of.pixel_features(frame) for frame in frames]
        shown = panel(pixels(out), 0, column, SIZE, 3, 0)
        assert np.array_equal(shown, paint(shared_pca([f.unit() for f in features])[0], features[0].index))


def test_the_size_is_that_of_the_first_backbone_and_any_case_of_a_suffix_is_accepted(tmp_path, image_folder, spec):
    other = write_tiny(tmp_path / "other", contract=ImageContract(size=(32, 48))).folder
    draw_features([image_folder, str(other)], spec, tmp_path / "x.PNG", count=1, baseline=False)
    assert pixels(tmp_path / "x.PNG").shape[1] == 3 * (3 * 96 + GAP) + GAP


def test_painted_leaves_pixels_without_a_feature_pale():
    colors = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    assert paint(colors, np.array([[1, -1]])).tolist() == [[[4, 5, 6], list(NOTHING)]]


def test_matches_are_those_that_are_measured(tmp_path, image_folder, source, spec):
    seen, options = [], {"count": 2, "size": SIZE, "threshold": 3.0, "seed": 5}
    found = visualize_matches(image_folder, spec, tmp_path / "m.png", **options, progress=lambda *at: seen.append(at))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [title for title, _ in found] == [RANDOM_TITLE, "image"]
    shown = _pairs_to_draw(source, dataclasses.replace(spec, size=SIZE), None, 2, SkippedFrames())
    trained = load_extractor(image_folder)
    for number, pair in enumerate(shown):
        matches = match_pair(trained, source, pair, size=SIZE, seed=5 + number)
        assert found[1][1][number] == (matches.error <= 3).mean()
    twin = match_pair(load_extractor(image_folder, random_init=True, seed=5), source, shown[0], size=SIZE, seed=5)
    assert found[0][1][0] == (twin.error <= 3).mean()
    assert found[0][1] != found[1][1]
    (alone,) = visualize_matches(image_folder, spec, tmp_path / "a.png", against=None, count=2, size=SIZE)
    assert pixels(tmp_path / "a.png").shape[1] < pixels(tmp_path / "m.png").shape[1]
    assert alone[0] == "image"


def test_pairs_that_are_drawn_are_typical_and_told(tmp_path, image_folder, spec, monkeypatch):
    """Not the first and the last: those are neighbors in time, which overlap nearly wholly."""
    scenes = ["a", "b"]
    every = [Pair(name, f"{i}", f"{i + 1}", (100 - i) / 100) for name in scenes for i in range(100)]
    monkeypatch.setattr(matches_module, "find_pairs", lambda source, *_, **__: every)
    place = SimpleNamespace(scenes=lambda: scenes, name="x", frame_ids=None, load=None, fingerprint=None)
    shown = _pairs_to_draw(place, spec, scenes[0], 3, SkippedFrames())
    assert [pair.overlap for pair in shown] == [0.17, 0.51, 0.84]
    shown = _pairs_to_draw(place, spec, None, 2, SkippedFrames())
    assert [(pair.scene, pair.overlap) for pair in shown] == [(scenes[0], 0.26), (scenes[1], 0.76)]
    monkeypatch.undo()
    told = []
    visualize_matches(image_folder, spec, tmp_path / "m.png", against=None, count=1, size=SIZE, on_pair=told.append)
    assert re.fullmatch(r".*: \S+ and \S+, overlap \d+%, turned by \d+\u00b0", told[0])
    assert len(told) == 1


def test_matches_beside_another_backbone(tmp_path, image_folder, cloud_folder, geo, spec):
    found = visualize_matches(image_folder, spec, tmp_path / "m.png", against=geo, count=1)
    assert [title for title, _ in found] == ["image", "geo"]
    with pytest.raises(CheckpointError, match=r"beside .* that take images, or 'scratch'"):
        visualize_matches(image_folder, spec, tmp_path / "x.png", against=cloud_folder)
    with pytest.raises(CheckpointError, match="that take voxels"):
        visualize_matches(cloud_folder, spec, tmp_path / "x.png", against=image_folder)
    assert not (tmp_path / "x.png").exists()


def test_matches_of_clouds_are_seen_by_their_cameras(tmp_path, cloud_folder, source, spec):
    (pair,) = _pairs_to_draw(source, spec, None, 1, SkippedFrames())
    extractor = load_extractor(cloud_folder)
    matches = match_pair(extractor, source, pair, size=SIZE, seed=0)
    middle = float(np.sort(matches.error)[len(matches.error) // 2])  # "within" means that this one is right, too
    found = visualize_matches(cloud_folder, spec, tmp_path / "m.png", count=1, threshold=middle)
    assert found[1][1] == [(matches.error <= middle).mean()]
    frames = [resize_frame(source.load(pair.scene, frame), SIZE) for frame in (pair.frame1, pair.frame2)]
    seen = project_matches(matches, extractor.voxel_size)
    assert np.array_equal(seen.error, matches.error)
    assert seen.frames[0].color.shape == (192, 256, 3)
    for points, drawn, frame in (
        (matches.query, seen.query, frames[0]),
        (matches.query, seen.truth, frames[1]),
        (matches.predicted, seen.predicted, frames[1]),
    ):
        camera = behind_camera(torch.from_numpy(frame_cloud(frame).points), frame, (192, 256))
        k, world_to_camera = camera.intrinsics.numpy(), np.linalg.inv(camera.cam_to_world.numpy())
        for point, pixel in zip(points[:20], drawn, strict=False):
            x, y, z = (world_to_camera @ [*point, 1])[:3]
            np.testing.assert_allclose(pixel, [k[0, 0] * x / z + k[0, 2], k[1, 1] * y / z + k[1, 2]], atol=1e-6)
    for drawn, frame in zip(seen.frames, frames, strict=True):
        cloud = frame_cloud(frame)
        points = torch.from_numpy(cloud.points)
        row = splat(points, behind_camera(points, frame, (192, 256)), extractor.voxel_size / 2)
        assert np.array_equal(drawn.color, paint(cloud.colors, row))


def test_pairs_are_of_some_scenes_spread_over_all(tmp_path, image_folder, monkeypatch):
    asked = []
    whole = SimpleNamespace(name="many", scenes=lambda: list("abcdef"), frame_ids=None, load=None, fingerprint=None)
    monkeypatch.setattr(matches_module, "prepare", lambda *_: whole)
    monkeypatch.setattr(matches_module, "find_pairs", lambda source, spec, **_: asked.append(source.scenes()) or [])
    for scene in (None, "d"):
        with pytest.raises(DataError, match="No pair of source 'many'"):
            visualize_matches(image_folder, DataSpec("scannet"), tmp_path / "m.png", against=None, scene=scene)
    assert asked == [["a", "c", "f"], ["d"]]


def test_voxels_that_rgbd_cannot_give_are_refused_before_rooms_are_rendered(tmp_path):
    contract = VoxelContract((0.1, 1.0, 0.1), ("intensity",) * 3, coordinates="cylindrical")
    folder = str(write_tiny_3d(tmp_path / "net", contract=contract, recipe_yaml=None).folder)
    with pytest.raises(CheckpointError, match="RGB-D frames give cubic voxels"):
        visualize_matches(folder, DataSpec(), tmp_path / "m.png")  # rooms: not rendered


def test_a_frame_without_features_is_left_out_of_all_columns(source):
    frames, skips = [source.load(source.scenes()[0], frame) for frame in ("000000", "000010")], SkippedFrames()

    def cell(number, frame, column):
        if frame.id == "000000" and column == "blind":
            raise BadFrame(frame.id, "nothing is seen")
        return frame.id if column == "plain" else "seen"

    options = {"columns": ["plain", "blind"], "cell": cell, "what": "frame of scene 'x'", "progress": None}
    assert fill_rows(frames, skips=skips, **options) == [(frames[1], ["000010", "seen"])]
    assert "nothing is seen" in skips.summary()
    with pytest.raises(DataError, match=r"(?s)No frame of scene .* can be shown.*nothing is seen"):
        fill_rows(frames[:1], skips=SkippedFrames(), **options)


def test_clouds_are_turned_as_asked(tmp_path, cloud_folder, spec, monkeypatch):
    asked = []

    def match(*arguments, **options):
        asked.append(options)
        raise BadFrame("here", "enough is known")

    monkeypatch.setattr(matches_module, "match_pair", match)
    with pytest.raises(DataError, match="No pair of source"):
        visualize_matches(cloud_folder, spec, tmp_path / "m.png", count=2, against=None, turn="full", seed=4)
    assert asked == [{"size": SIZE, "turn": "full", "seed": seed} for seed in (4, 5)]


@pytest.mark.parametrize("kind, threshold, unit", [("image", 4.0, "px"), ("cloud", 2.0, "voxels")])
def test_matches_are_right_within_what_eval_measures(
    tmp_path, kind, threshold, unit, image_folder, cloud_folder, spec, monkeypatch
):
    drawn = {}

    def draw(rows, titles, path, **options):
        path.write_bytes(b"")
        drawn.update(options)

    monkeypatch.setattr(matches_module, "draw_matches", draw)
    folder = {"image": image_folder, "cloud": cloud_folder}[kind]
    visualize_matches(folder, spec, tmp_path / "m.png", count=1, against=None)
    assert drawn == {"threshold": threshold, "unit": unit}


def test_points_of_a_cloud_backbone_in_a_ply_file(tmp_path, cloud_folder, source, spec):
    out = tmp_path / "points.ply"
    cloud = visualize_points(cloud_folder, spec, out, limit=2000)
    vertex = read_ply(out)["vertex"]
    assert list(vertex) == ["x", "y", "z", "red", "green", "blue"]
    points = np.stack([vertex[axis] for axis in "xyz"], 1)
    surface = Surfaces(source).load(source.scenes()[0])
    places = {tuple(point): color for point, color in zip(surface.points.tolist(), surface.colors, strict=True)}
    assert len(points) == 2000 < len(surface)
    assert all(tuple(point) in places for point in points.tolist())
    assert [name for name, _ in cloud.layers] == ["cloud", "colors"]
    assert np.array_equal(np.stack([vertex[c] for c in ("red", "green", "blue")], 1), cloud.layers[0][1])
    assert all((places[tuple(p)] == c).all() for p, c in zip(points.tolist(), cloud.layers[1][1], strict=True))
    assert f"2,000 of {len(surface):,} points." in cloud.note
    (column_of,) = load_columns(find_backbone(cloud_folder), None)
    features = column_of.extractor.extract_surface(surface, [])
    row = {point: number for number, point in enumerate(map(tuple, surface.points.tolist()))}
    drawn = [features.index[row[tuple(point)]] for point in points.tolist()]
    assert np.array_equal(shared_pca([features.unit()[drawn]])[0], cloud.layers[0][1])


def test_points_of_an_image_backbone_are_those_that_are_seen(tmp_path, image_folder, spec):
    frames = dataclasses.replace(spec, frames=(0.0, 1.0))
    cloud = visualize_points(image_folder, frames, tmp_path / "points.png", frame="000010")
    assert [name for name, _ in cloud.layers] == ["image", RANDOM_TITLE, "colors"]
    assert len(cloud.points) == len(cloud.layers[0][1])
    assert cloud.top == 1.0
    assert cloud.title.endswith("/000010")
    picture = pixels(tmp_path / "points.png")
    assert picture.shape[1] == 4 * (320 + GAP) + GAP
    row = picture[HEADER + 144]
    for view in range(4):
        middle = row[GAP + view * (320 + GAP) : GAP + view * (320 + GAP) + 320]
        assert (middle != NOTHING).any()
        assert (middle == NOTHING).all(axis=1).any()


def test_points_that_no_frame_sees_are_left_out(tmp_path, image_folder, source, spec, monkeypatch):
    surface = Surfaces(source).load(source.scenes()[0])
    far = Surface(
        np.concatenate([surface.points + np.float32(50), surface.points]), np.concatenate([surface.colors] * 2)
    )
    monkeypatch.setattr(points_module.Surfaces, "load", lambda self, scene: far)
    cloud = visualize_points(image_folder, spec, tmp_path / "points.ply")
    assert 0.9 * len(surface) < len(cloud.points) <= len(surface)  # all frames look
    assert cloud.points.max() <= surface.points.max()
    assert f"of {2 * len(surface):,} points, of which the frames see {len(cloud.points):,}." in cloud.note


def test_layers_of_one_space_share_their_colors_on_points_too(tmp_path, geo, source, spec, monkeypatch):
    name = source.scenes()[0]
    whole = Surfaces(source).load(name)
    surface = Surface(whole.points[::9], whole.colors[::9])
    far = Surface(np.concatenate([surface.points, surface.points + np.float32(50)]), np.tile(surface.colors, (2, 1)))
    monkeypatch.setattr(points_module.Surfaces, "load", lambda self, scene: far)
    frames = [resize_frame(source.load(name, frame), SIZE) for frame in source.frame_ids(name)]
    cloud = visualize_points(geo, spec, tmp_path / "points.html", limit=400, seed=3)
    assert len(cloud.points) == 400
    assert cloud.points.max() <= surface.points.max()  # where pixels and voxels both say something
    assert all((cloud.rotation @ -frame.cam_to_world[:3, 1])[2] > 0.8 for frame in frames)
    row = {point: number for number, point in enumerate(map(tuple, far.points.tolist()))}
    drawn = [row[tuple(point)] for point in cloud.points.tolist()]
    for first, random in ((0, False), (2, True)):
        described = [
            drawn_column.extractor.extract_surface(far, frames)
            for drawn_column in load_columns(find_backbone(geo), Surfaces(source), random_init=random, seed=3)
        ]
        expected = shared_pca([features.unit()[features.index[drawn]] for features in described])
        for (_, colors), own in zip(cloud.layers[first : first + 2], expected, strict=True):
            assert np.array_equal(colors, own)
    known = sum(bool(pixel >= 0) for pixel in described[0].index)
    assert 400 < known < len(surface) + 1
    assert f"400 of {len(far):,} points, of which the frames see {known:,}." in cloud.note


def test_the_cloud_and_its_twin_are_of_the_frame_and_the_map_asked_for(tmp_path, image_folder, source, spec):
    cloud = visualize_points(image_folder, spec, tmp_path / "x.html", frame="000010", size=SIZE, level=1, seed=3)
    frame = resize_frame(source.load(source.scenes()[0], "000010"), SIZE)
    assert np.array_equal(cloud.points, frame_cloud(frame).points)
    for layer, random in ((0, False), (1, True)):
        (column_of,) = load_columns(find_backbone(image_folder), None, level=1, random_init=random, seed=3)
        features = column_of.extractor.extract_surface(frame_cloud(frame), [frame])
        assert np.array_equal(cloud.layers[layer][1], shared_pca([features.unit()[features.index]])[0])


def test_views_are_cut_from_above(tmp_path):
    plane = np.stack(np.meshgrid(np.linspace(0, 1, 51), np.linspace(0, 1, 51), [0.0]), -1).reshape(-1, 3)
    points = np.concatenate([plane + [0, 0, 1], plane]).astype(np.float32)  # the ceiling comes first
    blue, red = ([[0, 0, 255]] * len(plane), [[255, 0, 0]] * len(plane))
    layer = ("x", np.array([*blue, *red], np.uint8))
    spacing = points_module.spacing(plane)
    assert spacing == pytest.approx(0.02, rel=0.1)
    for top, expected in ((0.5, {(255, 0, 0)}), (1.0, {(0, 0, 255), (255, 0, 0)})):
        turn = np.eye(3)[[1, 2, 0]]  # the world's x is up, and it lies below its origin
        cloud = points_module.PaintedCloud((points - 7) @ turn, (layer,), turn, "t", "n", spacing, top)
        points_module._write_views(cloud, tmp_path / "x.png")
        shown = pixels(tmp_path / "x.png")[HEADER : HEADER + 288].reshape(-1, 3)
        found = {tuple(color) for color in np.unique(shown, axis=0).tolist()}
        assert found & {(255, 0, 0), (0, 0, 255)} == expected
    counts = [(shown == color).all(axis=1).sum() for color in ((255, 0, 0), (0, 0, 255))]
    assert counts[0] < counts[1]  # seen from above: the ceiling hides part of the floor


def test_the_page_holds_points_and_layers(tmp_path, geo, spec):
    out = tmp_path / "points.html"
    cloud = visualize_points(geo, spec, out, limit=500, seed=3)
    assert [name for name, _ in cloud.layers] == [
        "geo: pixels", "geo: voxels", f"{RANDOM_TITLE}: pixels", f"{RANDOM_TITLE}: voxels", "colors"
    ]  # fmt: skip
    text = out.read_text()
    assert not re.search(r"(src|href)=|https?:|@import|fetch\(", text)  # nothing from elsewhere
    scene = json.loads(re.search(r'<script id="scene" type="application/json">(.*?)</script>', text).group(1))
    points = np.frombuffer(base64.b64decode(scene["points"]), "<f4").reshape(-1, 3)
    turned = cloud.points.astype(np.float64) @ cloud.rotation.T
    np.testing.assert_allclose(points, turned - (turned.min(0) + turned.max(0)) / 2, atol=1e-6)
    assert [layer["name"] for layer in scene["layers"]] == [name for name, _ in cloud.layers]
    for layer, (_, colors) in zip(scene["layers"], cloud.layers, strict=True):
        assert base64.b64decode(layer["colors"]) == colors.tobytes()
    assert scene["radius"] == pytest.approx(np.linalg.norm(points, axis=1).max())
    assert (scene["top"], scene["note"]) == (0.8, cloud.note)
    assert 1 < scene["size"] / cloud.spacing < 4  # neighbors touch and do not hide each other
    assert len(points) == 500


def test_names_cannot_break_out_of_the_page():
    title = "</script><b>'\"&"
    page = viewer_page(np.zeros((1, 3)), [(title, np.zeros((1, 3), np.uint8))], title=title, note="", size=1)
    scene = re.search(r'type="application/json">(.*?)</script>', page).group(1)
    assert json.loads(scene)["title"] == json.loads(scene)["layers"][0]["name"] == title
    assert page.count("</script>") == 2


def test_points_are_thinned_by_the_seed(tmp_path, cloud_folder, spec):
    clouds = [visualize_points(cloud_folder, spec, tmp_path / "a.ply", limit=50, seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(clouds[0].points, clouds[1].points)
    assert not np.array_equal(clouds[0].points, clouds[2].points)
    assert len(np.unique(clouds[0].points, axis=0)) == 50


def test_rooms_are_those_of_pretraining(image_folder, geo, tmp_path, tiny_recipe):
    found = find_backbone(geo)
    plain = drawing_spec(DataSpec(), found, None, 4)
    assert plain.options == {"frames": 12, "scenes": 4}  # it was trained on another source
    assert plain.size == (48, 64)
    assert drawing_spec(DataSpec(options={"seed": 3}), found, (8, 9), 4) == DataSpec(options={"seed": 3}, size=(8, 9))
    recipe = (found.checkpoint.folder / "recipe.yaml").read_text()
    tree = yaml.safe_load(recipe)
    tree["data"] |= {"source": "rooms", "path": None, "options": {"width": 64, "height": 64}}
    of_rooms = write_tiny_3d(tmp_path / "rooms", recipe_yaml=yaml.safe_dump(tree)).folder
    assert drawing_spec(DataSpec(), find_backbone(str(of_rooms)), None, 2).options == {
        "width": 64, "height": 64, "scenes": 2
    }  # fmt: skip
    other = drawing_spec(DataSpec(source="scannet", path="x"), find_backbone(image_folder), None, 2)
    assert (other.size, other.options) == ((64, 96), {})
