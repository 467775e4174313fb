"""Trivial correspondences: the loss of a batch against a loop, its options, exact resume, the folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from geo_pretrain.errors import RecipeError
from geo_pretrain.loading import load_backbone, verify
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.losses.depth import depth_loss
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.tasks import build_task
from geo_pretrain.training.tasks.matching import sample_matches
from tests.training.losses.test_contrastive import slow_info_nce
from tests.training.test_loop import Stop, assert_same_weights, logged, run_here, stop_at

NAME = {"name": "trivial_correspondence_r18.tiny", "task": {"name": "trivial_correspondence", "matches": 32}}
DEPTH = {**NAME, "task": {**NAME["task"], "depth_proxy": True}}


@pytest.fixture
def task_and_batch(tiny_recipe):
    def make(*overrides):
        recipe = load_recipe(str(tiny_recipe(**DEPTH)), overrides)
        source = open_source(recipe.data)
        task = build_task(recipe)
        samples = task.dataset(source, find_pairs(source, recipe.data, skips=SkippedFrames()))
        return task, samples.collate([samples[(0, k)] for k in range(3)])

    return make


@pytest.mark.parametrize("dedup", [False, True])
def test_losses_of_a_batch_equal_the_loop(task_and_batch, dedup):
    task, batch = task_and_batch(f"task.dedup={str(dedup).lower()}")
    with torch.no_grad():
        losses = task(batch)
        features = [task.backbone(batch[f"image{k}"]) for k in (1, 2)]
    total = 0.0
    for b, seed in enumerate(batch["seed"]):
        pixels = sample_matches(torch.arange(48 * 64)[None], [seed], 32)[0][0].tolist()
        cells = [(p // 64 // 2, p % 64 // 2) for p in pixels]
        rows = [np.stack([f[b, :, i, j].double().numpy() for i, j in cells]) for f in features]
        same = np.array([[dedup and one == other for other in cells] for one in cells])
        total += slow_info_nce(rows[0], rows[1], 0.4, True, same)
    assert losses["trivial"].item() == pytest.approx(total / 3, rel=1e-5)
    with torch.no_grad():
        depth = [
            depth_loss(
                F.interpolate(task.headnet(f), size=(48, 64), mode="bilinear", align_corners=True), batch["depth"]
            )
            for f in features
        ]
    assert losses["depth"].item() == pytest.approx(float(sum(depth)) / 2, rel=1e-5)


def test_options_reach_the_loss_and_the_samples(task_and_batch):
    base, batch = task_and_batch()
    with torch.no_grad():
        reference = base(batch)["trivial"].item()
        for option in ("temperature=0.1", "symmetric=false", "matches=31"):
            task, _ = task_and_batch(f"task.{option}")
            assert task(batch)["trivial"].item() != pytest.approx(reference, rel=1e-7), option
    blurred = ["data.augment.blur_prob=1.0", "data.augment.blur_radius=[1.0, 1.0]"]
    taps, pillow = (task_and_batch(f"task.blur_taps={taps}", *blurred)[1] for taps in (25, "null"))
    assert not torch.equal(taps["image1"], pillow["image1"])
    assert (taps["image1"] - pillow["image1"]).abs().mean() < 0.1
    plain, batch = task_and_batch("task.depth_proxy=false")
    assert set(plain(batch)) == {"trivial"}
    assert set(plain.export().weights) == {"encoder", "decoder"}


def test_bf16_changes_the_network_and_not_the_precision_of_the_losses(task_and_batch):
    (task, batch), (low, _) = task_and_batch(), task_and_batch("precision=bf16")
    with torch.no_grad():
        full, half = task(batch), low(batch)
        assert low.features(batch["image1"]).dtype == torch.float32
    for name in ("trivial", "depth"):
        assert half[name].dtype == torch.float32
        assert half[name] != full[name]
        assert half[name].item() == pytest.approx(full[name].item(), rel=0.05)


def test_start_depends_on_the_seed_and_on_the_recipe_s_weights(tiny_recipe, tmp_path):
    path = str(tiny_recipe(**DEPTH))

    def built(*overrides):
        return build_task(load_recipe(path, overrides))

    one, again, other = built(), built(), built("seed=9")
    assert torch.equal(one.headnet.weight, again.headnet.weight)
    assert not torch.equal(one.headnet.weight, other.headnet.weight)
    assert (one.dataset(None, []).seed, other.dataset(None, []).seed) == (0, 9)
    run_here(path, tmp_path / "start", ["optim.steps=1"])
    started, start = built(f"model.init={tmp_path / 'start'}"), load_backbone(tmp_path / "start", decoder=True)
    assert torch.equal(started.backbone.encoder.conv1.weight, start.encoder.conv1.weight)


def test_what_is_exported_is_what_was_trained(task_and_batch):
    task, _ = task_and_batch()
    weights = task.export().weights
    for role, module in (("encoder", task.backbone.encoder), ("decoder", task.backbone.decoder)):
        want = module.state_dict()
        assert weights[role].keys() == want.keys()
        assert all(torch.equal(weights[role][key], value) for key, value in want.items())
    assert weights["heads"].keys() == {"headnet.weight", "headnet.bias"}  # as in Pri3D's module
    assert torch.equal(weights["heads"]["headnet.weight"], task.headnet.weight)


def test_resumed_run_is_the_same_and_its_folder_opens(tmp_path, tiny_recipe):
    path = tiny_recipe(**DEPTH, optim={"steps": 5, "accumulate": 2}, save_every=2)
    run_here(path, tmp_path / "whole")
    with pytest.raises(Stop):
        run_here(path, tmp_path / "broken", on_step=stop_at(3))
    run_here(path, tmp_path / "broken")
    assert_same_weights(tmp_path / "whole", tmp_path / "broken")
    assert logged(tmp_path / "whole") == logged(tmp_path / "broken")
    assert verify(tmp_path / "whole").passed
    assert load_backbone(tmp_path / "whole", decoder=True).load_report.coverage == 1


def test_loss_falls(tmp_path, tiny_recipe):
    run_here(tiny_recipe(**NAME, optim={"steps": 24}), tmp_path / "out")
    lines = [line["trivial"] for line in logged(tmp_path / "out")]
    assert sum(lines[-6:]) < 0.9 * sum(lines[:6])


@pytest.mark.parametrize(
    "override, part",
    [
        ("task.temperature=0", "'task.temperature' is 0.0"),
        ("task.matches=0", "'task.matches' is 0"),
        ("task.blur_taps=24", "'task.blur_taps' is 24, accepted is an odd number"),
    ],
)
def test_wrong_settings_are_named(tiny_recipe, override, part):
    with pytest.raises(RecipeError, match=part):
        build_task(load_recipe(str(tiny_recipe(**NAME)), [override]))


def test_recipe_is_pri3ds_but_for_the_second_look(tiny_recipe):
    """methods.md 3.7: the branch "simclr" of the released samples; network, loss and schedule are Pri3D's."""
    recipe, view = load_recipe("trivial_correspondence_r50"), load_recipe("pri3d_view_r50")
    assert (recipe.optim, recipe.model) == (view.optim, view.model)
    assert (recipe.data.size, recipe.data.overlap) == (view.data.size, view.data.overlap)
    augment = recipe.data.augment
    assert (augment.jitter, augment.jitter_prob, augment.grayscale_prob) == ((0.8, 0.8, 0.8, 0.2), 0.8, 0.2)
    assert (augment.blur_prob, augment.blur_radius, recipe.task["blur_taps"]) == (1.0, (0.1, 2.0), 25)
    assert (recipe.task["temperature"], recipe.task["matches"]) == (0.4, 1024)
    proxy = load_recipe("depth_prediction_r50")
    assert (proxy.optim, proxy.model, proxy.data) == (view.optim, view.model, view.data)
    assert proxy.task == {"name": "depth_prediction"}
