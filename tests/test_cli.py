"""The command line: every command answers --help with an example, works, and turns errors into one message."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from geo_pretrain import __version__, cli
from geo_pretrain.catalog import CATALOG
from geo_pretrain.catalog.lengths import LENGTHS
from geo_pretrain.errors import CheckpointError, DataError
from geo_pretrain.files import locked
from geo_pretrain.listing import answer
from geo_pretrain.training import pretrain as running
from geo_pretrain.training.data.sources import registry as sources
from geo_pretrain.training.evaluation import matching as matching_module
from geo_pretrain.training.evaluation.matching import MatchingResult
from geo_pretrain.training.recipe import DataSpec, load_recipe, load_stage1
from geo_pretrain.training.visualize import preview
from tests.authors_files import write
from tests.training.conftest import recording, tiny_recipe  # noqa: F401 (fixtures)
from tests.zoo import write_tiny, write_tiny_3d

COMMANDS = [
    ["list"],
    ["recommend"],
    ["info"],
    ["pull"],
    ["verify"],
    ["convert"],
    ["publish"],
    ["bundle"],
    ["card"],
    ["gallery"],
    ["cache", "ls"],
    ["cache", "rm"],
    *(["weights", verb] for verb in ("add", "check", "measured", "mirror", "texts")),
    ["demo"],
    ["doctor"],
    ["recipes", "list"],
    ["recipes", "show"],
    ["recipes", "copy"],
    ["train"],
    ["eval", "awareness"],
    ["eval", "matching"],
    ["eval", "pixel-to-voxel"],
    ["eval", "probe"],
    ["eval", "folds"],
    ["finetune"],
    ["launch"],
    ["predict"],
    ["export"],
    ["data", "check"],
    ["data", "preview"],
    ["data", "convert"],
    ["data", "mine"],
    ["data", "shards"],
    ["bench", "pretext"],
    ["bench", "table"],
    ["visualize", "matches"],
    ["visualize", "features"],
    ["visualize", "points"],
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
    assert "Closest: pri3d_view_r18," in run("list", "pri3d_veiw_r18").output


def test_a_list_in_a_narrow_pipe_cuts_nothing():
    lines = CliRunner().invoke(cli.app, ["list"], env={"COLUMNS": "80"}).output.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: " ".join(line.split()[2:]) for line in lines[1:]}
    trained = {name: f"train: {LENGTHS[name]}" for name, entry in CATALOG.items() if entry.status == "regenerable"}
    assert rows == {name: entry.how for name, entry in CATALOG.items()} | trained


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["pri3d*"],
        ["--license", "permissive", "*r18*"],
        ["--data=kitti"],
        ["--method", "pri3d", "--modality", "2d"],
        ["--status", "regenerable"],
    ],
    ids=" ".join,
)
def test_a_plain_list_is_answered_without_the_command_line_parser(arguments):
    assert f"{answer(arguments)}\n" == run("list", *arguments).output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--json"],
        ["a", "b"],
        ["nothing*"],
        ["--no-such", "x"],
        ["--method"],
        ["--method", "no_such"],
        ["-x"],
    ],
    ids=" ".join,
)
def test_help_mistakes_and_empty_lists_are_left_to_the_command_line_parser(arguments):
    assert answer(arguments) is None


def test_a_plain_list_loads_no_library_of_the_command_line():
    code = "import sys; from geo_pretrain.__main__ import main; sys.argv = ['geo-pretrain', 'list']; main()"
    code += "; print(*{'typer', 'rich', 'pydantic', 'torch', 'numpy', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:-1] == run("list").output.splitlines()[1:]
    assert done.stdout.splitlines()[-1] == ""


def test_info_as_table_and_json():
    assert "ICCV" in run("info", "pri3d_view_geo_r50").output
    tree = json.loads(run("info", "pri3d_view_geo_r50", "--json").output)
    assert tree["name"] == "pri3d_view_geo_r50"
    assert tree["license"]["weights"]


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A hub folder with a 2D and a 3D checkpoint, an empty cache."""
    write_tiny(tmp_path / "hub/tiny_net_r18")
    write_tiny_3d(tmp_path / "hub/tiny_net_srunet34")
    monkeypatch.setenv("GEO_PRETRAIN_HUB", str(tmp_path / "hub"))
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_list_as_json_and_by_data():
    rows = json.loads(run("list", "--json", "--data", "kitti").output)
    assert {row["network"] for row in rows} == {"ResNet-50 U-Net"}
    assert [row["name"] for row in rows] == ["pri3d_view_r50.kitti", "pri3d_view_r50.kitti_180"]


