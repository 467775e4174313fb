"""A backbone beside its random-init baseline: which measurement it gets, at which size, on which weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from geo_pretrain.catalog import Arch
from geo_pretrain.errors import CheckpointError
from geo_pretrain.loading import load_backbone
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.evaluation import matching
from geo_pretrain.training.evaluation.features import RANDOM, CloudExtractor, ImageExtractor, load_extractor
from geo_pretrain.training.evaluation.matching import MatchingResult, compare_matching
from geo_pretrain.training.recipe import DataSpec, load_recipe
from tests.training.test_loop import run_here
from tests.zoo import CONTRACT_3D, role_weights, write_tiny, write_tiny_3d


@pytest.fixture
def calls(monkeypatch):
    """The measurements asked for, not made."""
    made = []

    def evaluate(extractor, source, pairs, **options):
        made.append((type(extractor), extractor.network, options | {"pairs": pairs}))
        return MatchingResult(0.5, 1.0, (0.5,), 1, 0.1)

    monkeypatch.setattr(matching, "evaluate_matching", evaluate)
    return made


def random_init(folder, seed):
    return load_extractor(folder, random_init=True, seed=seed).network


@pytest.fixture
def spec(recording):
    return DataSpec(source="seven_scenes", path=str(recording), size=(60, 80), overlap=(0.3, 1.0))


def test_images_are_matched_at_the_size_of_their_contract(tmp_path, spec, calls):
    folder = str(write_tiny(tmp_path / "net").folder)
    assert list(compare_matching(folder, spec, seed=3)) == [RANDOM, folder]
    for kind, network, options in calls:
        assert kind is ImageExtractor
        assert options["size"] == (64, 96)
        assert options["seed"] == 3
        assert options["threshold"] is None
        assert network(torch.zeros(1, 3, 64, 96)).shape == (1, 32, 32, 48)


def test_both_networks_get_the_same_pairs_of_all_held_out_ones(tmp_path, spec, calls, monkeypatch):
    folder, done, splits = str(write_tiny(tmp_path / "net").folder), [], []

    def opened(spec, *, split):
        splits.append(split)
        return open_source(spec, split=split)

    monkeypatch.setattr(matching, "open_source", opened)
    monkeypatch.setattr(matching, "open_on_disk", lambda spec, split: None)
    compare_matching(folder, spec, size=(48, 64), count=3, seed=3, progress=lambda *at: done.append(at))
    every = find_pairs(open_source(spec), replace(spec, size=(48, 64)), skips=SkippedFrames())
    assert len(every) > 4
    for _, _, options in calls:
        assert options["size"] == (48, 64)
        assert len(options["pairs"]) == 3
        assert (options["pairs"][0], options["pairs"][-1]) == (every[0], every[-1])
        options["progress"](2, 5)
    assert done == [(2, 10), (7, 10)]
    assert splits == ["val"]
    drawn, expected, other = (n.state_dict() for n in (calls[0][1], random_init(folder, 3), random_init(folder, 0)))
    assert all(torch.equal(value, expected[key]) for key, value in drawn.items())
    assert not torch.equal(drawn["encoder.conv1.weight"], other["encoder.conv1.weight"])


def test_clouds_are_matched_at_the_size_of_their_recipe(tmp_path, spec, calls, tiny_recipe):
    run_here(tiny_recipe("pointcontrast_nce", optim={"steps": 1}), tmp_path / "net")
    compare_matching(str(tmp_path / "net"), spec, turn="full", threshold=3.0)
    compare_matching(str(tmp_path / "net"), spec, size=(96, 128))
    assert [options["size"] for _, _, options in calls] == [(48, 64)] * 2 + [(96, 128)] * 2
    assert [options["turn"] for _, _, options in calls] == ["full"] * 2 + ["camera"] * 2
    assert calls[0][2]["threshold"] == 3.0
    assert {kind for kind, _, _ in calls} == {CloudExtractor}


def test_clouds_of_weights_without_a_recipe_of_ours_are_matched_at_the_size_of_the_data(tmp_path, spec, calls):
    compare_matching(str(write_tiny_3d(tmp_path / "net", recipe_yaml=None).folder), spec)
    assert calls[0][2]["size"] == (60, 80)
    # a name of the catalog has the recipe that its entry states, whoever trained the weights
    name = "pointcontrast_nce_srunet34"
    compare_matching(str(write_tiny_3d(tmp_path / "theirs", name=name, recipe_yaml=None).folder), spec)
    assert calls[2][2]["size"] == load_recipe(name).data.size == (480, 640)


def test_an_encoder_alone_matches_its_maps(tmp_path, spec, calls):
    arch = Arch("resnet", {"depth": 18, "width": 8})
    weights = {"encoder": role_weights("encoder")}
    folder = str(write_tiny(tmp_path / "net", arch=arch, weights=weights).folder)
    compare_matching(folder, spec)
    random, own = (call[1] for call in calls)
    assert not own.training
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # what the demo does by hand for ImageNet weights: all maps at strides 4 to 32
        assert own(image).shape == random(image).shape == (1, 8 + 16 + 32 + 64, 32, 48)
    assert torch.equal(own.encoder.state_dict()["conv1.weight"], weights["encoder"]["conv1.weight"])
    assert not torch.equal(random.encoder.state_dict()["conv1.weight"], weights["encoder"]["conv1.weight"])


def test_what_cannot_be_measured_is_refused_before_the_data_are_opened(tmp_path):
    contract = type(CONTRACT_3D)((0.1, 1.0, 0.1), ("intensity",) * 3, coordinates="cylindrical")
    folder = str(write_tiny_3d(tmp_path / "net", contract=contract).folder)
    with pytest.raises(CheckpointError, match="RGB-D frames give"):
        compare_matching(folder, DataSpec())  # rooms: not rendered


@pytest.mark.parametrize("write", [write_tiny, write_tiny_3d])
def test_random_init_has_the_shapes_but_not_the_weights(tmp_path, write):
    folder = write(tmp_path / "net").folder
    trained = load_backbone(folder, decoder=write is write_tiny).state_dict()
    twins = [random_init(folder, seed).state_dict() for seed in (0, 0, 1)]
    weights = [key for key in trained if key.endswith((".kernel", "conv1.weight"))]
    assert len(weights) > 5
    for key in weights:
        assert trained[key].shape == twins[0][key].shape
        assert not torch.equal(trained[key], twins[0][key])
        assert torch.equal(twins[0][key], twins[1][key])
        assert not torch.equal(twins[0][key], twins[2][key])
