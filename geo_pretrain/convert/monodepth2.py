"""Convert depth networks in monodepth2's layout: a ResNet encoder and a decoder with numbered layers.

Godard et al., "Digging Into Self-Supervised Monocular Depth Estimation", ICCV 2019. Written from the key list of such a
network; their code, whose license is non-commercial, was not used. Encoder and decoder are in one file
(`encoder.encoder.*`, `decoder.decoder.*`) or in two (`encoder.*` with the image size beside it, `decoder.*`).

Decoder layers 0 to 9 are the convolutions of levels 4 to 0, two a level; layer 10 is the output at full resolution, our
`head` if the channels agree; layers 11 to 13 are outputs at coarser scales and become "heads".
"""

from __future__ import annotations

import re

from geo_pretrain.convert.keys import HEADS, Converted, Networks, State, assign, shown, without_data_parallel
from geo_pretrain.convert.torchvision import CLASSIFIER, SIGNS
from geo_pretrain.errors import WeightsMismatch

ENCODERS = ("encoder.encoder.", "encoder.")
DECODERS = ("decoder.decoder.", "decoder.")
FIRST = "0.conv.conv.weight"  # a key that every decoder has
CONV = re.compile(r"(?P<number>\d)\.conv\.conv\.(?P<leaf>weight|bias)")
OUTPUT = re.compile(r"1(?P<scale>[0-3])\.conv\.(?P<leaf>weight|bias)")


def convert_monodepth2(format: str, state: State, networks: Networks) -> Converted:
    """Convert to encoder, decoder, or both, whichever the file has; see `convert.convert`."""
    state = without_data_parallel(state)
    encoder = next((prefix for prefix in ENCODERS if prefix + SIGNS[0] in state), None)
    decoder = next((prefix for prefix in DECODERS if prefix + FIRST in state), None)
    targets: dict[str, tuple[str, str]] = {}
    strange = []
    for key in state:
        if encoder is not None and key.startswith(encoder):
            name = key.removeprefix(encoder)
            if not name.startswith(CLASSIFIER):
                targets[key] = ("encoder", name)
        elif decoder is not None and key.startswith(decoder):
            target = _decoder_target(key.removeprefix(decoder))
            if target is None:
                strange.append(key)
            else:
                targets[key] = target
        else:
            strange.append(key)
    if strange or not targets:
        accepted = ", ".join(
            repr(prefix + sign) for prefix, sign in [(p, SIGNS[0]) for p in ENCODERS] + [(p, FIRST) for p in DECODERS]
        )
        raise WeightsMismatch(
            f"{format!r}: {len(strange)} keys are no part of a depth network, such as {shown(strange)}; accepted are "
            f"files with {accepted}."
        )
    return assign(format, state, targets, networks, counters=True)


def _decoder_target(name: str) -> tuple[str, str] | None:
    if match := CONV.fullmatch(name):
        level, second = 4 - int(match["number"]) // 2, int(match["number"]) % 2
        return "decoder", f"upconv{level}_{second}.{match['leaf']}"
    if match := OUTPUT.fullmatch(name):
        scale = match["scale"]
        return ("decoder", f"head.{match['leaf']}") if scale == "0" else (HEADS, f"dispconv{scale}.{match['leaf']}")
    return None
