"""Convert the image network of SLidR's raw checkpoints: a ResNet-50 and the 1x1 convolution trained on top of it.

Sautier et al., "Image-to-Lidar Self-Supervised Distillation for Autonomous Driving Data", CVPR 2022. The ResNet is
MoCo v2's, which SLidR keeps frozen. The point network beside it is read by `sr_unet`.
"""

from __future__ import annotations

from geo_pretrain.convert.keys import HEADS, Converted, Networks, State, assign, shown, without_data_parallel
from geo_pretrain.convert.torchvision import CLASSIFIER, SIGNS
from geo_pretrain.errors import WeightsMismatch

ENCODER, HEAD = "encoder.", "decoder.0."


def convert_slidr_images(format: str, state: State, networks: Networks) -> Converted:
    """Convert to the encoder, and the 1x1 convolution as a head under its own name; see `convert.convert`."""
    state = without_data_parallel(state)
    strange = [key for key in state if not key.startswith((ENCODER, HEAD))]
    if strange or ENCODER + SIGNS[0] not in state:
        raise WeightsMismatch(
            f"{format!r}: not an image network of SLidR: keys such as {shown(strange or state)}; accepted are files "
            f"with {ENCODER + SIGNS[0]!r} and nothing but {ENCODER!r} and {HEAD!r}."
        )
    targets = {}
    for key in state:
        name = key.removeprefix(ENCODER)
        if key.startswith(HEAD):
            targets[key] = (HEADS, key)
        elif not name.startswith(CLASSIFIER):
            targets[key] = ("encoder", name)
    return assign(format, state, targets, networks, counters=True)
