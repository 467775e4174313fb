"""Recipes of S3DIS and ScanNet: the released scripts' numbers typed anew, and runs from made data to a result."""

from __future__ import annotations

import json

import numpy as np
import pytest

from geo_pretrain.training.finetune.registry import load_checked_finetune_recipe
from tests.front_door import geo_pretrain
from tests.indoor_layouts import write_s3dis, write_scannet_release
from tests.training.evaluation.test_scannet_benchmark import VALID

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
    assert recipe.evaluate.every_steps == (500 if name == "scannet3d_srunet34" else 200)


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
    data = "--data", f"scannet3d:{tmp_path / 'data'}", "--split", "test", "--benchmark", "scannet"
    geo_pretrain("predict", tmp_path / "out", *data, "--draw", 0, "-o", tmp_path / "found")
    ids = np.loadtxt(tmp_path / "found" / "benchmark" / "scene0004_00.txt", dtype=np.int64)
    labels = np.load(tmp_path / "found" / "scene0004_00.labels.npy")
    assert ids.tolist() == [VALID[label - 1] for label in labels]


def test_six_folds_are_measured_as_one(tmp_path):
    """Two of the areas, by networks of one step: their confusion matrices are added, whatever the mean of scores is."""
    write_s3dis(tmp_path / "raw")
    folders = [tmp_path / f"area{area}" for area in (1, 2)]
    matrices = []
    for area, folder in zip((1, 2), folders, strict=True):
        options = "optim.steps=1", "evaluate.every_steps=1", f"data.options.area={area}"
        result = finetune("s3dis_srunet34", f"s3dis:{tmp_path / 'raw'}", folder, *options)
        matrices.append(np.array(result["last"]["details"]["confusion"]))
    ended = geo_pretrain("eval", "folds", *folders, "--json")
    found = json.loads(ended.output)
    total = np.zeros((14, 14), int)
    for matrix in matrices:
        total += matrix
    ious, recalls = {}, []
    for row, name in enumerate(result["data"]["classes"], 1):
        truth, guess, both = total[row].sum(), total[:, row].sum(), total[row, row]
        if truth:
            ious[name] = both / (truth + guess - both)
            recalls.append(both / truth)
    assert found["pooled"]["miou"] == pytest.approx(np.mean(list(ious.values())))
    assert found["pooled"]["macc"] == pytest.approx(np.mean(recalls))
    assert {name: value for name, value in found["iou"].items() if name in ious} == pytest.approx(ious)
    assert [fold["folder"] for fold in found["folds"]] == [str(folder) for folder in folders]
    assert found["level"] == "voxels"
    table = geo_pretrain("eval", "folds", *folders).output
    assert f"pooled {found['pooled']['miou']:.1%}" in " ".join(table.split())
    assert "measured on the same data" in geo_pretrain("eval", "folds", folders[0], folders[0], expected=1).errors
    again = "optim.steps=1", "evaluate.every_steps=1", "data.options={area: 1, stairs: clutter}"
    finetune("s3dis_srunet34", f"s3dis:{tmp_path / 'raw'}", tmp_path / "again", *again)
    assert "measured on the same data" in geo_pretrain(
        "eval", "folds", folders[0], tmp_path / "again", expected=1
    ).errors.replace("\n", " ")
    recipe = folders[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.05", "lr: 0.04"))
    assert "no folds of one experiment: optim.lr: 0.05 -> 0.04" in geo_pretrain(
        "eval", "folds", *folders, expected=1
    ).errors.replace("\n", " ")
