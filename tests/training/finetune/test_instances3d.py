"""Instances of whole clouds: perfect and wrong networks, predictions in the cloud's order, rules, training, resume."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.distributed import World
from geo_pretrain.training.evaluation.grouping import Proposals
from geo_pretrain.training.evaluation.instances3d import InstanceRules, instance_precision, overlaps_of
from geo_pretrain.training.evaluation.scannet_benchmark import write_scannet_instances
from geo_pretrain.training.finetune import instances3d, load_finetuned
from geo_pretrain.training.finetune.registry import (
    backbone_init,
    build_finetune_task,
    load_checked_finetune_recipe,
)
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.losses import center_offsets, direction_loss, offset_loss
from tests.indoor_layouts import write_s3dis, write_scannet_release
from tests.training.finetune.killed import run_killed_at
from tests.training.finetune.test_run import assert_same_run
from tests.two_processes import in_two_processes

CLASSES = ("floor", "cube", "ball")
PAINT = np.array([[120, 120, 120], [230, 40, 40], [40, 40, 230]], np.uint8)
PLACES = ((0.4, 0.4, 1), (1.2, 0.4, 1), (0.4, 1.2, 2), (1.2, 1.2, 2))  # x, y (m) and class of each object
TOUCHING = ((0.4, 0.4, 1), (0.8, 0.4, 1), (0.4, 1.2, 2), (0.8, 1.2, 2))
SMALL = (
    "network.unet3d={variant: 18A, width: 8, voxel_size: 0.1}",
    "network.options={stuff: [floor], grouping: {cluster: 5, proposal: 5}, minimum: 5}",
    "data.cloud={voxel_size: 0.1, features: rgb, labels: majority}",
    "optim.batch=2",
    "optim.lr=0.1",
    "optim.steps=4",
    "evaluate.every_steps=2",
    "save_every=1",
)
CPU = torch.device("cpu")


def scene(number, places=PLACES, count=60):
    """Two cubes and two balls (cubes of another color) on a floor, shuffled."""
    rng = np.random.default_rng(number)
    points, labels, instances = [rng.uniform([0, 0, -0.02], [1.8, 1.8, 0.0], (300, 3))], [np.ones(300)], [np.zeros(300)]
    for k, (x, y, label) in enumerate(places, start=1):
        points.append(rng.uniform([x, y, 0.1], [x + 0.4, y + 0.4, 0.5], (count, 3)))
        labels.append(np.full(count, 1 + label))
        instances.append(np.full(count, 10 * k))
    order = rng.permutation(300 + 4 * count)
    labels = np.concatenate(labels).astype(np.int64)[order]
    points = np.concatenate(points).astype(np.float32)[order]
    return LabelledCloud(
        f"scene{number}", points, PAINT[labels - 1], labels, np.concatenate(instances).astype(int)[order]
    )


class Scenes:
    """Clouds of four objects each; number 7 is broken, number 8 has a point that is not finite."""

    name, classes, places = "scenes", CLASSES, PLACES

    def __init__(self, split, count=2):
        self.split, self.count = split, count

    def ids(self):
        return [str(100 * (self.split == "val") + k) for k in range(self.count)]

    def scene_of(self, id):
        return id

    def fingerprint(self):
        return self.split

    def load(self, id):
        if id == "7":
            raise BadFrame("scenes/7.ply", "cut short")
        if id == "8":
            cloud = scene(8)
            return replace(cloud, points=np.where(np.arange(len(cloud))[:, None] == 3, np.nan, cloud.points))
        return scene(int(id), self.places)


def recipe_of(*overrides):
    return load_checked_finetune_recipe("rooms3d_instances", [*SMALL, *overrides])


def task_of(*overrides, classes=CLASSES):
    recipe = recipe_of(*overrides)
    init = backbone_init(recipe, "scratch", {})
    return build_finetune_task(recipe, init, classes, init.contract())


def answer(task, monkeypatch, *, places=PLACES, offsets=True):
    """Make the network answer by the truth: classes from colors, offsets from the objects' known places."""

    def forward(coords, feats):
        seen = ((feats[:, None] + 0.5) * 255 - torch.from_numpy(PAINT).float()).square().sum(2)
        logits = F.pad(-seen / 1000, (1, 0), value=-99.0)
        cells = coords[:, 1:].float()
        middles = torch.tensor([[x + 0.2, y + 0.2, 0.3] for x, y, _ in places]) / task.voxel_size
        nearest = torch.cdist(cells, middles).argmin(1)
        moves = (middles[nearest] - cells) * task.voxel_size
        return torch.cat([logits, moves if offsets else torch.zeros_like(moves)], dim=1)

    monkeypatch.setattr(task, "forward", forward)


