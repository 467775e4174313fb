"""Convert authors' checkpoint formats to ours, one file a format family.

`FORMATS` lists what can be read; `convert` splits the flat state dict of an authors' file into the roles of a
checkpoint folder. `hub.extract` reads such files safely; this package renames keys and permutes tensors. It imports no
torch until a conversion runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from geo_pretrain.convert.keys import Converted, Networks, State
from geo_pretrain.convert.prefixes import find_prefix, select
from geo_pretrain.errors import WeightsMismatch, unknown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMATS", "Converted", "Format", "convert"]


@dataclass(frozen=True)
class Format:
    """A checkpoint format of some authors."""

    entries: tuple[str, ...]  # keys under which their file may hold the flat state dict, tried in order; "": top level
    function: str  # "module:function", imported when used: (format's name, state, networks) -> Converted
    roles: tuple[str, ...]  # the roles of a checkpoint folder that such a file can fill
    text: str  # description for users


SR_UNET = "geo_pretrain.convert.sr_unet:convert_file"

FORMATS: Mapping[str, Format] = {
    "pri3d": Format(
        ("model",),
        "geo_pretrain.convert.pri3d:convert_pri3d",
        ("encoder", "decoder", "heads"),
        "Pri3D: 2D U-Net, heads, and the 3D U-Net where it was trained along",
    ),
    "pri3d_3d": Format(("model",), SR_UNET, ("model",), "Pri3D: the 3D U-Net alone"),
    "torchvision": Format(
        ("state_dict", "model", ""),
        "geo_pretrain.convert.torchvision:convert_torchvision",
        ("encoder",),
        "torchvision ResNet, with or without classifier",
    ),
    "moco": Format(
        ("state_dict", "model", ""),
        "geo_pretrain.convert.moco:convert_moco",
        ("encoder",),
        "MoCo ResNet, as trained or already converted for Pri3D",
    ),
    "detectron2": Format(
        ("model", ""),
        "geo_pretrain.convert.detectron2:convert_detectron2",
        ("encoder",),
        "Detectron2 ResNet (pickle with numpy arrays)",
    ),
    "monodepth2": Format(
        ("state_dict", "model", ""),
        "geo_pretrain.convert.monodepth2:convert_monodepth2",
        ("encoder", "decoder", "heads"),
        "monodepth2-style depth network, in one file or in two",
    ),
    "pointcontrast": Format(("state_dict",), SR_UNET, ("model",), "PointContrast SR-UNet (MinkowskiEngine 0.4)"),
    "csc": Format(("state_dict",), SR_UNET, ("model",), "Contrastive Scene Contexts SR-UNet (MinkowskiEngine 0.4)"),
    "votenet": Format(
        ("state_dict",), SR_UNET, ("model",), "VoteNet fine-tuned from PointContrast or CSC: its SR-UNet"
    ),
    "slidr": Format(("model_points",), SR_UNET, ("model",), "SLidR SR-UNet (MinkowskiEngine 0.5)"),
    "slidr_images": Format(
        ("model_images",),
        "geo_pretrain.convert.slidr:convert_slidr_images",
        ("encoder", "heads"),
        "SLidR image network: ResNet-50 and its 1x1 head",
    ),
}


def convert(
    format: str, state: State, networks: Networks, *, prefix: str | None = "", ignore: Sequence[str] = ()
) -> Converted:
    """Convert an authors' flat state dict to the roles of a checkpoint folder.

    `state` is the entry of the file that `FORMATS[format].entries` names: names to tensors or numpy arrays; numbers and
    texts among them are left out. `networks` holds the state dict of each part of the network that the weights are for,
    by role ("encoder", "decoder", "model"); tensors on the meta device suffice. Only keys under `prefix` are looked at,
    and none that match a pattern in `ignore`; prefix=None: where the whole file does not fit, the one prefix is looked
    for under which a whole network lies, and the report names it.

    Returns the roles in the file: complete parts of the network in the network's dtypes, and "heads" if there are any.
    Raises `UnknownName` for an unknown format, `WeightsMismatch` when the file has no part of the network, or an
    incomplete one.
    """
    if format not in FORMATS:
        raise unknown("checkpoint format", format, FORMATS)
    rule = FORMATS[format]
    if not set(networks) & set(rule.roles):
        fitting = [name for name, other in FORMATS.items() if set(networks) & set(other.roles)]
        raise WeightsMismatch(
            f"Files of format {format!r} hold {_listed(rule.roles)}; this network is made of {_listed(networks)}. "
            f"Formats that hold it: {_listed(fitting)}."
        )
    everything = _tensors(format, state)
    tensors = select(everything, prefix or "", ignore)
    found = prefix or ""
    try:
        converted = _run(rule, format, tensors, networks)
    except WeightsMismatch as error:
        fitting = [name for name in FORMATS if _fits(name, rule, tensors, networks)]
        if fitting:
            raise WeightsMismatch(f"{error} It does fit as format {_listed(fitting)}.") from error
        if prefix is not None:
            raise
        found = find_prefix(tensors, networks, partial(_run, rule, format, networks=networks), error)
        converted = _run(rule, format, select(tensors, found), networks)
    below = [found + key for key in converted.report.unexpected]
    beside = [key for key in state if key not in everything or not key.startswith(found) or _ignored(key, ignore)]
    report = replace(converted.report, unexpected=tuple(dict.fromkeys([*below, *beside])), prefix=found)
    return Converted(_like_networks(format, converted.weights, networks), report)


def _ignored(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _run(rule: Format, format: str, state: State, networks: Networks) -> Converted:
    converted: Converted = resolve_name(rule.function)(format, state, networks)
    if not set(converted.weights) & set(networks):
        raise WeightsMismatch(
            f"{format!r}: the file holds {_listed(converted.weights)}; this network is made of {_listed(networks)}."
        )
    return converted


def _fits(name: str, tried: Format, state: State, networks: Networks) -> bool:
    """Whether another format reads the file; formats with the same function suggest each other themselves."""
    rule = FORMATS[name]
    if rule.function == tried.function or not set(networks) & set(rule.roles):
        return False
    try:
        _run(rule, name, state, networks)
    except WeightsMismatch:
        return False
    return True


def _tensors(format: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    import numpy as np
    import torch

    whole = [entry for entry in FORMATS[format].entries if isinstance(state.get(entry), Mapping)]
    if whole:
        raise WeightsMismatch(
            f"This is the whole checkpoint file; accepted: its entry {whole[0]!r}, a flat state dict."
        )
    tensors, strange = {}, {}
    for key, value in state.items():
        if not isinstance(key, str):
            strange[str(key)] = f"key of type {type(key).__name__}"
        elif isinstance(value, torch.Tensor):
            tensors[key] = value
        elif isinstance(value, np.ndarray | np.generic):
            if value.dtype.kind in "iuf":
                tensors[key] = torch.tensor(value)
            else:
                strange[key] = f"{type(value).__name__} of {value.dtype}"
        elif not isinstance(value, int | float | str):
            strange[key] = type(value).__name__
    if strange:
        raise WeightsMismatch(f"Not a flat state dict: {strange} among its values; accepted are tensors and arrays.")
    return tensors


def _like_networks(format: str, weights: Networks, networks: Networks) -> dict[str, dict[str, Tensor]]:
    """Cast the weights to the networks' dtypes; refuses to cast integers to floats or floats to integers."""
    cast: dict[str, dict[str, Tensor]] = {}
    for role, state in weights.items():
        network = networks.get(role, state)
        for key, value in state.items():
            if value.is_floating_point() != network[key].is_floating_point():
                raise WeightsMismatch(
                    f"{format!r}: {role}.{key} is {value.dtype}; accepted is {network[key].dtype}, wider or narrower."
                )
            cast.setdefault(role, {})[key] = value.to(network[key].dtype)
    return cast


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"
