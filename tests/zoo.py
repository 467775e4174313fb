"""Tiny checkpoints for the tests of the zoo's rooms: written by the real writer, with weights from the golden file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from geo_pretrain import hub
from geo_pretrain.backbones.architectures import unet_arch
from geo_pretrain.backbones.build import build, golden_values
from geo_pretrain.backbones.timm_names import timm_contract
from geo_pretrain.catalog import ENTRIES, Arch, Entry, License
from geo_pretrain.checkpoint import Checkpoint, write_checkpoint
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.seeding import seeded

DATA = Path(__file__).resolve().parent / "data"
LICENSE = License(code="MIT", weights="MIT", datasets=(("none", "MIT"),), base_model="none")
ARCH = Arch("resnet_unet", {"depth": 18, "width": 8, "out_chans": 32})
CONTRACT = ImageContract(size=(64, 96))
PLANES, LAYERS = (8, 12, 16, 24, 24, 16, 12, 12), (2, 3, 4, 6, 2, 2, 2, 2)
ARCH_3D = Arch("sr_unet", {"planes": list(PLANES), "layers": list(LAYERS), "width": 8, "in_chans": 3, "out_chans": 32})
CONTRACT_3D = VoxelContract(0.05, ("R", "G", "B"), offset=-0.5)


def golden_file() -> dict[str, Tensor]:
    """The released Pri3D network with narrow layers: weights, input and outputs."""
    return load_file(DATA / "res_unet2d_small.safetensors")


def role_weights(role: str, golden: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    prefix = f"state_dict.{role}."
    return {k.removeprefix(prefix): v for k, v in (golden or golden_file()).items() if k.startswith(prefix)}


def write_tiny(folder: Path, name: str = "tiny_net_r18", **changes: Any) -> Checkpoint:
    golden = golden_file()
    arguments: dict[str, Any] = {
        "name": name,
        "arch": ARCH,
        "contract": CONTRACT,
        "weights": {role: role_weights(role, golden) for role in ("encoder", "decoder")},
        "golden": {
            "input": golden["input"],
            "decoder": golden["eval.out"],
            **{f"encoder.{i}": golden[f"eval.encoder_out.{i}"] for i in range(1, 5)},
        },
        "license": LICENSE,
        "provenance": {"steps": 7, "seed": 0},
        "recipe_yaml": "name: tiny\n",
        "log": '{"step": 1}\n',
        "card": "# tiny\n",
    }
    return write_checkpoint(folder, **(arguments | changes))


def golden_3d() -> dict[str, Tensor]:
    """The released PointContrast network with narrow layers: weights, input and outputs."""
    return load_file(DATA / "srunet_small.safetensors")


def weights_3d(golden: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    prefix = "state_dict."
    return {k.removeprefix(prefix): v for k, v in (golden or golden_3d()).items() if k.startswith(prefix)}


def write_tiny_3d(folder: Path, name: str = "tiny_net_srunet34", **changes: Any) -> Checkpoint:
    golden = golden_3d()
    arguments: dict[str, Any] = {
        "arch": ARCH_3D,
        "contract": CONTRACT_3D,
        "weights": {"model": weights_3d(golden)},
        "golden": {
            "input.coords": golden["coords"],
            "input.feats": golden["feats"],
            "output": golden["eval.out"],
        },
    }
    return write_tiny(folder, name, **(arguments | changes))


def tiny_timm(name: str, seed: int) -> Any:
    """A U-Net around an encoder of timm ("timm/NAME"), with weights drawn by `seed`."""
    with seeded(seed):
        network: Any = build(unet_arch(name), decoder=True)
    return network.eval()


def write_timm(folder: Path, name: str, network: Any) -> Path:
    """Write a `tiny_timm` of this name; returns the folder."""
    arch = unet_arch(name)
    weights = {role: network.get_submodule(role).state_dict() for role in arch.roles}
    facts = {"arch": arch, "contract": timm_contract(name), "golden": golden_values(network)}
    return write_tiny(folder, folder.name, weights=weights, **facts).folder


def as_tiny(name: str) -> Entry:
    """An entry of the catalog, for a network as small as `write_tiny`'s, of which this project gave nothing away."""
    return replace(next(entry for entry in ENTRIES if entry.name == name), arch=ARCH, contract=CONTRACT)


def unsealed(folder: Path) -> dict[str, Any]:
    """The content of a config.json without its digest, so that it can be changed and written again."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config.pop("sha256", None)
    return config


def resolve(name_or_path: str | Path, *, roles: Sequence[str] | None = None, **where: Any) -> Path:
    """The folder of a checkpoint with the files of these roles; None: what `load_backbone` needs without a decoder."""
    opened = hub.open(name_or_path, **where)
    return opened.fetch(*(opened.network_roles(decoder=False) if roles is None else roles)).folder
