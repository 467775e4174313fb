"""Weights in installed packages, and doors: what can be had where, without fetching it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from geo_pretrain import hub, load_backbone, load_pair, verify
from geo_pretrain.backbones.feature_pair import pair_golden
from geo_pretrain.catalog import Arch
from geo_pretrain.checkpoint import Pairing, read_checkpoint
from geo_pretrain.errors import CheckpointError, HubError, UnknownName
from geo_pretrain.halving import write_halved
from geo_pretrain.hub.cache import folders_here, names_here
from geo_pretrain.loading import golden_of
from geo_pretrain.publish import publish
from geo_pretrain.sparse.tensor import SparseTensor
from tests.front_door import geo_pretrain
from tests.hub.hosts import Hosts
from tests.zoo import ARCH, CONTRACT, golden_file, role_weights, weights_3d, write_tiny, write_tiny_3d

NAME = "tiny_net_r18"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with weights as pip leaves it, which fails when it is imported, and metadata of one that is gone."""
    site = tmp_path / "site"
    write_tiny(site / "my_weights" / NAME)
    (site / "my_weights/__init__.py").write_text("raise RuntimeError('imported')\n")
    for name, package in (("my_weights", "my_weights"), ("gone", "gone"), ("inner", "json.tool")):
        facts = site / f"{name}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(f"[geo_pretrain.weights]\n{name} = {package}\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return site / "my_weights"


def test_a_name_in_an_installed_package_loads_offline_and_the_package_is_not_imported(installed: Path):
    network = load_backbone(NAME)
    assert torch.equal(network.conv1.weight, load_file(installed / NAME / "encoder.safetensors")["conv1.weight"])
    assert NAME in names_here()
    assert [(door.place, door.is_open) for door in hub.doors(NAME)] == [("package:my_weights", True)]
    assert hub.open(NAME, hub="package:my_weights").name == NAME
    with pytest.raises(UnknownName, match="package:gone"):
        hub.open("another_net_r18", hub="package:gone")
    with pytest.raises(
        HubError, match=r"package:gone: the package gone is not installed\. Install it: `pip install gone`"
    ):
        hub.open("crd_srunet34", hub="package:gone")
    (installed / NAME / "encoder.safetensors").unlink()
    assert NAME not in names_here()
    (door,) = hub.doors(NAME)
    assert not door.is_open
    assert "encoder.safetensors: is missing" in door.reason


def test_where_a_name_lies_is_where_it_is_loaded_from(installed: Path, tmp_path: Path):
    """A bundle that somebody installed comes before a package."""
    assert folders_here()[NAME] == hub.open(NAME).fetch("encoder").folder == installed / NAME
    bundle = write_tiny(tmp_path / "cache/bundles" / NAME).folder
    assert folders_here()[NAME] == hub.open(NAME).fetch("encoder").folder == bundle


def test_a_package_cannot_give_a_name_of_the_catalog_to_another_network(installed: Path):
    (installed / NAME).rename(installed / "pri3d_view_r18")
    with pytest.warns(UserWarning, match="calls itself 'tiny_net_r18'"), pytest.raises(HubError):
        hub.open("pri3d_view_r18")


def test_doors_of_a_server_are_tried_and_no_file_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GEO_PRETRAIN_MIRROR", raising=False)
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path / "cache"))
    write_tiny(tmp_path / NAME)
    config = (tmp_path / NAME / "config.json").read_bytes()
    with Hosts({f"/hub/{NAME}/config.json": config}) as hosts:
        (door,) = hub.doors(NAME, hub=f"{hosts.url}/hub")
        assert door.is_open
        other, missing = hub.doors(NAME, hub=[str(tmp_path), f"{hosts.url}/other"])
        assert other.size == sum(
            (tmp_path / NAME / f"{role}.safetensors").stat().st_size
            for role in read_checkpoint(tmp_path / NAME).arch.roles
        )
        assert "HTTP 404, no such file" in missing.reason
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert "downloads are off" in hub.doors(NAME, hub=f"{hosts.url}/hub")[0].reason
    assert not (tmp_path / "cache").exists()


def test_an_address_is_a_door_and_a_folder_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_tiny(tmp_path / NAME).folder
    config = (folder / "config.json").read_bytes()
    with Hosts({f"/any/{NAME}/config.json": config}) as hosts:
        (door,) = hub.doors(f"{hosts.url}/any/{NAME}")
        assert (door.place, door.is_open) == (f"{hosts.url}/any", True)
    assert hub.doors(str(folder)) == [hub.Door(str(folder), str(folder), is_open=True)]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (door,) = hub.doors("hf-hub:timm/resnet18.a1_in1k")
    assert (door.place, door.is_open) == ("hf-hub:timm/resnet18.a1_in1k", False)
    for name, said in (("timm/resnet18", "As a start of training: `finetune -b imagenet"), ("./none", "none")):
        with pytest.raises(CheckpointError, match=said):
            hub.doors(name)
    ended = geo_pretrain("pull", "--check", "--from-bundle", "x.tar", expected=2)
    assert "give it without --from-bundle" in " ".join(ended.errors.replace("│", " ").split())


