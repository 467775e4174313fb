"""SLidR's raw file: its image network in one entry, its point network in the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geo_pretrain.backbones.build import network_states
from geo_pretrain.catalog import CATALOG, Arch
from geo_pretrain.convert import FORMATS, convert
from geo_pretrain.errors import WeightsMismatch
from tests.authors_files import layout
from tests.convert.test_formats import assert_same, made_file

NETWORKS = network_states(Arch("resnet", {"depth": 18, "width": 8}))
IMAGES = made_file("slidr_images")
FILE: dict[str, Tensor] = dict(IMAGES.state)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_encoder_and_head_are_taken_apart(prefix: str):
    converted = convert("slidr_images", {prefix + key: value for key, value in FILE.items()}, NETWORKS)
    assert_same(converted.weights, IMAGES.expected)
    assert converted.weights["heads"]["decoder.0.weight"].shape == (64, 64, 1, 1)
    assert converted.report.unexpected == converted.report.added == ()


def test_a_classifier_is_left_out():
    converted = convert("slidr_images", FILE | {"encoder.fc.weight": torch.zeros(1000, 512)}, NETWORKS)
    assert converted.report.unexpected == ("encoder.fc.weight",)


def test_both_networks_of_the_published_raw_file_are_read():
    raw = layout("slidr", raw=True)
    entry = CATALOG["slidr_srunet34.nuscenes"]
    points = convert("slidr", raw.content["model_points"], network_states(entry.arch))
    assert_same(points.weights, raw.expected)
    images = raw.content["model_images"]
    converted = convert("slidr_images", images, network_states(Arch("resnet", {"depth": 50})))
    assert torch.equal(converted.weights["encoder"]["layer4.2.conv3.weight"], images["encoder.layer4.2.conv3.weight"])
    assert converted.weights["heads"]["decoder.0.weight"].shape == (64, 2048, 1, 1)
    assert [FORMATS[name].entries for name in ("slidr", "slidr_images")] == [("model_points",), ("model_images",)]


@pytest.mark.parametrize(
    "state, message",
    [
        ({k: v for k, v in FILE.items() if k != "encoder.layer2.0.bn1.weight"}, "'slidr_images: encoder': 119 of 120"),
        ({k: v for k, v in FILE.items() if k != "encoder.conv1.weight"}, "not an image network of SLidR: keys such as"),
        (FILE | {"decoder.1.weight": torch.zeros(2)}, "SLidR: keys such as 'decoder.1.weight'; accepted are files with "
         "'encoder.conv1.weight' and nothing but 'encoder.' and 'decoder.0.'"),
        (FILE | {"encoder.bn1.bias": torch.zeros(2)}, r"instead \(1\): bn1.bias \[2\]"),
        (dict(made_file("slidr").state), "not an image network of SLidR: keys such as 'conv0p1s1.kernel'"),
    ],
)  # fmt: skip
def test_other_files_are_refused(state: dict[str, Tensor], message: str):
    with pytest.raises(WeightsMismatch, match=message):
        convert("slidr_images", state, NETWORKS)
