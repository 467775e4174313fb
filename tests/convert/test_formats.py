"""Every format as a whole: files in their authors' layout become the roles of a checkpoint folder, tensor by tensor."""

from __future__ import annotations

import importlib
import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from geo_pretrain.backbones.build import build, network_states
from geo_pretrain.catalog import Arch
from geo_pretrain.checkpoint import WEIGHT_ROLES
from geo_pretrain.convert import FORMATS, Converted, convert
from geo_pretrain.errors import UnknownName, WeightsMismatch
from geo_pretrain.sparse import SparseTensor
from tests.authors_files import STORAGE, Layout, foreign_modules, layout, manifest, write
from tests.zoo import ARCH, ARCH_3D, golden_3d, golden_file

DATA = Path(__file__).resolve().parents[1] / "data"
WIDTH = {"width": 8}  # the published networks have 64 in 2D and 32 in 3D
UNET, RESNET = Arch("resnet_unet", {"depth": 18} | WIDTH), Arch("resnet", {"depth": 18} | WIDTH)
DEPTH_UNET = Arch("resnet_depth_unet", {"depth": 18})
SR_UNET = Arch("sr_unet", {"in_chans": 3, "out_chans": 32, "normalize": True} | WIDTH)
ARCHS = {
    "pri3d": UNET,
    "pri3d_3d": Arch("sr_unet", {"in_chans": 3, "out_chans": 24, "stem_kernel": 5} | WIDTH),
    "torchvision": RESNET,
    "moco": RESNET,
    "detectron2": RESNET,
    "monodepth2": DEPTH_UNET,
    "pointcontrast": SR_UNET,
    "csc": SR_UNET,
    "votenet": SR_UNET,
    "slidr": Arch("sr_unet", {"in_chans": 1, "out_chans": 64, "normalize": True} | WIDTH),
    "slidr_images": RESNET,
}


@cache
def made_file(format: str) -> Layout:
    return layout(format, arch=ARCHS[format])


