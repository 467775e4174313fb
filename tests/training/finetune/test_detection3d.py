"""Detection in clouds: targets follow augmentation, AP of known answers, exact resume, predictions, settings."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.data.samples.cloud_boxes import box_rows
from geo_pretrain.training.distributed import World
from geo_pretrain.training.evaluation.detection3d import ScoredBoxes
from geo_pretrain.training.finetune import load_finetuned
from geo_pretrain.training.finetune.box_coding import SIZES
from geo_pretrain.training.finetune.registry import (
    backbone_init,
    build_finetune_task,
    load_checked_finetune_recipe,
)
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune_recipe import RECIPES
from geo_pretrain.training.geometry3d.boxes import points_in_boxes
from tests.forked import Forked
from tests.training.finetune.blocks import Blocks, blocks
from tests.training.finetune.test_run import assert_same_run
from tests.two_processes import in_two_processes

SMALL = (
    "network.options={heading_bins: 12, seeds: 48, proposals: 16, start: quiet, metric: ap25}",
    "data.cloud.points=400",
    "optim.batch=2",
    "optim.steps=3",
    "optim.milestones=[2]",
    "evaluate.every_steps=3",
    "save_every=1",
)
ROOMS = "data.options={scenes: 2, val_scenes: 1, frames: 2, width: 64, height: 64}"
CPU = torch.device("cpu")


def recipe_of(*overrides, name="rooms3d_votenet"):
    return load_checked_finetune_recipe(name, [*SMALL, *overrides], toy=True)


def task_of(*overrides, classes=Blocks.classes, contract=None):
    recipe = recipe_of(*overrides)
    init = backbone_init(recipe, "scratch", {})
    return build_finetune_task(recipe, init, classes, contract or init.contract())


def answer_with(task, monkeypatch, answer):
    """Make the network propose `answer(id)`: rows [K, 7], classes [K], scores [K]."""

    def proposals(sample):
        rows, classes, scores = answer(sample.id)
        certain = torch.nn.functional.one_hot(classes - 1, len(task.classes)).float()
        return ScoredBoxes(rows, scores, certain)

    monkeypatch.setattr(task, "proposals", proposals)


def truth(id, shift=0.0):
    cloud = blocks(int(id.split("/")[1]))
    rows = box_rows(cloud.boxes)
    rows[:, 0] += shift
    return rows, torch.from_numpy(cloud.boxes.classes), torch.linspace(0.9, 0.5, len(rows))


# training


def run(out):
    return finetune(recipe_of(ROOMS), "scratch", out, device="cpu")


def test_killed_run_continues_bit_for_bit_and_its_folder_predicts(tmp_path):
    whole = run(tmp_path / "whole")
    broken = Forked(lambda: run(tmp_path / "broken"))
    log, deadline = Path(f"{tmp_path / 'broken'}.run") / "log.jsonl", time.monotonic() + 600
    while not (log.exists() and log.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        assert broken.poll() is None, broken.communicate()[0]
        time.sleep(0.002)
    broken.kill()
    broken.communicate()
    assert not (tmp_path / "broken").exists()
    run(tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert (whole.metric, whole.task, whole.data["data"]["source"]) == ("ap25", "detection3d", "rooms3d")
    assert set(whole.data["last"]["scores"]) == {"ap25", "ar25", "ap50", "ar50"}
    assert (tmp_path / "whole" / "predictions.html").is_file()
    assert np.asarray(Image.open(tmp_path / "whole" / "predictions.png")).std() > 5

    val = open_labelled("rooms3d", None, "val", task="detection3d", options=recipe_of(ROOMS).data.options)
    task = load_finetuned(tmp_path / "whole")  # size templates are among the weights
    assert task.evaluate(val, val.ids()).scores == whole.data["last"]["scores"]
    assert task.facts()["sizes"] == whole.data["sizes"]


def test_some_steps_lower_the_loss_on_a_batch():
    task = task_of("data.cloud.augment={}")
    task.prepare(Blocks("train", 4))
    batch = task.collate([task.sample(blocks(k), torch.Generator().manual_seed(k)) for k in range(4)])
    optimizer = torch.optim.Adam(task.module.parameters(), 3e-3)
    series = []
    for _ in range(9):
        losses = task.losses(batch)
        series.append({name: value.item() for name, value in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in task.module.parameters())
        optimizer.step()
    assert sum(series[-1].values()) < 0.8 * sum(series[0].values())
    assert series[-1]["objectness"] < series[0]["objectness"]


def test_clouds_without_boxes_have_a_loss_that_is_finite():
    task = task_of()
    empty = blocks(1, count=0)
    batch = task.collate([task.sample(empty, torch.Generator().manual_seed(k)) for k in range(2)])
    losses = task.losses(batch)
    assert all(torch.isfinite(value) for value in losses.values())
    assert losses["vote"] == losses["class"] == 0
    assert losses["objectness"] > 0


# targets


@pytest.mark.parametrize("votes", ["instances", "boxes"])
def test_boxes_and_votes_follow_augmentation(votes):
    augment = "{mirror: [1, 0.5, 0], rotate: [0, 0, 90], scale: [0.5, 2], translate: [1, 1, 1]}"
    task = task_of(f"data.cloud.augment={augment}", f"network.options.votes={votes}", "data.cloud.points=2000")
    cloud = blocks(3)
    _, classes, _ = truth("x/3")
    sample = task.sample(cloud, torch.Generator().manual_seed(5))
    assert sample.classes.tolist() == classes.tolist()
    points = sample.cloud.points
    grown = sample.rows.clone()
    grown[:, 3:6] *= 1.001
    inside = points_in_boxes(points, grown)
    owner = torch.from_numpy(cloud.instances)[sample.cloud.chosen]
    for k in range(len(grown)):  # every block's points lie in its box, also after mirror, turn, scale and shift
        assert inside[k][owner == k + 1].all()
    first = owner[sample.cloud.index]
    assert torch.equal(sample.voting[first > 0], torch.ones(int((first > 0).sum()), dtype=torch.bool))
    for voxel in range(len(first)):
        if first[voxel] > 0:
            center = grown[first[voxel] - 1, :3]
            exact = votes == "boxes"
            assert (sample.votes[voxel] - center).abs().max() < (1e-5 if exact else 0.3)
            if not exact:
                mine = points[owner == first[voxel]]
                middle = (mine.amin(0) + mine.amax(0)) / 2
                assert torch.allclose(sample.votes[voxel], middle.expand(3, 3))
        elif votes == "instances":
            assert not sample.voting[voxel]


def test_boxes_of_sets_without_headings_stay_aligned():
    task = task_of("data.cloud.augment={rotate: [0, 0, 5]}", "network.options.heading_bins=1")
    sample = task.sample(blocks(3), torch.Generator().manual_seed(5))
    assert (sample.rows[:, 6] == 0).all()
    points = torch.from_numpy(blocks(3).points)[sample.cloud.chosen]
    owner = torch.from_numpy(blocks(3).instances)[sample.cloud.chosen]
    inside = points_in_boxes(sample.cloud.points, sample.rows + torch.tensor([0, 0, 0, 1e-3, 1e-3, 1e-3, 0]))
    assert len(points) == len(owner)
    assert all(inside[k][owner == k + 1].all() for k in range(len(inside)))


def test_padding_has_the_released_number_of_places_where_it_is_asked_for():
    for overrides, places in (((), 3), (("match_released_code=true",), 64)):
        task = task_of(*overrides)
        batch = task.collate([task.sample(blocks(k, count=k), torch.Generator().manual_seed(k)) for k in (1, 3)])
        assert batch["boxes"].shape == (2, places, 7)
        assert (batch["classes"] > 0).sum(1).tolist() == [1, 3]
        assert task.module.shape.skip_near_origin == bool(overrides)


class Faulty(Blocks):
    """The second cloud is broken."""

    def load(self, id):
        if id.endswith("/1"):
            raise BadFrame("blocks/1.npz", "cut short")
        return super().load(id)


def test_size_templates_are_those_of_the_training_boxes():
    train = Faulty("train", 5)
    boxes = [blocks(k).boxes for k in (0, 2, 3, 4)]
    for which, middle in (("mean", np.mean), ("median", np.median)):
        task = task_of(f"network.options.sizes={which}")
        task.prepare(train)
        for label in (1, 2):
            sizes = [size for one in boxes for size, c in zip(one.sizes, one.classes, strict=True) if c == label]
            expected = [middle([size[axis] for size in sizes]) for axis in range(3)]
            np.testing.assert_allclose(task.module.mean_sizes[label - 1], expected, rtol=1e-5)
    published = task_of(
        "data.source=sunrgbd3d",
        "data.options={}",
        "network.options.sizes=published",
        classes=[f"c{k}" for k in range(10)],
    )
    published.prepare(train)
    assert torch.equal(published.module.mean_sizes, torch.tensor(SIZES["sunrgbd"]))


# evaluation and predictions


def test_the_true_boxes_have_full_precision_and_moved_ones_do_not(monkeypatch):
    source, task = Faulty("train", 4), task_of("network.options.protocols=[training, pointcontrast_test]")
    answer_with(task, monkeypatch, truth)
    found = task.evaluate(source, source.ids())
    for name in ("ap25", "ar25", "ap50", "ar50", "pointcontrast_test_ap25", "pointcontrast_test_ap50"):
        assert found.scores[name] == pytest.approx(1)
    assert found.per_class["ap50"] == {"cube": pytest.approx(1), "bar": pytest.approx(1)}
    assert found.details["skipped"] == [{"path": "blocks/1.npz", "reason": "cut short"}]
    assert sum(found.details["boxes"].values()) == 9
    answer_with(task, monkeypatch, lambda id: truth(id, shift=0.2))
    moved = task.evaluate(source, source.ids()).scores
    assert moved["ap25"] > moved["ap50"]
    answer_with(task, monkeypatch, lambda id: truth(id, shift=5.0))
    assert task.evaluate(source, source.ids()).scores["ar25"] == 0
    with pytest.raises(DataError, match="No box in 2 clouds of 'blocks', split 'val'"):
        task.evaluate(Blocks("val", 2, count=0), ["val/0", "val/1"])


def test_processes_measure_together_what_one_does_alone(tmp_path, monkeypatch):
    source, task = Faulty("train", 5), task_of()
    answer_with(task, monkeypatch, lambda id: truth(id, shift=0.05 * int(id[-1])))
    alone = task.evaluate(source, source.ids())

    def work(rank):
        assert task.evaluate(source, source.ids(), World(rank, 2, CPU)) == alone

    in_two_processes(work, tmp_path)


def test_predictions_are_in_the_clouds_frame_and_labels_are_not_looked_at(monkeypatch):
    task = task_of()
    cloud = blocks(2)
    bare = replace(cloud, labels=None, instances=None, boxes=None)
    for first, again in [task.predict([cloud, bare])]:
        assert np.array_equal(first.boxes.centers, again.boxes.centers)
        assert np.array_equal(first.scores, again.scores)
        assert (np.diff(first.scores) <= 0).all()
    moved = replace(bare, points=bare.points + np.array([40, -30, 2], np.float32))
    answer_with(task, monkeypatch, truth)
    (found,) = task.predict([replace(moved, id="x/2")])
    np.testing.assert_allclose(found.boxes.centers, cloud.boxes.centers, atol=1e-6)
    assert found.boxes.classes.tolist() == cloud.boxes.classes.tolist()


def test_a_source_without_boxes_is_named():
    task = task_of()
    bare = replace(blocks(2), boxes=None)
    with pytest.raises(DataError, match="Cloud 'blocks/2' has no boxes"):
        task.sample(bare, torch.Generator())
    task = task_of("network.options.votes=instances")
    with pytest.raises(DataError, match=r"no instances to vote by; accepted: network.options.votes=boxes"):
        task.sample(replace(blocks(2), instances=None), torch.Generator())


# recipes


@pytest.mark.parametrize(
    "override, parts",
    [
        ("network.options.heading_bins=0", ["network.options.heading_bins", "1 up"]),
        ("network.options.protocols=[test]", ["protocols", "training, pointcontrast_test, csc_test, votenet_test"]),
        ("network.options.sizes=published", ["network.options.sizes", "scannet3d, sunrgbd3d"]),
        ("network.options.radios=1", ["radios", "radius"]),
        ("data.cloud.augment.rotate=[3, 0, 0]", ["data.cloud.augment.rotate", "boxes stand upright"]),
        ("data.cloud.augment.elastic=[[0.2, 0.4]]", ["data.cloud.augment.elastic", "boxes cannot follow"]),
        ("data.cloud.augment.flip_axes=xy", ["data.cloud.augment.flip_axes"]),
        ("data.cloud.normalize=unit_sphere", ["data.cloud.normalize"]),
        ("data.cloud.labelled_points=20", ["data.cloud.labelled_points"]),
        ("network.kind=srunet", ["'network.kind' is 'srunet'", "votenet"]),
        ("data.source=scannet", ["'scannet' has no labels for task 'detection3d'", "rooms3d"]),
    ],
)
def test_settings_that_boxes_do_not_allow_are_refused(override, parts):
    with pytest.raises(RecipeError) as caught:
        recipe_of(override)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name, points, bins, classes", [("scannet3d", 40_000, 1, 18), ("sunrgbd3d", 20_000, 12, 10)])
def test_recipes_state_the_released_protocol(name, points, bins, classes):
    recipe = load_checked_finetune_recipe(f"{name}_votenet", ["network.unet3d.width=8"])
    cloud, optim, augment = recipe.clouds(), recipe.optim, recipe.clouds().augment
    assert (cloud.voxel_size, cloud.features, cloud.points) == (0.025, "ones", points)
    assert (augment.mirror, augment.rotate, augment.scale) == (
        ((0.5, 0.5, 0), (0, 0, 5), (1, 1)) if bins == 1 else ((0.5, 0, 0), (0, 0, 30), (0.85, 1.15))
    )
    assert (optim.optimizer, optim.batch, optim.epochs, optim.weight_decay) == ("adam", 32 if bins == 1 else 64, 180, 0)
    rates = [optim.rate(0, 1, epoch=epoch) for epoch in (0, 79, 80, 119, 120, 160, 179)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-6, 1e-6])
    assert (optim.bn_momentum, optim.bn_epochs) == ("votenet", 20)
    init = backbone_init(recipe, "scratch", {})
    task = build_finetune_task(recipe, init, [f"c{k}" for k in range(classes)], init.contract())
    assert (task.module.shape.heading_bins, task.module.shape.seeds, task.module.shape.proposals) == (bins, 1024, 256)
    assert task.module.mean_sizes.shape == (classes, 3)
    text = (RECIPES / f"{name}_votenet.yaml").read_text()
    (line,) = [
        line for line in text.splitlines() if "--set" in line
    ]  # CSC's settings, as the recipe's header tells them
    csc = load_checked_finetune_recipe(f"{name}_votenet", line.removeprefix("#").replace("--set", "").split())
    assert (csc.optim.bn_epochs, csc.clouds().features) == (80, "rgb")
