"""The number format in which a run's networks compute: float32, or bfloat16 where the processor multiplies it faster.

Recipes with `precision: auto` leave it to the machine on which a run begins; its state, result and log say what was
chosen, and a run that goes on keeps that.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Literal, TypeVar

import torch
import yaml

from geo_pretrain.sparse.backend import product_dtype
from geo_pretrain.training.config import lookup
from geo_pretrain.training.distributed import World
from geo_pretrain.training.finetune_recipe import POINT_KINDS, FinetuneRecipe
from geo_pretrain.training.recipe import AUTO, Recipe
from geo_pretrain.yaml_text import parse_yaml

AnyRecipe = TypeVar("AnyRecipe", Recipe, FinetuneRecipe)


def bf16_is_faster(device: torch.device, *, points: bool = False) -> bool:
    """Whether the device computes products of bfloat16 faster than of float32.

    A CPU does so with AMX or with AVX-512's products of bfloat16, by torch's own queries; without them oneDNN converts
    every operand and takes longer. CUDA devices do so where they support bfloat16 themselves. `points`: for sparse
    convolutions, whose kernels on a CPU need AVX-512's products of bfloat16 and the extra `fast`.
    """
    if points and device.type == "cpu":
        return product_dtype("cpu", torch.bfloat16) == torch.bfloat16
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def settle_precision(recipe: AnyRecipe, world: World, recorded: str | None = None) -> AnyRecipe:
    """Replace `precision: auto` by "bf16" or "fp32": what the run recorded, or else what all processes compute faster.

    `recorded`: the recipe of the saved state from which the run goes on, as YAML.
    """
    if recipe.precision != AUTO:
        return recipe
    before = recorded_precision(recorded)
    if before is not None:
        return replace(recipe, precision=before)
    faster = bf16_is_faster(world.device, points=is_for_points(recipe))
    return replace(recipe, precision="bf16" if all(world.all_gather_object(faster)) else "fp32")


def choices(wanted: AnyRecipe, settled: AnyRecipe) -> dict[str, str]:
    """What the machine decided of a recipe, for the first line of the run's log."""
    return {} if wanted.precision == settled.precision else {"precision": settled.precision}


def recorded_precision(recipe: str | None) -> Literal["fp32", "bf16"] | None:
    """The precision that a recorded recipe, YAML, states; None where it states none of the two."""
    with suppress(yaml.YAMLError):
        value = None if recipe is None else lookup(parse_yaml(recipe), "precision")
        return value if value in ("fp32", "bf16") else None
    return None


def is_for_points(recipe: Recipe | FinetuneRecipe) -> bool:
    """Whether the network that a recipe trains is a sparse one alone."""
    if isinstance(recipe, Recipe):
        return recipe.model is None
    return recipe.network.kind in POINT_KINDS
