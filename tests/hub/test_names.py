"""A name of the catalog means one thing: what bears it and is another checkpoint is passed over or refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from geo_pretrain import hub
from geo_pretrain.catalog import CATALOG
from geo_pretrain.catalog.entry import File
from geo_pretrain.errors import CheckpointError, DigestMismatch, HubError
from geo_pretrain.loading import load_backbone
from tests.zoo import CONTRACT, as_tiny, write_tiny


def test_another_network_among_the_bundles_is_passed_over_and_said_so(tmp_path: Path, monkeypatch):
    name = "pri3d_view_r18"
    folder = write_tiny(tmp_path / "bundles" / name, name).folder
    load = partial(load_backbone, name, cache_dir=tmp_path, local_files_only=True)
    said = pytest.warns(UserWarning, match=rf"bundles: '{name}' is a name of the catalog.* It is not used")
    with said, pytest.raises(HubError, match=r"whose network is .*width=64.*; this one's is .*width=8"):
        load()
    assert load_backbone(str(folder)).name == name
    other = replace(as_tiny(name), contract=replace(CONTRACT, size=(8, 8)))
    monkeypatch.setattr("geo_pretrain.catalog.CATALOG", CATALOG | {name: other})
    with pytest.warns(UserWarning, match="whose input is"), pytest.raises(HubError, match="8x8"):
        load()
    monkeypatch.setattr("geo_pretrain.catalog.CATALOG", CATALOG | {name: as_tiny(name)})
    assert load().name == name


def test_another_network_is_refused_in_a_place_that_the_user_named_too(tmp_path: Path):
    name = "pri3d_view_r18"
    write_tiny(tmp_path / "mine" / name, name)
    said = pytest.warns(UserWarning, match=r"this one's is .*width=8.* load its folder by its path\. It is not used")
    with said, pytest.raises(HubError, match="mine"):
        load_backbone(name, hub=str(tmp_path / "mine"), cache_dir=tmp_path, local_files_only=True)
    assert load_backbone(tmp_path / "mine" / name).name == name


def test_a_checkpoint_that_calls_itself_otherwise_is_refused_where_network_and_input_are_the_same(
    tmp_path: Path, monkeypatch
):
    name, other = "pri3d_view_r18", "pri3d_geo_r18"  # one network and input: names alone tell their weights apart
    folder = write_tiny(tmp_path / "mine" / name, other).folder
    shutil.copytree(folder, tmp_path / "bundles" / name)
    monkeypatch.setattr("geo_pretrain.catalog.CATALOG", CATALOG | {name: as_tiny(name), other: as_tiny(other)})
    load = partial(load_backbone, name, cache_dir=tmp_path, local_files_only=True)
    for place, hubs in (("mine", str(tmp_path / "mine")), ("bundles", None)):
        said = pytest.warns(UserWarning, match=rf"{place}: '{name}' is .*calls itself '{other}'.* It is not used")
        with said, pytest.raises(HubError, match=f"calls itself '{other}'"):
            load(hub=hubs)
    monkeypatch.chdir(tmp_path / "mine")
    with pytest.raises(CheckpointError, match=rf"calls itself '{other}'\..*load this folder as '\./{name}'"):
        load_backbone(name)
    assert load_backbone(f"./{name}").name == load_backbone(folder).name == other


def test_a_bare_name_of_the_catalog_is_no_other_folder_that_happens_to_lie_here(tmp_path: Path, monkeypatch):
    name = "pri3d_view_r18"
    found = write_tiny(tmp_path / name, name)
    monkeypatch.chdir(tmp_path)
    for call in (load_backbone, hub.open):
        with pytest.raises(CheckpointError, match=rf"is a name of the catalog, .* load this folder as '\./{name}'"):
            call(name)
    assert load_backbone(f"./{name}").name == load_backbone(Path(name)).name == name
    tiny = as_tiny(name)
    monkeypatch.setattr("geo_pretrain.catalog.CATALOG", CATALOG | {name: tiny})
    assert load_backbone(name).name == name  # the same network and input, without a pin: one's own training
    source = (f"http://localhost/{name}/encoder.safetensors",)
    pinned = File("encoder", "encoder.safetensors", found.files["encoder.safetensors"].size, "0" * 64, source)
    monkeypatch.setattr("geo_pretrain.catalog.CATALOG", CATALOG | {name: replace(tiny, files=(pinned,))})
    with pytest.raises(DigestMismatch, match=rf"loads as '\./{name}'.*is published with sha256 0000"):
        load_backbone(name)
