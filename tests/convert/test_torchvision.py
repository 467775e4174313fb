"""torchvision's own state dicts, and what people wrap around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from geo_pretrain.backbones.build import build, network_states
from geo_pretrain.catalog import Arch
from geo_pretrain.convert import convert
from geo_pretrain.errors import WeightsMismatch
from tests.authors_files import layout

RESNET = Arch("resnet", {"depth": 18})
NETWORKS = network_states(RESNET)
FILE = dict(layout("torchvision", fc=True).content)


def prefixed(prefix: str, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in (FILE if state is None else state).items()}


@torch.no_grad()
@pytest.mark.parametrize("depth", [34, 50])
def test_torchvisions_own_network_gives_the_same_maps(depth: int):
    torch.manual_seed(depth)
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    arch = Arch("resnet", {"depth": depth})
    converted = convert("torchvision", theirs.state_dict(), network_states(arch))
    assert converted.report.unexpected == ("fc.weight", "fc.bias")
    ours = build(arch).eval()
    ours.load_state_dict(converted.weights["encoder"])
    images = torch.randn(1, 3, 64, 64)
    expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
    for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        expected = stage(expected)
    assert torch.allclose(ours(images)[4], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "module.", "module.module.", "backbone.", "module.encoder.", "model.layer4."])
def test_one_prefix_of_any_kind_is_taken_off_and_the_classifier_is_left_out(prefix: str):
    converted = convert("torchvision", prefixed(prefix), NETWORKS)
    assert list(converted.weights) == ["encoder"]
    assert list(converted.weights["encoder"]) == list(NETWORKS["encoder"])
    for key, value in converted.weights["encoder"].items():
        assert value is FILE[key]
    assert converted.report.unexpected == (f"{prefix}fc.weight", f"{prefix}fc.bias")
    assert converted.report.matched == tuple(f"encoder.{key}" for key in NETWORKS["encoder"])


def test_files_that_count_no_batches_get_zeros_and_the_report_says_so():
    old = {key: value for key, value in FILE.items() if not key.endswith("num_batches_tracked")}
    converted = convert("torchvision", old, NETWORKS)
    counters = [key for key in NETWORKS["encoder"] if key.endswith("num_batches_tracked")]
    assert len(counters) == 20
    assert converted.report.added == tuple(f"encoder.{key}" for key in counters)
    assert len(converted.report.matched) == 100
    for key in counters:
        value = converted.weights["encoder"][key]
        assert (value.dtype, value.shape, int(value)) == (torch.int64, (), 0)
    storages = {converted.weights["encoder"][key].data_ptr() for key in counters}
    assert len(storages) == 20  # each its own: training counts them up
    build(RESNET).load_state_dict(converted.weights["encoder"])


def test_one_lost_counter_is_a_lost_tensor():
    damaged = {key: value for key, value in FILE.items() if key != "layer2.0.bn1.num_batches_tracked"}
    with pytest.raises(WeightsMismatch, match=r"119 of 120 .* Missing \(1\): layer2.0.bn1.num_batches_tracked \[\]"):
        convert("torchvision", damaged, NETWORKS)


def test_a_decoder_of_the_network_is_not_in_such_a_file():
    networks = network_states(Arch("resnet_unet", {"depth": 18}))
    assert list(networks) == ["encoder", "decoder"]
    assert list(convert("torchvision", FILE, networks).weights) == ["encoder"]


def cut(*keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in FILE.items() if key not in keys}


WRONG: list[tuple[dict[str, Any], str]] = [
    (cut("layer4.1.conv2.weight"), r"'torchvision: encoder': 119 of 120 tensors match this network; all are needed\. "
     r"Missing \(1\): layer4.1.conv2.weight \[512, 512, 3, 3\]\."),
    (FILE | {"bn1.bias": torch.zeros(32)}, r"119 of 120 .* In the file instead \(1\): bn1.bias \[32\]"),
    (FILE | {"layer5.0.conv1.weight": torch.zeros(2)}, r"120 of 120 .* instead \(1\): layer5.0.conv1.weight \[2\]"),
    (cut("conv1.weight"), r"'torchvision': No ResNet in keys such as 'bn1.weight', 'bn1.bias', 'bn1.running_mean' "
     r"and 118 more; accepted is one state dict with torchvision's names \('conv1.weight' and 'layer1.0.conv1.weight'"),
    (prefixed("q.") | prefixed("k."), "2 ResNets, under 'q.', 'k.', in keys"),
    (prefixed("net.") | {"head.weight": torch.zeros(2)}, r"1 keys are no part of its ResNet, such as 'head.weight'; "
     r"accepted is what begins with 'net.'"),
    (prefixed("net.") | {"step": torch.zeros(()), "fc.weight": torch.zeros(2)}, "2 keys are no part of its ResNet"),
    ({}, "No ResNet in keys such as none"),
]  # fmt: skip


@pytest.mark.parametrize("state, message", WRONG)
def test_other_files_are_refused(state: dict[str, Tensor], message: str):
    with pytest.raises(WeightsMismatch, match=message):
        convert("torchvision", state, NETWORKS)


def test_another_depth_is_refused():
    with pytest.raises(WeightsMismatch, match=r"'torchvision: encoder': \d+ of 318 tensors match this network"):
        convert("torchvision", FILE, network_states(Arch("resnet", {"depth": 50})))
    deeper = {key: torch.empty(value.shape) for key, value in torchvision.models.resnet34().state_dict().items()}
    with pytest.raises(WeightsMismatch, match=r"120 of 120 .* In the file instead \(96\): layer1.2.conv1.weight"):
        convert("torchvision", deeper, NETWORKS)
