"""Rename the keys of ResNets between Detectron2's names and torchvision's, which are ours; no number changes.

| torchvision | Detectron2 |
|---|---|
| `conv1`, `bn1` | `stem.conv1`, `stem.conv1.norm` |
| `layer1` .. `layer4` | `res2` .. `res5` |
| `<block>.conv2`, `<block>.bn2` | `<block>.conv2`, `<block>.conv2.norm` |
| `<block>.downsample.0`, `.1` | `<block>.shortcut`, `<block>.shortcut.norm` |
| `fc` | `stem.fc` (its conversion script), `linear` (its classifier) |

Two things that matter cannot be seen in the keys. Torchvision's bottleneck has its stride in the 3x3 convolution:
Detectron2 needs `MODEL.RESNETS.STRIDE_IN_1X1: False` for such weights, while its own MSRA models have it in the 1x1.
And those MSRA models expect BGR in 0..255 where ours expect normalized RGB. An MSRA file converts without any error
and gives wrong features here: say "detectron2" only of files made from torchvision-style training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from geo_pretrain.convert.keys import Converted, Networks, State, assign, shown
from geo_pretrain.convert.torchvision import CLASSIFIER
from geo_pretrain.errors import WeightsMismatch

T = TypeVar("T")  # tensors or numpy arrays

LEAVES = r"\.(?P<leaf>weight|bias|running_mean|running_var|num_batches_tracked)"
THEIRS = re.compile(
    rf"(?:stem|res(?P<stage>[2-5])\.(?P<block>\d+))\.(?P<conv>conv[123]|shortcut)(?P<norm>\.norm)?{LEAVES}"
)
OURS = re.compile(rf"(?:layer(?P<stage>[1-4])\.(?P<block>\d+)\.)?(?P<layer>(?:conv|bn)[123]|downsample\.[01]){LEAVES}")
CLASSIFIERS = ("stem.fc.", "linear.")
PREFIXES = ("", "backbone.bottom_up.", "backbone.")  # the ResNet alone, inside a detector with FPN, inside one without
STEM = "stem.conv1.weight"


def from_detectron2(state: Mapping[str, T]) -> dict[str, T]:
    """Rename Detectron2's ResNet keys to torchvision's. Raises `WeightsMismatch` for a key that is not one of them.

    >>> from_detectron2({"res2.0.shortcut.norm.weight": 1, "stem.conv1.weight": 2})
    {'layer1.0.downsample.1.weight': 1, 'conv1.weight': 2}
    """
    return {_ours(key): value for key, value in state.items()}


def to_detectron2(state: Mapping[str, T]) -> dict[str, T]:
    """Rename torchvision's ResNet keys to Detectron2's; the inverse of `from_detectron2`.

    >>> to_detectron2({"bn1.running_var": 1, "layer4.2.conv3.weight": 2})
    {'stem.conv1.norm.running_var': 1, 'res5.2.conv3.weight': 2}
    """
    return {_theirs(key): value for key, value in state.items()}


def convert_detectron2(format: str, state: State, networks: Networks) -> Converted:
    """Convert to the encoder, from a bare ResNet or a whole detector; see `convert.convert`.

    Frozen norms have no batch counters; these are added as zeros.
    """
    prefix = next((prefix for prefix in PREFIXES if prefix + STEM in state), None)
    if prefix is None:
        accepted = ", ".join(repr(prefix + STEM) for prefix in PREFIXES)
        raise WeightsMismatch(
            f"{format!r}: no ResNet in keys such as {shown(state)}; accepted are files with one of {accepted}."
        )
    parts = (f"{prefix}stem.", f"{prefix}res") if prefix else ""  # in a bare ResNet's file, unknown keys are refused
    inside = from_detectron2({key.removeprefix(prefix): key for key in state if key.startswith(parts)})
    targets = {key: ("encoder", ours) for ours, key in inside.items() if not ours.startswith(CLASSIFIER)}
    return assign(format, state, targets, networks, counters=True)


def _ours(key: str) -> str:
    for classifier in CLASSIFIERS:
        if key.startswith(classifier):
            return CLASSIFIER + key.removeprefix(classifier)
    match = THEIRS.fullmatch(key)
    if match is None:
        raise WeightsMismatch(
            f"Detectron2's ResNet has no {key!r}; accepted are keys such as 'res2.0.conv1.norm.weight'."
        )
    stage, block, conv, norm, leaf = match.group("stage", "block", "conv", "norm", "leaf")
    plain, normed = ("downsample.0", "downsample.1") if conv == "shortcut" else (conv, f"bn{conv[-1]}")
    layer = normed if norm else plain
    return f"layer{int(stage) - 1}.{block}.{layer}.{leaf}" if stage else f"{layer}.{leaf}"


def _theirs(key: str) -> str:
    if key.startswith(CLASSIFIER):
        return f"stem.{key}"
    match = OURS.fullmatch(key)
    if match is None:
        raise WeightsMismatch(f"torchvision's ResNet has no {key!r}; accepted are keys such as 'layer1.0.bn1.weight'.")
    stage, block, layer, leaf = match.group("stage", "block", "layer", "leaf")
    if layer.startswith("downsample"):
        conv = "shortcut.norm" if layer.endswith("1") else "shortcut"
    else:
        conv = f"conv{layer[-1]}.norm" if layer.startswith("bn") else layer
    return f"res{int(stage) + 1}.{block}.{conv}.{leaf}" if stage else f"stem.{conv}.{leaf}"
