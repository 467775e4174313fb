"""Places that cannot be: addresses, homes and folders that nobody can open are told, and the next place is tried."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from geo_pretrain import hub
from geo_pretrain.errors import HubError, InputError, UnknownName
from geo_pretrain.hub.cache import cache_root, folders_here, names_here
from geo_pretrain.hub.transfer import TIMEOUT_VARIABLE, _mirror, _seconds
from geo_pretrain.loading import load_backbone
from tests.zoo import write_tiny

NAME = "tiny_net_r18"


@pytest.fixture
def good(tmp_path: Path) -> str:
    return str(write_tiny(tmp_path / "good" / NAME, NAME).folder.parent)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("http://[bad", r"'http://\[bad' is no address \(Invalid IPv6 URL\)"),
        ("http://127.0.0.1:99999/hub", "is no address .*port"),
        ("~nobody_of_this_name/hub", "does not know that home folder"),
    ],
)
def test_a_place_that_cannot_be_is_told_and_the_next_one_is_tried(bad: str, why: str, good: str, tmp_path: Path):
    assert hub.open(NAME, hub=f"{bad},{good}", cache_dir=tmp_path).name == NAME
    with pytest.raises(HubError, match=why):
        hub.open("pri3d_view_r18", hub=bad, cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(HubError, match=r"no address|home folder"):
        hub.open(f"{bad}/x")


def test_without_a_home_there_is_no_default_cache_and_other_places_serve(good: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", "~nobody_of_this_name/cache")
    assert hub.open(NAME, hub=good).name == NAME
    with pytest.raises(HubError, match=r"home folder\. Set GEO_PRETRAIN_CACHE to a folder\."):
        cache_root(None)
    with pytest.raises(HubError, match=r"home folder\. Give a whole path\."):
        cache_root("~nobody_of_this_name/cache")


def test_a_folder_that_may_not_be_looked_into_holds_nothing(good: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def refuse(path: Path) -> bool:
        asked.append(path)
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)  # root may look anywhere, so this says no
    with pytest.raises(UnknownName, match="All names"):
        hub.open(NAME, cache_dir=tmp_path)
    assert [path.name for path in asked][-1] == NAME


def test_a_name_that_no_file_system_takes_is_unknown(tmp_path: Path):
    with pytest.raises(UnknownName):
        hub.open("a" * (os.pathconf(tmp_path, "PC_NAME_MAX") + 1), cache_dir=tmp_path)


def test_hubs_are_texts():
    with pytest.raises(InputError, match=r"hub takes folders, .* got 123\."):
        hub.open("pri3d_view_r18", hub=123, local_files_only=True)  # type: ignore[arg-type]


def test_a_mirror_that_is_no_address_and_a_timeout_beyond_clocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEO_PRETRAIN_MIRROR", "http://[bad")
    with pytest.raises(HubError, match=r"'http://\[bad' is no address"):
        _mirror()
    monkeypatch.setenv(TIMEOUT_VARIABLE, "1e12")
    assert _seconds(TIMEOUT_VARIABLE) == 1e6


def test_weights_load_under_another_default_device(good: str):
    folder = Path(good) / NAME
    expected = load_backbone(folder).state_dict()
    with torch.device("meta"):
        network = load_backbone(folder)
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


def test_what_a_hub_folder_of_the_environment_holds_loads_without_a_network(
    good: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GEO_PRETRAIN_HUB", f"~nobody_of_this_name/hub, http://127.0.0.1:9/x,{good},{tmp_path / 'none'}")
    assert folders_here(tmp_path)[NAME] == Path(good) / NAME
    assert NAME in names_here(tmp_path)
    assert NAME not in folders_here(tmp_path, hubs=False)
