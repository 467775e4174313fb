"""Limited labels: points drawn by seed are nested, official lists are read as they are, voxels keep their labels."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.training.data.labelled.clouds.limited import LabelledPoints, read_point_list
from geo_pretrain.training.data.labelled.registry import subset
from geo_pretrain.training.finetune import run
from geo_pretrain.training.finetune.registry import backbone_init, build_finetune_task
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from tests.front_door import geo_pretrain
from tests.training.painted_clouds import painted

POINTS = (20, 50, 100, 200)
TINY = (
    "data.options={scenes: 2, val_scenes: 1, frames: 2, width: 64, height: 64}",
    "network.unet3d={variant: 18A, width: 8, voxel_size: 0.2}",
    "data.cloud.voxel_size=0.2",
    "optim.batch=2",
    "optim.steps=1",
    "evaluate.every_steps=1",
)


def test_drawn_points_are_labelled_ones_nested_and_of_the_seed_and_cloud():
    cloud, other = painted(0), painted(1)
    labelled = np.flatnonzero(cloud.labels)
    assert len(labelled) < len(cloud)
    rows = [LabelledPoints.of(count, 3).rows(cloud) for count in POINTS]
    for count, found in zip(POINTS, rows, strict=True):
        assert len(set(found.tolist())) == count
        assert set(found.tolist()) <= set(labelled.tolist())
    for few, more in pairwise(rows):
        assert set(few.tolist()) < set(more.tolist())
    assert LabelledPoints.of(20, 3).rows(cloud).tolist() == rows[0].tolist()
    assert LabelledPoints.of(20, 4).rows(cloud).tolist() != rows[0].tolist()
    assert LabelledPoints.of(20, 3).rows(other).tolist() != rows[0].tolist()
    assert len(LabelledPoints.of(10**6, 0).rows(cloud)) == len(labelled)  # all that there are


def test_only_chosen_points_keep_label_and_instance():
    cloud = replace(painted(0), instances=np.arange(len(painted(0))) + 1)
    chosen = LabelledPoints.of(50, 0)
    kept, rows = chosen.keep(cloud), chosen.rows(cloud)
    for row in range(len(cloud)):
        inside = row in rows
        assert kept.labels[row] == (cloud.labels[row] if inside else 0)
        assert kept.instances[row] == (cloud.instances[row] if inside else 0)
    np.testing.assert_array_equal(kept.points, cloud.points)


@pytest.mark.parametrize("kind", ["json", "arrays", "tensors"])
def test_official_lists_are_taken_as_they_are(kind, tmp_path):
    cloud = replace(painted(0), id="scene0000_00")
    lists = {cloud.id: [5, 0, 17], "other": [1]} | ({"none": []} if kind == "json" else {})
    path = tmp_path / ("points20.json" if kind == "json" else "points20")
    if kind == "json":
        path.write_text(json.dumps(lists))
    elif kind == "arrays":
        torch.save({scan: np.array(rows) for scan, rows in lists.items()}, path)
    else:
        torch.save({scan: torch.tensor(rows) for scan, rows in lists.items()}, path)
    found = read_point_list(path)
    assert {scan: rows.tolist() for scan, rows in found.items()} == lists
    chosen = LabelledPoints.of(str(path), 0)
    assert chosen.rows(cloud).tolist() == [5, 0, 17]
    assert str(chosen) == f"labelled points of the list {str(path)!r}"
    with pytest.raises(BadFrame, match=r"the list of labelled points .*points20.* does not have this scan"):
        chosen.rows(painted(3))


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"a": [-1]}', '{"a": [0.5]}', '{"a": [[1]]}', '{"a": {}}', "no list"])
def test_other_files_are_no_lists(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a.json'"):
        read_point_list(tmp_path / "a.json")
    with pytest.raises(DataError, match=r"no list of labelled points"):
        read_point_list(tmp_path / "none")


def test_a_row_that_a_cloud_does_not_have_is_a_bad_frame(tmp_path):
    cloud = painted(0)
    (tmp_path / "a.json").write_text(json.dumps({cloud.id: [len(cloud)]}))
    with pytest.raises(BadFrame, match=rf"names point {len(cloud)} of {len(cloud)}"):
        LabelledPoints.of(str(tmp_path / "a.json"), 0).keep(cloud)


def task_of(*overrides):
    recipe = load_finetune_recipe("rooms3d_srunet34", [*TINY, *overrides], toy=True)
    init = backbone_init(recipe, "scratch", {})
    return build_finetune_task(recipe, init, ("red", "green", "blue"), init.contract())


def test_unlabelled_points_have_no_say_in_a_voxel_but_in_the_released_way():
    cloud, wanted = painted(0), "data.cloud.labels=agree"
    chosen = LabelledPoints.of(50, 0)
    for released in (False, True):
        task = task_of(wanted, "data.cloud.labelled_points=50", f"match_released_code={released}")
        sample = task.sample(cloud, torch.Generator().manual_seed(0))
        votes = {}
        for label, voxel in zip(chosen.keep(cloud).labels[sample.chosen], sample.inverse.tolist(), strict=True):
            votes.setdefault(voxel, set()).add(int(label))
        if not released:
            votes = {voxel: labels - {0} for voxel, labels in votes.items()}
        expected = [labels.pop() if len(labels) == 1 else 0 for _, labels in sorted(votes.items())]
        assert sample.labels.tolist() == expected
        assert ("as released" in task.facts()["labelled_points"]) == released
        full = task.evaluation_sample(cloud)
        assert int((full.labels > 0).sum()) > 100  # evaluation has all labels
    assert "labelled_points" not in task_of().facts()


@pytest.mark.parametrize("percent", [1, 5, 10, 15, 20, 30, 50])
def test_shares_of_scenes_are_nested_and_of_the_right_size(percent):
    class Scans:
        name, split, classes = "scans", "train", ("a",)

        def ids(self):
            return [f"scene{k:04d}_00" for k in range(200)]

        def scene_of(self, id):
            return id

        def fingerprint(self):
            return "f"

    part = subset(Scans(), percent / 100, 1)
    assert len(part.ids()) == 2 * percent
    assert set(part.ids()) <= set(subset(Scans(), 0.6, 1).ids())


def test_command_line_takes_shares_official_scenes_and_points(tmp_path, monkeypatch):
    """The recipe that would be run, and the clouds it would be run on."""
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "20.txt").write_text("rooms_train_0001\n")
    ran = []

    def only_open(recipe, backbone, out, **options):
        ran.append((recipe, run.open_splits(recipe, None, None)))
        raise DataError("seen")

    monkeypatch.setattr(run, "finetune", only_open)
    line = ["finetune", "rooms3d_srunet34", "--toy", "-b", "scratch", "--device", "cpu", "--out", tmp_path / "out"]
    line += [word for override in TINY for word in ("--set", override)]
    limits = ["--fraction", "0.2", "--scenes", tmp_path / "lists", "--labelled-points", "20"]
    assert "seen" in geo_pretrain(*line, *limits, expected=1).errors
    [(recipe, data)] = ran
    assert recipe.data.cloud.labelled_points == 20
    assert (data.train.ids(), data.fraction) == (["rooms_train_0001"], 0.5)
    geo_pretrain(*line, "--labelled-points", "lists/points20", expected=1)
    assert ran[1][0].data.cloud.labelled_points == "lists/points20"
    wrong = geo_pretrain(*line, "--labelled-points", "0", expected=1).errors
    assert "'data.cloud.labelled_points' is 0, accepted is a whole number from 1 up" in wrong


def test_tasks_without_labels_of_points_take_no_limit():
    for name, more in (("rooms_srunet34", ()), ("shapenetcore_srunet34", ())):
        with pytest.raises(RecipeError, match=r"labelled_points' is 20, accepted is none for detection3d and classif"):
            load_finetune_recipe(name, ["data.cloud.labelled_points=20", *more])
