"""The typed loaders give what their types say, and tell the right one. What checkers see: tests/typing_cases.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import geo_pretrain as gp
from geo_pretrain.backbones.base import EncoderDecoder, FeatureEncoder
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.catalog import Arch, names
from tests.zoo import write_tiny, write_tiny_3d


def test_folders_load_as_what_they_are(tmp_path: Path):
    images = write_tiny(tmp_path / "images").folder
    points = write_tiny_3d(tmp_path / "points").folder
    encoder, unet = gp.load_image_encoder(images, out_indices=(4,)), gp.load_image_unet(images)
    assert isinstance(encoder, FeatureEncoder)
    assert len(encoder(torch.zeros(1, 3, 32, 32))) == 1
    assert isinstance(unet, EncoderDecoder)
    assert isinstance(gp.load_point_unet(points), SRUNet)
    for load, folder, right in (
        (gp.load_image_encoder, points, "point clouds: load_point_unet loads it"),
        (gp.load_point_unet, images, "images: load_image_encoder loads it"),
    ):
        with pytest.raises(ValueError, match=right):
            load(folder)


def test_a_name_of_another_kind_is_told_before_anything_is_fetched():
    with pytest.raises(ValueError, match="'csc_100k_srunet34' takes point clouds: load_point_unet loads it"):
        gp.load_image_encoder("csc_100k_srunet34")
    with pytest.raises(ValueError, match="'csc_100k_srunet34' takes point clouds"):
        gp.load_image_unet("csc_100k_srunet34")
    with pytest.raises(ValueError, match="'pri3d_view_r18' takes images: load_image_encoder loads it"):
        gp.load_point_unet("pri3d_view_r18")
    with pytest.raises(ValueError, match=r"an encoder alone .*; drop decoder=True, or use load_image_encoder"):
        gp.load_image_unet("moco_v2_r18.rooms")


def test_types_of_names_are_the_architectures_that_load():
    """The overloads of load_backbone promise a ResNetEncoder for every name of images, an SRUNet for every other."""
    for name in names.ImageName.__args__:
        assert gp.backbone_info(name).arch.encoder_alone.name == "resnet"
    for name in names.PointName.__args__:
        assert gp.backbone_info(name).arch == Arch("sr_unet", gp.backbone_info(name).arch.args)