def test_doors_of_authors_are_asked_for_their_size(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GEO_PRETRAIN_HUB", "")
    (door,) = hub.doors("pri3d_view_geo_r50")
    assert door.place == "the authors' own file"
    assert not door.is_open
    assert "Google Drive has no such file" in door.reason
    assert not (tmp_path / "cache").exists()


# halving


def test_half_of_a_checkpoint_loads_as_float32_and_reproduces_its_own_outputs(tmp_path: Path):
    whole = write_tiny(tmp_path / "whole")
    half = write_halved(whole.folder, tmp_path / "half")
    stored = load_file(half.folder / "encoder.safetensors")
    assert {key: value.dtype for key, value in stored.items() if value.ndim > 1} == dict.fromkeys(
        (key for key, value in stored.items() if value.ndim > 1), torch.float16
    )
    assert stored["bn1.running_var"].dtype is torch.float32
    network = load_backbone(half.folder)
    assert network.conv1.weight.dtype is torch.float32
    assert torch.equal(network.conv1.weight, load_backbone(whole.folder).conv1.weight.half().float())
    assert verify(half.folder).passed
    moved = half.provenance["float16"]["moved"]
    assert moved
    assert all(0 < value < 0.01 for value in moved.values())
    ratio = half.files["encoder.safetensors"].size / whole.files["encoder.safetensors"].size
    assert 0.5 < ratio < 0.56
    assert verify(write_halved(write_tiny_3d(tmp_path / "whole3").folder, tmp_path / "half3").folder).passed


def test_a_half_may_leave_out_the_network_that_only_pairs_need(tmp_path: Path):
    teacher = {f"{role}.{key}": value for role in ("encoder", "decoder") for key, value in role_weights(role).items()}
    weights, pairing = {"model": weights_3d(), "teacher": teacher}, Pairing(ARCH, CONTRACT, "teacher")
    whole = write_tiny_3d(tmp_path / "whole", weights=weights, pairing=pairing)
    golden = pair_golden(load_pair(whole.folder))
    golden["output"] = load_backbone(whole.folder)(SparseTensor(golden["input.coords"], golden["input.feats"])).feats
    write_tiny_3d(tmp_path / "whole", weights=weights, pairing=pairing, golden=golden)
    alone = write_halved(tmp_path / "whole", tmp_path / "alone", without=("teacher",))
    assert "teacher" not in alone.roles
    assert alone.pairing is None
    assert verify(alone.folder).errors.keys() == {"output"}
    with pytest.raises(CheckpointError, match="'model' cannot be left out; accepted: heads, teacher"):
        write_halved(whole.folder, tmp_path / "none", without=("model",))


def test_weights_that_float16_does_not_hold_are_not_halved(tmp_path: Path):
    encoder = role_weights("encoder")
    encoder["conv1.weight"][0] = 1e6
    big = {"weights": {"encoder": encoder}, "arch": Arch("resnet", {"depth": 18, "width": 8})}
    write_tiny(tmp_path / "big", **big)
    with pytest.raises(CheckpointError, match=r"golden outputs are not reproduced .*'decoder': inf"):
        write_halved(tmp_path / "big", tmp_path / "half")
    golden = {"input": golden_file()["input"]} | golden_of(tmp_path / "big")
    write_tiny(tmp_path / "big", **big, golden=golden)
    with pytest.raises(
        CheckpointError, match=r"encoder has weights above 65504, .*: conv1\.weight\. Publish it as it is"
    ):
        write_halved(tmp_path / "big", tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_a_half_is_published_and_the_original_stays(tmp_path: Path):
    whole = write_tiny(tmp_path / NAME)
    before = (whole.folder / "config.json").read_bytes()
    publish(whole.folder, tmp_path / "hub", half=True)
    assert load_file(tmp_path / "hub" / NAME / "encoder.safetensors")["conv1.weight"].dtype is torch.float16
    assert json.loads((tmp_path / "hub" / NAME / "config.json").read_text())["provenance"]["float16"]
    assert (whole.folder / "config.json").read_bytes() == before


def test_what_is_no_checkpoint_is_told_apart_from_one_that_lacks(tmp_path: Path):
    with pytest.raises(CheckpointError, match="'timm/convnext_tiny' is an encoder of timm and no checkpoint"):
        hub.open("timm/convnext_tiny")
    folder = write_tiny(tmp_path / "tiny").folder
    assert "is a folder here, nothing to fetch" in " ".join(geo_pretrain("pull", "--check", folder).output.split())
