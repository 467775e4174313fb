"""Every published recipe with --toy: builds its network, takes a step and is measured, on rooms, by the front door.

Only what makes a step dear is taken down further: image sizes, boxes, channels after the encoder. ResNet-50 hosts of
other libraries keep their width, since they have no other.
"""

from __future__ import annotations

import pytest

from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune_recipe import list_finetune_recipes, load_finetune_recipe

pytestmark = pytest.mark.usefixtures("quick_weights")

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


@pytest.mark.parametrize("name", [name for name in list_finetune_recipes() if not name.startswith("rooms_")])
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
