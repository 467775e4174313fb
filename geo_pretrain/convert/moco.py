"""Convert ResNets pre-trained with MoCo, in its own training state or already converted by Pri3D's script.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020. A training state holds the
network twice (query and key encoder) and a queue; the query encoder is used. Pri3D's conversion script writes
`backbone.*` while its U-Net expects `backbone.encoder.*` and silently loads nothing: both prefixes are read here. A
file without a ResNet is an error.
"""

from __future__ import annotations

from collections.abc import Mapping

from geo_pretrain.convert.keys import Converted, Networks, State, assign, shown, without_data_parallel
from geo_pretrain.convert.torchvision import SIGNS, resnet_targets
from geo_pretrain.errors import WeightsMismatch

# prefix of the ResNet's keys, after `module.` -> prefixes of what else such a file holds
PREFIXES: Mapping[str, tuple[str, ...]] = {
    "encoder_q.": ("encoder_k.", "queue"),
    "backbone.encoder.": (),
    "backbone.": (),
    "": (),
}


def convert_moco(format: str, state: State, networks: Networks) -> Converted:
    """Convert to the query encoder, without its projection head; see `convert.convert`."""
    state = without_data_parallel(state)
    for prefix, beside in PREFIXES.items():
        if prefix + SIGNS[0] in state:
            return assign(format, state, resnet_targets(format, state, prefix, beside=beside), networks, counters=True)
    accepted = ", ".join(repr(prefix + SIGNS[0]) for prefix in PREFIXES)
    raise WeightsMismatch(
        f"{format!r}: no ResNet in keys such as {shown(state)}; accepted are files with one of {accepted}, after "
        "'module.' in front of every key or not."
    )
