"""The Pri3D task: sampling, half resolution, the loss of a batch against a loop over pairs, and its options."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from geo_pretrain.errors import RecipeError, UnknownName
from geo_pretrain.geometry import match_pixels
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.samples.pairs import PairSamples
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.losses.depth import depth_loss
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.tasks import TASKS, build_task
from geo_pretrain.training.tasks.images import ImageUNetTask
from geo_pretrain.training.tasks.matching import half_resolution_cell, sample_matches
from tests.training.losses.test_contrastive import slow_info_nce

DATA = Path(__file__).parents[2] / "data"


def test_sampling_without_replacement_is_uniform_over_the_matches():
    target = torch.full((1, 40), -1)
    matched = torch.arange(0, 40, 2)
    target[0, matched] = 100 + matched
    counts = torch.zeros(40)
    for seed in range(600):
        pixel1, pixel2, found = sample_matches(target, [seed], 5)
        assert len(set(pixel1[0].tolist())) == 5
        assert torch.equal(pixel2, pixel1 + 100)
        assert found.item()
        counts[pixel1[0]] += 1
    assert counts[1::2].sum() == 0
    assert (counts[matched] - 150).abs().max() < 5 * 150**0.5


def test_fewer_matches_than_asked_are_drawn_with_replacement():
    target = torch.full((1, 40), -1)
    target[0, [3, 7, 9]] = torch.tensor([5, 6, 7])
    seen = torch.cat([sample_matches(target, [seed], 10)[0][0] for seed in range(50)])
    assert set(seen.tolist()) == {3, 7, 9}
    assert (seen == 3).float().mean() == pytest.approx(1 / 3, abs=0.1)


def test_draw_of_a_pair_does_not_depend_on_its_batch():
    target = torch.where(torch.rand(3, 60) < 0.5, torch.arange(60).expand(3, -1), -1)
    target[1] = -1
    together = sample_matches(target, [7, 8, 9], 20)
    assert together[2].tolist() == [True, False, True]
    assert (together[0][1] == 0).all()
    for k, seed in enumerate([7, 8, 9]):
        alone = sample_matches(target[k : k + 1], [seed], 20)
        assert torch.equal(alone[0][0], together[0][k])


def test_half_resolution_cell_is_the_released_rounding():
    height, width = 12, 16
    pixel = torch.arange(height * width)
    want = torch.round((pixel // width - 0.5) / 2) * (width // 2) + torch.round((pixel % width - 0.5) / 2)
    got = half_resolution_cell(pixel, width, torch.Size((1, 1, height // 2, width // 2)))
    assert torch.equal(got, want.long())


@pytest.fixture
def task_and_batch(tiny_recipe):
    def make(*overrides):
        recipe = load_recipe(str(tiny_recipe()), overrides)
        source = open_source(recipe.data)
        pairs = find_pairs(source, recipe.data, skips=SkippedFrames())
        task = build_task(recipe)
        samples = PairSamples(source, pairs, recipe.data, 0, task.contract)
        return task, samples.collate([samples[(0, k)] for k in range(3)])

    return make


def slow_losses(task, batch, dedup=False):
    """Pair by pair, match by match."""
    config, total = task.config, 0.0
    features = [task.backbone(batch[f"image{k}"]) for k in (1, 2)]
    target = match_pixels(*(batch[f"{n}{k}"] for n in ("depth", "intrinsics", "cam_to_world") for k in (1, 2)))
    for b in range(len(target)):
        if not (target[b] >= 0).any():
            continue
        pixel1, _, _ = sample_matches(target[b : b + 1], batch["seed"][b : b + 1], config.matches)
        rows, cells = ([], []), ([], [])
        for p in pixel1[0].tolist():
            for side, q in enumerate((p, target[b, p].item())):
                i, j = q // 64 // 2, q % 64 // 2
                rows[side].append(features[side][b, :, i, j].detach().double().numpy())
                cells[side].append((i, j))
        n = len(rows[0])
        same = np.array(
            [[cells[0][i] == cells[0][j] or cells[1][i] == cells[1][j] for j in range(n)] for i in range(n)]
        )
        total += slow_info_nce(
            np.stack(rows[0]), np.stack(rows[1]), config.temperature, True, same if dedup else np.zeros_like(same)
        )
    depth = [
        depth_loss(
            F.interpolate(task.headnet(f), size=(48, 64), mode="bilinear", align_corners=True), batch[f"depth{k}"]
        )
        for k, f in enumerate(features, 1)
    ]
    return total / len(target), float(sum(depth)) / 2


@pytest.mark.parametrize("dedup", [False, True])
def test_losses_of_a_batch_equal_the_loop(task_and_batch, dedup):
    task, batch = task_and_batch(f"task.dedup={str(dedup).lower()}")
    batch["depth1"][1] = 0  # a pair without a match
    with torch.no_grad():
        losses = task(batch)
        view, depth = slow_losses(task, batch, dedup)
    assert losses["view"].item() == pytest.approx(view, rel=1e-5)
    assert losses["depth"].item() == pytest.approx(depth, rel=1e-5)


def test_batch_without_any_match_trains_on(task_and_batch):
    task, batch = task_and_batch()
    batch["depth1"][:] = 0
    losses = task(batch)
    sum(losses.values()).backward()
    assert losses["view"].item() == 0
    assert all(torch.isfinite(p.grad).all() for p in task.parameters() if p.grad is not None)


def test_options_reach_the_matcher_and_the_loss(task_and_batch):
    base, batch = task_and_batch()
    with torch.no_grad():
        reference = base(batch)["view"].item()
        for option in (
            "temperature=0.1",
            "tolerance=0.001",
            "distance=euclidean",
            "rounding=nearest",
            "symmetric=false",
        ):
            task, _ = task_and_batch(f"task.{option}")
            assert task(batch)["view"].item() != pytest.approx(reference, rel=1e-7), option
    bare, _ = task_and_batch("task.depth_proxy=false")
    assert set(bare(batch)) == {"view"}
    assert "heads" not in bare.export().weights


def test_joint_views_are_one_batch(task_and_batch):
    """Either way to the bit: BatchNorm sees one view after the other, or both."""
    task, batch = task_and_batch()
    joint, _ = task_and_batch("task.joint=true")
    images = [batch["image1"], batch["image2"]]
    reference = copy.deepcopy(task.backbone)
    apart = [reference(view) for view in images]
    assert all(map(torch.equal, task.features_of(*images), apart))
    assert_equal_buffers(task.backbone, reference)
    reference = copy.deepcopy(joint.backbone)
    together = reference(torch.cat(images)).chunk(2)
    assert all(map(torch.equal, joint.features_of(*images), together))
    assert_equal_buffers(joint.backbone, reference)
    assert not torch.equal(together[0], apart[0])
    assert torch.equal(joint.features(images[0]), joint.backbone(images[0]))
    joint.eval()
    task.eval()
    torch.testing.assert_close(joint(batch), task(batch), rtol=0.01, atol=0)  # buffers took other steps


def assert_equal_buffers(first, second):
    for name, value in first.named_buffers():
        assert torch.equal(value, second.get_buffer(name)), name


def test_every_task_on_views_has_the_choice():
    tasks = [kind for kind in (resolve_name(row) for row, _ in TASKS.values()) if issubclass(kind, ImageUNetTask)]
    assert len({*tasks}) >= 3
    for kind in tasks:
        assert kind.config_type.__dataclass_fields__["joint"].default is False


def test_bf16_changes_the_network_and_not_the_precision_of_the_loss(task_and_batch):
    task, batch = task_and_batch()
    low, _ = task_and_batch("precision=bf16")
    with torch.no_grad():
        full, half = task(batch), low(batch)
    assert half["view"].dtype == torch.float32
    assert half["view"] != full["view"]
    assert half["view"].item() == pytest.approx(full["view"].item(), rel=0.02)


@pytest.mark.parametrize(
    "name, absent",
    [
        ("pri3d_view_r18", ("backbone3d.", "w2d.", "w3d.")),
        ("pri3d_view_r18.nodepth", ("backbone3d.", "w2d.", "w3d.", "headnet.")),
        ("pri3d_geo_r18", ()),
        ("pri3d_view_geo_r18", ()),
    ],
)
def test_state_keys_and_shapes_are_those_of_the_released_module(name, absent):
    """The released module without what the task does not train, and without its constant Sobel kernel."""
    keys = json.loads((DATA / "pri3d_full_model_r18.json").read_text())["keys"]
    with torch.device("meta"):
        task = build_task(load_recipe(name, ["model.init=scratch"]))
    own = {key: list(value.shape) for key, value in task.state_dict().items()}
    assert own == {key: shape for key, shape in keys.items() if not key.startswith(("headloss.", *absent))}


def test_start_depends_on_the_seed_alone(tiny_recipe):
    def first(seed, noise):
        torch.manual_seed(noise)
        task = build_task(load_recipe(str(tiny_recipe()), [f"seed={seed}"]))
        return task.backbone.encoder.conv1.weight

    assert torch.equal(first(0, 1), first(0, 2))
    assert not torch.equal(first(0, 1), first(1, 1))


def test_wrong_settings_are_named(tiny_recipe):
    for override, error, part in (
        ("task.temprature=1", RecipeError, "'task.temperature'"),
        ("task.temperature=0", RecipeError, "a number above 0"),
        ("task.distance=cosine", RecipeError, "depth, euclidean"),
        ("task.geo_tolerance=-1", RecipeError, "'task.geo_tolerance' is -1.0, accepted is a number above 0"),
        ("task.name=pri3d", UnknownName, "'pri3d_view'"),
        ("task.geo=true", RecipeError, "'task.geo' is not free; the task's name, 'pri3d_view', sets it"),
        ("task.name=pri3d_geo", RecipeError, "key 'unet3d' is missing; task 'pri3d_geo' trains it"),
        ("model=null", RecipeError, "key 'model' is missing; task 'pri3d_view' trains it"),
        ("task={name: depth_prediction, depth_proxy: false}", RecipeError, "nothing else would be learned"),
    ):
        with pytest.raises(error, match=part):
            build_task(load_recipe(str(tiny_recipe()), [override]))
