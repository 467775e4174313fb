"""Detectron2's names against lists written by hand from its own network, in both directions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geo_pretrain.backbones.build import network_states
from geo_pretrain.catalog import Arch
from geo_pretrain.convert import convert
from geo_pretrain.convert.detectron2 import from_detectron2, to_detectron2
from geo_pretrain.errors import WeightsMismatch
from tests.authors_files import layout

R18, R50 = network_states(Arch("resnet", {"depth": 18})), network_states(Arch("resnet", {"depth": 50}))
LEAVES = ("weight", "bias", "running_mean", "running_var")
MADE = layout("detectron2")


def normed(theirs: str, conv: str, norm: str) -> dict[str, str]:
    """A convolution with its norm: Detectron2's names -> torchvision's."""
    pairs = {f"{theirs}.weight": f"{conv}.weight"}
    return pairs | {f"{theirs}.norm.{leaf}": f"{norm}.{leaf}" for leaf in LEAVES}


def table(depth: int) -> dict[str, str]:
    """Every tensor of a network with norms: stage by stage, block by block."""
    names = normed("stem.conv1", "conv1", "bn1")
    blocks, convs = ((2, 2, 2, 2), 2) if depth == 18 else ((3, 4, 6, 3), 3)
    for stage, count in enumerate(blocks):
        for block in range(count):
            theirs, ours = f"res{stage + 2}.{block}", f"layer{stage + 1}.{block}"
            for conv in range(1, convs + 1):
                names |= normed(f"{theirs}.conv{conv}", f"{ours}.conv{conv}", f"{ours}.bn{conv}")
            if block == 0 and (stage > 0 or depth == 50):
                names |= normed(f"{theirs}.shortcut", f"{ours}.downsample.0", f"{ours}.downsample.1")
    return names


@pytest.mark.parametrize("depth, count", [(18, 100), (50, 265)])
def test_every_name_has_its_partner_in_both_directions(depth: int, count: int):
    names = table(depth)
    assert len(names) == len(set(names.values())) == count
    network = (R18 if depth == 18 else R50)["encoder"]
    assert set(names.values()) == {key for key in network if not key.endswith("num_batches_tracked")}
    values = {key: object() for key in names}
    ours = from_detectron2(values)
    assert ours == {names[key]: value for key, value in values.items()}
    assert to_detectron2(ours) == values
    assert list(to_detectron2(ours)) == list(values)  # in the order given


def test_counters_and_classifier_are_renamed_too():
    pairs = {
        "stem.conv1.norm.num_batches_tracked": "bn1.num_batches_tracked",
        "res4.5.conv3.norm.num_batches_tracked": "layer3.5.bn3.num_batches_tracked",
        "res3.0.shortcut.norm.num_batches_tracked": "layer2.0.downsample.1.num_batches_tracked",
        "stem.fc.weight": "fc.weight",
        "stem.fc.bias": "fc.bias",
    }
    values = dict.fromkeys(pairs, 1)
    assert list(from_detectron2(values)) == list(pairs.values())
    assert list(to_detectron2(from_detectron2(values))) == list(pairs)
    assert list(from_detectron2({"linear.weight": 1})) == ["fc.weight"]


def test_names_of_others_are_refused():
    for key in (
        "res2_0_branch2a_w", "res1.0.conv1.weight", "res6.0.conv1.weight", "res2.0.conv4.weight", "conv1.weight",
        "res2.0.conv1.norm.kernel", "stem.conv1.norm", "res2.x.conv1.weight", "layer1.0.conv1.weight",
    ):  # fmt: skip
        with pytest.raises(
            WeightsMismatch, match=f"Detectron2's ResNet has no '{key}'; accepted are keys such as 'res"
        ):
            from_detectron2({key: 1})
    for key in ("stem.conv1.weight", "layer0.0.conv1.weight", "layer5.0.conv1.weight", "layer1.0.downsample.2.weight",
                "layer1.0.bn4.weight", "encoder.conv1.weight", "up1.conv1.weight"):  # fmt: skip
        with pytest.raises(WeightsMismatch, match=f"torchvision's ResNet has no '{key}'; accepted are keys such as 'l"):
            to_detectron2({key: 1})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"counters": True},
        {"fc": True},
        {"prefix": "backbone."},
        {"prefix": "backbone.bottom_up."},
        {"prefix": "backbone.bottom_up.", "detector": True},
    ],
)
def test_arrays_become_the_encoder(options: dict[str, bool]):
    made = layout("detectron2", **options)
    converted = convert("detectron2", made.state, R18)
    assert list(converted.weights) == ["encoder"]
    assert list(converted.weights["encoder"]) == list(R18["encoder"])
    for key, value in made.expected["encoder"].items():
        given = converted.weights["encoder"][key]
        assert given.dtype == value.dtype, key
        assert torch.equal(given, value), key
    assert len(converted.report.added) == (0 if options.get("counters") else 20)
    left = set(converted.report.unexpected)
    if options.get("fc"):
        assert left == {"stem.fc.weight", "stem.fc.bias"}
    elif options.get("detector"):
        assert left == {
            "backbone.fpn_lateral2.weight",
            "backbone.fpn_lateral2.bias",
            "proposal_generator.rpn_head.conv.bias",
            "roi_heads.box_predictor.cls_score.bias",
        }
    else:
        assert left == set()


def test_the_deep_network_too():
    made = layout("detectron2", arch=Arch("resnet", {"depth": 50}))
    converted = convert("detectron2", made.state, R50)
    assert len(converted.weights["encoder"]) == 318
    assert len(converted.report.added) == 53
    with pytest.raises(WeightsMismatch, match=r"of 120 tensors match this network"):
        convert("detectron2", made.state, R18)


def changed(remove: str = "", **add: np.ndarray) -> dict[str, np.ndarray]:
    state = {key: value for key, value in MADE.state.items() if key != remove}
    return state | {key.replace("__", "."): value for key, value in add.items()}


@pytest.mark.parametrize(
    "state, message",
    [
        (changed("stem.conv1.weight"), r"'detectron2': no ResNet in keys such as 'stem.conv1.norm.weight', .*; accepted"
         r" are files with one of 'stem.conv1.weight', 'backbone.bottom_up.stem.conv1.weight', 'backbone.stem"),
        (changed("res3.0.shortcut.weight"), r"119 of 120 .* Missing \(1\): layer2.0.downsample.0.weight \[128, 64, 1"),
        (changed(stem__conv1__weight=np.zeros((8, 3, 7, 7), "f4")), r"instead \(1\): conv1.weight \[8, 3, 7, 7\]"),
        (changed(rpn__weight=np.zeros(3)), "Detectron2's ResNet has no 'rpn.weight'"),
        ({f"backbone.bottom_up.{key}": value for key, value in changed("res5.1.conv2.weight").items()}, "119 of 120"),
        ({"conv1_w": np.zeros(3), "res2_0_branch2a_w": np.zeros(3)}, "no ResNet in keys such as 'conv1_w', 'res2_0_br"),
        ({f"module.{key}": value for key, value in MADE.state.items()}, "no ResNet in keys such as 'module.stem.conv1"),
    ],
)  # fmt: skip
def test_other_files_are_refused(state: dict[str, np.ndarray], message: str):
    with pytest.raises(WeightsMismatch, match=message):
        convert("detectron2", state, R18)
