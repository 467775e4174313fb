"""Splitting authors' checkpoints, against the key list of their own class (never our own state dict)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from geo_pretrain.backbones.build import network_states
from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.catalog import Arch
from geo_pretrain.convert import convert
from geo_pretrain.convert.pri3d import split_pri3d
from geo_pretrain.errors import WeightsMismatch
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.tasks import build_task
from tests.authors_files import layout
from tests.convert.test_formats import assert_same, made_file

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
        (lambda m: {k: v for k, v in m.items() if not k.startswith("w3d.")}, r"missing are \['heads: w3d.weight'\]"),
        (
            lambda m: {f"module.module.{k}": v for k, v in m.items()},
            r"575 keys belong to no part \(such as \['module.b",
        ),
        (lambda m: {k.replace("backbone.", "net."): v for k, v in m.items()}, "Accepted prefixes: 'backbone.encoder.'"),
        (lambda m: {}, "missing are"),
    ],
)
def test_other_files_are_refused(model: dict[str, torch.Tensor], change, message: str):
    with pytest.raises(WeightsMismatch, match=message):
        split_pri3d(change(model))


ARCH = Arch("resnet_unet", {"depth": 18, "width": 8})  # an eighth of the published channels, in 3D 4 of 32
UNET = network_states(ARCH)
MADE = made_file("pri3d")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_whole_file_becomes_encoder_decoder_and_heads(prefix: str):
    converted = convert("pri3d", {prefix + key: value for key, value in MADE.state.items()}, UNET)
    assert_same(converted.weights, MADE.expected)
    assert converted.report.unexpected == (f"{prefix}headloss.get_gradient.edge_conv.weight",)


@pytest.mark.parametrize("geo, depth_proxy, heads", [(True, False, 378), (False, True, 2), (False, False, 0)])
def test_losses_that_were_off_leave_no_heads(geo: bool, depth_proxy: bool, heads: int):
    made = layout("pri3d", arch=ARCH, geo=geo, depth_proxy=depth_proxy)
    converted = convert("pri3d", made.state, UNET)
    assert_same(converted.weights, made.expected)
    assert len(converted.weights.get("heads", ())) == heads


@pytest.mark.parametrize("task", ["pri3d_view_geo_r18", "pri3d_view_geo_r50", "pri3d_view_r18"])
def test_heads_are_those_of_our_own_pretext_task(task: str):
    """Name by name and shape by shape: such a folder can be measured and trained on."""
    recipe, depth = load_recipe(task, ["model.init=scratch"]), int(task[-2:])
    with torch.device("meta"):
        ours = build_task(recipe)
    expected = {key: value.shape for key, value in ours.state_dict().items() if not key.startswith("backbone.")}
    keys = json.loads((DATA / f"pri3d_full_model_r{depth}.json").read_text())["keys"]
    without = () if "geo" in task else ("backbone3d.", "w2d.", "w3d.")
    state = {key: torch.empty(keys[key], device="meta") for key in keys if not key.startswith(without)}
    state |= {
        key: torch.empty((), device="meta", dtype=torch.int64) for key in state if key.endswith("batches_tracked")
    }
    converted = convert("pri3d", state, network_states(Arch("resnet_unet", {"depth": depth})))
    assert {key: value.shape for key, value in converted.weights["heads"].items()} == expected


def test_an_encoder_alone_can_be_had():
    converted = convert("pri3d", MADE.state, network_states(Arch("resnet", {"depth": 18, "width": 8})))
    assert set(converted.weights) == {"encoder", "heads"}
    assert sum(key.startswith("backbone.decoder.") for key in converted.report.unexpected) == 74


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: {k: v for k, v in m.items() if k != "backbone.decoder.up3.bn1_2.bias"},
         r"'pri3d: decoder': 73 of 74 tensors match this .*; all are needed\. Missing \(1\): up3.bn1_2.bias \[8\]\."),
        (lambda m: {k: v for k, v in m.items() if k != "backbone.encoder.bn1.num_batches_tracked"},
         r"'pri3d: encoder': 119 of 120"),
        (lambda m: m | {"backbone.decoder.conv0.bias": torch.zeros(21)}, r"instead \(1\): conv0.bias \[21\]"),
        (lambda m: m | {"backbone.decoder.up5.conv1.weight": torch.zeros(2)}, r"74 of 74 .* \(1\): up5.conv1.weight"),
        (lambda m: {k: v for k, v in m.items() if "num_batches" not in k}, "'pri3d: encoder': 100 of 120"),
    ],
)  # fmt: skip
def test_a_network_that_is_not_whole_is_refused(change, message: str):
    with pytest.raises(WeightsMismatch, match=message):
        convert("pri3d", change(dict(MADE.state)), UNET)


def test_another_depth_is_refused():
    with pytest.raises(WeightsMismatch, match=r"'pri3d: encoder': \d+ of 318 tensors match this network"):
        convert("pri3d", MADE.state, network_states(Arch("resnet_unet", {"depth": 50, "width": 8})))


def test_a_file_without_the_3d_network_has_none_to_give():
    sparse = network_states(Arch("sr_unet", {"width": 4, "out_chans": 12, "stem_kernel": 5}))
    converted = convert("pri3d_3d", MADE.state, sparse)
    heads, prefix = MADE.expected["heads"], "backbone3d."
    assert_same(converted.weights, {"model": {k.removeprefix(prefix): heads[k] for k in heads if k.startswith(prefix)}})
    with pytest.raises(WeightsMismatch, match="No SR-UNet of family 'pri3d' in keys such as"):
        convert("pri3d_3d", layout("pri3d", arch=ARCH, geo=False).state, sparse)


def test_another_last_layer_of_a_sparse_network_is_refused():
    sparse = network_states(Arch("sr_unet", {"width": 4, "out_chans": 32, "stem_kernel": 5}))
    with pytest.raises(
        WeightsMismatch,
        match=r"'pri3d_3d': the last layer is another one: missing are final.kernel, "
        r"final.bias, shaped \[\[12, 32\], \[1, 32\]\]; the file has {'backbone3d.final.kernel': \[12, 12\]",
    ):
        convert("pri3d_3d", MADE.state, sparse)
