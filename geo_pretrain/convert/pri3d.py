"""Split the `model` dictionary of a Pri3D checkpoint into the roles of a checkpoint folder.

Keys are those the released code saves. 2D names already equal torchvision's, 3D names MinkowskiEngine 0.5's in ordinary
kernel order, so that only prefixes are renamed and nothing is permuted. All that is no part of the 2D U-Net becomes
"heads", under the names of our own pretext task: the 3D U-Net, both projections, the depth head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from geo_pretrain.convert.keys import HEADS as HEADS_ROLE
from geo_pretrain.convert.keys import Converted, Networks, State, assign, without_data_parallel
from geo_pretrain.errors import WeightsMismatch

T = TypeVar("T")  # the values of a dict: tensors or anything else

PREFIXES = {"backbone.encoder.": "encoder", "backbone.decoder.": "decoder", "backbone3d.": "backbone3d"}
HEADS = ("w2d.", "w3d.", "headnet.", "headloss.")
CONSTANT = "headloss."  # a fixed Sobel kernel, a constant in our depth loss
NEEDED = {  # keys of each part, to recognize a Pri3D file
    "encoder": ("conv1.weight", "layer4.0.conv1.weight"),
    "decoder": ("up1.conv1.weight", "conv0.weight"),
}
NEEDED_3D = {  # the same if there is a 3D part
    "backbone3d": ("conv0p1s1.kernel", "final.kernel"),
    "heads": ("w2d.weight", "w3d.weight"),
}
BARE_ENCODER = "conv1.weight"  # a torchvision dictionary has it at the top level


def split_pri3d(model: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Split the `model` entry of an authors' checkpoint into parts.

    Returns "encoder" (torchvision's names), "decoder" (without "decoder."), and, if the file has them, "backbone3d"
    (the input of `sr_unet.convert_sr_unet` for family "pri3d") and "heads" (names as they are). A `module.` in front of
    every key, left by data-parallel training, is removed. Raises `WeightsMismatch` for keys that belong to no part, or
    when encoder or decoder are missing.
    """
    model = without_data_parallel(model)
    if "model" in model:
        raise WeightsMismatch("This is the whole checkpoint file; accepted: its entry 'model', a flat state dict.")
    if BARE_ENCODER in model:
        raise WeightsMismatch("This is a torchvision state dict (an encoder without prefixes), not a Pri3D 'model'.")
    parts: dict[str, dict[str, T]] = {}
    strange = []
    for key, value in model.items():
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
        if prefix is not None:
            parts.setdefault(PREFIXES[prefix], {})[key.removeprefix(prefix)] = value
        elif key.startswith(HEADS):
            parts.setdefault("heads", {})[key] = value
        else:
            strange.append(key)
    needed = NEEDED | (NEEDED_3D if "backbone3d" in parts else {})
    missing = [f"{part}: {key}" for part, keys in needed.items() for key in keys if key not in parts.get(part, {})]
    if strange or missing:
        accepted = ", ".join(repr(prefix) for prefix in (*PREFIXES, *HEADS))
        raise WeightsMismatch(
            f"Not a Pri3D 'model': {len(strange)} keys belong to no part (such as {strange[:3]}), "
            f"missing are {missing}. Accepted prefixes: {accepted}."
        )
    return parts


def convert_pri3d(format: str, state: State, networks: Networks) -> Converted:
    """Convert to encoder and decoder of the 2D U-Net, and heads (all other weights); see `convert.convert`."""
    parts = split_pri3d({key: key for key in state})
    targets = {key: (role, ours) for role in ("encoder", "decoder") for ours, key in parts[role].items()}
    targets |= {key: (HEADS_ROLE, f"backbone3d.{ours}") for ours, key in parts.get("backbone3d", {}).items()}
    targets |= {
        key: (HEADS_ROLE, ours) for ours, key in parts.get("heads", {}).items() if not ours.startswith(CONSTANT)
    }
    return assign(format, state, targets, networks)
