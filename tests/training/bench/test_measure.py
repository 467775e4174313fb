"""What a benchmark measures a checkpoint on and with: held-out rooms, the budget's numbers, the seed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.bench import measure as measuring
from geo_pretrain.training.bench.plan import BenchSpec, base_data, plan, rows
from geo_pretrain.training.data.frame import SkippedFrames, resize_frame
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.evaluation.features import EncoderMaps
from geo_pretrain.training.evaluation.matching import MatchingResult
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.tasks import build_task
from tests.zoo import write_tiny, write_tiny_3d

SPEC = BenchSpec(
    finetune_steps=5,
    finetune_batch=3,
    finetune_lr=0.03,
    finetune_lr_points=0.07,
    pairs=3,
    val_scenes=2,
    labelled=1,
    pixels=77,
    overrides=(
        "data.size=[48, 64]",
        "data.options={scenes: 1, frames: 4, width: 80, height: 64}",
        "data.overlap=[0.1, 1.0]",
        "data.max_pairs_per_scene=1",
    ),
)


def data(**options):
    found = base_data(SPEC)
    return dataclasses.replace(found, options=found.options | options)


@pytest.mark.parametrize("options", [{}, {"split": "train"}])
def test_matching_is_on_pairs_spread_over_rooms_that_nothing_was_trained_on(options):
    source, pairs = measuring.Rooms(dataclasses.replace(data(**options), units="frames"), SPEC).held_out()
    assert source.scenes() == ["rooms_val_0000", "rooms_val_0001"]
    every = find_pairs(source, dataclasses.replace(data(), max_pairs_per_scene=None), skips=SkippedFrames())
    assert len(every) > 5  # not one a scene, as for training
    assert pairs == [every[round(k * (len(every) - 1) / 2)] for k in range(3)]
    assert all(pair.frame1 != pair.frame2 for pair in pairs)


def test_few_labelled_frames_of_the_training_rooms_and_all_of_the_others():
    rooms = measuring.Rooms(data(depth_noise=True, split="train"), SPEC)
    train, val = rooms.frames()
    assert [frame.scene for frame in train] == ["rooms_train_0000"]
    assert [frame.scene for frame in val] == [f"rooms_val_{k:04d}" for k in range(2) for _ in range(4)]
    trained_on = open_source(data())
    want = resize_frame(trained_on.load("rooms_train_0000", train[0].id), (48, 64))
    assert np.array_equal(train[0].color, want.color)
    assert np.array_equal(train[0].depth, want.depth)  # without noise
    assert (train[0].depth.shape, val[0].depth.shape) == ((48, 64), (48, 64))


def test_rooms_to_be_measured_on_are_not_trained_on():
    spec = dataclasses.replace(SPEC, overrides=(*SPEC.overrides, "data.options={split: val}"))
    with pytest.raises(RecipeError, match=r"'data\.options\.split' is 'val', accepted is train"):
        plan(rows(["pri3d_view"])[0], spec, 0)


@pytest.fixture
def calls(monkeypatch):
    """What each measurement is called with; nothing is measured."""
    found = {}

    def stand_in(name, result):
        def call(*arguments, **options):
            found[name] = SimpleNamespace(arguments=arguments, options=options, training=arguments[0].training)
            return result

        monkeypatch.setattr(measuring, name, call)

    recall = MatchingResult(0.5, 4.0, (0.4, 0.6), 10, 0.01)
    stand_in("evaluate_matching", recall)
    for number, name in enumerate(("probe_backbone", "finetune_frames", "finetune_clouds")):
        stand_in(name, SimpleNamespace(miou=number / 10))
    return found


def test_an_image_network_is_measured_with_the_budget_and_the_seed(tmp_path, calls):
    folder = write_tiny(tmp_path / "tiny_net_r18").folder
    got = measuring.measure(folder, data(), SPEC, seed=6)
    assert got["kind"] == "2D"
    facts = {"recall": 0.5, "threshold": 4.0, "unit": "px", "chance": 0.01, "of": "dense output"}
    assert (got["matching"], got["probe"], got["finetuned"]) == (facts, 0.0, 0.1)
    assert set(got["seconds"]) == {"matching", "probe", "finetuned"}
    whole = measuring.load_network(folder, decoder=True)

    matching = calls["evaluate_matching"]
    assert not matching.training
    assert isinstance(matching.arguments[0].network, ResNetUNet)
    assert matching.options == {"size": (48, 64), "seed": 6}
    assert matching.arguments[1].scenes()[0] == "rooms_val_0000"

    probe = calls["probe_backbone"]
    encoder, train, val, spec = probe.arguments
    assert torch.equal(encoder.conv1.weight, whole.encoder.conv1.weight)
    assert (train.split, val.split) == ("train", "val")
    assert (spec.pixels, spec.seed, spec.size) == (77, 6, (48, 64))

    tuned = calls["finetune_frames"]
    network, _, train, val, budget = tuned.arguments
    assert (train[0].scene, val[0].scene) == ("rooms_train_0000", "rooms_val_0000")
    assert (budget.steps, budget.batch, budget.lr) == (5, 3, 0.03)
    assert tuned.options["seed"] == 6
    assert torch.equal(network.encoder.conv1.weight, whole.encoder.conv1.weight)
    twin = measuring.encoder_segmenter(whole.encoder, network.out_chans, seed=6)
    assert torch.equal(network.decoder.conv0.weight, twin.decoder.conv0.weight)
    rooms = measuring.Rooms(data(), SPEC)
    assert network.out_chans == len(rooms.train.classes) + 1  # and the unlabelled


def test_an_encoder_alone_is_matched_by_its_maps(tmp_path, calls):
    task = build_task(load_recipe("moco_v2_unsup_in_sn_r50", ["model.width=8", "task.queue=8"], toy=True))
    exported = task.export()
    folder = write_tiny(
        tmp_path / "encoder_r50",
        "encoder_net_r50",
        arch=exported.arch,
        weights={"encoder": exported.weights["encoder"]},
        golden=exported.golden,
    ).folder
    got = measuring.measure(folder, data(), SPEC, seed=6)
    assert got["matching"]["of"] == "encoder's maps"
    assert isinstance(calls["evaluate_matching"].arguments[0].network, EncoderMaps)


def test_a_point_network_is_measured_with_the_budget_and_the_seed(tmp_path, calls):
    folder = write_tiny_3d(tmp_path / "tiny_net_srunet34").folder
    got = measuring.measure(folder, data(), SPEC, seed=6)
    assert (got["kind"], got["probe"], got["finetuned"], got["matching"]["of"]) == ("3D", 0.0, 0.2, "output")
    matching = calls["evaluate_matching"]
    assert matching.options == {"size": (48, 64), "turn": "upright", "seed": 6}
    assert matching.arguments[1].scenes()[0] == "rooms_val_0000"
    probed, train_source, val_source, spec = calls["probe_backbone"].arguments
    assert torch.equal(probed.final.kernel, matching.arguments[0].network.final.kernel)
    assert (len(train_source.ids()), len(val_source.ids())) == (1, 8)
    assert (spec.pixels, spec.seed, spec.size) == (77, 6, (48, 64))
    tuned = calls["finetune_clouds"]
    network, _, train, val, budget = tuned.arguments
    assert (len(train), len(val)) == (1, 8)
    assert (budget.steps, budget.batch, budget.lr) == (5, 3, 0.07)
    assert tuned.options["seed"] == 6
    start = measuring.load_network(folder)
    twin = measuring.segmentation_srunet(start, len(train_source.classes) + 1, seed=6)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in network.state_dict().items())


def test_random_weights_are_drawn_by_the_seed(tmp_path, calls):
    folder = write_tiny(tmp_path / "tiny_net_r18").folder

    def first(seed, pretrained):
        measuring.measure(folder, data(), SPEC, seed=seed, pretrained=pretrained)
        return calls["probe_backbone"].arguments[0].conv1.weight

    one, again, other = first(1, False), first(1, False), first(2, False)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(first(1, True), first(2, True))
