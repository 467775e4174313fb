"""Pixel-level SimCLR: losses and a batch against loops, exact resume, and what a run leaves behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from geo_pretrain.errors import RecipeError
from geo_pretrain.loading import load_backbone, verify
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.losses import fused
from geo_pretrain.training.losses.contrastive import anchor_nce, nt_xent
from geo_pretrain.training.recipe import list_recipes, load_recipe
from geo_pretrain.training.tasks import build_task
from tests.training.test_loop import Stop, logged, run_here, stop_at

TINY = {
    "name": "img2pc_stage1_r18.tiny",
    "task": {"name": "pixel_simclr", "matches": 48},
    "data": {"units": "frames", "overlap": None},
    "optim": {"kind": "adam", "lr": 0.003, "dampening": 0.0, "bn_momentum": "constant", "steps": 40},
}


def tiny(write, **changes):
    """The path of a recipe that trains this task in seconds; `write` is the fixture `tiny_recipe`."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for key, value in changes.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    return write(**tree)


def unit_rows(*shape, seed=0):
    rows = np.random.default_rng(seed).normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def slow_nce(anchors, positives, temperature, negatives):
    """Anchor by anchor and negative by negative."""
    total = 0.0
    for i in range(len(anchors)):
        own = np.exp(anchors[i] @ positives[i] / temperature)
        rest = 0.0
        for j in range(len(anchors)):
            if j != i and negatives in ("positives", "both"):
                rest += np.exp(anchors[i] @ positives[j] / temperature)
            if j != i and negatives in ("anchors", "both"):
                rest += np.exp(anchors[i] @ anchors[j] / temperature)
        total -= np.log(own / (own + rest))
    return total / len(anchors)


def slow_nt_xent(view1, view2, temperature):
    """Equation 1 of SimCLR: the 2N rows in one list, pairs (k, k + N), both orders."""
    rows, n = np.concatenate([view1, view2]), len(view1)
    total = 0.0
    for i in range(2 * n):
        scores = [rows[i] @ rows[k] / temperature for k in range(2 * n) if k != i]
        total -= rows[i] @ rows[(i + n) % (2 * n)] / temperature - np.log(np.exp(scores).sum())
    return total / (2 * n)


@pytest.mark.parametrize("negatives", ["positives", "anchors", "both"])
@pytest.mark.parametrize("block", [1, 33, 1 << 20])  # scores: one anchor, three, and all at a time
def test_every_reading_of_the_negatives_equals_the_loop(negatives, block, monkeypatch):
    monkeypatch.setitem(fused.BLOCK, "cpu", block)
    anchors, positives = unit_rows(2, 11, 5)
    tensors = [torch.from_numpy(rows).requires_grad_() for rows in (anchors, positives)]
    loss = anchor_nce(*tensors, temperature=0.2, negatives=negatives)
    assert loss.item() == pytest.approx(slow_nce(anchors, positives, 0.2, negatives), rel=1e-12)
    assert torch.autograd.gradcheck(lambda a, p: anchor_nce(a, p, temperature=0.2, negatives=negatives), tensors)


def test_negatives_of_the_other_side_are_algorithm_1_of_ppkt():
    golden = load_file(Path(__file__).parents[2] / "data" / "losses.safetensors")
    query, key = (golden[name].clone().requires_grad_() for name in "qk")
    unit = [torch.nn.functional.normalize(rows, dim=1) for rows in (query, key)]
    loss = anchor_nce(*unit, temperature=0.04)
    loss.backward()
    for got, name in ((loss.detach()[None], "loss_mean"), (query.grad, "grad_mean_z3d"), (key.grad, "grad_mean_z2d")):
        want = golden[f"ppnce.{name}"]
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_nt_xent_is_simclrs_equation():
    view1, view2 = unit_rows(2, 9, 4)
    both = torch.from_numpy(view1), torch.from_numpy(view2)
    assert nt_xent(*both, temperature=0.1).item() == pytest.approx(slow_nt_xent(view1, view2, 0.1), rel=1e-12)
    other = (slow_nce(view1, view2, 0.1, "positives") + slow_nce(view2, view1, 0.1, "positives")) / 2
    assert nt_xent(*both, temperature=0.1, negatives="other").item() == pytest.approx(other, rel=1e-12)