def test_info_of_a_folder_and_its_load_report(zoo):
    plain = run("info", "tiny_net_r18").output
    assert "hub/tiny_net_r18" in plain.replace("\n", "").replace(" ", "")
    assert "License\nThe weights' license is what counts for you" in plain
    tree = json.loads(run("info", "tiny_net_srunet34", "--loaded", "--json").output)
    assert tree["loaded"]["coverage"] == 1
    assert tree["loaded"]["fresh"] == []
    assert "100% of the network's tensors came from" in run("info", "tiny_net_r18", "--loaded").output


def test_pull_verify_and_cache(zoo, monkeypatch):
    shown = run("verify", "tiny_net_r18").output
    assert "5 golden outputs reproduced" in shown
    assert shown.count("ok") == 5
    assert str(zoo / "hub/tiny_net_r18") in run("pull", "tiny_net_r18").output
    assert "Nothing is cached" in run("cache", "ls").output
    assert run("pull").exit_code == 2
    assert run("cache", "rm").exit_code == 2


def test_bundle_here_pull_there(zoo, monkeypatch):
    run("bundle", "tiny_net_r18", "tiny_net_srunet34", "-o", "zoo.tar")
    monkeypatch.delenv("GEO_PRETRAIN_HUB")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "tiny_net_srunet34" in run("pull", "--from-bundle", "zoo.tar").output
    assert "1 golden outputs" in run("verify", "tiny_net_srunet34").output
    rows = json.loads(run("cache", "ls", "--json").output)
    assert [(row["name"], row["kind"]) for row in rows] == [("tiny_net_r18", "bundle"), ("tiny_net_srunet34", "bundle")]
    assert "tiny_net_r18" in run("cache", "ls").output
    assert "Removed 1 checkpoints" in run("cache", "rm", "tiny_net_r18").output
    assert "Removed 1 checkpoints" in run("cache", "rm", "--all").output
    assert json.loads(run("cache", "ls", "--json").output) == []


def test_two_conversions_into_one_folder_do_not_mix(zoo):
    write("detectron2", zoo / "theirs.pkl")
    with locked((zoo / "mine").resolve()), pytest.raises(CheckpointError, match="Another process is at work on mine"):
        run("convert", "theirs.pkl", "--from", "detectron2", "--name", "m", "--like", "pri3d_view_r18", "-o", "mine")
    assert not (zoo / "mine").exists()


def test_convert_in_and_out(zoo):
    write("detectron2", zoo / "theirs.pkl")
    out = run(
        "convert", "theirs.pkl", "--from", "detectron2", "--name", "mine", "--like", "pri3d_view_r18", "-o", "mine"
    )
    assert "mine" in out.output
    assert json.loads((zoo / "mine/config.json").read_text())["name"] == "mine"
    run("convert", "mine", "--to", "detectron2", "-o", "back.pkl")
    theirs, back = (pickle.loads((zoo / name).read_bytes())["model"] for name in ("theirs.pkl", "back.pkl"))
    assert theirs.keys() == {key for key in back if not key.endswith("num_batches_tracked")}
    assert all(np.array_equal(theirs[key], back[key]) for key in theirs)
    with pytest.raises(CheckpointError, match=r"mine holds a checkpoint; give another folder, or .*--overwrite"):
        run("convert", "theirs.pkl", "--from", "detectron2", "--name", "pri3d_view_r18", "-o", "mine")
    assert json.loads((zoo / "mine/config.json").read_text())["name"] == "mine"
    # the file held an encoder alone, and so does the checkpoint: each command takes it for whole
    assert "5 golden outputs reproduced" in run("verify", "mine").output
    assert "100% of the network's tensors came from" in run("info", "mine", "--loaded").output
    assert "mi[ne][b].tar" in run("bundle", "mine", "-o", "mi[ne][b].tar").output  # brackets are no markup
    mistakes = (["x", "-o", "y"], ["x", "--from", "moco", "--to", "timm", "-o", "y"])
    for arguments in mistakes:
        result = run("convert", *arguments)
        assert result.exit_code == 2
        assert "spconv" in result.output
    for named in ([], ["--name", "my_own"]):
        result = run("convert", "theirs.pkl", "--from", "detectron2", *named, "-o", "y")
        assert result.exit_code == 2
        assert "--like" in result.output


