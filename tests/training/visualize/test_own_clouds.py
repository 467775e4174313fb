"""Features on clouds of one's own: files alone, without labels, splits and frames."""

from __future__ import annotations

import numpy as np
import pytest

from geo_pretrain.errors import BadFrame, DataError, RecipeError, UnknownName
from geo_pretrain.training.data.surfaces.ply import read_ply
from geo_pretrain.training.recipe import DataSpec
from geo_pretrain.training.visualize.points import visualize_points
from tests.front_door import geo_pretrain


def write(path, count=300, scale=1.0, **more):
    generator = np.random.default_rng(1)
    points = generator.uniform(0, 2, (count, 3)) * scale
    np.savez(path, points=points, **(more or {"colors": generator.integers(0, 256, (count, 3), np.uint8)}))
    return points


def own(path, **options):
    return DataSpec(source="clouds", path=str(path), options=options)


def test_a_file_is_drawn_by_the_command_and_keeps_its_points(cloud_folder, tmp_path):
    points = write(tmp_path / "scan.npz", scale=1000.0)
    shown = geo_pretrain(
        "visualize", "points", cloud_folder, "--data", f"clouds:{tmp_path / 'scan.npz'}", "--set",
        "data.options.scale=0.001", "-o", tmp_path / "out.ply",
    ).output  # fmt: skip
    assert "300 of 300 points" in shown
    drawn = read_ply(tmp_path / "out.ply", ["vertex"])["vertex"]
    np.testing.assert_allclose(np.stack([drawn[k] for k in "xyz"], 1), points / 1000, atol=1e-5)
    voxel = np.unique(np.floor(points / 1000 / 0.1), axis=0, return_inverse=True)[1].reshape(-1)
    colors = np.stack([drawn[k] for k in ("red", "green", "blue")], 1)
    assert len(np.unique(np.column_stack([voxel, colors]), axis=0)) == len(np.unique(voxel))  # one a voxel
    assert len(np.unique(colors, axis=0)) > 20


def test_a_folder_is_asked_for_one_of_its_clouds(cloud_folder, tmp_path):
    root = tmp_path / "scans"
    (root / "attic").mkdir(parents=True)
    write(root / "attic" / "a.npz")
    write(root / "b.npz", count=200)
    cloud = visualize_points(cloud_folder, own(root), tmp_path / "out.html", scene="b")
    assert len(cloud.points) == 200
    assert [title for title, _ in cloud.layers] == ["cloud", "random weights", "colors"]
    assert len(visualize_points(cloud_folder, own(root), tmp_path / "out.png").points) == 300
    with pytest.raises(UnknownName, match=r"Unknown cloud 'attic/b'\. Closest: 'attic/a', 'b'"):
        visualize_points(cloud_folder, own(root), tmp_path / "out.ply", scene="attic/b")


def test_what_cannot_be_drawn_is_said(cloud_folder, image_folder, tmp_path):
    write(tmp_path / "a.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:400])
    (tmp_path / "none").mkdir()
    write(tmp_path / "gray.npz", tint=np.zeros((300, 3), np.uint8))
    out = tmp_path / "x.ply"
    for backbone, spec, options, error, message in [
        (image_folder, own(tmp_path / "a.npz"), {}, RecipeError, "is a network for images"),
        (cloud_folder, own(tmp_path / "gray.npz"), {}, DataError, r"has no colors; .*data\.options\.color=NAME"),
        (cloud_folder, own(tmp_path / "cut.npz"), {}, BadFrame, r"cut\.npz: "),
        (cloud_folder, own(tmp_path / "none"), {}, DataError, r"has no \.ply, .* file"),
        ("not opened", own(tmp_path / "gone"), {}, DataError, "is neither a file nor a folder"),
        ("not opened", own(tmp_path / "a.npz"), {"frame": "1"}, RecipeError, "have no frames"),
        ("not opened", DataSpec(source="clouds"), {}, RecipeError, "--data clouds:PATH"),
    ]:
        with pytest.raises(error, match=message):
            visualize_points(backbone, spec, out, **options)
    assert not out.exists()
    visualize_points(cloud_folder, own(tmp_path / "gray.npz", color="tint"), out)
    write(tmp_path / "far.npz", count=600, scale=500)
    with pytest.warns(UserWarning, match=r"hardly any of the 600 points .*data\.options\.scale=0\.01"):
        visualize_points(cloud_folder, own(tmp_path / "far.npz"), out)


@pytest.mark.parametrize("name", ["clouds", "ade20k"])
def test_labelled_data_are_told_apart_from_frames(name, tmp_path):
    line = ["train", "pri3d_view_r18", "--data", f"{name}:{tmp_path}", "--out", tmp_path / "out"]
    wrong = geo_pretrain(*line, expected=1).errors
    assert f"{name!r} is labelled data, for finetune, predict and eval probe; here posed RGB-D is wanted" in wrong
    assert not (tmp_path / "out").exists()
