"""The registry of downstream tasks by their names in recipes, and the initialization of a run's backbone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any

from geo_pretrain import hub
from geo_pretrain.backbones.architectures import ENCODERS
from geo_pretrain.backbones.timm_names import PREFIX
from geo_pretrain.catalog import find
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import RecipeError, require
from geo_pretrain.training.data.labelled.registry import labelled_options
from geo_pretrain.training.finetune.task import FinetuneTask
from geo_pretrain.training.finetune_recipe import POINT_KINDS, FinetuneRecipe, load_finetune_recipe, with_encoder
from geo_pretrain.training.initialize import FILE, PACKAGE, weights_file
from geo_pretrain.training.networks import IMAGENET, SCRATCH, PretrainedInit
from geo_pretrain.training.networks3d import PretrainedInit3D
from geo_pretrain.training.recipe import AUTO, UNet3DSpec

DEFAULT_ENCODER = "resnet50"  # of a recipe with encoder "auto", where the start is no checkpoint
TASKS = {  # task of a recipe -> "module:class", called with (recipe, start, classes, contract)
    "segmentation": "geo_pretrain.training.finetune.segmentation:Segmentation",
    "segmentation3d": "geo_pretrain.training.finetune.segmentation3d:CloudSegmentation",
    "instances3d": "geo_pretrain.training.finetune.instances3d:Instances3D",
    "detection3d": "geo_pretrain.training.finetune.detection3d:Detection3D",
    "parts3d": "geo_pretrain.training.finetune.parts3d:Parts3D",
    "classification3d": "geo_pretrain.training.finetune.classification3d:Classification3D",
    "detection": "geo_pretrain.training.finetune.detection:Detection",
    "instances": "geo_pretrain.training.finetune.detection:Detection",
}


def load_checked_finetune_recipe(name: str, overrides: Iterable[str] = (), *, toy: bool = False) -> FinetuneRecipe:
    """`load_finetune_recipe`, and check the options of the data set and of the network with the rest."""
    return load_finetune_recipe(name, overrides, toy=toy, also=[_check_data, _check_network])


def _check_data(recipe: FinetuneRecipe) -> None:
    labelled_options(recipe.data.source, recipe.labels(), recipe.data.options)


def _check_network(recipe: FinetuneRecipe) -> None:
    resolve_name(TASKS[recipe.task]).check(with_encoder(recipe, DEFAULT_ENCODER))


def check_start(recipe: FinetuneRecipe, backbone: str) -> None:
    """Raise for weights in a file or package that are not there, or that no encoder is named for; reads nothing.

    And for libraries that the task needs. Raises `CheckpointError`, `RecipeError`, `MissingDependency`. A name of the
    catalog or a folder is checked where it is opened.
    """
    for library, extra in resolve_name(TASKS[recipe.task]).needs:
        require(library, extra)
    if not backbone.startswith((FILE, PACKAGE)):
        return
    path = weights_file(backbone)
    if recipe.network.encoder != AUTO:
        return
    guess = guessed_encoder(f"{backbone.partition(':')[2] if backbone.startswith(PACKAGE) else path.stem}")
    line = f"By its name: --set network.encoder={guess}." if guess else "Add --set network.encoder=NAME."
    raise RecipeError(
        f"Backbone {backbone!r} holds weights, and not the name of their network. {line} Accepted: "
        f"{', '.join(ENCODERS)}, or timm/NAME."
    )


def guessed_encoder(name: str) -> str | None:
    """The longest name of an encoder that a file's or package's name contains; None where none does."""
    plain = name.lower().replace("-", "_")
    known = {encoder: encoder for encoder in ENCODERS}
    if find_spec("timm") is not None:
        known |= {one: f"{PREFIX}{one}" for one in require("timm", "adapters").list_models() if one not in known}
    inside = [one for one in known if one in plain]
    return known[max(inside, key=len)] if inside else None


def backbone_init(recipe: FinetuneRecipe, backbone: str, where: Mapping[str, Any]) -> PretrainedInit | PretrainedInit3D:
    """The initialization of a run's backbone; `where`: hub, revision, cache_dir, ... of load_backbone."""
    network = resolved(recipe, backbone, where).network
    if network.kind in POINT_KINDS:
        return PretrainedInit3D(backbone, network.unet3d or UNet3DSpec(), where, frames=recipe.on_frames())
    return PretrainedInit(backbone, network.encoder, network.width, where)


def resolved(recipe: FinetuneRecipe, backbone: str, where: Mapping[str, Any]) -> FinetuneRecipe:
    """The recipe with the encoder of this backbone in place of "auto": for scratch and imagenet a ResNet-50.

    Raises `RecipeError` for a backbone without an image encoder, and what opening it raises.
    """
    if recipe.network.encoder != AUTO:
        return recipe
    if backbone in (SCRATCH, IMAGENET):
        return with_encoder(recipe, DEFAULT_ENCODER)
    check_start(recipe, backbone)
    arch = (find(backbone) or hub.open(backbone, **where)).arch
    if arch.encoder_name is None:
        raise RecipeError(f"Backbone {backbone!r} is {arch}; accepted: a ResNet, a U-Net or a timm encoder for images.")
    return with_encoder(recipe, arch.encoder_name)


def build_finetune_task(
    recipe: FinetuneRecipe,
    start: PretrainedInit | PretrainedInit3D,
    classes: Sequence[str],
    contract: ImageContract | VoxelContract,
) -> FinetuneTask:
    """Build the task of a recipe: its network with `start`'s weights and outputs for these classes (labels 1..C)."""
    task: FinetuneTask = resolve_name(TASKS[recipe.task])(recipe, start, tuple(classes), contract)
    return task
