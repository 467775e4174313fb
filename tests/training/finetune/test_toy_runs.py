"""Every published recipe with --toy: builds its network, takes a step and is measured, on rooms, by the front door.

Only what makes a step dear is taken down further: image sizes, boxes, channels after the encoder. ResNet-50 hosts of
other libraries keep their width, since they have no other.
"""

from __future__ import annotations

import pytest
import torch

from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.finetune.registry import backbone_init, build_finetune_task
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune_recipe import POINT_KINDS, list_finetune_recipes, load_finetune_recipe
from geo_pretrain.training.schedule import pri3d_bn_momentum, set_bn_momentum

pytestmark = pytest.mark.usefixtures("quick_weights", "pickled_loaders")

ROOMS = "data.options={scenes: 1, val_scenes: 1, frames: 2, labelled: 2, width: 64, height: 64}"
STEP = ["optim.batch=2", "optim.steps=1", "evaluate.every_steps=1", "evaluate.images=1", "optim.warmup=0", ROOMS]
SMALL = {
    "unet": ["network.width=8"],
    "mask_rcnn": [
        "network.options.width=8",
        "network.options.roi_batch=4",
        "network.options.proposals=8",
        "optim.milestones=[1, 1]",
        "data.augment.shorter=[64, 64]",
    ],
}
SCANS = "data.options={scenes: 1, val_scenes: 1, frames: 2, width: 64, height: 64, objects: 2, val_objects: 1}"
CLOUDS = [SCANS, "optim.batch=2", "optim.steps=1", "evaluate.images=1", "network.unet3d.width=8"]


def recipes(clouds):
    """Names of the recipes on whole clouds, or of others; those on rooms and own images have runs of their own."""
    names = [name for name in list_finetune_recipes() if not name.startswith(("rooms_", "folder_"))]
    return [name for name in names if (load_finetune_recipe(name).network.kind in POINT_KINDS) == clouds]


@pytest.mark.parametrize("name", recipes(clouds=True))
def test_a_loss_of_every_recipe_on_clouds(name):
    """Each task's own tests train on its toy; here every recipe's settings meet the toy's, up to the loss."""
    recipe = load_finetune_recipe(name, CLOUDS, toy=True)
    assert (recipe.name, recipe.data.source) == (f"{name}.toy", "rooms3d")
    source = open_labelled("rooms3d", None, "train", task=recipe.labels(), options=recipe.data.options)
    init = backbone_init(recipe, "scratch", {})
    task = build_finetune_task(recipe, init, source.classes, init.contract())
    task.prepare(source)
    task.module.train()
    clouds = [task.load(source, id) for id in source.ids()]
    samples = [task.sample(cloud, torch.Generator().manual_seed(k)) for k, cloud in enumerate(2 * clouds)]
    losses = task.losses(task.collate(samples[:2]))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert sum(losses.values()).requires_grad


@pytest.mark.parametrize("name", recipes(clouds=False))
def test_one_step_of_every_recipe(name, tmp_path):
    kind = load_finetune_recipe(name).network.kind
    size = [] if kind == "mask_rcnn" else ["data.size=[64, 64]"]
    recipe = load_finetune_recipe(name, [*STEP, *size, *SMALL.get(kind, [])], toy=True)
    result = finetune(recipe, "scratch", tmp_path / "out", device="cpu")
    assert (result.recipe, result.steps, result.data["network"]) == (f"{name}.toy", 1, kind)
    assert result.metric == ("mask_ap" if kind == "mask_rcnn" else "miou")
    assert 0 <= result.score <= 1
    assert result.data["last"]["details"]["images"] == 1
    assert result.data["data"]["source"] == "rooms"
    assert len(result.data["data"]["classes"]) == (22 if kind == "mask_rcnn" else 25)
    assert (tmp_path / "out" / "predictions.png").is_file()


@pytest.mark.parametrize("name", list_finetune_recipes("segmentation"))
def test_toys_average_batchnorm_over_no_more_steps_than_they_have(name):
    """Pri3D's momentum falls to 0.001 and smp's is 0.01: after 100 steps such an average is still of the beginning."""
    optim = load_finetune_recipe(name, toy=True).optim
    assert (optim.bn_momentum, optim.backbone_bn_momentum) == ("constant", None)  # torch's 0.1: some 20 steps


@pytest.mark.parametrize(("falling", "old"), [(True, 0.887), (False, 0.9**120)])
def test_how_much_of_a_running_mean_is_of_the_first_180_of_300_steps(falling, old):
    """The closed form of docs/benchmarks.md: 0.999 ** 120 with Pri3D's schedule, which is at its floor there."""
    layer = torch.nn.BatchNorm2d(1).train()
    for step in range(300):
        if falling:
            set_bn_momentum(layer, pri3d_bn_momentum(max(step - 1, 0)))
        layer(torch.full((2, 1, 1, 1), float(step >= 180)))
    assert 1 - layer.running_mean.item() == pytest.approx(old, abs=2e-3)