def test_publish_to_a_folder_after_a_dry_run(zoo):
    shown = run("publish", "hub/tiny_net_r18", "--to", "shelf", "--dry-run")
    assert "encoder.safetensors" in shown.output
    assert not (zoo / "shelf").exists()
    run("publish", "hub/tiny_net_r18", "--to", "shelf")
    assert (zoo / "shelf/tiny_net_r18/config.json").is_file()


def test_card_is_printed_or_written(zoo):
    assert "# pri3d_view_geo_r50" in run("card", "pri3d_view_geo_r50").output
    run("card", "hub/tiny_net_r18", "-o", "card.md")
    assert "tiny_net_r18" in (zoo / "card.md").read_text()


def test_train_then_eval_matching(tmp_path, tiny_recipe, recording):  # noqa: F811
    out = tmp_path / "kitchen"
    data = f"seven_scenes:{recording}"
    trained = run("train", tiny_recipe(), "--data", data, "--steps", 4, "--out", out, "--device", "cpu")
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


def given(monkeypatch, place, name, result, *command):
    """What a command hands to the function that works, but for what shows progress; and what the command prints."""
    calls = []
    monkeypatch.setattr(place, name, lambda *arguments, **options: calls.append((arguments, options)) or result)
    shown = run(*command)
    assert shown.exit_code == 0, shown.output
    ((arguments, options),) = calls
    return arguments, {k: v for k, v in options.items() if k not in ("skips", "progress", "report", "note")}, shown


def test_every_option_of_train_arrives(tmp_path, monkeypatch):
    place = running, "run_recipe", running.Outcome(None, 0)
    name, out = "img2pc_srunet34.rooms", tmp_path / "x"
    data = ["--data", f"seven_scenes:{tmp_path}", "--frames", "0.25:0.75"]
    more = ["--steps", 7, "--overwrite", "--set", "optim.lr=0.5", "--set", "data.size=[48, 64]", "--device", "cpu"]
    (recipe, at, world), options, _ = given(monkeypatch, *place, "train", name, "--toy", *data, *more, "-o", out)
    changes = ["data.source=seven_scenes", f"data.path={tmp_path}", "data.options={}", "data.frames=[0.25, 0.75]"]
    changes += ["optim.steps=7", "optim.lr=0.5", "data.size=[48, 64]"]
    expected = load_recipe(name, changes, toy=True)
    assert recipe == dataclasses.replace(expected, name="img2pc_srunet34.seven_scenes_toy")
    first = dataclasses.replace(load_stage1(expected, toy=True), name="img2pc_stage1_r18.seven_scenes_toy")
    assert (at, options["stage1"], options["overwrite"], str(world.device)) == (out, first, True, "cpu")
    (recipe, *_), options, _ = given(monkeypatch, *place, "train", name, "--small", *data[:2], "-o", out)
    assert (recipe.data.size, options["stage1"].name) == ((120, 160), "img2pc_stage1_r18.seven_scenes_small")
    # a length in steps takes the place of one in epochs; what --set says comes last; a name given is kept
    own = ["--set", "name=mine.run", "--set", "optim.steps=9", "--set", "data.frames=[0.5, 1]"]
    (recipe, *_), options, _ = given(
        monkeypatch, *place, "train", "pri3d_view_r18", *data, "--steps", 7, *own, "-o", out
    )
    assert (recipe.name, recipe.optim.steps, recipe.optim.epochs, recipe.data.frames) == ("mine.run", 9, None, (0.5, 1))
    assert (options["stage1"], options["overwrite"], options["check"]) == (None, False, True)
    (recipe, *_), options, _ = given(monkeypatch, *place, "train", name, "-o", out, "--no-check")
    assert not options["check"]
    assert recipe == load_recipe(name)
    assert options["stage1"] == load_stage1(recipe)