def test_perfect_network_scores_1_and_broken_clouds_are_counted(monkeypatch):
    task = task_of()
    answer(task, monkeypatch)
    found = task.evaluate(Scenes("val"), ["1", "7", "2", "8"])
    for name in ("ap", "ap50", "ap25", "voxel_ap50", "point_ap25"):
        assert found.scores[name] == 1.0, name
    assert found.scores["miou"] == pytest.approx(1.0, abs=0.02)
    assert found.per_class["ap50"] == {"floor": None, "cube": 1.0, "ball": 1.0}
    first, second = found.details["skipped"]
    assert (first["path"], second) == ("scene8", {"path": "scenes/7.ply", "reason": "cut short"})
    assert "finite" in first["reason"]
    with pytest.raises(DataError, match=r"No instance to find.* Instances count from .* network.options.minimum"):
        task_of("network.options.minimum=900").evaluate(Scenes("val"), ["1"])


def test_offsets_part_objects_that_touch(monkeypatch):
    source, with_offsets, without = Scenes("val"), task_of(), task_of()
    source.places = TOUCHING
    answer(with_offsets, monkeypatch, places=TOUCHING)
    answer(without, monkeypatch, places=TOUCHING, offsets=False)
    assert with_offsets.evaluate(source, ["1"]).scores["ap50"] == 1.0
    assert without.evaluate(source, ["1"]).scores["ap50"] <= 0.5


def test_levels_have_rules_of_their_own(monkeypatch):
    options = "network.options={stuff: [floor], grouping: {cluster: 5, proposal: 5}}"
    voxels, points = task_of(options), task_of(options, "evaluate.level=points")
    for task in (voxels, points):
        answer(task, monkeypatch)
    found = voxels.evaluate(Scenes("val"), ["1"])
    assert found.details["minimum"] == 10
    assert found.scores["ap50"] == 1.0
    assert "point_ap50" not in found.scores  # objects have 60 points; the benchmark's minimum is 100
    with pytest.raises(DataError, match=r"1 clouds of 'scenes'.*No instance"):
        points.evaluate(Scenes("val"), ["1"])


def test_released_rules_are_switched_and_named(monkeypatch):
    options = "network.options={stuff: [floor], uncounted: [ball], grouping: {cluster: 5, proposal: 5}, minimum: 5}"
    mended, released = task_of(options), task_of(options, "match_released_code=true")
    for task in (mended, released):
        answer(task, monkeypatch)
    assert mended.evaluate(Scenes("val"), ["1"]).per_class["ap50"]["ball"] == 1.0
    assert released.evaluate(Scenes("val"), ["1"]).per_class["ap50"] == {"floor": None, "cube": 1.0, "ball": None}
    assert "the first 1000" in released.protocol_deviations()["neighbors"]
    assert "all are followed" in mended.protocol_deviations()["neighbors"]
    assert "no AP (as published)" in released.protocol_deviations()["classes"]
    limited = []
    monkeypatch.setattr(
        "geo_pretrain.training.finetune.instances3d.group",
        lambda places, logits, classes, settings: limited.append(settings.neighbors) or Proposals.of([], [], []),
    )
    for task in (mended, released):
        task.find(scene(1))
    assert limited == [None, 1000]


@pytest.mark.parametrize("more", [(), ("data.cloud.points=300",), ("network.options.group=points",)])
def test_predictions_are_of_all_points_in_the_clouds_order_without_looking_at_labels(monkeypatch, more):
    task = task_of("network.options.grouping.proposal=4", *more)
    answer(task, monkeypatch)
    cloud = scene(1)
    bare = replace(cloud, labels=None, instances=None)
    order = np.random.default_rng(0).permutation(len(cloud))
    turned = replace(bare, points=cloud.points[order], colors=cloud.colors[order])
    (found, again, shuffled) = task.predict([cloud, bare, turned])
    assert np.array_equal(found.masks, again.masks)
    assert found.masks.shape == (4, len(cloud))
    assert found.scores.dtype == np.float32
    assert (np.diff(found.scores) <= 0).all()
    for one, numbers, labels in (
        (found, cloud.instances, cloud.labels),
        (shuffled, cloud.instances[order], cloud.labels[order]),
    ):
        assert sorted(one.classes.tolist()) == [2, 2, 3, 3]
        assert np.mean(one.labels.labels == labels) > 0.97
        for mask, label in zip(one.masks, one.classes, strict=True):
            owner = np.bincount(numbers[mask]).argmax()
            assert np.sum(mask & (numbers == owner)) / np.sum(mask | (numbers == owner)) > 0.9
            assert labels[numbers == owner][0] == label


