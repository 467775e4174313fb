"""Make the folder of a fine-tuning run a checkpoint folder too: `load_backbone` and adapters take its backbone.

config.json, the backbone's weights by role, golden values and a card stand beside results.json; model.safetensors, the
whole network, is in the inventory under the role "finetuned". So the folder is verified, published and opened by name
as any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from geo_pretrain.adapters.common import encoder_of
from geo_pretrain.backbones.architectures import ARCHITECTURES, Arch, encoder_arch, unet_arch
from geo_pretrain.backbones.build import build, golden_values
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.backbones.timm_names import is_timm
from geo_pretrain.cards.finetuned import render_finetuned
from geo_pretrain.catalog.license import License
from geo_pretrain.checkpoint import FINETUNED, ROLES, Checkpoint, add_checkpoint
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import CheckpointError, GeoPretrainError, first_line, some
from geo_pretrain.loading import match
from geo_pretrain.training.finetune.task import FinetuneTask
from geo_pretrain.training.networks3d import srunet_shape

COUNTER = "num_batches_tracked"  # of BatchNorm, which torchvision's frozen norms do without
TIMM_PREFIX = "model."  # of timm's tensors inside `TimmEncoder`
FACTS = ("recipe", "task", "network", "metric", "score", "seed", "backbone", "contract", "steps", "last")


@dataclass(frozen=True)
class BackboneExport:
    """The backbone of a fine-tuned network as a checkpoint folder holds it."""

    arch: Arch
    contract: ImageContract | VoxelContract
    weights: dict[str, dict[str, Tensor]]  # by role
    golden: dict[str, Tensor]


def export_backbone(task: FinetuneTask) -> BackboneExport | None:
    """The network inside a task that others can start from; None where its input is not the contract's.

    The U-Net for images comes whole, its last layer giving one channel a class; of other networks the encoder.
    """
    setup = getattr(task, "setup", None)
    if setup is not None and setup.msra:  # BGR without std, and the stride elsewhere: another network
        return None
    if isinstance(task.contract, VoxelContract):
        return _points(task, task.contract)
    arch, parts = _unet(task) if task.recipe.network.kind == "unet" else _encoder(task)
    network = build(arch, decoder=arch.has_decoder).eval()
    weights: dict[str, dict[str, Tensor]] = {}
    for role, part in parts.items():
        own: nn.Module = network.get_submodule(role) if len(parts) > 1 else network
        weights[role] = _fitting(own, part)
        own.load_state_dict(weights[role])
    return BackboneExport(arch, image_contract(task), weights, golden_values(network))


def image_contract(task: FinetuneTask) -> ImageContract:
    """The contract of an image network's backbone, with the size and the resizing of its fine-tuning."""
    data = task.recipe.data
    own = cast(ImageContract, task.contract)
    return replace(own, size=data.size or own.size, interpolation=task.recipe.resize())


def add_backbone(
    folder: Path, task: FinetuneTask, license: License, results: Mapping[str, Any], name: str
) -> Checkpoint | None:
    """Make the finished folder of a run a checkpoint folder; None, and a warning, where its backbone cannot be one.

    The run is over by then and its results are written: nothing here may take them back.
    """
    try:
        export = export_backbone(task)
        if export is not None:
            return write_as_checkpoint(folder, export, license, results, name)
        reason = "its input is not the contract's"
    except (GeoPretrainError, RuntimeError, TypeError, ValueError, KeyError) as error:
        reason = first_line(error)
    warnings.warn(f"{folder}: load_backbone cannot take the backbone of this run ({reason}).", stacklevel=2)
    return None


def write_as_checkpoint(
    folder: Path, export: BackboneExport, license: License, results: Mapping[str, Any], name: str
) -> Checkpoint:
    """Write config.json, the backbone's weights, golden values and card into the finished folder of a run."""
    provenance = {
        FINETUNED: {key: results[key] for key in FACTS if key in results}
        | {"data": {key: value for key, value in results["data"].items() if key != "skipped"}},
        "seconds": results["seconds"],
        "device": results["device"],
        "code": results["code"],
        "libraries": results["libraries"],
    }
    card = render_finetuned(name, export.arch, export.contract, license, provenance)
    return add_checkpoint(
        folder,
        name=name,
        arch=export.arch,
        contract=export.contract,
        weights=export.weights,
        golden=export.golden,
        license=license,
        provenance=provenance,
        card=card,
        present={ROLES["model"]: FINETUNED, ROLES["recipe"]: "recipe", ROLES["log"]: "log"},
    )


def _encoder(task: FinetuneTask) -> tuple[Arch, dict[str, nn.Module]]:
    encoder: Any = encoder_of(getattr(task.module, "network", task.module))
    return encoder_arch(task.recipe.network.encoder, **_width(task), **_in_chans(task, encoder)), {"encoder": encoder}


def _unet(task: FinetuneTask) -> tuple[Arch, dict[str, nn.Module]]:
    unet: Any = cast(Any, task.module).network
    chans = {"out_chans": 1 + len(task.classes), **_in_chans(task, unet.encoder)}
    arch = unet_arch(task.recipe.network.encoder, **_width(task), **chans)
    return arch, {"encoder": unet.encoder, "decoder": unet.decoder}


def _width(task: FinetuneTask) -> dict[str, Any]:
    return {} if is_timm(task.recipe.network.encoder) else task.start_shape()


def _in_chans(task: FinetuneTask, encoder: Any) -> dict[str, int]:
    count = len(task.contract.channels)
    return {} if count == 3 else {"in_chans": count}


def _fitting(own: nn.Module, part: nn.Module) -> dict[str, Tensor]:
    """The tensors of a host's encoder under the names of ours; counters that frozen norms lack are 0."""
    given = {key: value.detach().cpu() for key, value in part.state_dict().items()}
    expected = own.state_dict()
    if not any(key in expected for key in given):
        given = {TIMM_PREFIX + key: value for key, value in given.items()}
    fits, missing, _ = match(expected, given)
    lacking = [key for key in missing if not key.endswith(COUNTER)]
    if lacking:
        raise CheckpointError(f"The network's encoder has no {some(lacking)}, which ours has.")
    return {key: fits.get(key, expected[key]) for key in expected}


def _points(task: FinetuneTask, contract: VoxelContract) -> BackboneExport:
    unet = cast(SRUNet, task.backbone())
    shape = srunet_shape(unet) | ({"normalize": True} if unet.normalize else {})
    plain = SRUNet(**{key: value for key, value in shape.items() if key not in ("planes", "layers")})
    if (list(plain.planes), list(plain.layers)) == (shape["planes"], shape["layers"]):
        del shape["planes"], shape["layers"]  # the variant's own
    arch = Arch("sr_unet", shape)
    network = SRUNet(**shape)
    network.load_state_dict(unet.state_dict())
    (role,) = ARCHITECTURES[arch.name].roles
    weights = {role: {key: value.detach().cpu() for key, value in unet.state_dict().items()}}
    golden = golden_values(network.eval(), ones=not contract.given_channels)
    return BackboneExport(arch, contract, weights, golden)
