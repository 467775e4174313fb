"""Authors' 3D checkpoints, laid out as their code saves them, against the key lists of their own classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from geo_pretrain.convert.pri3d import split_pri3d
from geo_pretrain.convert.sr_unet import FAMILIES, convert_sr_unet
from geo_pretrain.errors import UnknownName, WeightsMismatch

DATA = Path(__file__).resolve().parents[1] / "data"
MANIFESTS = {
    "pointcontrast": "pointcontrast_res16unet34c",
    "csc": "csc_res16unet34c",
    "votenet": "pointcontrast_res16unet34c",
    "slidr": "slidr_minkunet",
    "pri3d": "pri3d_resunet3d",
}
BLOCK = "block4.5.conv2.kernel"


def network(family: str, classes: int | None = None) -> dict[str, Tensor]:
    """The state dict of the authors' class, each slice filled with its number; a fine-tuned head for `classes`."""
    shapes = json.loads((DATA / f"{MANIFESTS[family]}.json").read_text())["keys"]
    if classes is not None:
        shapes |= {"final.kernel": [96, classes], "final.bias": [1, classes]}
    state = {}
    for key, shape in shapes.items():
        numbers = torch.arange(float(shape[0])) if shape else torch.tensor(17)
        state[key] = numbers.reshape(-1, *[1] * (len(shape) - 1)).expand(shape) if shape else numbers
    return state


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


LAYOUTS = [  # as found in their files: plain, after data-parallel training, inside a larger network
    ("pointcontrast", ""),
    ("pointcontrast", "module."),
    ("pointcontrast", "encoder."),
    ("csc", ""),
    ("csc", "module.encoder."),
    ("votenet", "backbone_net.net."),
    ("votenet", "module.backbone_net.net."),
    ("slidr", ""),
    ("slidr", "module."),
    ("pri3d", "backbone3d."),
    ("pri3d", ""),
]


@pytest.mark.parametrize("family, prefix", LAYOUTS)
def test_every_key_is_found_and_only_old_block_kernels_are_reordered(family: str, prefix: str):
    ours = network(family)
    converted, report = convert_sr_unet(family, prefixed(prefix, ours), ours)
    assert {key: value.shape for key, value in converted.items()} == {k: v.shape for k, v in ours.items()}
    assert len(report.matched) == 374
    assert report.missing == report.unexpected == ()
    changed = [key for key in ours if not torch.equal(converted[key], ours[key])]
    layout = json.loads((DATA / f"{MANIFESTS[family]}.json").read_text()).get("kernel_layout", {})
    assert changed == [key for title, keys in layout.items() if "HYBRID" in title for key in keys]
    if FAMILIES[family].me04:
        offsets = json.loads((DATA / "kernel_offsets.json").read_text())
        assert converted[BLOCK][:, 0, 0].tolist() == offsets["cube_from_hybrid"]


def test_every_family_was_visited():
    assert {family for family, _ in LAYOUTS} == set(FAMILIES) == set(MANIFESTS)


def test_another_head_is_left_out_and_reported():
    file = network("csc", classes=20)
    converted, report = convert_sr_unet("csc", file, network("csc"))
    assert report.missing == report.unexpected == ("final.kernel", "final.bias")
    assert "final.kernel" not in converted
    assert len(converted) == len(report.matched) == 372


def test_the_offset_branch_of_instance_segmentation_is_left_over():
    branch = {"offsets_pre.kernel": torch.ones(96, 96), "bntr_offset.bn.weight": torch.ones(96)}
    _, report = convert_sr_unet("csc", network("csc") | branch, network("csc"))
    assert report.unexpected == tuple(branch)
    assert report.missing == ()


def test_a_detectors_own_heads_are_left_over():
    heads = {"vgen.conv1.weight": torch.ones(2), "pnet.conv3.bias": torch.ones(2)}
    file = prefixed("backbone_net.net.", network("votenet", classes=256)) | heads
    converted, report = convert_sr_unet("votenet", file, network("votenet"))
    assert set(heads) < set(report.unexpected)
    assert "backbone_net.net.final.kernel" in report.unexpected
    assert len(converted) == 372


def test_the_3d_part_of_a_whole_pri3d_model_is_found():
    keys = json.loads((DATA / "pri3d_full_model_r18.json").read_text())["keys"]
    model = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    for state in (model, split_pri3d(model)["backbone3d"]):
        converted, report = convert_sr_unet("pri3d", state, network("pri3d"))
        assert len(converted) == 374
        assert report.missing == ()


def without(key: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != key}


PC = network("pointcontrast")


@pytest.mark.parametrize(
    "family, state, message",
    [
        ("pointcontrast", {"state_dict": PC, "curr_iter": 1}, "whole checkpoint file; accepted: its entry 'state_"),
        ("slidr", {"model_points": PC, "config": 1}, "accepted: its entry 'model_points'"),
        ("pri3d", {"model": PC, "step": 1}, "accepted: its entry 'model'"),
        ("pointcontrast", without(BLOCK, PC), r"371 of 372 tensors .* Missing \(1\): block4.5.conv2.kernel \[27, 256"),
        ("csc", PC | {"block9.kernel": torch.ones(2)}, r"372 of 372 .* In the file instead \(1\): block9.kernel \[2\]"),
        ("pointcontrast", PC | {BLOCK: torch.ones(27, 6, 8)}, r"instead \(1\): block4.5.conv2.kernel \[27, 6, 8"),
        ("slidr", network("slidr"), r"371 of 372 .* Missing \(1\): conv0p1s1.kernel \[27, 3, 32\]"),
        ("pointcontrast", prefixed("backbone3d.", PC), r"No SR-UNet of family 'pointcontrast' in keys such as \['"),
        ("csc", prefixed("backbone3d.", PC), "accepted are files with 'conv0p1s1.kernel', 'encoder.conv0p1s1.kernel'"),
        ("csc", prefixed("backbone_net.net.", PC), "Families that fit these keys: 'votenet'"),
        ("csc", prefixed("model.", PC), "Families that fit these keys: none"),
        ("csc", {}, "Families that fit these keys: none"),
    ],
)  # fmt: skip
def test_files_that_do_not_hold_the_whole_network_are_refused(family: str, state: dict[str, Tensor], message: str):
    with pytest.raises(WeightsMismatch, match=message):
        convert_sr_unet(family, state, PC)


def test_an_unknown_family_is_answered_with_the_nearest():
    with pytest.raises(
        UnknownName, match=r"Unknown family of 3D checkpoints 'pointcontrst'\. Closest: 'pointcontrast'"
    ):
        convert_sr_unet("pointcontrst", {}, {})
