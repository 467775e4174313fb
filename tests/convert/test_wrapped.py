"""Networks inside what people save: wrappers, heads, training states, numbered names, safetensors files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from geo_pretrain.backbones.build import network_states
from geo_pretrain.catalog import CATALOG, Arch
from geo_pretrain.checkpoint import read_checkpoint, read_weights
from geo_pretrain.convert import convert
from geo_pretrain.convert.prefixes import prefixes, select
from geo_pretrain.errors import CheckpointError, UnsafeFile, WeightsMismatch
from geo_pretrain.hub.authors import convert_file
from geo_pretrain.hub.extract import extract
from tests.authors_files import layout

RESNET = Arch("resnet", {"depth": 18, "width": 8})
NETWORKS = network_states(RESNET)
FILE: dict[str, Tensor] = dict(layout("torchvision", arch=RESNET, fc=True).content)
ENTRY = dataclasses.replace(CATALOG["pri3d_view_r18"], arch=Arch("resnet_unet", {"depth": 18, "width": 8}))
SGD = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}


def under(prefix: str, state: Mapping[str, Any] = FILE) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


def numbered(prefix: str = "", *, stem: str = "") -> dict[str, Tensor]:
    """The names in `nn.Sequential(*resnet.children())`; `stem`: the stem alone is one, of this name."""
    names = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7", "fc": "9"}
    if stem:
        names = {"conv1": f"{stem}.0", "bn1": f"{stem}.1"}
    renamed = {}
    for key, value in FILE.items():
        first, _, rest = key.partition(".")
        renamed[f"{prefix}{names.get(first, first)}.{rest}"] = value
    return renamed


def test_the_numbered_names_are_those_that_torch_makes():
    children = [nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.MaxPool2d(1), *(nn.Sequential() for _ in range(4))]
    names = set(nn.Sequential(*children, nn.AvgPool2d(1), nn.Linear(1, 1)).state_dict())
    assert {"0.weight", "1.running_mean", "9.weight"} <= names & set(numbered())


def assert_encoder(weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    assert list(weights) == ["encoder"]
    assert set(weights["encoder"]) == set(NETWORKS["encoder"])
    assert all(value.equal(FILE[key]) for key, value in weights["encoder"].items())


@pytest.mark.parametrize(
    "wrap", [numbered(), numbered("backbone."), numbered(stem="layer0"), numbered("m.", stem="layer0")]
)
def test_numbered_names_are_read(wrap: dict[str, Tensor]):
    converted = convert("torchvision", wrap, NETWORKS)
    assert_encoder(converted.weights)
    assert set(converted.report.unexpected) < set(wrap)  # the classifier, by its name in the file
    assert len(converted.report.unexpected) == 2


HEADED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a head beside": ("torchvision", under("model.") | {"head.weight": torch.zeros(3)}, "model."),
    "deep": ("torchvision", under("a.b.net.") | under("a.c.", {"x": torch.zeros(1)}), "a.b.net."),
    "numbered, and a head": ("torchvision", numbered("backbone.") | {"head.0.weight": torch.zeros(3)}, "backbone."),
    "moco": ("moco", under("student.") | under("queue.", {"x": torch.zeros(1)}), "student."),
    "one network under two names": ("torchvision", under("net.") | {"w": torch.zeros(1)}, "net."),
}


@pytest.mark.parametrize("name", HEADED)
def test_the_one_prefix_that_fits_is_found_and_named(name: str):
    format, state, prefix = HEADED[name]
    with pytest.raises(WeightsMismatch):
        convert(format, state, NETWORKS)
    converted = convert(format, state, NETWORKS, prefix=None)
    assert_encoder(converted.weights)
    assert converted.report.prefix == prefix
    used = {key for key in state if key not in converted.report.unexpected}
    assert len(used) == len(NETWORKS["encoder"])
    assert all(key.startswith(prefix) for key in used)
    text = converted.report.coverage(NETWORKS)
    assert f"encoder: 120 of 120 tensors (prefix {prefix!r})" in text
    assert f"Not used: {len(converted.report.unexpected)} keys of the file: " in text


def test_two_networks_are_not_chosen_among():
    other = {key: value + 1 for key, value in FILE.items()}
    both = under("teacher.") | under("student.", other) | {"center": torch.zeros(1)}
    with pytest.raises(
        WeightsMismatch, match=r"Several networks lie in the file, under 'teacher\.', 'student\.': name"
    ):
        convert("torchvision", both, NETWORKS, prefix=None)
    assert_encoder(convert("torchvision", both, NETWORKS, prefix="teacher.").weights)
    shared = under("net.") | under("alias.net.") | {"w": torch.zeros(1)}  # the same tensors twice
    assert_encoder(convert("torchvision", shared, NETWORKS, prefix=None).weights)


def test_an_almost_whole_network_is_named_and_not_loaded():
    state = under("model.") | {"head.weight": torch.zeros(3)}
    del state["model.layer4.1.conv2.weight"]
    with pytest.raises(
        WeightsMismatch, match=r"Closest: under the prefix 'model\.', 119 of 120 tensors of the encoder"
    ):
        convert("torchvision", state, NETWORKS, prefix=None)


def test_prefix_and_ignore_take_what_they_name_and_nothing_else():
    state = FILE | {"decode_head.conv.weight": torch.zeros(3), "decode_head.bn.bias": torch.zeros(3)}
    with pytest.raises(WeightsMismatch, match="120 of 120"):
        convert("torchvision", state, NETWORKS)
    converted = convert("torchvision", state, NETWORKS, ignore=["decode_head.*"])
    assert_encoder(converted.weights)
    assert {"decode_head.conv.weight", "decode_head.bn.bias"} < set(converted.report.unexpected)
    for wrong in ({"ignore": ["decoder_head.*"]}, {"prefix": "decodehead."}):
        with pytest.raises(WeightsMismatch, match=r"No key of the file (fits|begins with)"):
            convert("torchvision", state, NETWORKS, **wrong)
    with pytest.raises(WeightsMismatch, match=r"layer1\.0\.conv1\.weight"):  # no part of the network may be left out
        convert("torchvision", FILE, NETWORKS, ignore=["layer1.0.conv1.*"])
    assert select({"a.b": 1, "a.c": 2, "d": 3}, "a.", ["*.c"]) == {"b": 1}
    assert prefixes(["a.b.c", "a.d"]) == ["a.", "a.b."]


FILES: dict[str, tuple[Any, str]] = {
    "a tensor beside state_dict": ({"state_dict": FILE, "best_acc1": torch.tensor(69.8), "optimizer": SGD}, ""),
    "an array beside model": ({"model": FILE, "losses": np.arange(3.0)}, ""),
    "an entry that no format names": ({"net": FILE, "best": torch.tensor(1.0), "optimizer": SGD}, "net."),
    "an entry in an entry": ({"state": {"model_state": FILE}, "epoch": 3}, ""),  # torchvision's: any one prefix
    "a head beside it": ({"state_dict": under("model.") | {"head.w": torch.zeros(2)}, "ema": {"n": 1}}, "model."),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_whatever_is_around_the_network(name: str, tmp_path: Path):
    content, prefix = FILES[name]
    torch.save(content, tmp_path / "f.pth")
    notes: list[str] = []
    made = convert_file(
        tmp_path / "f.pth", tmp_path / "out", like=ENTRY, format="torchvision", name="mine", note=notes.append
    )
    assert_encoder({"encoder": read_weights(made, "encoder")})
    assert made.provenance.get("prefix", "") == prefix
    assert notes[0].startswith("encoder: 120 of 120 tensors")


def test_a_safetensors_file_is_read(tmp_path: Path):
    path = tmp_path / "f.safetensors"
    save_file(under("model.") | {"head.weight": torch.zeros(3)}, path)
    before = path.read_bytes()
    arguments: dict[str, Any] = {"like": ENTRY, "format": "torchvision", "name": "mine"}
    made = convert_file(path, tmp_path / "out", **arguments)
    assert_encoder({"encoder": read_weights(read_checkpoint(made.folder), "encoder")})
    assert made.provenance["prefix"] == "model."
    assert path.read_bytes() == before
    for damaged in (before[:-1], before[:9] + b"x" + before[10:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"f\.safetensors: is not a safetensors file"):
            convert_file(path, tmp_path / "other", **arguments)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["f.safetensors", "out"]


def test_errors_speak_of_the_entry_where_the_network_was_looked_for(tmp_path: Path):
    arguments: dict[str, Any] = {"like": ENTRY, "format": "torchvision", "name": "mine"}
    path = tmp_path / "f.pth"
    torch.save({"state_dict": {"a.weight": torch.zeros(2)}, "best": torch.tensor(1.0)}, path)
    with pytest.raises(WeightsMismatch, match=r"No ResNet in keys such as 'a\.weight'; "):
        convert_file(path, tmp_path / "out", **arguments)
    torch.save({"step": 3}, path)
    with pytest.raises(CheckpointError, match=r"no tensors in 'state_dict' or 'model' or the top level\. Its top"):
        convert_file(path, tmp_path / "out", **arguments)
    torch.save({"net": FILE}, path)
    with pytest.raises(CheckpointError, match="no tensors in"):  # as for a published file, of which all is known
        convert_file(path, tmp_path / "out", prefix="", **arguments)
    with pytest.raises(WeightsMismatch, match=r"begins with prefix='nett\.'. Prefixes in it: 'net\.'"):
        convert("torchvision", under("net."), NETWORKS, prefix="nett.")


def test_all_tensors_of_a_file_lie_under_joined_keys(tmp_path: Path):
    inner = {"w": torch.ones(2), "deep": {"v": torch.zeros(1), 3: torch.zeros(1)}}
    shared = {"x": torch.zeros(1)}
    itself: dict[str, Any] = {"a": inner, "b": [torch.zeros(1)], "c": shared, "d": shared, "n": 3}
    itself["again"] = itself
    torch.save(itself, tmp_path / "f.pth")
    made = extract(tmp_path / "f.pth", tmp_path / "out.safetensors", entries=["*"])
    assert made.tensors < 100  # a dict in itself is followed a few times
    torch.save({"a.b": torch.zeros(1), "a": {"b": torch.zeros(1)}}, tmp_path / "f.pth")
    with pytest.raises(UnsafeFile, match=r"it gives 'a\.b' twice"):
        extract(tmp_path / "f.pth", tmp_path / "out.safetensors", entries=["*"])


def test_a_head_beside_a_whole_network_is_refused_with_the_way_on():
    """At the top level no prefix tells the network from the rest."""
    with pytest.raises(
        WeightsMismatch, match=r"head\.weight \[3\]\. What else .* left out \(ignore=, --ignore PATTERN"
    ):
        convert("torchvision", FILE | {"head.weight": torch.zeros(3)}, NETWORKS, prefix=None)


def test_keys_that_are_no_texts_are_refused():
    file: dict[Any, Any] = FILE | {3: torch.zeros(3)}
    with pytest.raises(WeightsMismatch, match=r"Not a flat state dict.*key of type int"):
        convert("torchvision", file, NETWORKS)
