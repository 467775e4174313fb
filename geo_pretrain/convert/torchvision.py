"""ResNets with torchvision's names, which are ours: only what stands in front of them, and the classifier, go.

Whoever trained the network wrapped it in something, so any prefix is accepted, as long as there is one ResNet and
nothing beside it. Files from before PyTorch 0.4.1, torchvision's first ResNets among them, count no batches in their
norms: those counters are added as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from geo_pretrain.convert.keys import Converted, place, shown
from geo_pretrain.errors import WeightsMismatch

if TYPE_CHECKING:
    from torch import Tensor

SIGNS = ("conv1.weight", "layer1.0.conv1.weight")  # every ResNet has both, and nothing else at the same depth
CLASSIFIER = "fc."  # or the projection that self-supervised training puts in its place


def convert_torchvision(
    format: str, state: Mapping[str, Tensor], networks: Mapping[str, Mapping[str, Tensor]]
) -> Converted:
    """The encoder of a flat state dict; see `convert.convert`."""
    prefixes = [key.removesuffix(SIGNS[1]) for key in state if key.endswith(SIGNS[1])]
    prefixes = [prefix for prefix in prefixes if prefix + SIGNS[0] in state]
    if len(prefixes) != 1:
        found = f"{len(prefixes)} ResNets, under {shown(prefixes)}," if prefixes else "No ResNet"
        raise WeightsMismatch(
            f"{format!r}: {found} in keys such as {shown(state)}; accepted is one state dict with torchvision's names "
            f"({' and '.join(map(repr, SIGNS))}), under one prefix or none."
        )
    return place(format, state, resnet_places(format, state, prefixes[0]), networks, counters=True)


def resnet_places(
    format: str, state: Mapping[str, Tensor], prefix: str, *, beside: tuple[str, ...] = ()
) -> dict[str, tuple[str, str]]:
    """Where the tensors of the ResNet under `prefix` belong: key of the file -> ("encoder", torchvision's name).

    Its classifier has no place, nor what begins with one of `beside`. Raises `WeightsMismatch` for any other key.
    """
    strange = [key for key in state if not key.startswith((prefix, *beside))]
    if strange:
        accepted = ", ".join(map(repr, (prefix, *beside)))
        raise WeightsMismatch(
            f"{format!r}: {len(strange)} keys are no part of its ResNet, such as {shown(strange)}; accepted is what "
            f"begins with {accepted}."
        )
    names = {key: key.removeprefix(prefix) for key in state if key.startswith(prefix)}
    return {key: ("encoder", name) for key, name in names.items() if not name.startswith(CLASSIFIER)}
