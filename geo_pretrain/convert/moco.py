"""ResNets pre-trained with MoCo, as its code saves them or as other code has converted them.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020. A training state holds the
network twice (query and key encoder) and a queue; the query encoder is the one that is used. The conversion script of
Pri3D writes `backbone.*`, and the U-Net it is meant for expects `backbone.encoder.*`, so that nothing is loaded and
nobody is told: both are read here, and which of them a file has is seen in its keys. No ResNet found is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from geo_pretrain.convert.keys import Converted, place, shown, without_data_parallel
from geo_pretrain.convert.torchvision import SIGNS, resnet_places
from geo_pretrain.errors import WeightsMismatch

if TYPE_CHECKING:
    from torch import Tensor

# in front of the ResNet's keys, after `module.` -> what else such a file holds
PREFIXES: Mapping[str, tuple[str, ...]] = {
    "encoder_q.": ("encoder_k.", "queue"),
    "backbone.encoder.": (),
    "backbone.": (),
    "": (),
}


def convert_moco(format: str, state: Mapping[str, Tensor], networks: Mapping[str, Mapping[str, Tensor]]) -> Converted:
    """The query encoder of a flat state dict, without its projection; see `convert.convert`."""
    state = without_data_parallel(state)
    for prefix, beside in PREFIXES.items():
        if prefix + SIGNS[0] in state:
            return place(format, state, resnet_places(format, state, prefix, beside=beside), networks, counters=True)
    accepted = ", ".join(repr(prefix + SIGNS[0]) for prefix in PREFIXES)
    raise WeightsMismatch(
        f"{format!r}: no ResNet in keys such as {shown(state)}; accepted are files with one of {accepted}, after "
        "'module.' in front of every key or not."
    )
