"""3D fine-tuning by recipe: the task's numbers, exact resume, sweep, command line, and backbones of the wrong kind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.frames import labelled_clouds
from geo_pretrain.training.data.labelled.clouds.voxels import voxels_of
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.distributed import World
from geo_pretrain.training.finetune.in_memory import PointsSpec, evaluate_clouds
from geo_pretrain.training.finetune.registry import backbone_init, build_finetune_task
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune.sweep import run_sweep
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from tests.front_door import geo_pretrain
from tests.training.finetune.sweeps import Squares
from tests.training.finetune.test_run import Stop, assert_same_run, stop_at
from tests.two_processes import in_two_processes
from tests.zoo import write_tiny, write_tiny_3d

CPU = torch.device("cpu")
SMALL = (
    "data.options={scenes: 2, val_scenes: 1, frames: 2, labelled: 2, width: 64, height: 64}",
    "network.unet3d={variant: 18A, width: 8, voxel_size: 0.15}",
    "optim.batch=2",
    "optim.steps=4",
    "evaluate.every_steps=2",
    "save_every=1",
)


def recipe_of(*overrides):
    return load_finetune_recipe("rooms_srunet34", [*SMALL, *overrides])


def run(out, *overrides, backbone="scratch", **options):
    return finetune(recipe_of(*overrides), backbone, out, device="cpu", **options)


def task_of(backbone="scratch", *overrides, classes=("wall", "floor", "chair")):
    recipe = recipe_of(*overrides)
    init = backbone_init(recipe, str(backbone), {})
    return build_finetune_task(recipe, init, classes, init.contract())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_3d(tmp_path_factory.mktemp("tiny") / "tiny_net_srunet34").folder


def rooms(split):
    return open_labelled("rooms", None, split, task="segmentation", options=recipe_of().data.options)


def test_optimizer_is_that_of_the_short_runs_in_memory():
    optim, spec = load_finetune_recipe("rooms_srunet34").optim, PointsSpec()
    assert (optim.lr, optim.momentum, optim.dampening, optim.weight_decay, optim.batch) == (
        spec.lr, spec.momentum, spec.dampening, spec.weight_decay, spec.batch,
    )  # fmt: skip
    assert optim.backbone_bn_momentum == spec.bn_momentum
    assert (optim.schedule, optim.power) == ("poly", 0.9)


def test_broken_off_run_continues_bit_for_bit_and_says_all(tmp_path, folder):
    whole = run(tmp_path / "whole", backbone=folder)
    with pytest.raises(Stop):
        run(tmp_path / "broken", backbone=folder, on_step=stop_at(3))
    run(tmp_path / "broken", backbone=folder)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    data = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert (data["task"], data["network"], data["metric"]) == ("segmentation3d", "srunet", "miou")
    assert (data["data"]["train_images"], data["data"]["val_images"]) == (4, 2)
    assert "whole scans" in data["quirks"]["scenes"]
    assert [past["step"] for past in data["evaluations"]] == [2, 4]
    assert whole.metric == "miou"
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lr" in line] == [1, 2, 3, 4]
    assert (tmp_path / "whole" / "predictions.png").is_file()
    with pytest.raises(Stop):
        run(tmp_path / "other", backbone=folder, on_step=stop_at(3))
    with pytest.raises(RecipeError, match="from another backbone"):
        run(tmp_path / "other")


def test_saved_weights_give_the_reported_number_and_that_of_the_runs_in_memory(tmp_path):
    result = run(tmp_path / "out")
    val = rooms("val")
    task = task_of(classes=val.classes)
    task.module.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    found = task.evaluate(val, val.ids())
    assert found.scores["miou"] == result.score
    confusion = evaluate_clouds(task.module, task.contract, labelled_clouds(val))
    assert found.details["confusion"] == confusion.tolist()
    assert found.per_class["iou"] == result.per_class()


def test_weights_are_those_of_the_backbone_but_for_the_last_layer(folder):
    task, scratch = task_of(folder), task_of(folder)
    weights = load_file(folder / "model.safetensors")
    for key, value in task.module.state_dict().items():
        assert torch.equal(value, weights[key]) != key.startswith("final."), key
    again, other = task_of(), task_of("scratch", "seed=1")
    assert torch.equal(again.module.conv0p1s1.kernel, task_of().module.conv0p1s1.kernel)
    assert not torch.equal(again.module.conv0p1s1.kernel, other.module.conv0p1s1.kernel)
    assert torch.equal(task.module.final.kernel, scratch.module.final.kernel)


def test_last_layer_has_a_learning_rate_of_its_own():
    task = task_of("scratch", "optim.head_factor=10", "optim.backbone_factor=0.5")
    rest, last = task.parameter_groups()
    assert (rest["factor"], last["factor"]) == (0.5, 10)
    assert {id(p) for p in last["params"]} == {id(p) for p in task.module.final.parameters()}
    assert len(rest["params"]) + len(last["params"]) == len(list(task.module.parameters()))


def test_samples_are_rotated_by_their_own_generator_and_the_loss_is_over_labelled_voxels():
    source, task = rooms("train"), task_of(classes=rooms("train").classes)
    cloud = task.load(source, source.ids()[1])
    assert cloud.id == source.ids()[1]
    first, again = (task.sample(cloud, torch.Generator().manual_seed(1)) for _ in range(2))
    by_hand = voxels_of(cloud, task.contract, torch.Generator().manual_seed(1))
    for sample in (first, again):  # whole clouds' pipeline, with the settings of frames, bit for bit
        for found, wanted in zip((sample.coords, sample.feats, sample.labels), by_hand, strict=True):
            assert torch.equal(found, wanted)
    other = task.sample(cloud, torch.Generator().manual_seed(2))
    assert first.coords.shape != other.coords.shape or not torch.equal(first.coords, other.coords)
    batch = task.collate([first, other])
    loss = task.losses(batch)["segmentation"]
    loss.backward()
    assert all(p.grad is not None for p in task.module.parameters())
    blank = task.losses(batch | {"labels": torch.zeros_like(batch["labels"])})["segmentation"]
    assert blank.item() == 0
    assert blank.requires_grad


def test_frame_without_depth_is_named(monkeypatch):
    source, task = rooms("train"), task_of()
    empty = LabelledCloud("x", np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8), np.zeros(0, np.int64))
    monkeypatch.setattr("geo_pretrain.training.finetune.segmentation3d.cloud_of", lambda frame, id: empty)
    with pytest.raises(BadFrame, match=f"{source.ids()[0]}.*valid depth"):
        task.load(source, source.ids()[0])


def test_source_without_depth_is_refused(tmp_path):
    sources = (Squares("train"), Squares("val"))
    with pytest.raises(RecipeError, match=r"'squares' has no depth"):
        run(tmp_path / "out", sources=sources)


def test_two_processes_equal_two_accumulation_steps_and_measure_alike(tmp_path):
    overrides = ("optim.lr=0.02", "evaluate.every_steps=4")
    run(tmp_path / "accumulated", *overrides, "optim.accumulate=2")

    def work(rank):
        run(tmp_path / "two", *overrides, world=World(rank, 2, CPU))
        task, val = task_of(classes=rooms("val").classes), rooms("val")
        alone, shared = task.evaluate(val, val.ids()), task.evaluate(val, val.ids(), World(rank, 2, CPU))
        assert alone == shared

    in_two_processes(work, tmp_path)
    accumulated, two = (load_file(tmp_path / name / "model.safetensors") for name in ("accumulated", "two"))
    for key, value in accumulated.items():
        if "running" not in key and "tracked" not in key:
            torch.testing.assert_close(value, two[key], atol=2e-5, rtol=1e-3, msg=key)


def test_backbone_of_the_wrong_kind_is_an_error_that_says_so(tmp_path, folder):
    images = write_tiny(tmp_path / "tiny_net_r18").folder
    with pytest.raises(RecipeError, match=r"resnet_unet.*network for images; accepted: a 3D backbone, or a 2D recipe"):
        run(tmp_path / "out", backbone=images)
    with pytest.raises(RecipeError, match=r"'imagenet' is a ResNet for images.*accepted: scratch"):
        run(tmp_path / "out", backbone="imagenet")
    with pytest.raises(RecipeError, match=r"sr_unet.*accepted: a ResNet or a U-Net for images"):
        finetune(load_finetune_recipe("rooms_unet_r18"), folder, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "recipe, override, parts",
    [
        ("rooms_srunet34", "network.kind=unet", ["'network.kind' is 'unet'", "'segmentation3d'", "srunet"]),
        ("rooms_srunet34", "network.freeze=2", ["network", "freeze", "kind and unet3d for srunet"]),
        ("rooms_srunet34", "network.unet3d.variant=50", ["network.unet3d.variant", "34C"]),
        ("rooms_srunet34", "data.augment.flip=0.5", ["data.augment", "srunet"]),
        ("rooms_unet_r18", "network.unet3d={width: 8}", ["network.unet3d", "srunet"]),
        ("rooms_unet_r18", "network.kind=srunet", ["'network.kind' is 'srunet'", "'segmentation'"]),
    ],
)
def test_settings_of_the_other_kind_are_refused(recipe, override, parts):
    with pytest.raises(RecipeError) as caught:
        load_finetune_recipe(recipe, [override])
    for part in parts:
        assert part in str(caught.value)


def test_batchnorm_momentum_of_the_recipe_is_that_of_all_layers(tmp_path, monkeypatch):
    from geo_pretrain.training.finetune.training import Finetuning

    seen = []
    monkeypatch.setattr(Finetuning, "seed", lambda self, step, micro_batch: seen.append(self.module))
    run(tmp_path / "out", "optim.steps=1", "evaluate.every_steps=1", "optim.backbone_bn_momentum=0.03")
    norms = [layer.momentum for layer in seen[0].modules() if isinstance(layer, nn.BatchNorm1d)]
    assert norms
    assert set(norms) == {0.03}


def test_toy_run_by_the_command_line_and_a_sweep_of_two_starts(tmp_path, folder):
    options = [item for override in SMALL for item in ("--set", override)]
    geo_pretrain(
        "finetune", "rooms_srunet34", "--toy", "-b", folder, "--out", tmp_path / "one", "--device", "cpu", *options
    )
    assert json.loads((tmp_path / "one" / "results.json").read_text())["recipe"] == "rooms_srunet34.toy"
    found = run_sweep(recipe_of(), [str(folder), "scratch"], [1.0, 0.5], [0], tmp_path / "sweep", device="cpu")
    assert [(point.backbone, point.fraction) for point in found.points] == [
        ("tiny_net_srunet34", 0.5), ("tiny_net_srunet34", 1.0), ("scratch", 0.5), ("scratch", 1.0),
    ]  # fmt: skip
    assert found.images == {0.5: 2, 1.0: 4}
    assert found.paper == ()


def test_validation_without_labels_is_an_error(monkeypatch):
    task, val = task_of(classes=rooms("val").classes), rooms("val")
    original = type(task).load

    def blank(self, source, id):
        cloud = original(self, source, id)
        return LabelledCloud(cloud.id, cloud.points, cloud.colors, np.zeros_like(cloud.labels))

    monkeypatch.setattr(type(task), "load", blank)
    with pytest.raises(DataError, match="No labelled voxel in 2 clouds"):
        task.evaluate(val, val.ids())
