"""Your own clouds by recipe: files of several kinds are trained on and measured, broken ones skipped and counted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from geo_pretrain.training.finetune.folder import read_result
from tests.front_door import geo_pretrain
from tests.training.painted_clouds import painted

TINY = (
    "network.unet3d={variant: 18A, width: 8, voxel_size: 0.2}",
    "data.cloud.voxel_size=0.3",
    "optim.batch=2",
    "optim.steps=4",
    "evaluate.every_steps=4",
    "workers=0",
)


def write(path, seed):
    cloud = painted(seed)
    path.parent.mkdir(exist_ok=True)
    fields = {"points": cloud.points, "colors": cloud.colors, "label": cloud.labels}
    if path.suffix == ".npz":
        np.savez(path, **fields)
    else:
        np.save(path, np.column_stack(list(fields.values())))


def line(folder, out):
    """Arguments of a short run."""
    words = ["clouds_srunet34", "--data", f"clouds:{folder}", "-b", "scratch", "--device", "cpu", "--out", out]
    return [*words, *(word for override in TINY for word in ("--set", override))]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "own"
    root.mkdir()
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    for seed, name in enumerate(("train/a.npz", "train/b.npy", "train/c.npz", "val/d.npy", "val/e.npz")):
        write(root / name, seed)
    return root


def test_own_clouds_are_trained_on_and_broken_ones_counted(folder, tmp_path):
    for name in ("train/c.npz", "val/e.npz"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:900])
    shown = geo_pretrain("finetune", *line(folder, tmp_path / "out")).output
    result = read_result(tmp_path / "out")
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (result.metric, data["data"]["classes"]) == ("miou", ["red", "green", "blue"])
    [skipped] = data["last"]["details"]["skipped"]
    assert skipped["path"] == str(folder / "val/e.npz")
    assert "cannot be read" in skipped["reason"]
    log = (tmp_path / "out" / "log.jsonl").read_text()
    assert str(folder / "train/c.npz") in log
    assert (tmp_path / "out" / "predictions.png").is_file()
    training, validation = result.left_out()
    assert training.startswith(f"1 of 3 training clouds left out: {folder / 'train/c.npz'}: ")
    assert training.count("c.npz") == 1
    assert validation.startswith(f"1 of 2 validation clouds left out: {folder / 'val/e.npz'}: ")
    assert training in shown
    assert validation in shown


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_that_the_list_lacks_ends_the_run(folder, tmp_path, split):
    (folder / "classes.txt").write_text("red\ngreen\n")
    for kept in list(folder.glob("[tv]*/*.np[yz]")):  # clouds whose labels are all in the list
        if kept.parent.name != split:
            cloud = painted(1)
            np.save(kept.with_suffix(".npy"), np.column_stack([cloud.points, cloud.colors, cloud.labels.clip(0, 2)]))
            kept.with_suffix(".npz").unlink(missing_ok=True)
    wrong = geo_pretrain("finetune", *line(folder, tmp_path / "out"), expected=1).errors
    assert ("no class: 3. " if split == "train" else "label 3 at") in wrong  # of train before training
    assert "data.options.ignore" in wrong
    assert not (tmp_path / "out").exists()


def test_clouds_that_are_not_in_meters_are_told_before_training(folder, tmp_path):
    for path in folder.glob("*/*.np[yz]"):
        cloud = painted(1, count=600)
        np.savez(path.with_suffix(".npz"), points=cloud.points * 1000, colors=cloud.colors, label=cloud.labels)
        if path.suffix == ".npy":
            path.unlink()
    words = ["finetune", *line(folder, tmp_path / "out")]
    with pytest.warns(UserWarning, match="Cloud 'train/a': hardly any of the 600 points") as told:
        geo_pretrain(*words, "--set", "data.options.scale=0.3", expected=1)
    assert ["millimeters: --set data.options.scale=0.001" in str(one.message) for one in told] == [True]
    wrong = geo_pretrain(*words, expected=1).errors
    assert " m wide. If its coordinates are no meters, give the option scale: 0.01 of" in wrong
    assert "None of the 2 validation clouds looked at can be used: val/d: The points span" in wrong


def test_clouds_that_no_evaluation_could_take_are_told_before_training(folder, tmp_path):
    for path in folder.glob("*/*.np[yz]"):
        cloud = painted(1, count=3000)
        path.unlink()
        points = cloud.points.repeat(2, axis=0)
        points[::2, 0] += 1500
        points[1::2] += 0.01
        colors, label = (one.repeat(2, axis=0) for one in (cloud.colors, cloud.labels))
        np.savez(path.with_suffix(".npz"), points=points, colors=colors, label=label)
    wrong = geo_pretrain("finetune", *line(folder, tmp_path / "out"), expected=1).errors
    assert "None of the 2 validation clouds looked at can be used: " in wrong
    assert "accepted: meters, up to 1000" in wrong
    checked = geo_pretrain("data", "check", f"clouds:{folder}", "-o", tmp_path / "check.png", expected=1)
    assert "3 of 3 clouds: it spans 150" in " ".join(checked.output.split())
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("factor", [100, 1 / 1000])
def test_clouds_that_are_all_not_in_meters_are_refused_unless_their_unit_is_stated(folder, tmp_path, factor):
    for path in folder.glob("*/*.np[yz]"):
        cloud = painted(1, count=3000)
        path.unlink()
        arrays = {"points": cloud.points * factor, "colors": cloud.colors, "label": cloud.labels}
        np.savez(path.with_suffix(".npz"), **arrays)
    words = ["finetune", *line(folder, tmp_path / "out")]
    wrong = geo_pretrain(*words, expected=1).errors
    assert "The clouds seem not to be in meters (all 3 looked at)" in wrong
    mend = {100: "Centimeters: --set data.options.scale=0.01", 1 / 1000: "Kilometers: --set data.options.scale=1000"}
    assert mend[factor] in wrong
    assert "If it is right all the same: --set data.options.scale=1." in wrong
    assert not (tmp_path / "out.run").exists()
    with pytest.warns(UserWarning, match="Cloud 'train/a': "):
        geo_pretrain(*words, "--set", "data.options.scale=1")


def test_wrong_data_are_said_in_one_line(folder, tmp_path):
    words = ["finetune", *line(folder, tmp_path / "out")]
    wrong = geo_pretrain(*words, "--set", "data.options.label=klass", expected=1).errors
    assert "no field klass (data.options.label); it has " in wrong
    (folder / "classes.txt").unlink()
    wrong = geo_pretrain(*words, expected=1).errors
    assert "classes.txt' is missing. It names the classes" in wrong
    assert "Traceback" not in wrong
