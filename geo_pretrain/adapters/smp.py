"""Our image encoders inside the segmentation networks of segmentation-models-pytorch (smp).

Every builder gives smp's own class in evaluation mode, its encoder loaded as a whole or the call fails, all other
layers fresh:

    network = pspnet("pri3d_view_geo_r50", num_classes=20, psp_dropout=0.1).train()
    optimizer = torch.optim.SGD(parameter_groups(network, lr=0.1), momentum=0.9)

Besides `num_classes` all take `pretrained=False` (the same network with a random start), `freeze` (how many stages of
the encoder, see `common.freeze_stages`), `output_stride`, the options of `load_backbone` that say where to look (`hub`,
`revision`, `cache_dir`, `local_files_only`), `in_chans`, `strict`, `device`, `dtype`, and any option of smp's class.
The networks carry `contract`, `transforms` (an image in, their normalized input out) and `load_report`, and
`preprocessing_params` in the form of `smp.encoders.get_preprocessing_params`.

Importing this module adds the encoders "geo-resnet18", "geo-resnet34", "geo-resnet50" and "geo-resnet101" to smp's.
They are smp's ResNets with two differences: `output_stride` dilates by torchvision's rule, by which the weights were
measured (with smp's the last maps differ by a quarter of their size), and `load_state_dict` leaves the caller's dict
alone. A network that was saved with smp's `save_pretrained` names one of them, so `smp.from_pretrained` builds the same
network again after this import, and without it stops.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from geo_pretrain.adapters.common import (
    Name,
    check_request,
    equip,
    freeze_stages,
    load_encoder,
    parameter_groups,
    split_options,
)
from geo_pretrain.backbones.architectures import ENCODERS
from geo_pretrain.backbones.resnet_unet import dilate
from geo_pretrain.backbones.timm_encoder import TimmEncoder
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import require

__all__ = [
    "deeplabv3",
    "deeplabv3plus",
    "fpn",
    "freeze_stages",
    "parameter_groups",
    "pspnet",
    "unet",
    "unetplusplus",
    "upernet",
]

smp = require("segmentation_models_pytorch", "adapters")

PREFIX = "geo-"
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # of DeepLab's papers; smp takes those of 8 for 16, too
OURS = {  # what smp calls otherwise or what is not free here
    "classes": "use num_classes",
    "in_channels": "use in_chans",
    "encoder_name": "the encoder is that of the name given first",
    "encoder_weights": "use pretrained=True or False",
    "encoder_depth": "all stages of the encoder are used",
    "encoder_output_stride": "use output_stride",
}


class Encoder(smp.encoders.resnet.ResNetEncoder):  # type: ignore[name-defined]
    """smp's ResNet encoder, dilated by torchvision's rule."""

    def make_dilated(self, output_stride: int) -> None:
        """Called by smp for strides other than 32."""
        dilate(self, output_stride)

    def load_state_dict(self, state_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """As torch's; a classifier ("fc.") is passed over, as in smp, but stays in the caller's dict."""
        state = copy.copy(state_dict)  # with its _metadata
        for key in ("fc.weight", "fc.bias"):
            state.pop(key, None)  # type: ignore[attr-defined]
        return nn.Module.load_state_dict(self, state, **kwargs)


for _name in ENCODERS:
    _settings = {"encoder": Encoder, "pretrained_settings": {}}
    smp.encoders.encoders[PREFIX + _name] = {**smp.encoders.encoders[_name], **_settings}


def unet(
    name: Name, *, num_classes: int, pretrained: bool = True, freeze: int = 0, output_stride: int = 32, **options: Any
) -> Any:
    """`smp.Unet`: [B, C, H, W] -> logits [B, num_classes, H, W], any size from 32 x 32 pixels up.

    This is smp's U-Net around our encoder. Pri3D's own, whose decoder is pre-trained as well, is
    `load_backbone(name, decoder=True)`.
    """
    return _build(smp.Unet, name, num_classes, pretrained, freeze, _stride(output_stride, 32, 16, 8), options)


def unetplusplus(
    name: Name, *, num_classes: int, pretrained: bool = True, freeze: int = 0, output_stride: int = 32, **options: Any
) -> Any:
    """`smp.UnetPlusPlus`: [B, C, H, W], sides multiples of 32 -> logits [B, num_classes, H, W]. Stride 32 only."""
    return _build(smp.UnetPlusPlus, name, num_classes, pretrained, freeze, _stride(output_stride, 32), options)


def fpn(
    name: Name, *, num_classes: int, pretrained: bool = True, freeze: int = 0, output_stride: int = 32, **options: Any
) -> Any:
    """`smp.FPN`: [B, C, H, W], sides multiples of 32 -> logits [B, num_classes, H, W]. Stride 32 only."""
    return _build(smp.FPN, name, num_classes, pretrained, freeze, _stride(output_stride, 32), options)


def upernet(
    name: Name, *, num_classes: int, pretrained: bool = True, freeze: int = 0, output_stride: int = 32, **options: Any
) -> Any:
    """`smp.UPerNet`: [B, C, H, W], sides multiples of the stride -> logits [B, num_classes, H, W]."""
    return _build(smp.UPerNet, name, num_classes, pretrained, freeze, _stride(output_stride, 32, 16, 8), options)


def pspnet(
    name: Name, *, num_classes: int, pretrained: bool = True, freeze: int = 0, output_stride: int = 8, **options: Any
) -> Any:
    """`smp.PSPNet` on the whole encoder at stride 8, as its paper has it: logits [B, num_classes, H, W].

    smp's default ends after layer2, where most of the weights (94 % of a ResNet-50's) have not been used yet. Sides are
    multiples of the stride.
    """
    stride = _stride(output_stride, 8, 16, 32)
    options = {"upsampling": stride, **options}
    return _build(smp.PSPNet, name, num_classes, pretrained, freeze, stride, options)


def deeplabv3(
    name: Name, *, num_classes: int, pretrained: bool = True, freeze: int = 0, output_stride: int = 16, **options: Any
) -> Any:
    """`smp.DeepLabV3`: [B, C, H, W], sides multiples of the stride 16 or 8 -> logits [B, num_classes, H, W].

    Atrous rates are (6, 12, 18) at stride 16 and twice that at 8, unless `decoder_atrous_rates` says otherwise.
    """
    stride = _stride(output_stride, 16, 8)
    options = {"decoder_atrous_rates": ATROUS_RATES[stride], **options}
    return _build(smp.DeepLabV3, name, num_classes, pretrained, freeze, stride, options)


def deeplabv3plus(
    name: Name, *, num_classes: int, pretrained: bool = True, freeze: int = 0, output_stride: int = 16, **options: Any
) -> Any:
    """`smp.DeepLabV3Plus`: as `deeplabv3`, with the map of layer1 and separable convolutions in the decoder."""
    stride = _stride(output_stride, 16, 8)
    options = {"decoder_atrous_rates": ATROUS_RATES[stride], **options}
    return _build(smp.DeepLabV3Plus, name, num_classes, pretrained, freeze, stride, options)


def _build(
    host: Any, name: Name, num_classes: int, pretrained: bool, freeze: int, output_stride: int, options: dict[str, Any]
) -> Any:
    title = f"smp.{host.__name__}"
    signature = inspect.signature(host.__init__).parameters.values()
    accepted = {p.name for p in signature if p.kind is p.POSITIONAL_OR_KEYWORD} - {"self", *OURS}
    load, rest = split_options(title, options, accepted, OURS)
    check_request(num_classes, freeze)
    encoder = load_encoder(name, title, pretrained=pretrained, output_stride=output_stride, **load)
    stride_name = "encoder_output_stride" if host in (smp.DeepLabV3, smp.DeepLabV3Plus) else "output_stride"
    encoder_name, more = _in_smp(encoder)
    network = host(
        encoder_name=encoder_name,
        encoder_weights=None,
        in_channels=encoder.in_chans,
        classes=num_classes,
        **({"encoder_depth": 5, stride_name: output_stride} | more | rest),
    )
    nn.Module.load_state_dict(network.encoder, encoder.state_dict())
    contract: ImageContract = encoder.contract
    network.preprocessing_params = _preprocessing(contract)
    # what smp ignores when it builds the network again from its saved configuration, and people can read there
    network.config["_geo_pretrain"] = {"name": encoder.name, "contract": contract.to_dict(), "pretrained": pretrained}
    return equip(network, encoder, freeze)


def _in_smp(encoder: Any) -> tuple[str, dict[str, Any]]:
    """The name of an encoder in smp and the options of its network; smp has any of timm's with the usual strides."""
    if not isinstance(encoder, TimmEncoder):
        return PREFIX + encoder.host_name, {}
    strides = [stride for _, stride in encoder.arguments["maps"]]
    if strides not in ([1, 2, 4, 8, 16, 32], [2, 4, 8, 16, 32], [4, 8, 16, 32]):
        raise ValueError(
            f"timm's {encoder.timm_name} has maps of strides {strides}; accepted by smp: (1, 2,) 4, 8, 16, 32. Pri3D's "
            "U-Net (load_backbone(decoder=True), network.kind unet) takes any."
        )
    return f"tu-{encoder.timm_name}", dict(encoder.arguments["options"])


def _preprocessing(contract: ImageContract) -> dict[str, Any]:
    """The contract as the parameters of smp's preprocessing."""
    return {
        "input_space": "RGB" if contract.channels == ("R", "G", "B") else "+".join(contract.channels),
        "input_range": list(contract.value_range),
        "mean": list(contract.mean),
        "std": list(contract.std),
    }


def _stride(given: int, *accepted: int) -> int:
    if given not in accepted:
        raise ValueError(f"output_stride is {given!r}; accepted by this network: {', '.join(map(str, accepted))}.")
    return given
