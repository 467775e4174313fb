"""The registry of downstream tasks by their names in recipes, and the initialization of a run's backbone."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.training.finetune.task import FinetuneTask
from geo_pretrain.training.finetune_recipe import FinetuneRecipe
from geo_pretrain.training.networks import PretrainedInit
from geo_pretrain.training.networks3d import PretrainedInit3D
from geo_pretrain.training.recipe import UNet3DSpec

TASKS = {  # task of a recipe -> "module:class", called with (recipe, start, classes, contract)
    "segmentation": "geo_pretrain.training.finetune.segmentation:Segmentation",
    "segmentation3d": "geo_pretrain.training.finetune.segmentation3d:CloudSegmentation",
    "detection": "geo_pretrain.training.finetune.detection:Detection",
    "instances": "geo_pretrain.training.finetune.detection:Detection",
}


def backbone_init(recipe: FinetuneRecipe, backbone: str, where: Mapping[str, Any]) -> PretrainedInit | PretrainedInit3D:
    """The initialization of a run's backbone; `where`: hub, revision, cache_dir, ... of load_backbone."""
    network = recipe.network
    if recipe.task == "segmentation3d":
        return PretrainedInit3D(backbone, network.unet3d or UNet3DSpec(), where)
    return PretrainedInit(backbone, network.encoder, network.width, where)


def build_finetune_task(
    recipe: FinetuneRecipe,
    start: PretrainedInit | PretrainedInit3D,
    classes: Sequence[str],
    contract: ImageContract | VoxelContract,
) -> FinetuneTask:
    """Build the task of a recipe: its network with `start`'s weights and outputs for these classes (labels 1..C)."""
    module, _, name = TASKS[recipe.task].partition(":")
    task = getattr(importlib.import_module(module), name)(recipe, start, tuple(classes), contract)
    return cast(FinetuneTask, task)