def test_losses_of_one_row_alone_are_zero():
    row = torch.nn.functional.normalize(torch.randn(1, 4), dim=1).requires_grad_()
    for negatives in ("positives", "anchors", "both"):
        loss = anchor_nce(row, row * 1.0, temperature=0.1, negatives=negatives)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert torch.isfinite(row.grad).all()


@pytest.fixture
def task_and_batch(tiny_recipe):
    def make(*overrides):
        recipe = load_recipe(str(tiny(tiny_recipe)), overrides)
        source = open_source(recipe.data)
        pairs = find_pairs(source, recipe.data, skips=SkippedFrames())
        task = build_task(recipe)
        samples = task.dataset(source, pairs)
        return task, samples.collate([samples[(0, k)] for k in range(3)])

    return make


def slow_pixels(task, batch):
    """Features of the matched pixels of each image, looked up one by one: a list of (view 1, view 2), float64."""
    maps = task.backbone(torch.cat([batch["image1"], batch["image2"]])).detach().double().numpy()
    height, width = maps.shape[-2:]
    found, start = [], 0
    for image, count in enumerate(batch["matches_per_image"]):
        rows = []
        for match in batch["matches"][start : start + count].tolist():
            views = []
            for view, pixel in enumerate(match):
                number, rest = divmod(pixel, height * width)
                assert number == image
                feature = maps[image + 3 * view, :, rest // width, rest % width]
                views.append(feature / np.linalg.norm(feature))
            rows.append(views)
        found.append(np.array(rows).reshape(count, 2, -1).transpose(1, 0, 2))
        start += count
    return found


def test_loss_contrasts_the_matched_pixels_of_all_images(task_and_batch):
    task, batch = task_and_batch()
    with torch.no_grad():
        views = np.concatenate(slow_pixels(task, batch), axis=1)
        assert views.shape == (2, 144, 16)
        assert task(batch)["nce"].item() == pytest.approx(slow_nt_xent(*views, 0.1), rel=1e-5)


def test_negatives_of_the_own_image_and_of_the_other_view_are_options(task_and_batch):
    task, batch = task_and_batch("task.scope=image", "task.negatives=other", "task.temperature=0.5")
    first = batch["matches_per_image"][0]
    batch["matches"] = torch.cat([batch["matches"][:5], batch["matches"][first:]])
    batch["matches_per_image"][0] = 5  # images count by their matches
    total = 0.0
    with torch.no_grad():
        for view1, view2 in slow_pixels(task, batch):
            ways = (view1, view2), (view2, view1)
            total += len(view1) * sum(slow_nce(*way, 0.5, "positives") for way in ways) / 2
        assert task(batch)["nce"].item() == pytest.approx(total / (5 + 48 + 48), rel=1e-5)


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_images_without_a_common_pixel_add_nothing(task_and_batch, scope):
    task, batch = task_and_batch(f"task.scope={scope}")
    first = batch["matches_per_image"][0]
    batch["matches"], batch["matches_per_image"][0] = batch["matches"][first:], 0
    assert task(batch)["nce"].item() > 0
    batch["matches"], batch["matches_per_image"] = batch["matches"][:0], [0, 0, 0]
    loss = task(batch)["nce"]
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in task.parameters())


def test_bf16_changes_the_network_and_not_the_precision_of_the_loss(task_and_batch):
    task, batch = task_and_batch()
    low, _ = task_and_batch("precision=bf16")
    with torch.no_grad():
        full, half = task(batch)["nce"], low(batch)["nce"]
    assert half.dtype == torch.float32
    assert half != full
    assert half.item() == pytest.approx(full.item(), rel=0.05)


def test_wrong_settings_are_named(tiny_recipe):
    path = str(tiny(tiny_recipe))
    for override, part in (
        ("task.temperature=0", "'task.temperature' is 0"),
        ("task.matches=0", "'task.matches' is 0"),
        ("task.channels=0", "'task.channels' is 0"),
        ("task.flip_prob=1.5", "'task.flip_prob' is 1.5"),
        ("task.scale=[0, 1]", r"'task.scale' is \[0.0, 1.0\]"),
        ("task.negatives=all", "both, other"),
        ("data.units=pairs", "'data.units' is 'pairs', accepted here is frames"),
        ("model=null", "key 'model' is missing"),
    ):
        with pytest.raises(RecipeError, match=part):
            build_task(load_recipe(path, [override]))


