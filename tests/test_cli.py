"""The command line: every command answers --help with an example, works, and turns errors into one message."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from geo_pretrain import __version__, cli
from tests.training.conftest import recording, tiny_recipe  # noqa: F401 (fixtures)

COMMANDS = [
    ["list"],
    ["info"],
    ["demo"],
    ["train"],
    ["eval", "matching"],
    ["eval", "pixel-to-voxel"],
    ["data", "preview"],
]


def run(*arguments):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def all_commands():
    group = typer.main.get_command(cli.app)
    found = []
    for name, command in group.commands.items():
        found += [[name, sub] for sub in command.commands] if hasattr(command, "commands") else [[name]]
    return found


def test_the_sweep_sees_every_command():
    assert sorted(all_commands()) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_an_example(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"Example: geo-pretrain {' '.join(command)}" in " ".join(result.output.replace("`", "").split())


def test_version():
    assert __version__ in run("--version").output


def test_list_and_filters():
    everything = run("list").output
    assert "pri3d_view_geo_r50" in everything
    permissive = run("list", "pri3d*", "--license", "permissive").output
    assert "pri3d_view_r18.rooms" in permissive
    assert "pri3d_view_geo_r50" not in permissive
    assert "No backbone matches" in run("list", "nothing*").output


def test_info_as_table_and_json():
    assert "ICCV" in run("info", "pri3d_view_geo_r50").output
    tree = json.loads(run("info", "pri3d_view_geo_r50", "--json").output)
    assert tree["name"] == "pri3d_view_geo_r50"
    assert tree["licence"]["weights"]


def test_train_then_eval_matching(tmp_path, tiny_recipe, recording):  # noqa: F811
    out = tmp_path / "kitchen"
    data = f"seven_scenes:{recording}"
    trained = run("train", tiny_recipe(), "--data", data, "--steps", 30, "--out", out, "--device", "cpu")
    assert trained.exit_code == 0, trained.output
    assert json.loads((out / "config.json").read_text())["name"] == "pri3d_view_r18.seven_scenes"
    assert "not registered" in trained.output
    measured = run("eval", "matching", out, "--data", data, "--overlap", "0.3:1", "--size", "48x64", "--json")
    results = json.loads(measured.output[measured.output.index("{") :])
    assert set(results) == {"random", str(out)}
    assert results[str(out)]["queries"] == results["random"]["queries"] > 0
    assert "recall at 4 px" in run("eval", "matching", out, "--data", data).output


def test_train_then_eval_in_3d(tmp_path, tiny_recipe, recording):  # noqa: F811
    data = ["--data", f"seven_scenes:{recording}"]
    for tiny, command in (("pointcontrast_nce", "matching"), ("pri3d_geo", "pixel-to-voxel")):
        out = tmp_path / tiny
        trained = run("train", tiny_recipe(tiny), *data, "--steps", 3, "--out", out, "--device", "cpu")
        assert trained.exit_code == 0, trained.output
        turn = ["--turn", "full"] if command == "matching" else []
        measured = run("eval", command, out, *data, *turn, "--pairs", 2, "--json").output
        results = json.loads(measured[measured.index("{") :])
        assert set(results) == {"random", str(out)}
        assert results[str(out)]["unit"] == "voxels"
        assert len(results[str(out)]["per_pair"]) == 2
        assert results[str(out)]["queries"] == results["random"]["queries"] > 0
        shown = run("eval", command, out, *data, "--pairs", 2, "--threshold", 3).output
        assert "recall within 3 voxels" in shown
        assert "chance" in shown


def test_preview_of_a_recording(tmp_path, recording):  # noqa: F811
    out = tmp_path / "x.png"
    assert run("data", "preview", f"seven_scenes:{recording}", "-o", out, "--frames", 2).exit_code == 0
    with Image.open(out) as image:
        assert image.width > 300


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["info", "pri3d_viewgeo_r50"], ["Unknown backbone", "pri3d_view_geo_r50"]),
        (["train", "pri3d_veiw_r18", "--out", "x"], ["Unknown recipe", "pri3d_view_r18"]),
        (["train", "pri3d_view_r18", "--out", "x", "--set", "optim.lrr=1"], ["optim.lrr", "optim.lr"]),
        (["train", "pri3d_view_r18", "--out", "x", "--data", "kitti:x"], ["Unknown data source", "Closest"]),
        (["eval", "matching", "no_such_backbone"], ["no_such_backbone"]),
        (["eval", "pixel-to-voxel", "./no_such_folder"], ["no_such_folder", "does not exist"]),
    ],
)
def test_mistakes_give_one_message_and_no_traceback(arguments, parts, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["geo-pretrain", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("Error:")
    for part in parts:
        assert part in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option, value", [("--frames", "half"), ("--overlap", "1"), ("--size", "big"), ("--turn", "left")]
)
def test_malformed_options_are_named(option, value):
    result = run("eval", "matching", "x", option, value)
    assert result.exit_code == 2
    assert option in result.output


def test_runs_as_a_module_from_another_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "geo_pretrain", "list", "pri3d_view_r18.rooms"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "MIT" in done.stdout
