"""What must not be published, and folders as the target of publishing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from geo_pretrain import publish as publishing
from geo_pretrain.catalog import CATALOG, Arch, File, License
from geo_pretrain.checkpoint import Checkpoint, read_checkpoint
from geo_pretrain.contract import contract_from_dict
from geo_pretrain.errors import CheckpointError, DigestMismatch, GeoPretrainError, HubError
from geo_pretrain.hub import names
from geo_pretrain.publish import publish
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.tasks import build_task
from tests.test_publish import CARD, NAME, content
from tests.zoo import LICENSE, PLANES, golden_file, resolve, unsealed, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "run", card=CARD).folder


# From here on: what is refused before anything goes anywhere, and folders as targets; no network, so no other process.


def shifted() -> dict[str, Any]:
    golden = golden_file()
    return {"input": golden["input"], "decoder": golden["eval.out"] + 1e-3 * golden["eval.out"].abs().max()}


def licensed(**changes: Any) -> dict[str, Any]:
    return {"license": replace(LICENSE, **changes)}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unfinished run": ({"finished": False}, "its training did not finish.*Resume the run"),
    "unstated weights": (licensed(weights="LicenseRef-unstated"), "nobody stated terms for the weights"),
    "unstated data": (
        licensed(weights="LicenseRef-unstated", datasets=(("photos", "LicenseRef-unstated"), ("none", "MIT"))),
        r"the weights, the data set photos \(LicenseRef-unstated\)",
    ),
    "unstated code": (licensed(code="LicenseRef-unstated"), "nobody stated terms for the code"),
    "an unstated start": (
        licensed(weights="LicenseRef-x", base_model="somebody's (LicenseRef-unstated)"),
        "terms for the start weights",
    ),
    "an empty card": ({"card": " \n"}, r"README\.md: is empty"),
    "golden values of another network": ({"golden": shifted()}, "golden outputs are not reproduced"),
    "no golden outputs": ({"golden": {"input": golden_file()["input"]}}, "golden outputs are not reproduced"),
    "another network under a name of the catalog": (
        {"name": "pri3d_geo_r18.rooms"},
        "is a name of the catalog, whose network is",
    ),
}


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = unsealed(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def drop(role: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit_config(folder, lambda config: config["files"].pop(read_checkpoint(folder).file_of(role)))

    return change


def foreign_role(folder: Path) -> None:
    (folder / "setup.py").write_text("x")
    entry = {"role": "setup", "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    edit_config(folder, lambda config: config["files"].update({"setup.py": entry}))


def flip(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    return change


EDITED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no card": (drop("card"), "holds no file with role 'card'"),
    "no golden values": (drop("golden"), "holds no file with role 'golden'"),
    "no decoder": (drop("decoder"), "holds no file with role 'decoder'"),
    "an altered weight file": (flip("decoder.safetensors"), r"decoder\.safetensors: sha256 is"),
    "an altered card": (flip("README.md"), r"README\.md: sha256 is"),
    "an absent log": (lambda folder: (folder / "log.jsonl").unlink(), r"log\.jsonl: is missing"),
    "unlisted weights": (
        lambda folder: shutil.copy(folder / "encoder.safetensors", folder / "heads.safetensors"),
        r"heads\.safetensors: is not listed",
    ),
    "a file that no role explains": (foreign_role, r"setup\.py: has role 'setup'; accepted: encoder"),
    "an incomplete license chain": (
        lambda folder: edit_config(folder, lambda config: config["licence"].update(code="")),
        "license chain is incomplete",
    ),
    "no checkpoint": (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
}


def assert_refused(folder: Path, target: Path, message: str) -> None:
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match=message) as caught:
            publish(folder, target, dry_run=dry_run)
        assert str(folder) in str(caught.value)
        assert not target.exists()


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_must_not_go_out_is_refused(tmp_path: Path, case: str):
    changes, message = REFUSED[case]
    assert_refused(write_tiny(tmp_path / "run", **changes).folder, tmp_path / "hub", message)


@pytest.mark.parametrize("case", list(EDITED))
def test_what_is_not_whole_is_refused(folder: Path, tmp_path: Path, case: str):
    change, message = EDITED[case]
    run = shutil.copytree(folder, tmp_path / "run")
    change(run)
    assert_refused(run, tmp_path / "hub", message)


def test_a_name_of_the_catalog_keeps_network_input_and_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = "pri3d_geo_r18.rooms"
    found = write_tiny(tmp_path / "run", name=name)
    files: tuple[File, ...] = ()

    def catalog(**changes: Any) -> None:
        facts = {"name": name, "arch": found.arch, "contract": found.contract, "files": files} | changes
        entry = type("Entry", (), facts)
        monkeypatch.setattr("geo_pretrain.hub.names.CATALOG", {name: entry})

    catalog()
    assert publish(found.folder, tmp_path / "hub", dry_run=True).name == name
    catalog(contract=replace(found.contract, interpolation="bilinear"))
    with pytest.raises(CheckpointError, match=r"whose input is images: .*bilinear.*Give it another name"):
        publish(found.folder, tmp_path / "hub", dry_run=True)
    stored = found.files["encoder.safetensors"]
    source = (f"http://localhost/{name}/encoder.safetensors",)
    files = (File("encoder", "encoder.safetensors", stored.size, "1" * 64, source),)
    catalog()
    with pytest.raises(DigestMismatch, match=f"published with sha256 {'1' * 64}"):
        publish(found.folder, tmp_path / "hub", dry_run=True)
    files = (replace(files[0], sha256=stored.sha256),)
    catalog()
    assert publish(found.folder, tmp_path / "hub", dry_run=True).name == name


R18 = {"depth": 18, "width": 64}


@pytest.mark.parametrize(
    ("name", "one", "other", "same"),
    [
        ("resnet_unet", R18, R18 | {"out_chans": 32}, True),  # 32 follows from the depth
        ("resnet_unet", R18, R18 | {"out_chans": 16}, False),
        ("resnet_unet", R18, {"depth": 18, "in_chans": 3}, True),
        ("resnet_unet", R18, {"depth": 34, "width": 64}, False),
        ("resnet_unet", R18, {"depth": 18, "width": 8}, False),
        ("sr_unet", {"planes": PLANES, "width": 8}, {"planes": list(PLANES), "width": 8}, True),
        (
            "sr_unet",
            {"width": 8, "in_chans": 3},
            {"width": 8, "in_chans": 3, "normalize": True},
            False,
        ),  # no weight tells
    ],
)
def test_networks_are_compared_by_what_they_are(name: str, one: dict[str, Any], other: dict[str, Any], same: bool):
    assert names.same_network(Arch(name, one), Arch(name, other)) is same
    assert names.same_network(Arch(name, other), Arch(name, one)) is same
    assert not names.same_network(Arch("resnet", {"depth": 18}), Arch(name, one))


@pytest.mark.parametrize("name", ["pri3d_geo_r18.rooms", "pri3d_geo_r50", "pointcontrast_nce_srunet34.rooms"])
def test_what_a_recipe_makes_may_have_its_name(name: str):
    """As training states it, after a round trip through JSON."""
    recipe = load_recipe(name)
    if recipe.model is not None:
        recipe = replace(recipe, model=replace(recipe.model, init="scratch"))
    with torch.device("meta"):
        task: Any = build_task(recipe)
    arch = Arch(CATALOG[name].arch.name, json.loads(json.dumps(task.arch_args)))
    contract = contract_from_dict(json.loads(json.dumps(task.contract.to_dict())))
    names.check_published_name(Checkpoint(Path(name), name, arch, contract, {}, CATALOG[name].license, {}, True))


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("hf-hub:lonely", {}, "hf-hub:owner/repo is accepted"),
        ("hf-hub:a/b/c", {}, "hf-hub:owner/repo is accepted"),
        ("hf-hub:lab/tiny@v1", {}, "hf-hub:owner/repo is accepted"),
        ("hf-hub:lab/--bad--", {}, "hf-hub:owner/repo is accepted"),
        ("hf:lab", {}, "hf-hub:owner/repo or a folder is accepted"),
        ("https://example.org/hub", {}, "hf-hub:owner/repo or a folder is accepted"),
        ("hf-hub:lab/tiny", {"tag": "not a tag"}, "such as 'v2'"),
        ("hf-hub:lab/tiny", {"tag": ""}, "such as 'v2'"),
        ("some/folder", {"tag": "v1"}, "Hugging Face only"),
        ("some/folder", {"private": True}, "Hugging Face only"),
        ("nowhere/near/here", {}, "mkdir -p nowhere/near"),
    ],
)
def test_targets_that_cannot_be(folder: Path, to: str, options: dict[str, Any], message: str):
    with pytest.raises(HubError, match=message):
        publish(folder, to, dry_run=True, **options)
    assert not Path("some").exists()


def test_a_folder_becomes_a_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = shutil.copytree(folder, tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    target = tmp_path / "new" / "hub"
    plan = publish(run, target, dry_run=True)
    assert not (tmp_path / "new").exists()
    done = publish(run, str(target))
    assert replace(plan, dry_run=False) == replace(done, to=str(target))
    assert done.url == str(target / NAME)
    assert done.left_out == ("notes.txt",)
    assert str(done).startswith(f"Published '{NAME}' to {target / NAME}:\n")
    assert str(done).endswith("\nNot part of the checkpoint, so left out: notes.txt")
    assert content(target / NAME) == content(folder)
    assert os.listdir(target) == [NAME]
    monkeypatch.setenv("GEO_PRETRAIN_HUB", str(target))
    assert resolve(NAME) == target / NAME
    assert done.catalog_lines() == ""
    lines = done.catalog_lines("https://example.org/hub/")
    assert '"https://example.org/hub/tiny_net_r18/encoder.safetensors"' in lines
    assert lines.count("File(") == len(done.files) - 1


def test_a_folder_keeps_what_it_has(folder: Path, tmp_path: Path):
    publish(folder, tmp_path)
    before = {path: path.stat().st_ino for path in (tmp_path / NAME).iterdir()}
    publish(folder, tmp_path)
    assert {path: path.stat().st_ino for path in (tmp_path / NAME).iterdir()} == before
    publish(tmp_path / NAME, tmp_path)  # onto itself
    assert {path: path.stat().st_ino for path in (tmp_path / NAME).iterdir()} == before
    other = write_tiny(tmp_path / "other", provenance={"steps": 8}).folder
    for dry_run in (True, False):
        with pytest.raises(HubError, match=r"another checkpoint of this name\. A published name"):
            publish(other, tmp_path, dry_run=dry_run)
    assert content(tmp_path / NAME) == content(folder)
    # the same one, damaged, is repaired
    flip("encoder.safetensors")(tmp_path / NAME)
    (tmp_path / NAME / "log.jsonl").unlink()
    publish(folder, tmp_path, dry_run=True)
    assert content(tmp_path / NAME) != content(folder)
    publish(folder, tmp_path)
    assert content(tmp_path / NAME) == content(folder)
    assert sorted(os.listdir(tmp_path)) == ["other", NAME]


def test_folders_that_cannot_be_hubs(folder: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "hub" / NAME).mkdir(parents=True)
    (tmp_path / "hub" / NAME / "thesis.tex").write_text("years of work")
    for target, message in {
        folder: "is a checkpoint itself; a folder that holds",
        tmp_path / "file": "is a file; a folder that holds",
        tmp_path / "file" / "below": "is a file; accepted: a name in a folder",
        tmp_path / "hub": "holds files but no config",
    }.items():
        with pytest.raises(GeoPretrainError, match=message):
            publish(folder, target)
    assert os.listdir(tmp_path / "hub" / NAME) == ["thesis.tex"]
    assert NAME not in os.listdir(folder)


def test_a_copy_that_fails_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = shutil.copyfile

    def copy(source: Path, target: Path) -> None:
        real(source, target)
        if target.name == "decoder.safetensors":
            flip(target.name)(target.parent)

    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(DigestMismatch, match=r"decoder\.safetensors"):
        publish(folder, tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_catalog_has_an_entry_with_unstated_terms():
    """So the refusal is not of a case that never comes."""
    unstated = [name for name, entry in CATALOG.items() if entry.license.weights == publishing.UNSTATED]
    assert unstated
    assert isinstance(CATALOG[unstated[0]].license, License)
