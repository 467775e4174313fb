"""Fine-tuning recipes: the published numbers typed anew, a closed schema, schedules by hand, the toy overlay."""

from __future__ import annotations

import math

import pytest
import yaml

from geo_pretrain.errors import RecipeError, UnknownName
from geo_pretrain.training.finetune_recipe import (
    KINDS,
    RECIPES,
    FinetuneOptim,
    changes,
    list_finetune_recipes,
    load_finetune_recipe,
)

UNET = {  # Pri3D's script; batch 64 is the paper's
    "network.kind": "unet",
    "network.transfer": "all",
    "network.output_stride": 32,
    "network.aux": 0,
    "network.freeze": 0,
    "optim.lr": 0.01,
    "optim.backbone_factor": 1,
    "optim.head_factor": 1,
    "optim.momentum": 0.9,
    "optim.dampening": 0.1,
    "optim.weight_decay": 0,
    "optim.batch": 64,
    "optim.epochs": 80,
    "optim.steps": None,
    "optim.schedule": "poly",
    "optim.power": 0.9,
    "optim.floor": 0,
    "optim.warmup": 0,
    "optim.clip_norm": None,
    "optim.bn_momentum": "pri3d",
    "optim.backbone_bn_momentum": None,
    "evaluate.every_epochs": 5,
    "evaluate.every_steps": None,
    "evaluate.batch": 1,
    "evaluate.images": None,
    "data.size": (240, 320),
    "data.fraction": 1,
    "data.augment.flip": 0,
    "data.augment.rotate": 0,
    "data.augment.blur": 0,
    "data.augment.crop": None,
    "precision": "fp32",
}
OUTDOORS = {"data.augment.rotate": 10, "data.augment.flip": 0.5}
HOSTS = {
    "network.transfer": "encoder",
    "network.encoder": "resnet50",
    "data.source": "scannet",
    "data.size": (240, 320),
    "data.augment.flip": 0.5,
    "data.augment.blur": 0.5,
    "data.augment.blur_kernel": 5,
    "data.augment.rotate": 0,
    "data.augment.crop": None,
    "optim.lr": 0.01,
    "optim.momentum": 0.9,
    "optim.dampening": 0,
    "optim.weight_decay": 1e-4,
    "optim.batch": 16,
    "optim.schedule": "poly",
    "optim.power": 0.9,
    "optim.bn_momentum": "constant",
}
DEEPLAB = HOSTS | {
    "network.output_stride": 16,
    "network.options": {"decoder_atrous_rates": [6, 12, 18]},
    "network.aux": 0,
    "optim.steps": 50_000,
    "optim.epochs": None,
    "optim.backbone_factor": 0.1,
    "optim.head_factor": 1,
    "optim.floor": 1e-6,
    "optim.backbone_bn_momentum": 0.01,
    "evaluate.every_steps": 3000,
}
PUBLISHED = {
    "scannet_unet_r18": UNET | {"network.encoder": "resnet18", "data.source": "scannet"},
    "scannet_unet_r50": UNET | {"network.encoder": "resnet50", "data.source": "scannet"},
    "nyuv2_unet_r18": UNET | {"network.encoder": "resnet18", "data.source": "nyuv2"},
    "nyuv2_unet_r50": UNET | {"network.encoder": "resnet50", "data.source": "nyuv2"},
    "cityscapes_unet_r50": UNET
    | OUTDOORS
    | {"network.encoder": "resnet50", "data.source": "cityscapes", "data.size": (180, 360)},
    "kitti_unet_r50": UNET
    | OUTDOORS
    | {"network.encoder": "resnet50", "data.source": "kitti", "data.size": None, "data.augment.crop": (240, 320)},
    "scannet_deeplabv3_r50": DEEPLAB | {"network.kind": "deeplabv3"},
    "scannet_deeplabv3plus_r50": DEEPLAB | {"network.kind": "deeplabv3plus"},
    "scannet_pspnet_r50": HOSTS
    | {
        "network.kind": "pspnet",
        "network.output_stride": 8,
        "network.aux": 0.4,
        "network.options": {"psp_dropout": 0.1},
        "optim.epochs": 50,
        "optim.steps": None,
        "optim.backbone_factor": 1,
        "optim.head_factor": 10,
        "optim.floor": 0,
        "optim.backbone_bn_momentum": None,
        "evaluate.every_epochs": 1,
    },
}
ADE20K = {  # CSAILVision/semantic-segmentation-pytorch, its configuration of resnet50dilated
    "network.kind": "fcn",
    "network.encoder": "resnet50",
    "network.output_stride": 8,
    "network.options": {"dropout": 0.0},
    "network.aux": 0,
    "data.source": "ade20k",
    "data.size": None,
    "data.augment.flip": 0.5,
    "data.augment.short_sides": (300, 375, 450, 525, 600),
    "data.augment.longer": 1000,
    "loss.label_stride": 8,
    "optim.lr": 0.02,
    "optim.momentum": 0.9,
    "optim.dampening": 0,
    "optim.weight_decay": 1e-4,
    "optim.decay_norms": False,
    "optim.batch": 16,
    "optim.sync_bn": True,
    "optim.steps": 20 * 5000,
    "optim.schedule": "poly",
    "optim.power": 0.9,
    "optim.backbone_factor": 1,
    "optim.head_factor": 1,
    "evaluate.short_sides": (450,),
    "evaluate.every_steps": 5000,
}
PUBLISHED["ade20k_fcn_r50"] = ADE20K
OWN = ("folder_unet", "folder_deeplabv3plus")  # of your own images: test_own_image_runs
ROOMS = ("rooms_unet_r18", "rooms_deeplabv3_r18", "rooms_deeplabv3plus_r18", "rooms_pspnet_r18")


