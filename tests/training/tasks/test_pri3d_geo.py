"""Pri3D's geometric prior: the loss of a batch against a loop over voxels, its options, what a run leaves behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geo_pretrain.checkpoint import read_weights
from geo_pretrain.loading import load_backbone, verify
from geo_pretrain.sparse import SparseTensor
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.samples.sampler import sample_seed
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.recipe import list_recipes, load_recipe
from geo_pretrain.training.tasks import build_task
from geo_pretrain.training.tasks.matching import sample_matches
from tests.training.losses.test_contrastive import slow_info_nce
from tests.training.tasks.test_moco import run_in_two_processes
from tests.training.test_loop import Stop, assert_same_weights, logged, run_here, stop_at, weights


@pytest.fixture
def task_and_batch(tiny_recipe):
    def make(*overrides, tiny="pri3d_geo"):
        recipe = load_recipe(str(tiny_recipe(tiny)), overrides)
        source = open_source(recipe.data)
        pairs = find_pairs(source, recipe.data, skips=SkippedFrames())
        task = build_task(recipe)
        samples = task.dataset(source, pairs)
        return task, samples.collate([samples[(0, k)] for k in range(3)])

    return make


def slow_seen(point, depth, intrinsics, cam_to_world, tolerance, exact):
    """The flat pixel that sees a world point, or -1."""
    x, y, z = (np.linalg.inv(cam_to_world) @ np.append(point, 1))[:3]
    if z == 0 or (z < 0 and not exact):
        return -1
    u, v = x / z * intrinsics[0, 0] + intrinsics[0, 2], y / z * intrinsics[1, 1] + intrinsics[1, 2]
    column, row = (int(u), int(v)) if exact else (int(np.floor(u)), int(np.floor(v)))
    if not (0 <= column < depth.shape[1] and 0 <= row < depth.shape[0]):
        return -1
    seen = depth[row, column]
    if abs(z - seen) >= tolerance or (seen == 0 and not exact):
        return -1
    return row * depth.shape[1] + column


def slow_geo_loss(task, batch, *, tolerance=0.05, exact=False):
    """Pair by pair, frame by frame, voxel by voxel."""
    total, count = 0.0, len(batch["seed"])
    for k in (1, 2):
        features2d = task.backbone(batch[f"image{k}"])
        voxels = task.backbone3d(SparseTensor(batch[f"coords{k}"], batch[f"feats{k}"])).feats
        width = batch[f"depth{k}"].shape[-1]
        for b in range(count):
            rows = (batch[f"coords{k}"][:, 0] == b).nonzero()[:, 0]
            depth, intrinsics, pose = (
                batch[f"{name}{k}"][b].double().numpy() for name in ("depth", "intrinsics", "cam_to_world")
            )
            points = (batch[f"coords{k}"][rows, 1:].double().numpy() + (0 if exact else 0.5)) * task.voxel_size
            target = torch.tensor([slow_seen(p, depth, intrinsics, pose, tolerance, exact) for p in points])
            if not (target >= 0).any():
                continue
            seed = sample_seed(batch["seed"][b], k, 0)
            voxel, pixel, _ = sample_matches(target[None], [seed], task.config.matches)
            q = [task.w2d(features2d[b, :, p // width // 2, p % width // 2]) for p in pixel[0].tolist()]
            k3 = [task.w3d(voxels[rows[v]]) for v in voxel[0].tolist()]
            rows2d, rows3d = (torch.stack(r).detach().double().numpy() for r in (q, k3))
            total += slow_info_nce(rows2d, rows3d, 0.4, True, np.zeros((len(q), len(q)), dtype=bool))
    return total / (2 * count)


@pytest.mark.parametrize("exact", [False, True])
def test_loss_of_a_batch_equals_the_loop_over_voxels(task_and_batch, exact):
    task, batch = task_and_batch(f"task.match_released_code={str(exact).lower()}", "task.matches=24")
    batch["depth1"][1] = 0  # in exact mode voxels near the camera plane still match
    with torch.no_grad():
        got = task(batch)
        want = slow_geo_loss(task, batch, tolerance=0.2 if exact else 0.05, exact=exact)
    assert set(got) == {"geo", "depth"}
    assert got["geo"].item() == pytest.approx(want, rel=1e-4)


def test_tolerance_and_seed_reach_the_loss(task_and_batch):
    task, batch = task_and_batch()
    with torch.no_grad():
        reference = task(batch)["geo"].item()
        for option in ("geo_tolerance=0.2", "temperature=0.1", "symmetric=false", "rounding=nearest", "matches=32"):
            other, _ = task_and_batch(f"task.{option}")
            assert other(batch)["geo"].item() != pytest.approx(reference, rel=1e-7), option
        batch["seed"] = [seed + 1 for seed in batch["seed"]]
        assert task(batch)["geo"].item() != reference


def without_voxels(batch, element):
    """The batch with the chunks of one element emptied."""
    for k in (1, 2):
        keep = batch[f"coords{k}"][:, 0] != element
        batch[f"coords{k}"], batch[f"feats{k}"] = batch[f"coords{k}"][keep], batch[f"feats{k}"][keep]
    return batch


@pytest.mark.parametrize("tiny", ["pri3d_geo", "pri3d_view_geo"])
def test_batch_without_any_match_reaches_every_parameter(task_and_batch, tiny):
    """Processes wait for each other's gradients, so none may be missing."""
    for empty in ("depth", "voxels"):
        task, batch = task_and_batch(tiny=tiny)
        if empty == "depth":
            batch["depth1"][:], batch["depth2"][:] = 0, 0
        else:
            for element in range(3):
                without_voxels(batch, element)
        losses = task(batch)
        assert losses["geo"].item() == 0
        sum(losses.values()).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in task.parameters())


