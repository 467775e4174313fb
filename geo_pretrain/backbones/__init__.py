"""The networks, and the one table that says which class an architecture's name stands for (no torch here)."""

from __future__ import annotations

from collections.abc import Mapping

# name in catalog entries and checkpoint folders -> "module:class"
ARCHITECTURES: Mapping[str, str] = {
    "resnet": "geo_pretrain.backbones.resnet_unet:ResNetEncoder",
    "resnet_unet": "geo_pretrain.backbones.resnet_unet:ResNetUNet",
    "resnet_depth_unet": "geo_pretrain.backbones.depth_unet:ResNetDepthUNet",
    "sr_unet": "geo_pretrain.backbones.sr_unet:SRUNet",
}
# the files that hold such a network; of two, the first is enough for one without decoder
WEIGHT_FILES: Mapping[str, tuple[str, ...]] = {
    "resnet": ("encoder",),
    "resnet_unet": ("encoder", "decoder"),
    "resnet_depth_unet": ("encoder", "decoder"),
    "sr_unet": ("model",),
}