def value(recipe, key):
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_has_the_published_numbers(name):
    recipe = load_finetune_recipe(name)
    assert {key: value(recipe, key) for key in PUBLISHED[name]} == PUBLISHED[name]
    assert recipe.name == name
    assert recipe.task == "segmentation"
    assert not recipe.match_released_code
    assert recipe.resize() == "bilinear"
    assert load_finetune_recipe(name, ["match_released_code=true"]).resize() == "nearest"


def test_every_segmentation_recipe_is_in_the_table_or_toy_evidence():
    assert list_finetune_recipes("segmentation") == sorted([*PUBLISHED, *ROOMS, *OWN])
    assert set(list_finetune_recipes()) >= {*PUBLISHED, *ROOMS, *list_finetune_recipes("segmentation3d")}
    assert "rooms_srunet34" in list_finetune_recipes("segmentation3d")
    for name in ROOMS:
        recipe = load_finetune_recipe(name)
        assert recipe.data.source == "rooms"
        assert recipe.network.encoder == "resnet18"
        assert recipe.network.kind == name.split("_")[1]
    budgets = [(r.optim.steps, r.optim.batch, r.data, r.evaluate) for r in map(load_finetune_recipe, ROOMS)]
    assert all(budget == budgets[0] for budget in budgets)


@pytest.mark.parametrize("name", [*PUBLISHED, *ROOMS])
def test_toy_overlay_makes_any_recipe_small_and_keeps_what_it_is_about(name):
    recipe, toy = load_finetune_recipe(name), load_finetune_recipe(name, toy=True)
    assert toy.name == f"{name}.toy"
    assert toy.network == recipe.network
    assert (toy.data.source, toy.data.path, toy.data.augment.crop) == ("rooms", None, None)
    assert max(toy.data.size) <= 96
    assert toy.optim.steps <= 100
    assert toy.optim.batch <= 4
    assert (toy.optim.lr, toy.optim.schedule) == (recipe.optim.lr, recipe.optim.schedule)
    assert toy.workers == 0


def test_recipe_survives_the_way_through_yaml(tmp_path):
    for name in list_finetune_recipes():
        recipe = load_finetune_recipe(name, ["optim.lr=0.5", "data.path=/data"])
        path = tmp_path / "again.yaml"
        path.write_text(recipe.to_yaml())
        assert load_finetune_recipe(str(path)) == recipe
        assert recipe.optim.lr == 0.5


@pytest.mark.parametrize(
    "override, parts",
    [
        ("loss.label_stride=8", ["'loss.label_stride' is 8, accepted is 1, or for fcn its output_stride"]),
        ("loss.lovasz=1", ["'loss.lovasz'", "0 but for task 'segmentation3d'"]),
        ("data.augment.short_sides=[300]", ["'data.augment.short_sides'", "without data.size"]),
        (
            "evaluate.short_sides=[300]",
            ["'evaluate.short_sides'", "none but for task 'segmentation' without data.size"],
        ),
        ("evaluate.short_sides=[]", ["'evaluate.short_sides'", "lengths from 32 up"]),
        ("optim.lrr=1", ["unknown key 'optim.lrr'", "'optim.lr'"]),
        ("network.kind=deeplab", ["'network.kind'", "deeplabv3"]),
        ("network.kind=mask_rcnn", ["'network.kind' is 'mask_rcnn'", "'segmentation'", "unet"]),
        ("network.depth=34", ["'network.encoder'", "resnet18, resnet50"]),
        ("optim.steps=5", ["optim.steps / optim.epochs", "exactly one"]),
        ("data.fraction=0", ["data.fraction", "above 0"]),
        ("data.fraction=20", ["data.fraction", "up to 1"]),
        ("data.size=[16, 320]", ["data.size", "32"]),
        ("data.augment.flip=2", ["data.augment.flip", "probability"]),
        ("data.augment.blur_kernel=4", ["blur_kernel", "odd"]),
        ("evaluate.every_steps=3", ["evaluate.every_epochs / every_steps"]),
        ("evaluate.batch=0", ["evaluate.batch", "from 1 up"]),
        ("optim.schedule=multistep", ["optim.milestones"]),
        ("optim.milestones=[1, 2]", ["optim.milestones"]),
        ("optim.backbone_factor=0", ["optim.backbone_factor", "above 0"]),
        ("network.freeze=6", ["network.freeze"]),
        ("network.output_stride=16", ["output_stride 32"]),
        ("workers=-1", ["workers"]),
    ],
)
def test_wrong_values_are_named_with_what_is_accepted(override, parts):
    with pytest.raises(RecipeError) as caught:
        load_finetune_recipe("scannet_unet_r50", [override])
    for part in parts:
        assert part in str(caught.value)


