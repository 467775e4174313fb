"""Recipes of streets and objects: the protocols' numbers typed anew, cosine by hand, Lovasz, and cylindrical voxels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.finetune.registry import backbone_init, build_finetune_task, load_checked_finetune_recipe
from geo_pretrain.training.finetune.segmentation3d import labelled_loss
from geo_pretrain.training.finetune_recipe import FinetuneOptim, load_finetune_recipe
from geo_pretrain.training.losses import lovasz_softmax

SGD = {"optimizer": "sgd", "momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-4, "backbone_bn_momentum": 0.02}
OPTIM = {
    "semantickitti_srunet34": {"lr": 0.1, "batch": 48, "steps": 15_000, "schedule": "poly", "head_factor": 1},
    "semantickitti_slidr_srunet34": {"lr": 0.05, "batch": 10, "epochs": 100, "schedule": "cosine", "head_factor": 40},
    "synthia4d_srunet34": {"lr": 0.1, "batch": 9, "steps": 120_000, "schedule": "poly", "power": 0.9},
}
CLOUD = {
    "semantickitti_srunet34": {"voxel_size": 0.05, "features": "gray", "labels": "agree", "limit": None},
    "semantickitti_slidr_srunet34": {
        "voxel_size": None, "cylindrical": (0.1, 1.0, 0.1), "features": "intensity", "labels": "first",
    },
    "synthia4d_srunet34": {"voxel_size": 0.15, "features": "rgb", "limit": 1_200_000, "bounds": 25},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIM)
def test_recipes_have_the_numbers_of_their_protocols(name):
    recipe = load_checked_finetune_recipe(name)
    assert {key: getattr(recipe.optim, key) for key in SGD | OPTIM[name]} == SGD | OPTIM[name]
    assert {key: getattr(recipe.data.cloud, key) for key in CLOUD[name]} == CLOUD[name]
    assert recipe.network.unet3d.variant == "34C"
    assert recipe.loss.lovasz == (1 if "slidr" in name else 0)
    assert recipe.evaluate.level == ("voxels" if name.startswith("synthia4d") else "points")


def test_cosine_by_hand():
    optim = FinetuneOptim(lr=0.05, schedule="cosine", warmup=2, warmup_factor=0.5)
    expected = {0: 0.025, 1: 0.0375 * (1 + math.cos(math.pi / 40)) / 2, 20: 0.025, 30: 0.025 * (1 - math.sqrt(0.5))}
    assert {step: optim.rate(step, 40) for step in expected} == pytest.approx(expected)


def scan(number):
    """Two rings of points with the remission of their class."""
    rng = np.random.default_rng(number)
    angle, labels = rng.uniform(-np.pi, np.pi, 200), rng.integers(0, 3, 200)
    radius = 5.0 + labels
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle), np.zeros(200)], 1).astype(np.float32)
    intensity = (0.2 + 0.3 * labels).astype(np.float32)
    return LabelledCloud(f"scan/{number}", points, None, labels.astype(np.int64), intensity=intensity)


def slidr(*overrides):
    small = "network.unet3d={variant: 18A, width: 8, voxel_size: 0.1}"
    recipe = load_finetune_recipe("semantickitti_slidr_srunet34", [small, *overrides])
    start = backbone_init(recipe, "scratch", {})
    return build_finetune_task(recipe, start, ("car", "road"), start.contract())


def test_slidr_voxels_are_cylindrical_with_one_channel_and_the_loss_has_two_parts():
    task = slidr()
    assert task.contract == VoxelContract((0.1, 1.0, 0.1), ("intensity",), offset=1.0, coordinates="cylindrical")
    assert task.module.in_chans == 1
    sample = task.sample(scan(0), torch.Generator().manual_seed(0))
    assert sample.coords[:, 2].max() <= 360
    assert set(sample.feats[:, 0].mul(10).round().int().tolist()) == {12, 15, 18}
    assert torch.equal(sample.labels, torch.from_numpy(scan(0).labels)[sample.index])  # of the retained point
    batch = task.collate([sample, task.sample(scan(1), torch.Generator().manual_seed(1))])
    losses = task.losses(batch)
    logits, labels = task.forward(batch["coords"], batch["feats"]), batch["labels"]
    assert set(losses) == {"segmentation", "lovasz"}
    assert losses["segmentation"].item() == pytest.approx(labelled_loss(logits[:, 1:], labels, first=1).item())
    known = labels > 0
    assert losses["lovasz"].item() == pytest.approx(lovasz_softmax(logits[known, 1:], labels[known] - 1).item())
    assert "lovasz" not in slidr("loss.lovasz=0").losses(batch)


def test_a_checkpoint_of_three_channels_takes_remission_by_choice(tmp_path):
    from tests.zoo import write_tiny_3d

    folder = str(write_tiny_3d(tmp_path / "tiny_net_srunet34").folder)
    recipe = load_finetune_recipe("semantickitti_slidr_srunet34")
    start = backbone_init(recipe, folder, {})
    with pytest.raises(RecipeError, match=r"1 channels.*takes 3.*gray"):
        build_finetune_task(recipe, start, ("car", "road"), start.contract())
    gray = load_finetune_recipe("semantickitti_slidr_srunet34", ["data.cloud.features=gray"])
    with pytest.warns(UserWarning, match="by data.cloud.features=gray.*--set data.cloud.features=contract keeps"):
        task = build_finetune_task(gray, start, ("car", "road"), start.contract())
    sample = task.evaluation_sample(scan(0))
    assert torch.equal(sample.feats[:, 0], sample.feats[:, 2])
    assert sample.feats.max().item() == pytest.approx(0.8 - 0.5)


@pytest.mark.parametrize(
    "override, part",
    [
        ("data.cloud.voxel_size=0.1", "data.cloud.voxel_size / data.cloud.cylindrical"),
        ("data.cloud.cylindrical=[0.1, 0, 0.1]", "degrees up to 180"),
        ("loss.lovasz=-1", "loss.lovasz"),
        ("optim.schedule=cosinus", "cosine"),
    ],
)
def test_wrong_settings_are_named(override, part):
    with pytest.raises(RecipeError, match=part):
        load_finetune_recipe("semantickitti_slidr_srunet34", [override])


def test_only_segmentation_of_clouds_has_a_lovasz_loss():
    with pytest.raises(RecipeError, match=r"loss\.lovasz"):
        load_finetune_recipe("scannet_unet_r50", ["loss.lovasz=1"])
