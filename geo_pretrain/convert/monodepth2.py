"""Depth networks in the layout that monodepth2 made common: a ResNet encoder and a numbered decoder.

Godard et al., "Digging Into Self-Supervised Monocular Depth Estimation", ICCV 2019. Known from the key list of such a
network alone; their code, whose license is non-commercial, was not used. Encoder and decoder lie in one file
(`encoder.encoder.*`, `decoder.decoder.*`) or in two (`encoder.*` with the image's size beside it, `decoder.*`).

The decoder's numbers: 0 to 9 are the convolutions of levels 4 to 0, two a level; 10 is the output at full resolution,
our `head`, where the channels agree; 11 to 13 are outputs at coarser scales and become "heads".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from geo_pretrain.convert.keys import HEADS, Converted, place, shown, without_data_parallel
from geo_pretrain.convert.torchvision import CLASSIFIER, SIGNS
from geo_pretrain.errors import WeightsMismatch

if TYPE_CHECKING:
    from torch import Tensor

ENCODERS = ("encoder.encoder.", "encoder.")
DECODERS = ("decoder.decoder.", "decoder.")
FIRST = "0.conv.conv.weight"  # of a decoder
CONV = re.compile(r"(?P<number>\d)\.conv\.conv\.(?P<leaf>weight|bias)")
OUTPUT = re.compile(r"1(?P<scale>[0-3])\.conv\.(?P<leaf>weight|bias)")


def convert_monodepth2(
    format: str, state: Mapping[str, Tensor], networks: Mapping[str, Mapping[str, Tensor]]
) -> Converted:
    """Encoder, decoder, or both, as the file has them; see `convert.convert`."""
    state = without_data_parallel(state)
    encoder = next((prefix for prefix in ENCODERS if prefix + SIGNS[0] in state), None)
    decoder = next((prefix for prefix in DECODERS if prefix + FIRST in state), None)
    places: dict[str, tuple[str, str]] = {}
    strange = []
    for key in state:
        if encoder is not None and key.startswith(encoder):
            name = key.removeprefix(encoder)
            if not name.startswith(CLASSIFIER):
                places[key] = ("encoder", name)
        elif decoder is not None and key.startswith(decoder):
            found = _decoder_place(key.removeprefix(decoder))
            if found is None:
                strange.append(key)
            else:
                places[key] = found
        else:
            strange.append(key)
    if strange or not places:
        accepted = ", ".join(
            repr(prefix + sign) for prefix, sign in [(p, SIGNS[0]) for p in ENCODERS] + [(p, FIRST) for p in DECODERS]
        )
        raise WeightsMismatch(
            f"{format!r}: {len(strange)} keys are no part of a depth network, such as {shown(strange)}; accepted are "
            f"files with {accepted}."
        )
    return place(format, state, places, networks, counters=True)


def _decoder_place(name: str) -> tuple[str, str] | None:
    if found := CONV.fullmatch(name):
        level, second = 4 - int(found["number"]) // 2, int(found["number"]) % 2
        return "decoder", f"upconv{level}_{second}.{found['leaf']}"
    if found := OUTPUT.fullmatch(name):
        scale = found["scale"]
        return ("decoder", f"head.{found['leaf']}") if scale == "0" else (HEADS, f"dispconv{scale}.{found['leaf']}")
    return None