def test_only_the_unet_takes_a_decoder_along():
    with pytest.raises(RecipeError, match=r"network\.transfer"):
        load_finetune_recipe("scannet_pspnet_r50", ["network.transfer=all"])


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UnknownName, match="scannet_unet_r50"):
        load_finetune_recipe("scannet_unet_50")


def test_files_say_how_they_are_run():
    for path in RECIPES.glob("*.yaml"):
        text = path.read_text()
        assert text.startswith(f"# geo-pretrain finetune {path.stem} "), path
        tree = yaml.safe_load(text)
        assert tree["network"]["kind"] in KINDS[tree["task"]]


def test_poly_schedule_by_hand():
    optim = FinetuneOptim(lr=0.01, power=0.9, steps=100)
    for step in (0, 1, 37, 99):
        assert optim.rate(step, 100) == pytest.approx(0.01 * (1 - step / 101) ** 0.9)


def test_multistep_with_warmup_by_hand():
    optim = FinetuneOptim(lr=0.02, schedule="multistep", milestones=(60, 80), gamma=0.1, warmup=10, warmup_factor=0.1)
    expected = {0: 0.002, 5: 0.02 * (0.1 + 0.9 * 0.5), 10: 0.02, 59: 0.02, 60: 0.002, 79: 0.002, 80: 0.0002, 89: 0.0002}
    for step, rate in expected.items():
        assert optim.rate(step, 90) == pytest.approx(rate)
    constant = FinetuneOptim(lr=0.5, schedule="constant")
    assert all(math.isclose(constant.rate(step, 10), 0.5) for step in range(10))


def test_the_former_key_depth_still_names_the_encoder(tmp_path):
    recipe = load_finetune_recipe("scannet_unet_r50")
    former = tmp_path / "former.yaml"
    former.write_text(recipe.to_yaml().replace("encoder: resnet50", "depth: 50"))
    assert "depth: 50" in former.read_text()
    assert load_finetune_recipe(str(former)) == recipe
    assert load_finetune_recipe("scannet_unet_r18", ["network.depth=50"]).network == recipe.network
    assert changes(former.read_text(), recipe.to_yaml()) == []


def test_former_keys_are_read_and_a_stored_recipe_without_newer_keys_is_no_other_recipe(tmp_path):
    path = tmp_path / "old.yaml"
    exact = ["match_released_code=true", "data.options={match_released_code: true}"]
    text = load_finetune_recipe("scannet_mask_rcnn_r50", exact).to_yaml()
    tree = yaml.safe_load(text)
    assert {"accumulate", "sync_bn"} <= tree["optim"].keys()
    for key in ("accumulate", "sync_bn"):
        del tree["optim"][key]
    former = yaml.safe_dump(tree).replace("match_released_code", "authors_exact").replace("encoder: resnet", "depth: ")
    path.write_text(former)
    recipe = load_finetune_recipe(str(path))
    assert recipe.match_released_code
    assert recipe.data.options == {"match_released_code": True}
    assert yaml.safe_load(recipe.to_yaml()) == yaml.safe_load(text)
    assert changes(former, text) == []
    assert changes(former, text.replace("sync_bn: false", "sync_bn: true")) == ["optim.sync_bn: False -> True"]
    overrides = ["authors_exact=false", "network.depth=18"]
    changed = load_finetune_recipe(str(path), overrides)
    assert (changed.match_released_code, changed.network.encoder) == (False, "resnet18")


def test_all_mistakes_are_named_at_once():
    wrong = ["network.kind=deeplab", "optim.lr=-1", "data.augment.flip=2", "evaluate.btach=3", "precision=fp8"]
    with pytest.raises(RecipeError) as error:
        load_finetune_recipe("scannet_unet_r50", wrong)
    first, *lines = str(error.value).splitlines()
    assert first.endswith("5 mistakes:")
    for part in (
        "'network.kind'",
        "'optim.lr' is -1.0",
        "'data.augment.flip' is 2.0",
        "'evaluate.btach'",
        "'precision'",
    ):
        assert len([line for line in lines if part in line]) == 1, part
