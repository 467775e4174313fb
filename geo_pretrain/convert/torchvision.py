"""Convert ResNets with torchvision's names, which are ours too: the prefix and the classifier are removed.

Any prefix is accepted, since training code wraps networks in various ways, as long as there is one ResNet and nothing
else in the file. Files from before PyTorch 0.4.1, such as torchvision's first ResNets, have no batch counters in their
norms: these are added as zeros. The numbered names of `nn.Sequential(*resnet.children())`, and of a stem in a
Sequential of its own (`layer0.0`), are read as well.
"""

from __future__ import annotations

from dataclasses import replace

from geo_pretrain.convert.keys import Converted, Networks, State, assign, shown
from geo_pretrain.errors import WeightsMismatch

SIGNS = ("conv1.weight", "layer1.0.conv1.weight")  # keys that every ResNet has, and nothing else under one prefix
CLASSIFIER = "fc."  # or the projection head of self-supervised training
SEQUENTIAL = {"0.": "conv1.", "1.": "bn1.", "9.": "fc."} | {f"{3 + stage}.": f"layer{stage}." for stage in range(1, 5)}
STEM_APART = {"layer0.0.": "conv1.", "layer0.1.": "bn1."}
NUMBERED = (  # names -> torchvision's, and keys by which such a file is known
    (SEQUENTIAL, ("0.weight", "1.running_mean", "4.0.conv1.weight")),
    (STEM_APART, ("layer0.0.weight", "layer0.1.running_mean", SIGNS[1])),
)


def convert_torchvision(format: str, state: State, networks: Networks) -> Converted:
    """Convert to the encoder; see `convert.convert`."""
    theirs = _numbered(state)
    if theirs:
        state = {theirs.get(key, key): value for key, value in state.items()}
    converted = _convert(format, state, networks)
    back = {name: key for key, name in theirs.items()}
    unexpected = tuple(back.get(key, key) for key in converted.report.unexpected)
    return replace(converted, report=replace(converted.report, unexpected=unexpected))


def _numbered(state: State) -> dict[str, str]:
    """Keys with numbered names -> torchvision's; empty where the file has torchvision's, or no ResNet."""
    for names, signs in NUMBERED:
        for prefix in [key.removesuffix(signs[0]) for key in state if key.endswith(signs[0])]:
            if all(prefix + sign in state for sign in signs) and prefix + SIGNS[0] not in state:
                return {
                    prefix + old + key.removeprefix(prefix + old): prefix + new + key.removeprefix(prefix + old)
                    for old, new in names.items()
                    for key in state
                    if key.startswith(prefix + old)
                }
    return {}


def _convert(format: str, state: State, networks: Networks) -> Converted:
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
            f"begins with {accepted}; others can be left out (ignore=, --ignore PATTERN)."
        )
    names = {key: key.removeprefix(prefix) for key in state if key.startswith(prefix)}
    return {key: ("encoder", name) for key, name in names.items() if not name.startswith(CLASSIFIER)}