def assert_same(given: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    assert {role: set(state) for role, state in given.items()} == {role: set(s) for role, s in expected.items()}
    for role, state in expected.items():
        for key, value in state.items():
            assert given[role][key].dtype == value.dtype, (role, key)
            assert torch.equal(given[role][key], value), (role, key)


def read(path: Path, storage: str) -> Any:
    """What a host with the authors' own libraries would load."""
    with foreign_modules():
        if storage == "pickle":
            return pickle.loads(path.read_bytes())
        return torch.load(path, weights_only=False)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_yields_the_whole_network_tensor_by_tensor(format: str, tmp_path: Path):
    if format == "pri3d_3d":  # the same file as the format before
        made = made_file("pri3d_3d")
        content, expected = made.content, made.expected
    else:
        expected = write(format, tmp_path / "theirs.pth", seed=3, arch=ARCHS[format])
        content = read(tmp_path / "theirs.pth", STORAGE.get(format, "zip"))
    rule = FORMATS[format]
    entry = next(entry for entry in rule.entries if not entry or entry in content)
    state = content[entry] if entry else content
    networks = network_states(ARCHS[format])
    converted = convert(format, state, networks)
    assert_same(converted.weights, expected)
    assert set(converted.weights) <= set(rule.roles)
    check_accounts(converted, state, networks)


def check_accounts(converted: Converted, state: dict[str, Tensor], networks: dict[str, dict[str, Tensor]]) -> None:
    """Nothing is counted twice, and nothing of either side goes unmentioned."""
    report = converted.report
    heads = len(converted.weights.get("heads", ()))
    assert len(report.matched) + heads + len(report.unexpected) == len(state)
    assert report.missing == ()
    parts = set(converted.weights) & set(networks)
    assert {*report.matched, *report.added} == {f"{role}.{key}" for role in parts for key in networks[role]}
    assert not set(report.matched) & set(report.added)


def test_the_table_is_well_formed():
    assert set(ARCHS) == set(FORMATS) == {
        "pri3d", "pri3d_3d", "torchvision", "moco", "detectron2", "monodepth2", "pointcontrast", "csc", "votenet",
        "slidr", "slidr_images",
    }  # fmt: skip
    for rule in FORMATS.values():
        module, _, function = rule.function.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert set(rule.roles) <= set(WEIGHT_ROLES)
        assert rule.entries
        assert len(set(rule.entries)) == len(rule.entries)
        assert rule.text


# --- networks that compute what the released code computed ---


@torch.no_grad()
def test_a_released_image_network_computes_its_golden_outputs():
    golden = golden_file()
    names = {key: f"backbone.{key.removeprefix('state_dict.')}" for key in golden if key.startswith("state_dict.")}
    converted = convert("pri3d", {names[key]: golden[key] for key in names}, network_states(ARCH))
    network = build(ARCH, decoder=True).eval()
    for role in ("encoder", "decoder"):
        network.get_submodule(role).load_state_dict(converted.weights[role])
    difference = (network(golden["input"]) - golden["eval.out"]).abs().max() / golden["eval.out"].abs().max()
    assert difference < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("format, right", [("pointcontrast", True), ("slidr", False)])
def test_a_released_sparse_network_in_the_old_order_computes_its_golden_outputs(format: str, right: bool):
    """Said to be of a family without the old order, the same file loads and computes something else."""
    golden = golden_3d()
    table = torch.tensor(manifest("kernel_offsets")["hybrid_from_cube"])
    kernels = manifest("pointcontrast_res16unet34c")["kernel_layout"]
    (old,) = (keys for title, keys in kernels.items() if "HYBRID" in title)
    assert len(old) == 46
    state = {k.removeprefix("state_dict."): v for k, v in golden.items() if k.startswith("state_dict.")}
    state = {key: value[table] if key in old else value for key, value in state.items()}
    network = build(ARCH_3D).eval()
    network.load_state_dict(convert(format, state, network_states(ARCH_3D)).weights["model"])
    out = network(SparseTensor(golden["coords"], golden["feats"])).feats
    difference = (out - golden["eval.out"]).abs().max() / golden["eval.out"].abs().max()
    assert (difference < 1e-4) == right
    assert right or difference > 0.1


@torch.no_grad()
@pytest.mark.parametrize("format", ["torchvision", "monodepth2", "csc"])
def test_written_files_give_outputs_that_are_finite_and_vary(format: str):
    arch = ARCHS[format]
    made = made_file(format)
    weights = convert(format, made.state, network_states(arch)).weights
    network = build(arch, decoder=format == "monodepth2").eval()
    if format == "monodepth2":
        network.encoder.load_state_dict(weights["encoder"])
        network.decoder.load_state_dict(weights["decoder"])
        outputs = network(torch.randn(1, 3, 64, 64))
    elif format == "torchvision":
        network.load_state_dict(weights["encoder"])
        outputs = network(torch.randn(1, 3, 64, 64))[4]
    else:
        network.load_state_dict(weights["model"])
        coords = torch.cat([torch.zeros(200, 1), torch.randint(0, 9, (200, 3))], 1).unique(dim=0).int()
        outputs = network(SparseTensor(coords, torch.rand(len(coords), 3))).feats
    assert outputs.isfinite().all()
    assert outputs.flatten(1).std() > 1e-3


# --- what a state dict may hold beside float32 tensors ---


def resnet_state(**options: Any) -> dict[str, Tensor]:
    return dict(layout("torchvision", seed=0, arch=RESNET, **options).content)


STATE = resnet_state()
NETWORKS = network_states(RESNET)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_weights_take_the_networks_dtypes(dtype: torch.dtype):
    state = {key: value.to(dtype) if value.is_floating_point() else value.int() for key, value in STATE.items()}
    encoder = convert("torchvision", state, NETWORKS).weights["encoder"]
    assert {value.dtype for value in encoder.values()} == {torch.float32, torch.int64}
    assert torch.equal(encoder["conv1.weight"], state["conv1.weight"].float())
    assert encoder["bn1.num_batches_tracked"] == STATE["bn1.num_batches_tracked"]


def test_whole_numbers_are_no_weights():
    with pytest.raises(WeightsMismatch, match=r"encoder.conv1.weight is torch.int8; accepted is torch.float32"):
        convert("torchvision", STATE | {"conv1.weight": STATE["conv1.weight"].to(torch.int8)}, NETWORKS)
    with pytest.raises(WeightsMismatch, match=r"encoder.bn1.num_batches_tracked is torch.float32; accepted is torch.i"):
        convert("torchvision", STATE | {"bn1.num_batches_tracked": torch.tensor(1.0)}, NETWORKS)


def test_arrays_are_read_and_numbers_and_texts_left_out():
    state: dict[str, Any] = {key: value.numpy() for key, value in STATE.items()}
    state["conv1.weight"].setflags(write=False)
    state["bn1.num_batches_tracked"] = np.int64(41)
    converted = convert("torchvision", state | {"height": 192, "lr": 0.1, "note": "x"}, NETWORKS)
    assert converted.report.unexpected == ("height", "lr", "note")
    encoder = converted.weights["encoder"]
    assert torch.equal(encoder["layer4.1.bn2.running_var"], STATE["layer4.1.bn2.running_var"])
    assert encoder["bn1.num_batches_tracked"] == 41
    assert all(isinstance(value, Tensor) for value in encoder.values())
    encoder["conv1.weight"] += 1  # our own copy
    assert not np.array_equal(state["conv1.weight"], encoder["conv1.weight"].numpy())


def test_other_objects_are_refused_by_name():
    with pytest.raises(WeightsMismatch, match=r"Not a flat state dict: {'optimizer': 'dict', 'x': 'list'} among its v"):
        convert("torchvision", STATE | {"optimizer": {}, "x": [1]}, NETWORKS)
    for array in (np.array(["a"]), np.array([1j]), np.array([object()])):
        with pytest.raises(WeightsMismatch, match=f"'odd': 'ndarray of {array.dtype}'.* accepted are tensors and a"):
            convert("torchvision", STATE | {"odd": array}, NETWORKS)


# --- wrong choices ---


@pytest.mark.parametrize("format", [name for name, rule in FORMATS.items() if rule.entries[0]])
def test_the_whole_file_is_answered_with_its_entry(format: str):
    entry = FORMATS[format].entries[0]
    whole = {entry: {"conv1.weight": torch.zeros(1)}, "epoch": 3}
    with pytest.raises(WeightsMismatch, match=f"This is the whole checkpoint file; accepted: its entry '{entry}'"):
        convert(format, whole, network_states(ARCHS[format]))


def test_an_unknown_format_is_answered_with_the_nearest():
    with pytest.raises(UnknownName, match=r"Unknown checkpoint format 'detectron'. Closest: 'detectron2'"):
        convert("detectron", STATE, NETWORKS)


def test_a_format_for_another_kind_of_network_is_answered_with_those_that_fit():
    with pytest.raises(
        WeightsMismatch,
        match=r"Files of format 'csc' hold 'model'; this network is made of 'encoder', 'decoder'. "
        r"Formats that hold it: 'pri3d', 'torchvision', 'moco', 'detectron2', 'monodepth2', 'slidr_images'\.",
    ):
        convert("csc", {}, network_states(UNET))
    with pytest.raises(WeightsMismatch, match=r"Formats that hold it: 'pri3d_3d', 'pointcontrast', 'csc', 'votenet', "):
        convert("torchvision", STATE, network_states(SR_UNET))


@pytest.mark.parametrize("told", ["pri3d", "torchvision", "moco", "detectron2", "monodepth2", "slidr_images"])
def test_a_file_of_another_family_is_answered_with_the_right_one(told: str):
    files = {name: made_file(name) for name in ("pri3d", "torchvision", "detectron2", "moco", "slidr_images")}
    right = {name: f"'{name}'" for name in files} | {"torchvision": "'torchvision', 'moco'"}
    for name, made in files.items():
        if name == told or (name, told) == ("torchvision", "moco"):
            continue
        with pytest.raises(WeightsMismatch) as caught:
            convert(told, made.state, network_states(UNET if told == "pri3d" or name == "pri3d" else RESNET))
        hint = f"It does fit as format {right[name]}."
        assert hint in str(caught.value), (name, str(caught.value))


def test_sparse_networks_are_told_apart_by_their_prefix_only_and_never_proposed_for_their_shapes():
    """PointContrast's tensors would fit SLidR's rule too, in the wrong order of kernels."""
    with pytest.raises(WeightsMismatch, match=r"Families that fit these keys: 'votenet'\.$"):
        convert("csc", made_file("votenet").state, network_states(SR_UNET))
    with pytest.raises(WeightsMismatch, match="No SR-UNet of family 'votenet'") as caught:
        convert("votenet", made_file("pointcontrast").state, network_states(SR_UNET))
    assert "does fit" not in str(caught.value)


def test_no_other_format_is_proposed_when_none_fits():
    with pytest.raises(WeightsMismatch) as caught:
        convert("torchvision", {"a.weight": torch.zeros(1)}, NETWORKS)
    assert "does fit" not in str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
def test_an_empty_state_dict_is_refused(format: str):
    with pytest.raises(WeightsMismatch):
        convert(format, {}, network_states(ARCHS[format]))


VICTIMS = {"pri3d_3d": "backbone3d.block3.1.norm2.bn.weight", "detectron2": "res4.1.conv2.norm.weight"}
VICTIMS |= dict.fromkeys(("pointcontrast", "csc", "votenet", "slidr"), "block3.1.norm2.bn.weight")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("damage", ["missing", "reshaped", "double prefix", "unknown prefix"])
def test_damage_to_any_file_is_refused(format: str, damage: str):
    made = made_file(format)
    state = dict(made.state)
    victim = next(key for key in state if key.endswith(VICTIMS.get(format, "layer3.1.bn2.weight")))
    if damage == "missing":
        del state[victim]
    elif damage == "reshaped":
        state[victim] = state[victim][:-1]
    elif damage == "double prefix":
        state = {f"module.module.{key}": value for key, value in state.items()}
    else:
        state = {f"net.{key}": value for key, value in state.items()}
    if format == "torchvision" and "prefix" in damage:  # the one format in which any prefix will do
        assert_same(convert(format, state, NETWORKS).weights, made.expected)
        return
    if format == "moco" and damage == "double prefix":
        state = {f"module.{key}": value for key, value in state.items()}  # theirs has one already
    with pytest.raises(WeightsMismatch, match=r"accepted|Accepted|all are needed"):
        convert(format, state, network_states(ARCHS[format]))


def test_manifests_agree_with_the_networks_they_are_for():
    """Totals of the published key lists, which the files above are made from with fewer channels."""
    for depth, keys, parameters in ((18, 575, 58_539_603), (50, 773, 213_211_859)):
        listed = json.loads((DATA / f"pri3d_full_model_r{depth}.json").read_text())
        assert (listed["num_keys"], listed["num_params"]) == (keys, parameters)
        assert len(listed["keys"]) == keys
    assert load_file(DATA / "srunet_small.safetensors")
