"""What no picture can be drawn of is named, and leaves nothing behind; what can be left out is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from geo_pretrain.catalog import Arch
from geo_pretrain.errors import BadFrame, DataError, RecipeError, UnknownName
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.recipe import DataSpec
from geo_pretrain.training.visualize.frames import draw_features
from geo_pretrain.training.visualize.grids import GAP, shorten
from geo_pretrain.training.visualize.matches import visualize_matches
from geo_pretrain.training.visualize.points import visualize_points
from tests.training.conftest import write_recording
from tests.training.visualize.conftest import pixels
from tests.zoo import role_weights, write_tiny

SIZE = (48, 64)


DRAWN = [
    (lambda backbone, spec, out, **options: draw_features([backbone], spec, out, **options), ".png"),
    (visualize_matches, ".png"),
    (visualize_points, ".ply"),
]


@pytest.mark.parametrize("draw, suffix", DRAWN, ids=["features", "matches", "points"])
def test_mistakes_are_named_and_leave_nothing(tmp_path, draw, suffix, image_folder, spec):
    out = tmp_path / "out" / f"x{suffix}"
    with pytest.raises(UnknownName, match=r"Unknown scene 'kitchen'\. Closest: 'recording"):
        draw(image_folder, spec, out, scene="kitchen")
    with pytest.raises(RecipeError, match=r"'x.gif'; accepted: names that end in .*\.png"):
        draw("no such backbone", spec, out.with_suffix(".gif"))
    with pytest.raises(UnknownName, match="Unknown data source"):
        draw(image_folder, DataSpec(source="scanet"), out)
    assert not out.parent.exists()


@pytest.mark.parametrize("draw, suffix", DRAWN, ids=["features", "matches", "points"])
def test_recordings_without_depth_are_named_and_leave_nothing(tmp_path, draw, suffix, image_folder):
    folder = write_recording(tmp_path / "blind")
    for path in folder.glob("*.depth.png"):
        path.unlink()
    with pytest.raises(DataError, match="depth image is missing"):
        draw(image_folder, DataSpec(source="seven_scenes", path=str(folder)), tmp_path / f"x{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == ["blind"]


def test_a_frame_that_cannot_be_read_is_left_out(tmp_path, image_folder, cloud_folder):
    folder, skips = write_recording(tmp_path / "kitchen"), SkippedFrames()
    (folder / "frame-000000.color.png").unlink()
    spec = DataSpec(source="seven_scenes", path=str(folder), size=SIZE)
    draw_features([image_folder], spec, tmp_path / "one.png", count=2, skips=skips, baseline=False)
    assert "color image is missing" in skips.summary()
    draw_features([image_folder], spec, tmp_path / "two.png", count=6, baseline=False)
    assert pixels(tmp_path / "two.png").shape[0] > 3 * pixels(tmp_path / "one.png").shape[0]
    visualize_points(cloud_folder, spec, tmp_path / "points.ply", limit=50)
    with pytest.raises(UnknownName, match="Unknown frame '7'"):
        visualize_points(cloud_folder, spec, tmp_path / "x.ply", frame="7")
    with pytest.raises(RecipeError, match="number of points is 0"):
        visualize_points(cloud_folder, spec, tmp_path / "x.ply", limit=0)


def test_a_frame_whose_depth_is_lost_by_its_size_is_named(tmp_path, cloud_folder):
    folder = write_recording(tmp_path / "kitchen")
    depth = np.zeros((120, 160), np.uint16)
    depth[0, 0] = 1000  # at half the size every second pixel is taken, beginning with the second
    Image.fromarray(depth).save(folder / "frame-000000.depth.png")
    spec = DataSpec(source="seven_scenes", path=str(folder))
    with pytest.raises(BadFrame, match="kitchen/000000: no pixel has a valid depth"):
        visualize_points(cloud_folder, spec, tmp_path / "x.ply", frame="000000", size=(60, 80))


def test_an_encoder_alone_has_features_and_matches(tmp_path, spec):
    arch = Arch("resnet", {"depth": 18, "width": 8})
    folder = str(write_tiny(tmp_path / "net", arch=arch, weights={"encoder": role_weights("encoder")}).folder)
    shown = visualize_matches(folder, spec, tmp_path / "matches.png", count=1)
    assert [title for title, _ in shown] == ["random weights", "net"]
    with pytest.raises(RecipeError, match="'scratch' is drawn beside a backbone"):
        visualize_matches("scratch", spec, tmp_path / "x.png")
    draw_features([folder], spec, tmp_path / "x.png", count=1)
    assert pixels(tmp_path / "x.png").shape[1] == 3 * (288 + GAP) + GAP


def test_long_titles_are_shortened_in_the_middle():
    assert shorten("runs", 300) == "runs"
    name = "pri3d_view_geo_r50_with_a_very_long_name_that_goes_on.rooms"
    short = shorten(name, 200)
    assert short.startswith("pri3d_")
    assert short.endswith(".rooms")
    assert "..." in short
    assert len(short) < len(name)


def test_features_that_are_not_numbers_are_reported(tmp_path, spec):
    weights = {role: role_weights(role) for role in ("encoder", "decoder")}
    weights["decoder"] = {
        key: value * torch.nan if value.is_floating_point() else value for key, value in weights["decoder"].items()
    }
    folder = str(write_tiny(tmp_path / "net", weights=weights).folder)
    with pytest.raises(DataError, match="are not finite"):
        draw_features([folder], spec, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