def test_pair_without_a_chunk_is_left_out_and_still_counted(task_and_batch):
    task, batch = task_and_batch("task.matches=24")
    without_voxels(batch, 1)
    with torch.no_grad():
        compact = dict(batch)
        for k in (1, 2):  # the slow twin's network wants consecutive numbers, its loop the true ones
            coords = batch[f"coords{k}"].clone()
            coords[coords[:, 0] == 2, 0] = 1
            compact[f"coords{k}"] = coords
        for name in ("image", "depth", "intrinsics", "cam_to_world"):
            for k in (1, 2):
                compact[f"{name}{k}"] = batch[f"{name}{k}"][[0, 2]]
        compact["seed"] = [batch["seed"][0], batch["seed"][2]]
        task.eval()
        assert task(batch)["geo"].item() == pytest.approx(slow_geo_loss(task, compact) * 2 / 3, rel=1e-4)


def test_pair_that_the_view_loss_skips_has_no_geo_loss_in_exact_mode_only(task_and_batch):
    for exact in (False, True):
        task, batch = task_and_batch(f"task.match_released_code={str(exact).lower()}", tiny="pri3d_view_geo")
        task.eval()
        with torch.no_grad():
            batch["cam_to_world2"][:, :3, 3] += 100.0  # nothing of frame 1 is in frame 2
            losses = task(batch)
        assert losses["view"].item() == 0
        assert (losses["geo"].item() == 0) == exact


def test_run_learns_and_its_folder_opens(tmp_path, tiny_recipe):
    checkpoint = run_here(tiny_recipe("pri3d_view_geo", optim={"steps": 20}), tmp_path / "out")
    lines = logged(tmp_path / "out")
    for name in ("view", "geo", "depth"):
        assert sum(line[name] for line in lines[-5:]) < 0.9 * sum(line[name] for line in lines[:5]), name
    assert verify(tmp_path / "out").passed
    assert load_backbone(tmp_path / "out", decoder=True).load_report.coverage == 1
    heads = read_weights(checkpoint, "heads")
    assert {key.split(".")[0] for key in heads} == {"backbone3d", "w2d", "w3d", "headnet"}
    assert heads["backbone3d.conv0p1s1.kernel"].shape == (125, 3, 8)


def test_stopped_run_continues_bit_for_bit(tmp_path, tiny_recipe):
    path = tiny_recipe("pri3d_view_geo", optim={"steps": 3}, save_every=1)
    run_here(path, tmp_path / "whole")
    with pytest.raises(Stop):
        run_here(path, tmp_path / "broken", on_step=stop_at(2))
    run_here(path, tmp_path / "broken")
    assert_same_weights(tmp_path / "whole", tmp_path / "broken")
    assert logged(tmp_path / "whole") == logged(tmp_path / "broken")


def test_depth_prediction_is_the_depth_proxy_alone(task_and_batch):
    task, batch = task_and_batch(tiny="depth_prediction")
    assert set(task(batch)) == {"depth"}
    assert {key.split(".")[0] for key in task.state_dict()} == {"backbone", "headnet"}


def test_two_processes_equal_two_accumulation_steps(tmp_path, tiny_recipe):
    """So all parameters get a gradient in both, or the processes would wait for each other for ever."""
    path = tiny_recipe("pri3d_view_geo", optim={"steps": 2, "accumulate": 2, "lr": 0.001})
    run_here(path, tmp_path / "accumulated")
    path = tiny_recipe("pri3d_view_geo", optim={"steps": 2, "lr": 0.001})
    run_in_two_processes(load_recipe(str(path)), tmp_path)
    accumulated, two = (weights(tmp_path / name) for name in ("accumulated", "two"))
    for role in accumulated:
        for key, value in accumulated[role].items():
            if "running" not in key and "tracked" not in key:  # the BatchNorm statistics are those of one process
                torch.testing.assert_close(value, two[role][key], atol=2e-5, rtol=1e-4)


def test_every_geo_recipe_leaves_the_tolerance_to_the_matcher_that_is_asked_for():
    recipes = [name for name in list_recipes() if "_geo_" in name]
    assert len(recipes) > 5
    for name in recipes:
        released = load_recipe(name, ["task.match_released_code=true"])
        assert released.task.get("geo_tolerance") is None
