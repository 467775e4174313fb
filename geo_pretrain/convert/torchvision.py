"""Convert ResNets with torchvision's names, which are ours too: the prefix and the classifier are removed.

Any prefix is accepted, since training code wraps networks in various ways, as long as there is one ResNet and nothing
else in the file. Files from before PyTorch 0.4.1, such as torchvision's first ResNets, have no batch counters in their
norms: these are added as zeros.
"""

from __future__ import annotations

from geo_pretrain.convert.keys import Converted, Networks, State, assign, shown
from geo_pretrain.errors import WeightsMismatch

SIGNS = ("conv1.weight", "layer1.0.conv1.weight")  # keys that every ResNet has, and nothing else under one prefix
CLASSIFIER = "fc."  # or the projection head of self-supervised training


def convert_torchvision(format: str, state: State, networks: Networks) -> Converted:
    """Convert to the encoder; see `convert.convert`."""
    prefixes = [key.removesuffix(SIGNS[1]) for key in state if key.endswith(SIGNS[1])]
    prefixes = [prefix for prefix in prefixes if prefix + SIGNS[0] in state]
    if len(prefixes) != 1:
        found = f"{len(prefixes)} ResNets, under {shown(prefixes)}," if prefixes else "No ResNet"
        raise WeightsMismatch(
            f"{format!r}: {found} in keys such as {shown(state)}; accepted is one state dict with torchvision's names "
            f"({' and '.join(map(repr, SIGNS))}), under one prefix or none."
        )
    return assign(format, state, resnet_targets(format, state, prefixes[0]), networks, counters=True)


def resnet_targets(
    format: str, state: State, prefix: str, *, beside: tuple[str, ...] = ()
) -> dict[str, tuple[str, str]]:
    """Targets of the ResNet's tensors for `keys.assign`: key of the file -> ("encoder", torchvision's name).

    The classifier and keys that begin with one of `beside` have no target. Raises `WeightsMismatch` for any other key
    that does not begin with `prefix`.
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