def test_predictions_are_those_that_are_measured():
    task, cloud = task_of(), scene(1)
    (found,) = task.predict([cloud])
    proposals = Proposals.of([np.flatnonzero(mask) for mask in found.masks], found.classes, found.scores)
    objects = np.where(cloud.labels > 1, cloud.labels, 0)
    precision = instance_precision([overlaps_of(objects, cloud.instances, proposals)], 3, InstanceRules(5))
    scores = task.evaluate(Scenes("val"), ["1"]).scores
    assert precision.means() == {name: pytest.approx(scores[f"point_{name}"]) for name in ("ap", "ap50", "ap25")}
    assert 0 < scores["point_ap"] < 1


def test_classes_grouped_without_their_offsets(monkeypatch):
    task = task_of(
        "network.options.unshifted=[ball]", "network.options.unshifted_grouping={radius: 3, cluster: 5, proposal: 5}"
    )
    answer(task, monkeypatch)
    assert task.evaluate(Scenes("val"), ["1"]).scores["ap50"] == 1.0
    calls = []
    real = instances3d.group
    monkeypatch.setattr(instances3d, "group", lambda *given: calls.append(given) or real(*given))
    task.find(scene(1))
    assert [sorted(set(given[2].tolist())) for given in calls] == [[0, 2], [0, 3]]
    assert np.array_equal(calls[1][0], np.floor(calls[1][0]))  # not moved
    assert calls[1][3].radius == 3


def test_losses_are_of_objects_and_not_of_stuff():
    task = task_of()
    samples = [task.sample(scene(k), torch.Generator().manual_seed(k)) for k in (1, 2)]
    batch = task.collate(samples)
    found = task.losses(batch)
    output = task.forward(batch["coords"], batch["feats"])
    objects = torch.where(batch["labels"] > 1, batch["instances"], 0)
    offsets = center_offsets(batch["coords"], objects, 0.1)
    torch.testing.assert_close(found["offset"], offset_loss(output[:, -3:], offsets, objects > 0))
    torch.testing.assert_close(found["direction"], direction_loss(output[:, -3:], offsets, objects > 0))
    torch.testing.assert_close(found["segmentation"], F.cross_entropy(output[:, 1:4], batch["labels"] - 1))
    sum(found.values()).backward()
    for name, parameter in task.module.named_parameters():
        assert parameter.grad is not None, name
    floors = batch | {"instances": torch.ones_like(batch["instances"]), "labels": torch.ones_like(batch["labels"])}
    assert task.losses(floors)["offset"] == 0
    del batch["instances"]
    with pytest.raises(DataError, match="without labels or instances"):
        task.losses(batch)


def test_heads_are_new_layers_and_share_the_momentum_of_the_backbone():
    task = task_of("optim.head_factor=10", "optim.backbone_bn_momentum=0.03")
    rest, new = task.parameter_groups()
    assert (rest["factor"], new["factor"]) == (1, 10)
    heads = {id(p) for name, p in task.module.named_parameters() if not name.startswith("unet.") or "final" in name}
    assert {id(p) for p in new["params"]} == heads
    assert task.module.bntr_offset.bn.momentum == 0.03
    assert task.backbone() is task.module.unet


@pytest.mark.parametrize(
    "override, parts",
    [
        ("network.options.stuff=[wall]", ["network.options.stuff", "floor, cube, ball"]),
        ("network.options={colour: 1}", ["network.options.colour"]),
        ("network.options.grouping={radius: -1}", ["network.options.grouping.radius", "above 0"]),
        ("network.kind=srunet", ["'network.kind' is 'srunet'", "srunet_instances"]),
        ("network.freeze=1", ["freeze"]),
        ("data.source=sunrgbd3d", ["sunrgbd3d", "instances3d"]),
        ("data.cloud={cylindrical: [0.1, 1, 0.1]}", ["cubic voxels"]),
    ],
)
def test_wrong_settings_are_named(override, parts):
    with pytest.raises(RecipeError) as caught:
        task_of(override)
    for part in parts:
        assert part in str(caught.value)