def test_settings_of_the_crop_reach_the_samples(task_and_batch):
    whole, batch = task_and_batch("task.scale=[1.0, 1.0]", "task.flip_prob=1.0")
    assert batch["rows1"].tolist() == [list(range(48))] * 3
    assert batch["columns2"].tolist() == [list(range(63, -1, -1))] * 3
    assert whole.dataset(None, []).views.flip_prob == 1
    other, _ = task_and_batch("seed=9", "task.matches=5")
    samples = other.dataset(None, [])
    assert (samples.seed, samples.matches) == (9, 5)


def test_start_depends_on_the_seed_and_on_the_recipe_s_weights(tiny_recipe, tmp_path):
    path = str(tiny(tiny_recipe))

    def first(*overrides):
        task = build_task(load_recipe(path, overrides))
        return task.backbone

    assert torch.equal(first().decoder.head.weight, first().decoder.head.weight)
    assert not torch.equal(first().decoder.head.weight, first("seed=1").decoder.head.weight)
    run_here(path, tmp_path / "start", ["optim.steps=1"])
    again, start = first(f"model.init={tmp_path / 'start'}"), load_backbone(tmp_path / "start", decoder=True)
    assert torch.equal(again.encoder.conv1.weight, start.encoder.conv1.weight)
    assert torch.equal(again.decoder.head.weight, start.decoder.head.weight)


def test_what_is_exported_is_what_was_trained(task_and_batch):
    task, _ = task_and_batch()
    weights = task.export().weights
    for role in ("encoder", "decoder"):
        want = getattr(task.backbone, role).state_dict()
        assert weights[role].keys() == want.keys()
        assert all(torch.equal(weights[role][key], value) for key, value in want.items())


def test_run_learns_and_its_folder_opens(tmp_path, tiny_recipe):
    checkpoint = run_here(tiny(tiny_recipe), tmp_path / "out")
    losses = [line["nce"] for line in logged(tmp_path / "out")]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert verify(tmp_path / "out").passed
    network = load_backbone(tmp_path / "out", decoder=True)
    assert network.load_report.coverage == 1
    assert (network.contract.mean, network.contract.std) == ((0.45,) * 3, (0.225,) * 3)
    assert (network.contract.size, network.contract.interpolation) == ((48, 64), "bilinear")
    assert network(torch.randn(1, 3, 48, 64)).shape == (1, 16, 48, 64)
    assert len(load_backbone(tmp_path / "out")(torch.randn(1, 3, 48, 64))) == 5  # the encoder alone
    assert checkpoint.arch.name == "resnet_depth_unet"
    assert {file.role for file in checkpoint.files.values()} >= {"encoder", "decoder", "golden", "recipe"}


def test_stopped_run_continues_bit_for_bit(tmp_path, tiny_recipe):
    path = tiny(tiny_recipe, optim={"steps": 5, "accumulate": 2}, save_every=2)
    run_here(path, tmp_path / "whole")
    with pytest.raises(Stop):
        run_here(path, tmp_path / "broken", on_step=stop_at(3))
    run_here(path, tmp_path / "broken")
    whole, broken = (load_backbone(tmp_path / name, decoder=True).state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert logged(tmp_path / "whole") == logged(tmp_path / "broken")


def test_recipes_are_the_entries():
    from geo_pretrain.catalog import find

    names = [name for name in list_recipes() if name.startswith("img2pc_stage1")]
    assert names == ["img2pc_stage1_r18", "img2pc_stage1_r18.rooms"]
    for name in names:
        recipe, entry = load_recipe(name, ["model.init=scratch"]), find(name)
        task = build_task(recipe)
        export = task.export()
        assert entry.recipe == name
        assert dict(entry.arch.args) == export.arch.args
        assert (entry.arch.name, entry.contract) == (export.arch.name, export.contract)