def test_every_option_of_eval_arrives(monkeypatch):
    result = MatchingResult(0.25, 3.0, (0.125, 0.375), 20, 0.0625, "voxels")
    common = ["--data", "seven_scenes:x", "--frames", "0.25:0.5", "--pairs", 7, "--threshold", 1.5, "--seed", 9]
    common += ["--set", "data.measure=match_released_code"]
    matching = ["--size", "48x64", "--overlap", "0.5:0.75", "--turn", "upright"]
    data = DataSpec("seven_scenes", "x", frames=(0.25, 0.5), overlap=(0.5, 0.75), measure="match_released_code")
    named = {"count": 7, "threshold": 1.5, "seed": 9}
    plain = {"count": 100, "threshold": None, "seed": 0}
    place = matching_module, "compare_matching", {"net": result}
    spec, options, shown = given(monkeypatch, *place, "eval", "matching", "net", *common, *matching, "--json")
    assert (spec, options) == (("net", data), named | {"size": (48, 64), "turn": "upright"})
    assert json.loads(shown.output)["net"] == {
        "recall": 0.25, "threshold": 3.0, "per_pair": [0.125, 0.375], "queries": 20, "chance": 0.0625,
        "unit": "voxels", "scenes": [], "spread": 0.125,
    }  # fmt: skip
    spec, options, shown = given(monkeypatch, *place, "eval", "matching", "net")
    assert (spec, options) == (("net", DataSpec()), plain | {"size": None, "turn": "camera"})
    heading, row = (line.split() for line in shown.output.splitlines())
    assert heading == ["weights", "recall", "within", "3", "voxels", "chance", "pairs", "queries"]
    assert row == ["net", "25.0%", "±", "12.5%", "6.2%", "2", "20"]
    place = matching_module, "compare_pixel_to_voxel", {"net": result}
    spec, options, _ = given(monkeypatch, *place, "eval", "pixel-to-voxel", "net", *common)
    assert (spec, options) == (("net", dataclasses.replace(data, overlap=(0.0, 1.0))), named)
    spec, options, _ = given(monkeypatch, *place, "eval", "pixel-to-voxel", "net")
    assert (spec, options) == (("net", DataSpec(overlap=(0.0, 1.0))), plain | {"threshold": 2.0})


def test_every_option_of_preview_arrives(monkeypatch):
    opened = []
    monkeypatch.setattr(sources, "open_source", lambda spec, **options: opened.append(spec) or "source")
    size = ["--scenes", 2, "--frames", 5, "-o", "x.png"]
    sheet = ("source", Path("x.png")), {"scenes": 2, "frames": 5}
    assert given(monkeypatch, preview, "contact_sheet", None, "data", "preview", "rooms", *size)[:2] == sheet
    own = ["--set", "data.options={scenes: 9}"]
    assert given(monkeypatch, preview, "contact_sheet", None, "data", "preview", "rooms", *size, *own)[:2] == sheet
    sets = ["data", "preview", "seven_scenes:p", *size, "--sets", "--kind", "instance", "--k-thresh", 0.5]
    arguments, options, _ = given(monkeypatch, preview, "sets_sheet", None, *sets, "--min-vertices", 3)
    assert (arguments, options) == (sheet[0], sheet[1] | {"kind": "instance", "k_thresh": 0.5, "min_vertices": 3})
    every = DataSpec(overlap=(0.0, 1.0))
    assert opened == [
        dataclasses.replace(every, options={"scenes": 2, "frames": 12}),
        dataclasses.replace(every, options={"scenes": 9}),
        dataclasses.replace(every, source="seven_scenes", path="p"),
    ]


ROOMS = ("--set", "data.options={scenes: 2, frames: 4, val_scenes: 1, labelled: 2, width: 64, height: 64}")
SMALL = (*ROOMS, "--set", "data.size=[64, 64]", "--set", "optim.steps=2", "--set", "network.width=8", "--device", "cpu")


def test_finetune_one_run_and_a_sweep(tmp_path):
    shown = run("finetune", "rooms_unet_r18", "-b", "scratch", "--out", tmp_path / "one", *SMALL).output
    assert "scratch" in shown
    assert "absent classes" in shown
    assert (tmp_path / "one/results.json").is_file()
    sweep = ["finetune", "rooms_unet_r18", "--sweep", "-b", "scratch", "--fraction", 1, "--seed", 0, "--seed", 1]
    result = run(*sweep, "--out", tmp_path / "many", *SMALL, "--json")
    summary = json.loads(result.output)
    assert [len(point["seeds"]) for point in summary["measured"]] == [2]
    assert (tmp_path / "many/curve.png").is_file()
    wrong = run("finetune", "rooms_unet_r18", "-b", "scratch", "-b", "imagenet", "--out", tmp_path / "x", *SMALL)
    assert wrong.exit_code == 2
    assert "--sweep" in wrong.output


