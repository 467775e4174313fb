"""Tiny checkpoints for the tests of the zoo's rooms: written by the real writer, with weights from the golden file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from geo_pretrain.catalog import Arch, Licence
from geo_pretrain.checkpoint import Checkpoint, write_checkpoint
from geo_pretrain.contract import ImageContract

DATA = Path(__file__).resolve().parent / "data"
LICENCE = Licence(code="MIT", weights="MIT", datasets=(("none", "MIT"),), base_model="none")
ARCH = Arch("resnet_unet", {"depth": 18, "width": 8, "out_chans": 32})
CONTRACT = ImageContract(size=(64, 96))


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
        "licence": LICENCE,
        "provenance": {"steps": 7, "seed": 0},
        "recipe_yaml": "name: tiny\n",
        "log": '{"step": 1}\n',
        "card": "# tiny\n",
    }
    return write_checkpoint(folder, **(arguments | changes))
