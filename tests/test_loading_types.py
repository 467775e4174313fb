"""Types of weights: what a network needs, what may be asked for, what float16 cannot hold."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from geo_pretrain.catalog import Arch
from geo_pretrain.errors import WeightsMismatch
from geo_pretrain.loading import load_backbone
from tests.zoo import role_weights, write_tiny


def test_weights_of_another_kind_of_number_are_refused(tmp_path: Path):
    encoder = role_weights("encoder")
    for key, dtype, needs in (
        ("conv1.weight", torch.int32, "floating"),
        ("bn1.num_batches_tracked", torch.float32, "whole"),
        ("bn1.num_batches_tracked", torch.bool, "whole"),
    ):
        write_tiny(
            tmp_path / "tiny",
            weights={"encoder": encoder | {key: encoder[key].to(dtype)}},
            arch=Arch("resnet", {"depth": 18, "width": 8}),
        )
        with pytest.raises(WeightsMismatch, match=rf"'{key}' is {dtype} in the file; this network needs .*{needs}"):
            load_backbone(tmp_path / "tiny")


@pytest.mark.parametrize("key", ["conv1.weight", "bn1.weight", "layer4.1.bn2.running_var"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_several_types_are_refused_unless_one_is_asked_for(tmp_path: Path, key, dtype):
    encoder = role_weights("encoder")
    weights = {"encoder": encoder | {key: encoder[key].to(dtype)}}
    write_tiny(tmp_path / "tiny", weights=weights, arch=Arch("resnet", {"depth": 18, "width": 8}))
    with pytest.raises(WeightsMismatch, match=rf"several types: .*'{key}' is {dtype}.*dtype= makes them one"):
        load_backbone(tmp_path / "tiny")
    network = load_backbone(tmp_path / "tiny", dtype=torch.float32)
    assert network(torch.zeros(1, 3, 32, 32))[0].dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, "float32"])
def test_types_that_no_weights_have_are_refused_before_anything_is_read(dtype):
    with pytest.raises(ValueError, match=r"dtype is .*; accepted: torch\.float32, torch\.float16"):
        load_backbone("pri3d_view_r18", dtype=dtype)


def test_values_that_float16_does_not_hold_are_named(tmp_path: Path):
    encoder = role_weights("encoder")
    encoder["bn1.running_var"] = torch.full_like(encoder["bn1.running_var"], 1e6)
    write_tiny(tmp_path / "tiny", weights={"encoder": encoder}, arch=Arch("resnet", {"depth": 18, "width": 8}))
    with pytest.warns(UserWarning, match=r"1 tensors .* above 65504.*infinity: 'bn1\.running_var'; .*bfloat16"):
        load_backbone(tmp_path / "tiny", dtype=torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_backbone(tmp_path / "tiny", dtype=torch.bfloat16)