def test_points_cannot_be_grouped_where_only_some_are_drawn():
    with pytest.raises(RecipeError, match=r"data\.cloud\.points.*group=points"):
        recipe_of("network.options.group=points", "data.cloud.points=100")


def run(out, *overrides, **options):
    recipe = recipe_of(*overrides)
    sources = Scenes("train", 4), Scenes("val", 1)
    return finetune(recipe, "scratch", out, device="cpu", sources=sources, **options)


def test_training_finds_objects_that_an_untrained_network_does_not(tmp_path):
    untrained = task_of().evaluate(Scenes("val"), Scenes("val", 1).ids()).scores
    result = run(tmp_path / "out", "optim.steps=16", "evaluate.every_steps=16")
    trained = result.data["last"]["scores"]
    assert (result.metric, result.score) == ("ap50", trained["ap50"])
    assert trained["ap50"] > 0.9
    assert trained["ap"] > untrained["ap"] + 0.3
    assert trained["miou"] > untrained["miou"] + 0.4
    assert np.asarray(Image.open(tmp_path / "out" / "predictions.png")).std() > 10
    assert (tmp_path / "out" / "predictions.html").is_file()
    assert "10 voxels" in result.data["quirks"]["AP"]
    again = load_finetuned(tmp_path / "out")
    assert again.evaluate(Scenes("val"), Scenes("val", 1).ids()).scores == trained
    (found,) = again.predict([replace(scene(3), labels=None, instances=None)])
    assert set(found.classes.tolist()) == {2, 3}


def test_run_killed_by_sigkill_continues_bit_for_bit(tmp_path):
    run(tmp_path / "whole")
    run_killed_at(3, partial(run, tmp_path / "killed"))
    assert not (tmp_path / "killed").exists()
    run(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    evaluations = json.loads((tmp_path / "whole" / "results.json").read_text())["evaluations"]
    assert [past["step"] for past in evaluations] == [2, 4]


def test_two_processes_measure_what_one_does(tmp_path):
    task, source = task_of(), Scenes("val", 3)
    alone = task.evaluate(source, source.ids())

    def work(rank):
        assert task.evaluate(source, source.ids(), World(rank, 2, CPU)) == alone

    in_two_processes(work, tmp_path)


# the published recipes on files in their sets' layouts

TINY = (
    "network.unet3d={variant: 18A, width: 8}",
    "network.options.minimum=5",
    "network.options.grouping={cluster: 3, proposal: 3}",
    "data.cloud.voxel_size=0.1",
    "optim.batch=2",
    "optim.steps=1",
    "evaluate.every_steps=1",
    "workers=0",
)


@pytest.mark.filterwarnings("ignore:S3DIS is not complete")
@pytest.mark.parametrize("write, name", [(write_s3dis, "s3dis"), (write_scannet_release, "scannet3d")])
def test_published_recipes_train_measure_and_predict_on_their_layouts(tmp_path, write, name):
    write(tmp_path / "data")
    recipe = load_checked_finetune_recipe(f"{name}_instances", [*TINY, f"data.path={tmp_path / 'data'}"])
    result = finetune(recipe, "scratch", tmp_path / "out", device="cpu")
    assert 0 <= result.score <= 1
    ap = result.per_class("ap50")
    things = {"s3dis": {"floor", "wall", "table", "chair"}, "scannet3d": {"table", "chair"}}[name]
    assert {each for each, value in ap.items() if value is not None} == things
    assert recipe.network.options.get("stuff", []) == ([] if name == "s3dis" else ["wall", "floor"])
    init = backbone_init(recipe, "scratch", {})
    source = open_labelled(name, tmp_path / "data", "val", task="instances3d", options=recipe.data.options)
    task = build_finetune_task(recipe, init, source.classes, init.contract())
    if name == "scannet3d":
        source = open_labelled(name, tmp_path / "data", "test", task="instances3d")
    cloud = source.load(source.ids()[0])
    (found,) = task.predict([cloud])
    assert found.masks.shape[1] == len(found.labels.labels) == len(cloud)
    if name == "scannet3d":
        listed = write_scannet_instances(tmp_path / "export", cloud.id, found).read_text().splitlines()
        assert len(listed) == len(found)
