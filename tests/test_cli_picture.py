"""`geo-pretrain visualize`: pictures from the command line, mistakes as one message, nothing half-written."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from typer.testing import CliRunner

from geo_pretrain import cli, devices
from geo_pretrain.training.data.surfaces.ply import read_ply
from geo_pretrain.training.recipe import DataSpec
from geo_pretrain.training.visualize import frames as drawing_frames
from geo_pretrain.training.visualize import matches as drawing_matches
from geo_pretrain.training.visualize import points as drawing_points
from tests.test_cli import run
from tests.training.conftest import recording  # noqa: F401 (fixture)
from tests.zoo import write_tiny, write_tiny_3d


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("nets")
    return [str(write_tiny(root / "image").folder), str(write_tiny_3d(root / "cloud", recipe_yaml=None).folder)]


@pytest.fixture
def data(recording):  # noqa: F811
    return ["--data", f"seven_scenes:{recording}"]


def test_matches(tmp_path, folders, data, recording):  # noqa: F811
    shown = run("visualize", "matches", folders[0], *data, "--size", "48x64", "--pairs", 1, "-o", tmp_path / "two.png")
    assert "random weights: " in shown.output
    assert "% right" in shown.output
    assert f"Wrote {tmp_path / 'two.png'}" in shown.output
    alone = ["--alone", "--overlap", "0.5:1", "--threshold", 2, "--scene", recording.name]
    run("visualize", "matches", folders[0], *data, "--size", "48x64", "--pairs", 1, *alone, "-o", tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.width < two.width
        assert one.height == two.height


def test_features_of_several_backbones_and_of_a_map(tmp_path, folders, data):
    command = ["visualize", "features", *folders, *data, "--size", "48x64", "--count", 1, "--frames", "0.5:1"]
    run(*command, "--alone", "-o", tmp_path / "a.png")
    run(*command, "--map", 1, "-o", tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert (a.width - 12, b.width - 12) == (3 * 268, 4 * 268)


@pytest.mark.parametrize("suffix", [".ply", ".html", ".png"])
def test_points(tmp_path, folders, data, suffix):
    out = tmp_path / f"points{suffix}"
    options = ["--frame", "000020", "--points", 300, "--size", "48x64", "--seed", 4, "-o", out]
    shown = run("visualize", "points", folders[1], *data, *options)
    assert "300 of 2,847 points." in shown.output
    if suffix == ".ply":
        assert len(read_ply(out)["vertex"]["x"]) == 300
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    before = out.read_bytes()
    run("visualize", "points", folders[1], *data, *options, "--map", 1)
    assert out.read_bytes() != before


def test_rooms_need_no_data(tmp_path, folders):
    options = "data.options={scenes: 1, frames: 2, width: 64, height: 64}"
    run("visualize", "features", folders[0], "--set", options, "--size", "64x64", "-o", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.height > 2 * 256


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["features", "no_such_backbone"], ["no_such_backbone", "Closest"]),
        (["features", "FOLDER", "--scene", "kitchen"], ["Unknown scene 'kitchen'", "'recording"]),
        (["points", "FOLDER", "--frame", "7"], ["Unknown frame '7'", "'000010'"]),
        (["matches", "FOLDER", "--against", "OTHER"], ["takes voxels", "that take images"]),
        (["matches", "FOLDER", "--overlap", "0.99999:1"], ["No pair of frames is left"]),
        (["points", "./photos"], ["photos", "config.json"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in ("features", "points", "matches") else "",
)
def test_mistakes_give_one_message_and_leave_nothing(arguments, parts, folders, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    arguments = [{"FOLDER": folders[0], "OTHER": folders[1]}.get(word, word) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["geo-pretrain", "visualize", *arguments, *data])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("Error:")
    for part in parts:
        assert part in error
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    "arguments", [["features", "x", "--map", "5"], ["features", "x", "--count", "0"], ["points", "x", "--points", "0"]]
)
def test_numbers_out_of_range_are_named(arguments):
    result = run("visualize", *arguments)
    assert result.exit_code == 2
    assert arguments[-2] in result.output


def given(monkeypatch, place, name, result, *command):
    """What a command hands to the function that draws, and what the command prints."""
    calls = []
    monkeypatch.setattr(devices, "device_fault", lambda device: None)
    monkeypatch.setattr(place, name, lambda *arguments, **options: calls.append((arguments, options)) or result)
    shown = run("visualize", *command)
    ((arguments, options),) = calls
    return arguments, {k: v for k, v in options.items() if k not in ("skips", "progress", "on_pair")}, shown.output


COMMON = ["--data", "seven_scenes:x", "--frames", "0.25:0.5", "--size", "48x64", "--seed", 9, "--scene", "a"]
COMMON += ["--device", "cuda", "--set", "data.measure=match_released_code"]


def test_every_option_of_matches_arrives(monkeypatch):
    options = ["--overlap", "0.5:0.75", "--against", "b", "--pairs", 7, "--threshold", 1.5, "--turn", "full"]
    place = drawing_matches, "visualize_matches", [("t", [0.2, 0.6, 0.7])]
    spec, named, shown = given(monkeypatch, *place, "matches", "net", *COMMON, *options, "-o", "m.png")
    data = DataSpec("seven_scenes", "x", frames=(0.25, 0.5), overlap=(0.5, 0.75), measure="match_released_code")
    assert spec == ("net", data, Path("m.png"))
    assert named == {
        "against": "b", "scene": "a", "count": 7, "size": (48, 64), "threshold": 1.5, "turn": "full", "seed": 9,
        "device": "cuda",
    }  # fmt: skip
    assert "t: 50% right" in shown
    spec, named, _ = given(monkeypatch, *place, "matches", "net", "--alone")
    assert spec == ("net", DataSpec(), Path("matches.png"))
    assert named == {
        "against": None, "scene": None, "count": 3, "size": None, "threshold": None, "turn": "camera", "seed": 0,
        "device": "cpu",
    }  # fmt: skip
    assert given(monkeypatch, *place, "matches", "net")[1]["against"] == "scratch"


def test_every_option_of_features_and_points_arrives(monkeypatch):
    data = DataSpec("seven_scenes", "x", frames=(0.25, 0.5), overlap=(0.0, 1.0), measure="match_released_code")
    common = {"scene": "a", "size": (48, 64), "level": 2, "baseline": False, "seed": 9, "device": "cuda"}
    plain = {"scene": None, "size": None, "level": None, "baseline": True, "seed": 0, "device": "cpu"}
    options = [*COMMON, "--map", 2, "--alone"]
    place = drawing_frames, "draw_features", ["image"]
    spec, named, _ = given(monkeypatch, *place, "features", "m", "n", *options, "--count", 7, "-o", "f.png")
    assert spec == (["m", "n"], data, Path("f.png"))
    assert named == common | {"count": 7}
    spec, named, _ = given(monkeypatch, *place, "features", "m")
    assert spec == (["m"], DataSpec(overlap=(0.0, 1.0)), Path("features.png"))
    assert named == plain | {"count": 4}
    place = drawing_points, "visualize_points", SimpleNamespace(note="7 of 8 points")
    more = ["--frame", "f", "--points", 7, "-o", "p.ply"]
    spec, named, shown = given(monkeypatch, *place, "points", "m", *options, *more)
    assert spec == ("m", data, Path("p.ply"))
    assert named == common | {"frame": "f", "limit": 7}
    assert "Wrote p.ply: 7 of 8 points" in shown
    spec, named, _ = given(monkeypatch, *place, "points", "m")
    assert spec == ("m", DataSpec(overlap=(0.0, 1.0)), Path("points.html"))
    assert named == plain | {"frame": None, "limit": 200_000}


@pytest.mark.parametrize("command", ["check", "preview"])
def test_a_place_that_no_picture_can_be_written_to_is_told_before_any_work(command, tmp_path):
    for out in (tmp_path, tmp_path / "x.xyz"):
        result = CliRunner().invoke(cli.app, ["data", command, "rooms", "-o", str(out)])
        assert result.exit_code == 2
        assert ".png, .jpg" in " ".join(result.output.replace("│", " ").split())
