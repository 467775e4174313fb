"""The input contract of a network as a table in its card."""

from __future__ import annotations

from geo_pretrain.backbones.architectures import Arch
from geo_pretrain.cards.markdown import numbers, table
from geo_pretrain.cards.usage import output_channels
from geo_pretrain.contract import COLORS, ImageContract, VoxelContract


def expects(arch: Arch, contract: ImageContract | VoxelContract) -> str:
    """The section that states the network's input."""
    rows = _image_rows(contract) if isinstance(contract, ImageContract) else _voxel_rows(arch, contract)
    return "## What goes in\n\n" + table(("what", "value"), rows)


def _image_rows(contract: ImageContract) -> list[tuple[str, str]]:
    low, high = contract.value_range
    height, width = contract.size
    return [
        ("channels", f"{', '.join(contract.channels)}, in this order"),
        ("values", f"[{low:g}, {high:g}] before normalization; 8-bit images are divided by 255"),
        ("mean", numbers(contract.mean)),
        ("standard deviation", numbers(contract.std)),
        (
            "size",
            f"{height}x{width} (height x width) in pre-training; `.transforms` resizes ({contract.interpolation})",
        ),
        ("tensor", f"float [B, {len(contract.channels)}, H, W], normalized"),
    ]


def _voxel_rows(arch: Arch, contract: VoxelContract) -> list[tuple[str, str]]:
    if isinstance(contract.voxel_size, tuple):
        size = "{:g} m x {:g} degree x {:g} m".format(*contract.voxel_size)
        axes = "cylindrical: radius, azimuth and height of x, y, z in meters, with the sensor at the origin"
    else:
        size, axes = f"{contract.voxel_size * 100:g} cm", "cartesian: x, y, z in meters"
    first = contract.reduce == "first"
    return [
        ("voxel edge", size),
        ("coordinates", axes),
        ("channels", _voxel_channels(contract)),
        ("values", _voxel_values(contract)),
        ("points of one voxel", "the first gives the features" if first else "the features are their mean"),
        (
            "output",
            f"{output_channels(arch)} channels a voxel" + (", of length 1" if arch.args.get("normalize") else ""),
        ),
    ]


def _voxel_channels(contract: VoxelContract) -> str:
    names = contract.given_channels
    ones = len(contract.channels) - len(names)
    given = ", ".join(names) + (", in this order" if len(names) > 1 else "")
    return "; ".join(filter(None, (given, f"{ones} x constant 1" if ones else "")))


def _voxel_values(contract: VoxelContract) -> str:
    names = contract.given_channels
    if not names:
        return "1 everywhere; colors are not taken"
    raw = "colors in [0, 1] (8-bit ones are divided by 255)" if set(names) <= COLORS else ", ".join(names)
    return raw + contract.scaling
