"""Recipes of S3DIS and ScanNet: the released scripts' numbers typed anew, and runs from made data to a result."""

from __future__ import annotations

import json

import numpy as np
import pytest

from geo_pretrain.training.finetune.registry import load_checked_finetune_recipe
from tests.front_door import geo_pretrain
from tests.indoor_layouts import write_s3dis, write_scannet_release

pytestmark = pytest.mark.filterwarnings("ignore:S3DIS is not complete")

ALL = {"optimizer": "sgd", "momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-4, "backbone_bn_momentum": 0.02,
       "schedule": "poly", "power": 0.9}  # fmt: skip
OPTIM = {
    "s3dis_srunet34": {"lr": 0.1, "batch": 48, "steps": 60_000},
    "scannet3d_srunet34": {"lr": 0.8, "batch": 48, "steps": 60_000},
    "scannet3d_scenes_srunet34": {"lr": 0.8, "batch": 6, "steps": 5_000},
    "scannet3d_points_srunet34": {"lr": 0.1, "batch": 48, "steps": 10_000},
}
SHARED = {"scale": (0.9, 1.1), "dropout": 0.2, "dropout_prob": 0.2, "flip_axes": "xy", "flip_prob": 0.95,
          "contrast_prob": 0.2, "color_translation_prob": 0.95, "color_jitter_prob": 0.95, "shift": 100,
          "center": "origin", "mirror": (0, 0, 0), "elastic_prob": 0.95}  # fmt: skip
S3DIS = {"elastic": (), "rotate": (180 / 32, 180 / 32, 180), "color_translation": 0.05, "color_jitter": 0.005}
SCANNET = {"elastic": ((0.2, 0.4), (0.8, 1.6)), "rotate": (180 / 64, 180 / 64, 180), "crop": None,
           "color_translation": 0.10, "color_jitter": 0.05}  # fmt: skip
TINY = ["network.unet3d={variant: 18A, width: 8, voxel_size: 0.1}", "data.cloud.voxel_size=0.1", "optim.steps=5",
        "optim.batch=2", "optim.lr=0.05", "evaluate.every_steps=5", "workers=0"]  # fmt: skip


def numbers(section, wanted):
    return {key: getattr(section, key) for key in wanted}


@pytest.mark.parametrize("name", OPTIM)
def test_recipes_have_the_numbers_of_the_released_scripts(name):
    recipe = load_checked_finetune_recipe(name)
    cloud, augment = recipe.data.cloud, recipe.data.cloud.augment
    s3dis = name.startswith("s3dis")
    assert numbers(recipe.optim, ALL | OPTIM[name]) == ALL | OPTIM[name]
    assert numbers(augment, SHARED) == SHARED
    wanted = S3DIS if s3dis else SCANNET
    assert numbers(augment, wanted) == wanted
    assert (cloud.voxel_size, cloud.features, cloud.labels) == (0.05 if s3dis else 0.02, "rgb", "agree")
    if s3dis:
        crop = augment.crop
        assert (crop.half, crop.minimum, crop.shift, crop.center) == (4, 4, (0.2, 0.2, 0.05), "box")
    assert cloud.labelled_points == (20 if "points" in name else None)
    assert recipe.data.fraction == (0.2 if "scenes" in name else 1)
    assert (recipe.network.unet3d.variant, recipe.evaluate.level) == ("34C", "voxels")


def finetune(recipe, data, out, *overrides):
    settings = [part for text in (*TINY, *overrides) for part in ("--set", text)]
    geo_pretrain(
        "finetune", recipe, "--data", data, "--backbone", "scratch", "--out", out, "--device", "cpu", *settings
    )
    return json.loads((out / "results.json").read_text())


def test_s3dis_is_trained_measured_and_drawn_without_a_broken_room(tmp_path):
    write_s3dis(tmp_path / "raw")
    geo_pretrain("data", "convert", "s3dis", tmp_path / "raw", tmp_path / "rooms")
    broken = tmp_path / "rooms" / "Area_6" / "office_1.ply"
    broken.write_bytes(broken.read_bytes()[:-7])
    result = finetune("s3dis_srunet34", f"s3dis:{tmp_path / 'rooms'}", tmp_path / "out")
    assert (result["steps"], result["data"]["train_images"], result["data"]["val_images"]) == (5, 5, 1)
    assert [skipped["path"] for skipped in result["data"]["skipped"]] == [str(broken)]
    assert {"miou", "macc", "voxel_miou", "point_miou"} <= set(result["last"]["scores"])
    assert np.shape(result["last"]["details"]["confusion"]) == (14, 14)
    assert len((tmp_path / "out" / "predictions.png").read_bytes()) > 10_000


def test_scannet_is_trained_with_few_points_of_few_scans_by_lists(tmp_path):
    write_scannet_release(tmp_path / "data")
    (tmp_path / "scenes.txt").write_text("scene0000_00\nscene0002_00\n")
    (tmp_path / "points.json").write_text(json.dumps({f"scene000{k}_00": list(range(0, 300, 2)) for k in (0, 2)}))
    result = finetune(
        "scannet3d_points_srunet34",
        f"scannet3d:{tmp_path / 'data'}",
        tmp_path / "out",
        f"data.scenes={tmp_path / 'scenes.txt'}",
        f"data.cloud.labelled_points={tmp_path / 'points.json'}",
        "evaluate.level=points",
    )
    assert (result["data"]["train_images"], result["data"]["val_images"]) == (2, 1)
    assert result["data"]["skipped"] == []
    last = result["last"]["scores"]
    assert last["miou"] == last["point_miou"]
    assert (tmp_path / "out" / "predictions.png").is_file()
