"""Load the folder of a finished fine-tuning run in Python: its network with its weights, ready to predict."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, Unpack

import torch

from geo_pretrain import hub
from geo_pretrain.backbones.architectures import HOST_WIDTH, Arch, unet_arch
from geo_pretrain.backbones.build import build
from geo_pretrain.backbones.resnet_unet import UNet
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.backbones.timm_names import is_timm
from geo_pretrain.catalog import find
from geo_pretrain.checkpoint import CONFIG, FINETUNED, read_checkpoint
from geo_pretrain.contract import contract_from_dict
from geo_pretrain.errors import CheckpointError, GeoPretrainError, InputError, WeightsMismatch, nearest, run_note, some
from geo_pretrain.files import expanded, read_sealed
from geo_pretrain.inputs import check_path
from geo_pretrain.loading import load_backbone
from geo_pretrain.seeding import seeded
from geo_pretrain.tensors import load_tensors
from geo_pretrain.training.distributed import checked_device
from geo_pretrain.training.finetune.folder import FORMAT, MODEL, RESULTS
from geo_pretrain.training.finetune.network import FinetunedNetwork
from geo_pretrain.training.finetune.registry import build_finetune_task
from geo_pretrain.training.finetune.task import FinetuneTask
from geo_pretrain.training.finetune_recipe import POINT_KINDS, FinetuneRecipe, load_finetune_recipe
from geo_pretrain.training.networks import IMAGENET, SCRATCH, SHAPE_TEMPLATES, PretrainedInit, Transfer
from geo_pretrain.training.networks3d import PretrainedInit3D
from geo_pretrain.training.recipe import UNet3DSpec

ACCEPTED = 'the folder of a fine-tuning run such as "runs/unet", or hf-hub:owner/repo'


def load_finetuned(
    name_or_folder: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    **where: Unpack[hub.Where],
) -> FinetunedNetwork:
    """Load a fine-tuned network: the folder that `geo-pretrain finetune` wrote, or one that was published.

    The result is a module in evaluation mode. `.predict(image)` takes what is at hand: a path, a PIL image, uint8
    [H, W, 3], or a list of them; a network for points takes a path, [N, 3] or
    [N, 6] (x y z red green blue), {"points": [N, 3], "colors": [N, 3]} or a `LabelledCloud`. `.classes` names
    the labels 1..C, `.transforms` makes the network's input, `.contract` says what that is.

    Args:
        name_or_folder: a folder with results.json, recipe.yaml and model.safetensors, from which nothing is downloaded;
            or hf-hub:owner/repo.
        device: where the network is put; None: the CPU.
        where: `hub`, `revision`, `cache_dir`, `local_files_only` of `load_backbone`, for what is no folder.

    Raises:
        InputError: another keyword is given; `in_chans` is `load_backbone`'s.
        CheckpointError: a file is missing or is not what the run wrote (`DigestMismatch` for altered weights).
        WeightsMismatch: the weights are not those of the network that the recipe describes.
        RecipeError: the recipe has a setting that this version does not know.

    Example:
        >>> import geo_pretrain as gp
        >>> network = gp.load_finetuned("runs/unet")  # doctest: +SKIP
        >>> labels = network.predict("photo.jpg").labels  # doctest: +SKIP
    """
    check_path(
        "load_finetuned", name_or_folder, 'the folder of a fine-tuning run such as "runs/unet", or hf-hub:owner/repo'
    )
    checked_device(device or "cpu")  # before anything is fetched
    _check_where(where)
    path = finetuned_folder(name_or_folder, **where)
    task, stated = load_task(path, device=device)
    return FinetunedNetwork(task, stated, path)


def finetuned_folder(name_or_folder: str | os.PathLike[str], **where: Unpack[hub.Where]) -> Path:
    """The folder of a fine-tuned network; one of Hugging Face is fetched."""
    path = expanded(name_or_folder)
    if not path.is_dir() and isinstance(name_or_folder, str) and name_or_folder.startswith(hub.HF_PREFIX):
        return hub.open(name_or_folder, **where).fetch(FINETUNED, "recipe").folder
    return path


def read_recipe(path: Path) -> FinetuneRecipe:
    """The recipe of a fine-tuned folder, without its network. Raises `CheckpointError` for what is no such folder."""
    _results(path)
    return load_finetune_recipe(str(_there(path, "recipe.yaml")))


def read_classes(path: Path) -> tuple[str, ...]:
    """The classes of a fine-tuned folder, without its network. Raises `CheckpointError` for what is no such folder."""
    try:
        return tuple(_results(path)["data"]["classes"])
    except (KeyError, TypeError) as error:
        raise _no_result(path, error) from None


def _no_result(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path / RESULTS}: not a result of fine-tuning ({error!r}).")


def _check_where(where: Mapping[str, Any]) -> None:
    """Raise `InputError` for keywords that nothing would read."""
    accepted = ["device", *hub.Where.__annotations__]
    for name in where:
        if name not in accepted:
            hint = f"Nearest: {nearest(name, accepted, 1)[0]!r}"
            if name in signature(load_backbone).parameters:
                hint = f"{name} is load_backbone's, which takes the backbone out of the same folder"
            raise InputError(
                f"load_finetuned: {name}={where[name]!r} is unknown; accepted: {', '.join(accepted)}. {hint}."
            )


def is_finetuned(name_or_folder: str | os.PathLike[str]) -> bool:
    """Whether this is the folder of a fine-tuned network, which `load_finetuned` takes, and not of a backbone alone."""
    folder = expanded(name_or_folder)
    if (folder / CONFIG).is_file():  # it may have replaced a fine-tuned network, whose results lie there still
        return FINETUNED in read_checkpoint(folder).provenance
    return (folder / RESULTS).is_file()


def load_task(path: Path, *, device: str | torch.device | None = None) -> tuple[FinetuneTask, Mapping[str, Any]]:
    """Load the task of a fine-tuned folder, its network in evaluation mode, and what its results state."""
    chosen = checked_device(device or "cpu")
    results = _results(path)
    recipe = load_finetune_recipe(str(_there(path, "recipe.yaml")))
    try:
        contract = contract_from_dict(results["contract"])
        classes, backbone = tuple(results["data"]["classes"]), results["backbone"]
    except (KeyError, TypeError, ValueError) as error:
        raise _no_result(path, error) from None
    shape = backbone.get("shape") or _shape_of_start(recipe, backbone["name"], path)
    task = build_finetune_task(recipe, _saved_init(recipe, backbone["name"], shape), classes, contract)
    _load_weights(task, path, results.get("model"))
    task.module.to(chosen).eval()
    return task, results


@dataclass(frozen=True)
class SavedInit(PretrainedInit):
    """The shape of an image network whose weights are about to be loaded: nothing is fetched or kept."""

    @property
    def named(self) -> bool:
        return False

    def unet(self, seed: int) -> tuple[UNet, Transfer]:
        """Pri3D's U-Net of this shape, and that nothing in it is pre-trained."""
        with seeded(seed):
            network: UNet = build(unet_arch(self.encoder, width=self.width), decoder=True)
        return network, "none"

    def host(self, builder: Callable[..., Any], seed: int, **options: Any) -> Any:
        """Another library's network; an encoder that the catalog has no shape of is read from the run's start."""
        with seeded(seed):
            shape = self.encoder if is_timm(self.encoder) else SHAPE_TEMPLATES.get(self.encoder, self.backbone)
            return builder(shape, pretrained=False, **options)


