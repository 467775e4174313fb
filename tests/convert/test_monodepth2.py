"""Depth networks in monodepth2's layout: one file or two, with our head or with those for disparity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from geo_pretrain.backbones.build import build, network_states
from geo_pretrain.catalog import Arch
from geo_pretrain.convert import convert
from geo_pretrain.errors import WeightsMismatch
from tests.authors_files import layout
from tests.convert.test_formats import assert_same, made_file

ARCH = Arch("resnet_depth_unet", {"depth": 18})
NETWORKS = network_states(ARCH)
MADE = made_file("monodepth2")
FILE: dict[str, Any] = dict(MADE.content)


def prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_one_file_gives_encoder_and_decoder(prefix: str):
    converted = convert("monodepth2", prefixed(prefix, FILE), NETWORKS)
    assert_same(converted.weights, MADE.expected)
    assert converted.report.unexpected == ("encoder.encoder.fc.weight", "encoder.encoder.fc.bias")
    network = build(ARCH, decoder=True)
    network.encoder.load_state_dict(converted.weights["encoder"])
    network.decoder.load_state_dict(converted.weights["decoder"])


def test_numbers_go_to_their_levels():
    """Written out once more, by hand, for the ends and the middle."""
    decoder = convert("monodepth2", FILE, NETWORKS).weights["decoder"]
    for number, name in ((0, "upconv4_0"), (1, "upconv4_1"), (2, "upconv3_0"), (7, "upconv1_1"), (9, "upconv0_1")):
        for leaf in ("weight", "bias"):
            assert decoder[f"{name}.{leaf}"] is FILE[f"decoder.decoder.{number}.conv.conv.{leaf}"]
    assert decoder["head.weight"] is FILE["decoder.decoder.10.conv.weight"]


def test_of_two_files_each_gives_its_part():
    encoder = layout("monodepth2", part="encoder")
    converted = convert("monodepth2", encoder.content, NETWORKS)
    assert_same(converted.weights, encoder.expected)
    assert set(converted.weights) == {"encoder"}
    assert set(converted.report.unexpected) == {
        "encoder.fc.weight", "encoder.fc.bias", "height", "width", "use_stereo",
    }  # fmt: skip
    decoder = layout("monodepth2", part="depth")
    converted = convert("monodepth2", decoder.content, NETWORKS)
    assert_same(converted.weights, decoder.expected)
    assert set(converted.weights) == {"decoder"}


def test_disparity_at_four_scales_is_one_head_and_three_more():
    made = layout("monodepth2", part="depth", scales=4, out_chans=1)
    networks = network_states(Arch("resnet_depth_unet", {"depth": 18, "out_chans": 1}))
    converted = convert("monodepth2", made.content, networks)
    assert_same(converted.weights, made.expected)
    assert set(converted.weights["heads"]) == {f"dispconv{s}.{leaf}" for s in (1, 2, 3) for leaf in ("weight", "bias")}
    assert converted.weights["decoder"]["head.weight"].shape == (1, 16, 3, 3)
    assert converted.weights["heads"]["dispconv3.weight"].shape == (1, 128, 3, 3)


def test_an_encoder_alone_can_be_had_of_a_whole_file():
    resnet = network_states(Arch("resnet", {"depth": 18}))
    converted = convert("monodepth2", FILE, resnet)
    assert set(converted.weights) == {"encoder"}
    assert len(converted.report.unexpected) == 22 + 2


def without(key: str) -> dict[str, Tensor]:
    return {k: v for k, v in FILE.items() if k != key}


@pytest.mark.parametrize(
    "state, message",
    [
        (without("decoder.decoder.3.conv.conv.bias"), r"'monodepth2: decoder': 21 of 22 .*\(1\): upconv3_1.bias \[1"),
        (without("encoder.encoder.layer1.0.conv1.weight"), "'monodepth2: encoder': 119 of 120"),
        (without("decoder.decoder.0.conv.conv.weight"), "'monodepth2': 21 keys are no part of a depth network, such as "
         "'decoder.decoder.0.conv.conv.bias', .* accepted are files with 'encoder.encoder.conv1.weight', 'encoder."),
        (without("encoder.encoder.conv1.weight"), "121 keys are no part of a depth network"),
        (FILE | {"decoder.decoder.14.conv.weight": torch.zeros(2)}, "1 keys .* such as 'decoder.decoder.14.conv"),
        (FILE | {"decoder.decoder.10.conv.conv.weight": torch.zeros(2)}, "1 keys are no part"),
        (FILE | {"decoder.decoder.0.conv.weight": torch.zeros(2)}, "1 keys are no part"),
        (FILE | {"pose.conv1.weight": torch.zeros(2)}, "1 keys are no part of a depth network, such as 'pose.conv1"),
        (prefixed("encoder.", FILE), "no part of a depth network"),
        (dict(layout("monodepth2", scales=4, out_chans=1).content), r"20 of 22 .* Missing \(2\): head.weight \[16, 16, "
         r"3, 3\], head.bias \[16\]\. In the file instead \(2\): head.weight \[1, 16, 3, 3\]"),
        ({"height": 192, "width": 640}, "0 keys are no part of a depth network, such as none"),
    ],
)  # fmt: skip
def test_other_files_are_refused(state: dict[str, Any], message: str):
    with pytest.raises(WeightsMismatch, match=message):
        convert("monodepth2", state, NETWORKS)


def test_a_decoder_is_no_encoder():
    with pytest.raises(
        WeightsMismatch, match="'monodepth2': the file holds nothing; this network is made of 'encoder'"
    ):
        convert("monodepth2", layout("monodepth2", part="depth").content, network_states(Arch("resnet", {"depth": 18})))
