"""Our encoders as torchvision's own ResNet class, for everything that is written against it."""

from __future__ import annotations

from typing import Any

import torchvision
from torch import nn
from torchvision.models import ResNet

from geo_pretrain.backbones.resnet_unet import ResNetEncoder
from geo_pretrain.loading import load_backbone

DILATIONS = {32: [False, False, False], 16: [False, False, True], 8: [False, True, True]}


def resnet(name: str, *, num_classes: int = 1000, **load_kwargs: Any) -> ResNet:
    """A `torchvision.models.ResNet` in evaluation mode with the encoder of a checkpoint and a fresh classifier `fc`.

    `load_kwargs` are those of `load_backbone` that leave the class as it is: where to look, `pretrained`, `in_chans`,
    `output_stride` (ResNet-50 and deeper, as in torchvision), `strict`, `device`, `dtype`. The network carries
    `contract`, `transforms` and `load_report` as plain attributes. Raises ValueError for other arguments and for
    networks of another width than torchvision's.

    >>> resnet("pri3d_view_geo_r18", num_classes=10, pretrained=False).fc.out_features
    10
    """
    refused = {"decoder", "out_indices"} & set(load_kwargs)
    if refused:
        raise ValueError(f"{', '.join(sorted(refused))}: torchvision's ResNet has no such option; use load_backbone.")
    encoder = load_backbone(name, **load_kwargs)
    if not isinstance(encoder, ResNetEncoder) or encoder.width != 64:
        raise ValueError(f"{name!r} is not a ResNet of torchvision's width 64; use load_backbone.")
    if encoder.output_stride != 32 and encoder.depth < 50:
        raise ValueError(
            f"output_stride={encoder.output_stride}: torchvision dilates ResNet-50 and deeper; accepted: 32."
        )
    network = _empty(encoder, num_classes)
    network.load_state_dict({**network.state_dict(), **encoder.state_dict()})
    network.contract, network.load_report = encoder.contract, encoder.load_report
    network.transforms = encoder.transforms
    return network.to(encoder.conv1.weight.device, encoder.conv1.weight.dtype).eval()


def _empty(encoder: ResNetEncoder, num_classes: int) -> ResNet:
    builder = getattr(torchvision.models, f"resnet{encoder.depth}")
    network = builder(
        weights=None,
        num_classes=num_classes,
        replace_stride_with_dilation=DILATIONS[encoder.output_stride],
    )
    if encoder.in_chans != 3:
        network.conv1 = nn.Conv2d(encoder.in_chans, 64, kernel_size=7, stride=2, padding=3, bias=False)
    return network
