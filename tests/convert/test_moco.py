"""MoCo's files: its training state, and what conversion scripts have made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from geo_pretrain.backbones.build import network_states
from geo_pretrain.catalog import Arch
from geo_pretrain.convert import FORMATS, convert
from geo_pretrain.errors import WeightsMismatch
from tests.authors_files import layout
from tests.convert.test_formats import made_file

NETWORKS = network_states(Arch("resnet", {"depth": 18}))
RAW = layout("moco")
VARIANTS = [
    "backbone.",
    "backbone.encoder.",
    "module.backbone.",
    "module.backbone.encoder.",
    "encoder_q.",
    "",
    "module.",
]


def assert_same(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(given) == list(expected)
    assert all(torch.equal(given[key], expected[key]) for key in expected)


def test_of_a_training_state_the_query_encoder_is_taken_without_its_projection():
    converted = convert("moco", RAW.state, NETWORKS)
    assert list(converted.weights) == ["encoder"]
    assert_same(converted.weights["encoder"], RAW.expected["encoder"])
    left = converted.report.unexpected
    assert {"queue", "queue_ptr", "encoder_q.fc.0.weight", "encoder_q.fc.2.bias"} < set(left)
    assert sum(key.startswith("encoder_k.") for key in left) == 124
    assert len(left) == 124 + 4 + 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fc", [False, True])
def test_converted_files_are_told_by_their_keys(variant: str, fc: bool):
    made = layout("moco", variant=variant, fc=fc)
    converted = convert("moco", made.state, NETWORKS)
    assert_same(converted.weights["encoder"], made.expected["encoder"])
    assert len(converted.report.unexpected) == (4 if fc else 0)


@pytest.mark.parametrize("entry", ["state_dict", "model", ""])
def test_its_state_dict_lies_where_the_table_says(entry: str):
    made = layout("moco", variant="backbone.", entry=entry)
    found = next(name for name in FORMATS["moco"].entries if not name or name in made.content)
    assert found == entry


def test_files_without_batch_counters_get_zeros():
    made = layout("moco", counters=False)
    converted = convert("moco", made.state, NETWORKS)
    assert_same(converted.weights["encoder"], made.expected["encoder"])
    assert len(converted.report.added) == 20


def renamed(old: str, new: str) -> dict[str, Any]:
    return {key.replace(old, new): value for key, value in RAW.state.items()}


@pytest.mark.parametrize(
    "state, message",
    [
        (renamed("module.encoder_q.", "module.base."), r"'moco': no ResNet in keys such as 'base.conv1.weight', .*; "
         r"accepted are files with one of 'encoder_q.conv1.weight', 'backbone.encoder.conv1.weight', 'backbone.conv1."),
        ({k: v for k, v in RAW.state.items() if "encoder_q" not in k}, "no ResNet in keys such as 'encoder_k.conv1"),
        ({f"module.{k}": v for k, v in RAW.state.items()}, "no ResNet in keys such as 'module.encoder_q.conv1.weight'"),
        (renamed("module.queue_ptr", "module.surprise"), "1 keys are no part of its ResNet, such as 'surprise'; "
         "accepted is what begins with 'encoder_q.', 'encoder_k.', 'queue'"),
        ({k: v for k, v in RAW.state.items() if k != "module.encoder_q.layer4.0.downsample.0.weight"}, "119 of 120"),
        (dict(RAW.state) | {"module.encoder_q.bn1.bias": torch.zeros(3)}, r"file instead \(1\): bn1.bias \[3\]"),
        (dict(layout("moco", variant="backbone.").state) | {"w2d.bias": torch.zeros(64)},
         "1 keys are no part of its ResNet, such as 'w2d.bias'; accepted is what begins with 'backbone.'"),
        (dict(made_file("pri3d").state), r"\d+ keys are no part of its ResNet, such as 'backbone.decoder.up1.conv1"),
    ],
)  # fmt: skip
def test_other_files_are_refused(state: dict[str, Any], message: str):
    with pytest.raises(WeightsMismatch, match=message):
        convert("moco", state, NETWORKS)
