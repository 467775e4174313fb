"""Splitting authors' checkpoints, against the key list of their own class (never our own state dict)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.convert.pri3d import split_pri3d
from geo_pretrain.errors import WeightsMismatch

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture(scope="module")
def model() -> dict[str, torch.Tensor]:
    keys = json.loads((DATA / "pri3d_full_model_r18.json").read_text())["keys"]
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


def test_every_key_of_a_full_checkpoint_lands_in_its_part(model: dict[str, torch.Tensor]):
    parts = split_pri3d(model)
    assert {part: len(keys) for part, keys in parts.items()} == {
        "encoder": 120, "decoder": 74, "backbone3d": 374, "heads": 7,
    }  # fmt: skip
    assert parts["encoder"]["conv1.weight"] is model["backbone.encoder.conv1.weight"]
    assert parts["decoder"]["up1.conv1_2.weight"] is model["backbone.decoder.up1.conv1_2.weight"]
    assert parts["backbone3d"]["conv0p1s1.kernel"] is model["backbone3d.conv0p1s1.kernel"]
    assert parts["heads"]["w2d.weight"] is model["w2d.weight"]


def test_the_parts_fit_our_network_key_by_key_and_shape_by_shape(model: dict[str, torch.Tensor]):
    parts = split_pri3d(model)
    with torch.device("meta"):
        network = ResNetUNet(18)
    for part, module in (("encoder", network.encoder), ("decoder", network.decoder)):
        assert {k: v.shape for k, v in parts[part].items()} == {k: v.shape for k, v in module.state_dict().items()}


def test_a_data_parallel_prefix_is_removed(model: dict[str, torch.Tensor]):
    wrapped = {f"module.{key}": value for key, value in model.items()}
    assert split_pri3d(wrapped) == split_pri3d(model)


def test_a_view_checkpoint_has_no_3d_part(model: dict[str, torch.Tensor]):
    view = {k: v for k, v in model.items() if not k.startswith(("backbone3d.", "w2d.", "w3d."))}
    parts = split_pri3d(view)
    assert set(parts) == {"encoder", "decoder", "heads"}
    assert set(parts["heads"]) == {"headnet.weight", "headnet.bias", "headloss.get_gradient.edge_conv.weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {"model": m, "step": 5}, "its entry 'model'"),
        (lambda m: {k.removeprefix("backbone.encoder."): v for k, v in m.items()}, "torchvision state dict"),
        (lambda m: {k: v for k, v in m.items() if ".decoder." not in k}, r"missing are \['decoder: up1"),
        (lambda m: m | {"surprise.weight": 1}, r"1 keys belong to no part \(such as \['surprise.weight'\]\)"),
        (lambda m: {k: v for k, v in m.items() if k != "backbone3d.final.kernel"}, r"\['backbone3d: final.kernel'\]"),
        (lambda m: {k.replace("backbone.", "net."): v for k, v in m.items()}, "Accepted prefixes: 'backbone.encoder.'"),
        (lambda m: {}, "missing are"),
    ],
)
def test_other_files_are_refused(model: dict[str, torch.Tensor], change, message: str):
    with pytest.raises(WeightsMismatch, match=message):
        split_pri3d(change(model))
