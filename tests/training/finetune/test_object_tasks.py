"""Parts and categories of single objects: toy runs, scores against slow twins, predictions, the classifier's layers."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.registry import open_labelled, subset
from geo_pretrain.training.distributed import World
from geo_pretrain.training.finetune.classification_network import classifier_srunet
from geo_pretrain.training.finetune.registry import (
    backbone_init,
    build_finetune_task,
    load_checked_finetune_recipe,
)
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from tests.training.finetune.killed import run_killed_at
from tests.training.finetune.test_run import assert_same_run
from tests.two_processes import in_two_processes

RECIPES = {"parts3d": "shapenetpart_srunet34", "classification3d": "shapenetcore_srunet34"}
PARTS = ("chair/seat", "chair/legs", "lamp/foot", "chair/back", "lamp/shade")
OF = {1: (1, 2, 4), 2: (3, 5)}
CATEGORIES = tuple("abcdefghijklm")  # 13, of which ten are rare
TINY = (
    "data.options={objects: 8, val_objects: 2, object_points: 128}",
    "data.cloud.points=96",
    "network.unet3d={variant: 18A, width: 8, voxel_size: 0.2}",
    "data.cloud.voxel_size=0.2",
    "optim.batch=4",
    "optim.steps=5",
    "optim.lr=0.02",
    "evaluate.every_steps=5",
    "evaluate.batch=4",
    "save_every=2",
)


def run(name, out, **options):
    return finetune(load_finetune_recipe(RECIPES[name], TINY, toy=True), "scratch", out, device="cpu", **options)


def task_of(name, classes, *overrides):
    recipe = load_finetune_recipe(RECIPES[name], [*TINY, *overrides], toy=True)
    start = backbone_init(recipe, "scratch", {})
    return build_finetune_task(recipe, start, classes, start.contract())


def rooms(name, split="val"):
    options = load_finetune_recipe(RECIPES[name], TINY, toy=True).data.options
    return open_labelled("rooms3d", None, split, task=name, options=options)


class Objects:
    """Objects of points at random: of category 1 + number % K; one is broken, one has no category."""

    name, split = "objects", "val"

    def __init__(self, classes, categories, labels=None, count=9):
        self.classes, self.categories, self.labels, self.count = classes, categories, labels, count

    def ids(self):
        return [str(number) for number in range(self.count)]

    def category_of(self, id):
        return 1 + int(id) % self.categories

    def load(self, id):
        if id == "4":
            raise BadFrame("objects/4.txt", "cut short")
        rng, category = np.random.default_rng(int(id)), self.category_of(id)
        points = rng.uniform(-1, 1, (150, 3)).astype(np.float32)
        labels = None if self.labels is None else rng.choice((0, *self.labels[category]), 150)
        return LabelledCloud(id, points, None, labels, category=None if id == "5" else category)


@pytest.mark.parametrize("name, score", [("parts3d", "instance_miou"), ("classification3d", "accuracy")])
def test_toy_learns_continues_bit_for_bit_measures_and_draws(name, score, tmp_path):
    whole = run(name, tmp_path / "whole")
    run_killed_at(3, partial(run, name, tmp_path / "broken"))
    run(name, tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    losses = [line["parts" if name == "parts3d" else "category"] for line in lines if "lr" in line]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    data = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert (data["task"], data["metric"], data["data"]["train_images"]) == (name, score, 8)
    assert whole.score == data["last"]["scores"][score]
    with Image.open(tmp_path / "whole" / "predictions.png") as picture:
        assert np.asarray(picture).std() > 10
    assert (tmp_path / "whole" / "predictions.html").is_file()
    val = rooms(name)
    task = task_of(name, val.classes)
    task.module.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"))
    assert task.evaluate(val, val.ids()).scores[score] == whole.score


def answer_by_place(task, monkeypatch, channels):
    """Make the network answer by the place of a voxel, whichever batch it is in."""

    def forward(coords, feats):
        place = coords[:, 1:].double() @ torch.tensor([1.0, 1.7, 2.3], dtype=torch.float64)
        return torch.stack([torch.sin(place * (c + 1)) for c in range(channels)], dim=1).float()

    monkeypatch.setattr(task, "forward", forward)
    return forward


def test_iou_of_parts_is_that_of_a_slow_twin_and_bad_objects_are_counted(monkeypatch):
    source = Objects(PARTS, 2, OF)
    task = task_of("parts3d", PARTS)
    forward = answer_by_place(task, monkeypatch, 5)
    found = task.evaluate(source, source.ids())
    ious = {1: [], 2: []}
    for id in source.ids():
        if id in "45":
            continue
        cloud = source.load(id)
        sample = task.evaluation_sample(cloud)
        logits = forward(sample.coords, sample.feats).tolist()
        pairs = []
        for row, voxel in zip(sample.chosen.tolist(), sample.inverse.tolist(), strict=True):
            best = max(OF[cloud.category], key=lambda part, v=voxel: logits[v][part - 1])
            pairs += [(cloud.labels[row], best)] if cloud.labels[row] else []
        of_part = []
        for part in OF[cloud.category]:
            both = sum(t == g == part for t, g in pairs)
            either = sum(part in (t, g) for t, g in pairs)
            of_part.append(both / either if either else 1)
        ious[cloud.category].append(np.mean(of_part))
    assert found.scores["instance_miou"] == pytest.approx(np.mean(ious[1] + ious[2]))
    assert found.scores["category_miou"] == pytest.approx((np.mean(ious[1]) + np.mean(ious[2])) / 2)
    assert found.per_class["iou"] == pytest.approx({"chair": np.mean(ious[1]), "lamp": np.mean(ious[2])})
    assert found.details["skipped"] == [
        {"path": "5", "reason": "the object has no category"},
        {"path": "objects/4.txt", "reason": "cut short"},
    ]
    assert found.details["objects"] == 7
    with pytest.raises(DataError, match="None of 1 clouds"):
        task.evaluate(source, ["4"])


def test_parts_are_predicted_for_all_points_of_objects_with_and_without_a_category(monkeypatch):
    source, task = Objects(PARTS, 2, OF), task_of("parts3d", PARTS)
    forward = answer_by_place(task, monkeypatch, 5)
    known, plain = source.load("0"), source.load("0")
    plain = LabelledCloud("0", plain.points, None, None)
    with_category, without = task.predict([known, plain])
    assert len(with_category.labels) == len(without.labels) == 150  # more than the 96 that are drawn
    assert set(with_category.labels.tolist()) <= set(OF[1])
    sample = task.evaluation_sample(plain)
    weight = forward(sample.coords, sample.feats).softmax(1).sum(0).tolist()
    likeliest = max(OF, key=lambda category: sum(weight[part - 1] for part in OF[category]))
    assert set(without.labels.tolist()) <= set(OF[likeliest])
    assert 0 < with_category.scores.min() <= with_category.scores.max() <= 1
    drawn = sample.chosen.numpy()
    logits = forward(sample.coords, sample.feats)[:, [part - 1 for part in OF[1]]]
    assert np.array_equal(with_category.labels[drawn], np.array(OF[1])[logits.argmax(1)[sample.inverse].numpy()])


def test_names_of_parts_must_name_their_category():
    with pytest.raises(DataError, match="'seat' names no category"):
        task_of("parts3d", ("seat", "legs"))


def test_accuracy_and_tails_are_those_of_a_slow_twin(monkeypatch):
    train = Objects(CATEGORIES, 13, count=16)  # a, b, c twice; the other ten once
    task, val = task_of("classification3d", CATEGORIES), Objects(CATEGORIES, 13, count=20)
    task.prepare(subset_of(train))
    assert task.tails == {"tail10": list(range(4, 14))}
    rng = np.random.default_rng(0)
    answers = {id: int(rng.choice([val.category_of(id), 1])) for id in val.ids()}

    def logits(clouds):
        return torch.nn.functional.one_hot(torch.tensor([answers[cloud.id] - 1 for cloud in clouds]), 13).float()

    monkeypatch.setattr(task, "logits", logits)
    found = task.evaluate(val, val.ids())
    measured = [(val.category_of(id), answers[id]) for id in val.ids() if id not in ("4", "5")]
    assert found.scores["accuracy"] == pytest.approx(np.mean([t == g for t, g in measured]))
    assert found.scores["tail10"] == pytest.approx(np.mean([t == g for t, g in measured if t >= 4]))
    each = {c: [t == g for t, g in measured if t == c] for c in range(1, 14)}
    assert found.per_class["accuracy"] == pytest.approx(
        {CATEGORIES[c - 1]: np.mean(hits) if hits else None for c, hits in each.items()}
    )
    assert found.scores["macc"] == pytest.approx(np.mean([np.mean(hits) for hits in each.values() if hits]))
    assert task.facts()["tails"] == {"tail10": list("defghijklm")}


def subset_of(source):
    """A share of the objects, whose rarest categories are still those of all of them."""
    source.scene_of = lambda id: id
    source.fingerprint = lambda: ""
    return subset(source, 0.5)


def test_a_category_is_predicted_without_looking_at_it():
    val, task = rooms("classification3d"), task_of("classification3d", rooms("classification3d").classes)
    clouds = [val.load(id) for id in val.ids()]
    plain = [LabelledCloud(cloud.id, cloud.points, None, None) for cloud in clouds]
    for one, other in zip(task.predict(clouds), task.predict(plain), strict=True):
        assert one.label == other.label == 1 + int(one.scores.argmax())
        assert np.array_equal(one.scores, other.scores)
        assert one.scores.sum() == pytest.approx(1, abs=1e-5)


def test_the_classifier_pools_the_deepest_map_and_keeps_the_way_up_as_it_is():
    torch.manual_seed(0)
    start = SRUNet("18A", width=8)
    network = classifier_srunet(start, 4, seed=3).eval()
    coords = torch.cat(
        [torch.nn.functional.pad(torch.randint(0, 40, (n, 3)), (1, 0), value=b) for b, n in ((0, 60), (1, 9))]
    )
    coords = coords.unique(dim=0).int()
    x = SparseTensor(coords, torch.ones(len(coords), 3))
    deepest = start.pyramid(x)[-1]
    rows = []
    for number in range(2):
        mine = deepest.feats[deepest.coords[:, 0] == number]
        rows.append(torch.cat([mine.max(0).values, mine.mean(0)]))
    torch.testing.assert_close(network(x), network.head(torch.stack(rows)))
    network.train()(x).sum().backward()
    for name, parameter in network.named_parameters():
        up = name.startswith(("unet.convtr", "unet.bntr", "unet.final", *(f"unet.block{n}." for n in range(5, 9))))
        assert parameter.requires_grad != up, name
        assert (parameter.grad is None) == up, name
    same = classifier_srunet(SRUNet("18A", width=8), 4, seed=3)
    assert torch.equal(network.head[-1].weight, same.head[-1].weight)
    wide = classifier_srunet(SRUNet("18A", width=8), 55, seed=0, hidden=32)
    shapes = [tuple(layer.weight.shape) for layer in wide.head if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(32, 2 * start.planes[3]), (32, 32), (55, 32)]


def test_objects_beyond_the_limit_of_a_batch_lose_their_category_too():
    source = Objects(CATEGORIES, 13)
    task = task_of("classification3d", CATEGORIES, "data.cloud.limit=150")
    samples = [task.sample(source.load(id), torch.Generator().manual_seed(int(id))) for id in "0123"]
    batch = task.collate(samples)
    assert batch["dropped"] == 4 - len(batch["counts"]) > 0
    assert batch["categories"].tolist() == [0, 1, 2, 3][: len(batch["counts"])]


def test_processes_together_measure_what_one_does(tmp_path):
    def work(rank):
        for name in RECIPES:
            val = rooms(name)
            task = task_of(name, val.classes)
            world = World(rank, 2, torch.device("cpu"))
            assert task.evaluate(val, val.ids()) == task.evaluate(val, val.ids(), world)

    in_two_processes(work, tmp_path)


def test_options_of_the_head_are_checked():
    with pytest.raises(RecipeError, match=r"network\.options\.hiden"):
        load_checked_finetune_recipe(RECIPES["classification3d"], ["network.options.hiden=512"])
    with pytest.raises(RecipeError, match=r"network\.options\.dropout"):
        load_checked_finetune_recipe(RECIPES["classification3d"], ["network.options.dropout=1"])
    with pytest.raises(RecipeError, match=r"srunet_classifier"):
        load_finetune_recipe(RECIPES["parts3d"], ["network.kind=srunet_classifier"])
