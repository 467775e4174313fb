"""What type checkers and editors know of loaded networks; `make types` (mypy) checks it.

An editor completes `.encode_points` after a name, and after a typed loader for folders: the types below are what
it goes by. `assert_type` fails in mypy and pyright as soon as one is lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

from torch import Tensor

import geo_pretrain as gp
from geo_pretrain.backbones.base import EncoderDecoder, FeatureEncoder
from geo_pretrain.backbones.resnet_unet import ResNetEncoder, ResNetUNet
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.contract import ImageContract, VoxelContract


def names_tell_the_network(points: Tensor, image: Tensor) -> None:
    """A name of the catalog, written as it is, says what it loads."""
    clouds = gp.load_backbone("csc_100k_srunet34", pretrained=False)
    assert_type(clouds, SRUNet)
    assert_type(clouds.encode_points(points, points), Tensor)
    assert_type(clouds.contract, VoxelContract | None)
    encoder = gp.load_backbone("pri3d_view_geo_r50", pretrained=False, out_indices=(3, 4))
    assert_type(encoder, ResNetEncoder)
    assert_type(encoder(image), list[Tensor])
    assert_type(encoder.contract, ImageContract | None)
    unet = gp.load_backbone("pri3d_view_geo_r50", decoder=True, pretrained=False)
    assert_type(unet, ResNetUNet)
    assert_type(unet(image), Tensor)


def other_texts_may_be_any_of_them(folder: Path, name: str) -> None:
    """A folder, or a name that is computed, may hold any network."""
    assert_type(gp.load_backbone(folder), ResNetEncoder | SRUNet)
    assert_type(gp.load_backbone(name, pretrained=False), ResNetEncoder | SRUNet)
    assert_type(gp.load_backbone(name, decoder=True), ResNetUNet)
    assert_type(gp.load_backbone(name, decoder=bool(name)), ResNetEncoder | ResNetUNet | SRUNet)


def typed_loaders_tell_the_network(folder: Path, points: Tensor, image: Tensor) -> None:
    """For folders, computed names and timm's encoders."""
    clouds = gp.load_point_unet(folder, device="cpu")
    assert_type(clouds, SRUNet)
    assert_type(clouds.encode_points(points), Tensor)
    encoder = gp.load_image_encoder("timm/resnet18", pretrained=False, output_stride=16)
    assert_type(encoder, FeatureEncoder)
    assert_type(encoder(image), list[Tensor])
    assert_type(encoder.feature_info, list[dict[str, Any]])
    unet = gp.load_image_unet(folder)
    assert_type(unet, EncoderDecoder)
    assert_type(unet(image), Tensor)
