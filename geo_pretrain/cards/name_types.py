"""The names of the catalog as types, so that editors complete names and know what each of them loads."""

from __future__ import annotations

from pathlib import Path

from geo_pretrain.catalog import backbone_info, list_backbones
from geo_pretrain.files import write_text

NAMES = "geo_pretrain/catalog/names.py"  # of a checkout
TYPES = {"resnet": "ImageName", "sr_unet": "PointName"}  # architecture of what loads without a decoder -> type


def name_types() -> str:
    """The text of catalog/names.py: a Literal of the names that load a ResNet, and one of those with a sparse U-Net."""
    lines = ['"""Names of the catalog by what their networks take, as types. `make cards` writes this file."""', ""]
    lines += ["from __future__ import annotations", "", "from typing import Literal, TypeAlias", ""]
    for arch, name in TYPES.items():
        names = [one for one in list_backbones() if backbone_info(one).arch.encoder_alone.name == arch]
        lines += [f"{name}: TypeAlias = Literal[", *(f'    "{one}",' for one in names), "]"]
    return "\n".join(lines) + "\n"


def write_name_types(root: Path) -> None:
    """Write the file into a checkout."""
    write_text(root / NAMES, name_types())