def test_preview_of_a_recording(tmp_path, recording):  # noqa: F811
    out = tmp_path / "x.png"
    assert run("data", "preview", f"seven_scenes:{recording}", "-o", out, "--frames", 2).exit_code == 0
    with Image.open(out) as image:
        assert image.width > 300


def test_check_of_a_recording_with_inverse_poses(tmp_path, recording, tiny_recipe):  # noqa: F811
    shutil.copytree(recording, tmp_path / "twin")
    for path in (tmp_path / "twin").glob("*.pose.txt"):
        np.savetxt(path, np.linalg.inv(np.loadtxt(path)))
    out = tmp_path / "x.png"
    shown = run("data", "check", f"seven_scenes:{tmp_path / 'twin'}", "-o", out)
    assert shown.exit_code == 1
    assert "poses: WRONG fit as world-to-camera" in shown.output
    assert "Suggested: --set data.options.pose_convention=world_to_camera" in shown.output
    with Image.open(out) as image:
        assert image.width > 1000
    arguments = "train", tiny_recipe(), "--data", f"seven_scenes:{tmp_path / 'twin'}", "--out", tmp_path / "run"
    with pytest.raises(DataError, match=r"read wrongly(.|\n)*--set data.options.pose_convention=world_to_camera"):
        run(*arguments, "--device", "cpu")
    assert not (tmp_path / "run").exists()
    right = run("data", "check", f"seven_scenes:{recording}", "-o", out, "--json", "--frames", "0:0.5")
    assert (right.exit_code, json.loads(right.output)["picture"]) == (0, str(out))


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["info", "pri3d_viewgeo_r50"], ["Unknown backbone", "pri3d_view_geo_r50"]),
        (["train", "pri3d_veiw_r18", "--out", "x"], ["Unknown recipe", "pri3d_view_r18"]),
        (["train", "pri3d_view_r18", "--out", "x", "--set", "optim.lrr=1"], ["optim.lrr", "optim.lr"]),
        (
            ["train", "pointcontrast_nce_srunet34", "--out", "x", "--set", "data.cloud.voxel_size=0.05"],
            ["unknown key 'data.cloud'", "Of that name there is 'unet3d.voxel_size'"],
        ),
        (["train", "pri3d_view_r18", "--out", "x", "--data", "kitchen:x"], ["Unknown data source", "Closest"]),
        (["eval", "matching", "no_such_backbone"], ["no_such_backbone"]),
        (["eval", "probe", "no_such_backbone"], ["no_such_backbone"]),
        (["finetune", "scanet_unet_r50", "-b", "scratch", "--out", "x"], ["Unknown", "scannet_unet_r50"]),
        (["info", "hf-hub:owner"], ["'owner' is no repository; OWNER/REPO"]),
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


def test_a_warning_of_ours_is_one_line_one_of_a_library_says_where_it_comes_from_and_the_first_process_tells_it():
    code = (
        "import warnings; from geo_pretrain import cli, hub;"
        "cli.main.__globals__['app'] = lambda: [warnings.warn_explicit('hm', UserWarning, f, 7)"
        " for f in (hub.__file__, '/lib/other.py')]; cli.main()"
    )

    def said(rank: str) -> list[str]:
        """On standard error, by one of several processes."""
        own = os.environ | {"RANK": rank}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=own)
        return done.stderr.splitlines()

    assert said(rank="0") == ["Warning: hm", "/lib/other.py:7: UserWarning: hm"]
    assert said(rank="1") == []


@pytest.mark.parametrize(
    "option, value",
    [("--frames", "half"), ("--frames", "0.75:2"), ("--overlap", "1"), ("--size", "big"), ("--turn", "left")],
)
def test_malformed_options_are_named(option, value):
    result = run("eval", "matching", "x", option, value)
    assert result.exit_code == 2
    assert option in result.output


def test_runs_as_a_module_from_another_folder(tmp_path):
    words = [sys.executable, "-m", "geo_pretrain", "list", "pri3d_view_r18.rooms"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "MIT" in done.stdout
