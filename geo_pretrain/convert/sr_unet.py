"""Convert SR-UNet checkpoints of PointContrast, CSC, VoteNet, SLidR and Pri3D to our state dict.

The families differ (`FAMILIES`) in where the file holds the network, and in whether it was trained with MinkowskiEngine
0.4, whose block kernels are in another order (`kernels.from_me04`). A wrong order loads without any error and ruins the
features; it cannot be seen in the tensors, so the family has to be given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from geo_pretrain.convert.kernels import from_me04
from geo_pretrain.convert.keys import Converted, KeyReport, Networks, State, match_keys, without_data_parallel
from geo_pretrain.errors import WeightsMismatch, unknown

if TYPE_CHECKING:
    from torch import Tensor

STEM = "conv0p1s1.kernel"  # every SR-UNet has it
HEADS = ("final.", "offsets_pre.", "bntr_offset.", "offsets.")  # CSC's instance segmentation adds the offset branch


@dataclass(frozen=True)
class Family:
    """How one code base saves its SR-UNet."""

    entry: str  # the key of the checkpoint file that holds the flat state dict
    prefixes: tuple[str, ...]  # possible prefixes of the network's keys, after `module.`
    me04: bool  # trained with MinkowskiEngine 0.4 or before


FAMILIES = {
    "pointcontrast": Family(entry="state_dict", prefixes=("", "encoder."), me04=True),
    "csc": Family(entry="state_dict", prefixes=("", "encoder."), me04=True),
    "votenet": Family(entry="state_dict", prefixes=("backbone_net.net.",), me04=True),  # fine-tuned PointContrast, CSC
    "slidr": Family(entry="model_points", prefixes=("",), me04=False),
    "pri3d": Family(entry="model", prefixes=("backbone3d.", ""), me04=False),
}

FORMAT_FAMILIES = {"pri3d_3d": "pri3d"}  # formats of `convert.FORMATS` with another name than their family


def convert_sr_unet(family: str, state: State, network: State) -> tuple[dict[str, Tensor], KeyReport]:
    """Convert an authors' flat state dict to ours; returns it with the report of its keys.

    `state` is the entry of the file that `FAMILIES` names; `network` is the state dict of the SR-UNet it is for, on any
    device, meta included. The result has all keys of `network`, except the head (`final`) where its shape differs, as
    after fine-tuning. Raises `UnknownName` for an unknown family, `WeightsMismatch` when the file holds no complete
    network.
    """
    if family not in FAMILIES:
        raise unknown("family of 3D checkpoints", family, FAMILIES)
    rule = FAMILIES[family]
    state = without_data_parallel(state)
    if rule.entry in state:
        raise WeightsMismatch(f"This is the whole checkpoint file; accepted: its entry {rule.entry!r}.")
    prefix = _prefix(family, state)
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    report = match_keys(inside, network, heads=HEADS, name=family)
    outside = tuple(key for key in state if not key.startswith(prefix))
    report = KeyReport(report.matched, report.missing, tuple(prefix + key for key in report.unexpected) + outside)
    matched = {key: inside[key] for key in report.matched}
    return (from_me04(matched) if rule.me04 else matched), report


def convert_file(format: str, state: State, networks: Networks) -> Converted:
    """Convert a file in one of the 3D formats to the whole network, `final` included; see `convert.convert`."""
    family = FORMAT_FAMILIES.get(format, format)
    network = networks["model"]
    weights, report = convert_sr_unet(family, state, network)
    if report.missing:
        have = {key: list(value.shape) for key, value in state.items() if key.endswith(report.missing)}
        raise WeightsMismatch(
            f"{format!r}: the last layer is another one: missing are {', '.join(report.missing)}, shaped "
            f"{[list(network[key].shape) for key in report.missing]}; the file has {have or 'none'}. Accepted is a "
            "network with the file's out_chans."
        )
    matched = tuple(f"model.{key}" for key in report.matched)
    return Converted({"model": weights}, KeyReport(matched, (), report.unexpected))


def _prefix(family: str, state: State) -> str:
    for prefix in FAMILIES[family].prefixes:
        if prefix + STEM in state:
            return prefix
    fitting = [name for name, rule in FAMILIES.items() if any(prefix + STEM in state for prefix in rule.prefixes)]
    accepted = ", ".join(repr(prefix + STEM) for prefix in FAMILIES[family].prefixes)
    raise WeightsMismatch(
        f"No SR-UNet of family {family!r} in keys such as {list(state)[:3]}; accepted are files with {accepted}. "
        f"Families that fit these keys: {', '.join(map(repr, fitting)) or 'none'}."
    )