@dataclass(frozen=True)
class SavedInit3D(PretrainedInit3D):
    """The shape of a 3D network whose weights are about to be loaded; `shape`: arguments of `SRUNet`."""

    shape: Mapping[str, Any] = field(default_factory=dict)

    def unet(self, seed: int, in_chans: int | None = None) -> tuple[SRUNet, bool]:
        """The network of this shape, and that nothing in it is pre-trained."""
        with seeded(seed):
            return SRUNet(**dict(self.shape) | ({} if in_chans is None else {"in_chans": in_chans})), False


def _saved_init(recipe: FinetuneRecipe, backbone: str, shape: Mapping[str, Any]) -> SavedInit | SavedInit3D:
    if recipe.network.kind in POINT_KINDS:  # "scratch": the contract is the task's own by now
        return SavedInit3D(SCRATCH, frames=recipe.on_frames(), shape=shape)
    return SavedInit(backbone, recipe.network.encoder, shape["width"])


def _shape_of_start(recipe: FinetuneRecipe, backbone: str, folder: Path) -> dict[str, Any]:
    """The shape of the start of a run whose results.json does not state it, which older versions wrote."""
    spec, in_3d = recipe.network, recipe.network.kind in POINT_KINDS
    if backbone in (SCRATCH, IMAGENET):
        own = spec.unet3d or UNet3DSpec()
        if in_3d:
            return {name: getattr(own, name) for name in ("variant", "width", "in_chans", "stem_kernel")}
        return {"width": spec.width}
    try:
        arch: Arch = (find(backbone) or hub.open(backbone, local_files_only=True)).arch
    except GeoPretrainError as error:
        raise CheckpointError(
            f"{folder}: an older version wrote this run and did not keep the shape of its start {backbone!r}, which "
            f"cannot be opened: {error}"
        ) from None
    given: dict[str, Any] = dict(arch.args)
    return given if in_3d else {"width": given.get("width", HOST_WIDTH)}


def _results(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        accepted = "the --out of a finished fine-tuning run"
        raise CheckpointError(f"{folder}: no such folder{run_note(folder)}; accepted: {accepted}.")
    if not (folder / RESULTS).is_file() and (published := _published(folder)) is not None:
        return published
    path = _there(folder, RESULTS)
    data = read_sealed(path)
    if data.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {data.get('format')!r}; this version reads {FORMAT}.")
    return data


def _published(folder: Path) -> dict[str, Any] | None:
    """What config.json of a published folder, which has no results.json, states of its fine-tuning; None: nothing."""
    if not (folder / CONFIG).is_file():
        return None
    checkpoint = read_checkpoint(folder)
    facts = checkpoint.provenance.get(FINETUNED)
    if facts is None:
        return None
    weights = checkpoint.files[checkpoint.file_of(FINETUNED)]
    return {**facts, "model": {"sha256": weights.sha256}}


def _there(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        what = (
            "a checkpoint folder: load_backbone loads it" if (folder / "config.json").is_file() else "no finished run"
        )
        raise CheckpointError(f"{str(folder)!r} has no {name}; it is {what}.")
    return folder / name


def _load_weights(task: FinetuneTask, folder: Path, stated: Mapping[str, Any] | None) -> None:
    """Load model.safetensors strictly, after a comparison with the digest that results.json states."""
    path = _there(folder, MODEL)
    weights = load_tensors(path, None if stated is None else stated["sha256"], RESULTS)
    own = task.module.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in weights]
    wrong += [f"{key} is not of the network" for key in weights if key not in own]
    wrong += [
        f"{key} is {list(weights[key].shape)}, the network has {list(value.shape)}"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if wrong:
        raise WeightsMismatch(f"{path}: {len(wrong)} of {len(own)} tensors do not fit: {some(wrong)}.")
    task.module.load_state_dict(weights)
