"""What is published or bundled names no folder of the machine that wrote it, and stays whole."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import yaml

from geo_pretrain.checkpoint import read_checkpoint, verify_files
from geo_pretrain.errors import CheckpointError
from geo_pretrain.hub.bundle import install_bundle, write_bundle
from geo_pretrain.hub.outgoing import outgoing
from geo_pretrain.publish import publish
from tests.zoo import LICENSE, write_tiny

SECRETS = ("/data/", "bob", "hunter2")
RECIPE = {"name": "tiny", "data": {"source": "scannet", "path": "/data/bob/scans"}, "options": ["/home/bob", 0.5]}
START = "http://me:hunter2@host/hub/moco_v2?sig=hunter2"
CARD = "# tiny\nfrom /data/bob/start with /data/bob/scans and http://host/a/b\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    provenance = {"steps": 7, "init": "/data/bob/start", "starts": [START], "data": {"source": "scannet"}}
    texts = {"recipe_yaml": yaml.safe_dump(RECIPE, sort_keys=False), "card": CARD}
    log = '{"step": 1}\n{"step": 2, "scene": "/data/bob/scans/scene0"}\nbroken'
    folder = tmp_path_factory.mktemp("own") / "run"
    return write_tiny(folder, provenance=provenance, license=LICENSE, log=log, **texts).folder


def assert_clean(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert not [secret for secret in SECRETS if secret in path.read_text("utf-8")], path
    verify_files(read_checkpoint(folder))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
    assert recipe == RECIPE | {
        "data": {"source": "scannet", "path": "(elsewhere)/scans"},
        "options": ["(elsewhere)", 0.5],
    }
    config = json.loads((folder / "config.json").read_bytes())
    assert config["provenance"]["init"] == "(elsewhere)/start"
    assert config["provenance"]["starts"] == ["http://***@host/hub/moco_v2?sig=***"]
    assert (folder / "README.md").read_text("utf-8").endswith("(elsewhere)/scans and http://host/a/b\n")
    log = '{"step": 1}\n{"step": 2, "scene": "(elsewhere)/scene0"}\nbroken'
    assert (folder / "log.jsonl").read_text("utf-8") == log


def test_published_folders_and_bundles_hold_no_path_of_this_machine(folder: Path, tmp_path: Path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = publish(folder, tmp_path / "hub")
    assert result.cleaned == ("README.md", "config.json", "log.jsonl", "recipe.yaml")
    assert "Without the folders of this machine" in str(result)
    assert_clean(tmp_path / "hub" / "tiny_net_r18")
    publish(folder, tmp_path / "hub")  # the same once more is no other checkpoint
    bundle = write_bundle([folder], tmp_path / "one.tar")
    with tarfile.open(bundle) as tar:
        assert len(tar.getnames()) == len(before)
    [installed] = install_bundle(bundle, tmp_path / "cache")
    assert_clean(installed)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_clean_folder_goes_out_byte_for_byte(tmp_path: Path):
    assert outgoing(write_tiny(tmp_path / "run")) == {}


def test_a_recipe_that_cannot_be_read_stays_at_home(tmp_path: Path):
    checkpoint = write_tiny(tmp_path / "run", recipe_yaml="a: [1\n")
    with pytest.raises(CheckpointError, match=r"recipe.yaml: is not YAML, so its paths cannot be left out"):
        publish(checkpoint.folder, tmp_path / "hub")
