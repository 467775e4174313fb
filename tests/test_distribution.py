"""Weights as Python packages: what is refused, what a wheel holds, and that damage is told. Narrow networks."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
import subprocess
import sys
import tarfile
import types
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from geo_pretrain import catalog, hub, load_backbone, verify
from geo_pretrain.cards import render_entry
from geo_pretrain.cards.sections import measured_section
from geo_pretrain.catalog import CATALOG, shipped
from geo_pretrain.catalog.entry import OUR_PACKAGES, Entry, Result, Shipped
from geo_pretrain.catalog.license import License, rooms_license
from geo_pretrain.checkpoint import read_checkpoint, verify_files
from geo_pretrain.contract import ImageContract
from geo_pretrain.distribution import add, check, measured, mirrors, project, shipped_file
from geo_pretrain.errors import CheckpointError, DataError, DigestMismatch, HubError, UnknownName
from geo_pretrain.hub.cache import names_here
from geo_pretrain.listing import catalog_rows
from geo_pretrain.training.visualize.loss_curve import read_losses, running_mean
from tests.hub.hosts import Hosts
from tests.zoo import ARCH, as_tiny, write_tiny

ROOT = Path(__file__).resolve().parents[1]
NAME = "pri3d_view_r18.rooms"
MADE_FOR = {entry.name: entry for entry in catalog.ENTRIES}  # before weights of this project were given away
LOG = "".join(
    json.dumps({"step": n, "lr": 0.1, "view": 7 - n / 1000, "images_per_second": 2.0}) + "\n" for n in range(1, 5001)
)
RECIPE = "name: pri3d_view_r18.rooms\ndata: {source: rooms, path: /home/someone/rooms}\n"
FACTS = {"steps": 20_000, "seconds": 90_000.0, "device": "cpu", "processes": 1, "init": "scratch"}
RUN = {"name": NAME, "log": LOG, "license": rooms_license(), "provenance": FACTS, "recipe_yaml": RECIPE}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a narrow network as long as those that are given away."""
    return write_tiny(tmp_path_factory.mktemp("run") / NAME, **RUN).folder


def give(monkeypatch: pytest.MonkeyPatch, entry: Entry) -> None:
    """Let the catalog say this of a name, wherever it was imported."""
    before, after = catalog.CATALOG, types.MappingProxyType({**catalog.CATALOG, entry.name: entry})
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "geo_pretrain"]:
        if vars(module).get("CATALOG") is before:
            monkeypatch.setattr(module, "CATALOG", after)


def make_narrow(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Make NAME a narrow network that nobody has given away; returns the file that lists what was."""
    listed = folder / "shipped.py"
    text = Path(shipped.__file__).read_text()
    listed.write_text(text[: text.index("SHIPPED: Mapping")] + shipped_file.rows_text({}))
    monkeypatch.setattr(add, "catalog_file", lambda weights: listed)
    monkeypatch.setattr(add, "_differences", lambda checkpoint: [])  # of a recipe that is none
    give(monkeypatch, as_tiny(NAME))
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return listed


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return make_narrow(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def given(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file shipped.py and, in weights/, the project to which the run was added."""
    folder = tmp_path_factory.mktemp("given")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_narrow(monkeypatch, folder)
        add.add_run(finished, folder / "weights")
    return folder


@pytest.fixture
def installed(given: Path, narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The package installed and its name listed: the site and the folder of projects."""
    shutil.copyfile(given / "shipped.py", narrow)
    shutil.copytree(given / "weights", weights := tmp_path / "weights")
    row = shipped_file.read_shipped(narrow)[NAME]
    give(monkeypatch, row.applied(catalog.CATALOG[NAME]))
    site, project = tmp_path / "site", weights / "geo_pretrain_weights"
    shutil.copytree(project / project.name, site / project.name)
    facts = site / f"{project.name}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project.name}\nVersion: 1.0\n")
    points = (project / "pyproject.toml").read_text().partition('entry-points."')[2].partition('"]\n')
    (facts / "entry_points.txt").write_text(f"[{points[0]}]\n" + points[2].partition("\n")[0].replace('"', "") + "\n")
    monkeypatch.syspath_prepend(site)
    return site, weights


def test_a_run_becomes_a_package_whose_name_loads_offline(installed: tuple[Path, Path], finished: Path, narrow: Path):
    site, weights = installed
    assert [door.place for door in hub.doors(NAME) if door.is_open] == ["package:geo_pretrain_weights"]
    network = load_backbone(NAME)
    assert torch.equal(network.conv1.weight, load_file(finished / "encoder.safetensors")["conv1.weight"].half().float())
    assert verify(NAME).passed
    assert NAME in names_here()
    assert [row["how"] for row in catalog_rows([NAME])] == ["ready offline"]
    made = read_checkpoint(site / "geo_pretrain_weights" / NAME)
    assert "(elsewhere)/rooms" in (made.folder / "recipe.yaml").read_text()
    steps = [json.loads(line)["step"] for line in (made.folder / "log.jsonl").read_text().splitlines()]
    assert steps[:3] == [1, 4, 7]
    assert steps[-1] == 5000
    assert len(steps) <= add.LOG_LINES + 1
    assert np.asarray(Image.open(made.folder / "loss.png")).std() > 5
    sums = (weights / "geo_pretrain_weights/SHA256SUMS").read_text().splitlines()
    done = subprocess.run(
        ["sha256sum", "-c"], input="\n".join(sums), cwd=site, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    readme = (weights / "geo_pretrain_weights/README.md").read_text()
    assert "| 20,000 steps in 25.0 h on cpu | none (random weights) |" in readme
    before = {path: path.read_bytes() for path in weights.rglob("*") if path.is_file()}
    add.add_run(finished, weights)
    assert {path: path.read_bytes() for path in weights.rglob("*") if path.is_file()} == before
    listed = narrow.read_text()
    lint = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--diff", str(narrow)], capture_output=True, check=False
    )
    assert lint.returncode == 0, lint.stdout.decode()
    assert 'made="20,000 steps in 25.0 h on cpu"' in listed


DAMAGE = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-7]), r"xxh3|sha256 is .* expected"),
    "a flipped byte": (
        lambda path: path.write_bytes(flipped(path.read_bytes())),
        r"sha256 is [0-9a-f]{64} .*, expected",
    ),
    "missing": (lambda path: path.unlink(), "is missing; config.json lists it"),
    "renamed": (lambda path: path.rename(path.with_name("x.safetensors")), "is missing; config.json lists it"),
}


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_file_is_told_with_the_line_that_mends_it(installed: tuple[Path, Path], fault: str):
    path = installed[0] / "geo_pretrain_weights" / NAME / "encoder.safetensors"
    spoil, message = DAMAGE[fault]
    spoil(path)
    with pytest.raises(HubError, match=message) as error:
        load_backbone(NAME)
    assert "pip install --force-reinstall --no-deps ./weights/geo_pretrain_weights" in str(error.value)
    assert str(path) in str(error.value)


def test_a_damaged_description_and_a_lost_folder_are_told(installed: tuple[Path, Path], tmp_path: Path):
    folder = installed[0] / "geo_pretrain_weights" / NAME
    config = (folder / "config.json").read_text()
    pin = read_checkpoint(folder).files["encoder.safetensors"].sha256
    (folder / "config.json").write_text(config.replace(pin, "0" * 64))
    with pytest.raises(HubError, match=r"config\.json: was altered.*--force-reinstall"):
        load_backbone(NAME)
    unsealed = {key: value for key, value in json.loads(config).items() if key != "sha256"}
    (folder / "config.json").write_text(json.dumps(unsealed).replace(pin, "0" * 64))
    with pytest.raises(HubError, match=f"promises sha256 {'0' * 64} for encoder.safetensors, expected {pin}"):
        load_backbone(NAME)
    folder.rename(folder.with_name("other_r18"))
    with pytest.raises(HubError, match=f"package geo_pretrain_weights has no '{NAME}'; it holds: other_r18"):
        load_backbone(NAME)


def test_without_the_package_the_error_and_the_list_say_which_line_installs_it(
    installed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(installed[0])])
    with pytest.raises(
        HubError, match=r"not installed\. Install it: `pip install \./weights/geo_pretrain_weights` in a c"
    ):
        load_backbone(NAME)
    assert [row["how"] for row in catalog_rows([NAME])] == ["install the weights"]
    card = render_entry(catalog.CATALOG[NAME])
    assert "pip install ./weights/geo_pretrain_weights  # in a clone" in card
    assert "Made with this project: 20,000 steps in 25.0 h on cpu." in card


def test_another_door_gives_the_same_bytes_when_the_package_is_damaged(
    installed: tuple[Path, Path], narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    site, weights = installed
    path = site / "geo_pretrain_weights" / NAME / "encoder.safetensors"
    path.write_bytes(flipped(path.read_bytes()))
    network = load_backbone(NAME, hub=str(weights / "geo_pretrain_weights/geo_pretrain_weights"))
    other = load_backbone(weights / "geo_pretrain_weights/geo_pretrain_weights" / NAME)
    assert torch.equal(network.conv1.weight, other.conv1.weight)


REFUSED = {
    "unfinished": ({"finished": False}, CheckpointError, "training did not finish"),
    "short": ({"provenance": {**FACTS, "steps": 400}}, CheckpointError, r"400 steps; .* 20000 or more"),
    "another name": ({"name": "kitchen_r18"}, UnknownName, "Unknown backbone 'kitchen_r18'"),
    "another network": (
        {"arch": dataclasses.replace(ARCH, args={**ARCH.args, "depth": 34})},
        CheckpointError,
        "network is",
    ),
    "terms": (
        {
            "license": License(
                "MIT", "LicenseRef-ImageNet-terms", (("rooms", "MIT"),), "r18 (LicenseRef-ImageNet-terms)"
            )
        },
        CheckpointError,
        "its weights are under 'LicenseRef-ImageNet-terms', .* accepted: MIT",
    ),
    "another start": ({"license": rooms_license("x (MIT)")}, CheckpointError, "the catalog states start"),
    "no log": ({"log": None}, CheckpointError, "no file with role 'log'"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_no_finished_run_of_the_name_is_refused(fault: str, narrow: Path, tmp_path: Path):
    changes, error, message = REFUSED[fault]
    run = write_tiny(tmp_path / "run", **(RUN | changes)).folder
    with pytest.raises(error, match=message):
        add.add_run(run, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_a_run_that_is_under_way_is_refused(narrow: Path, tmp_path: Path):
    (tmp_path / "run.run").mkdir()
    with pytest.raises(CheckpointError, match="did not finish"):
        add.add_run(tmp_path / "run", tmp_path / "weights")


def test_files_wheels_and_folders_that_are_too_big_are_refused(
    finished: Path, narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(project, "LARGEST_FILE", 300_000)
        with pytest.raises(CheckpointError, match=r"coder\.safetensors: has 0\.[0-9] MB; at most 0 MB a file"):
            add.add_run(finished, tmp_path / "weights")
        assert not (tmp_path / "weights").exists()
    for limit, message in (
        ("LARGEST_WHEEL", r"geo_pretrain_weights would hold .* MB; a wheel may have 0 MB.*--package NAME"),
        ("LARGEST_FOLDER", r"a repository may carry 0 MB. Make this wheel in a folder outside of it"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(project, limit, 300_000)
            with pytest.raises(CheckpointError, match=message):
                project.check_sizes(tmp_path / "weights/geo_pretrain_weights", [finished])


def test_other_weights_under_a_name_that_was_given_away_are_refused(installed: tuple[Path, Path], tmp_path: Path):
    run = write_tiny(tmp_path / "other", **(RUN | {"log": LOG.replace("2.0", "3.0")})).folder
    with pytest.raises(DigestMismatch, match=r"for log\.jsonl, this one has .* never changes meaning"):
        add.add_run(run, installed[1])


def test_numbers_measured_of_shipped_weights_stand_apart_from_the_papers():
    ours = Result("dense matching", "7-Scenes, kitchen", "recall at 4 px (%)", 41.5, "a.json", "random: 23.5")
    reported = Result("semantic segmentation", "ScanNet", "mIoU", 54.4, "T1")
    row = Shipped(
        "geo_pretrain_weights", {f"{r}.safetensors": (9, "a" * 64) for r in ("encoder", "decoder")}, "x", None
    )
    entry = row.applied(dataclasses.replace(MADE_FOR[NAME], results=(reported,)))
    entry = dataclasses.replace(entry, measured=(ours,))
    card = render_entry(entry)
    text = "\n\n".join(measured_section((ours,)))
    assert text in card
    assert "54.4" not in text
    assert "41.5" not in card.partition("## Reported by the authors")[2]
    assert "What these weights bring to a task was not measured" not in card


def test_mirrors_are_asked_after_the_package():
    row = Shipped("p", {"encoder.safetensors": (9, "a" * 64)}, "x", mirrors=("https://h/r", f"hf-hub:me/x@{'c' * 40}"))
    entry = dataclasses.replace(CATALOG["pri3d_view_r50.lr001"], authors_files=(), status="planned", results=())
    (file,) = row.applied(entry).files
    address = "https://h/r/pri3d_view_r50.lr001/encoder.safetensors"
    assert file.sources == ("package:p", address, f"hf-hub:me/x@{'c' * 40}")
    assert "install its weights with `pip install p`; or its files are at https" in row.applied(entry).how_to_get()


def test_a_written_row_is_read_back(tmp_path: Path):
    rows = {
        "b_r18": Shipped(
            "p",
            {"encoder.safetensors": (9, "a" * 64)},
            "x",
            (120, 160),
            ("https://h/r",),
            (Result("a", "b", "c", 1.5, f"results.json#/{'deep/' * 30}", 'said "so"'),),
        ),
        "a_r18": Shipped("q", {}, "y"),
    }
    path = tmp_path / "shipped.py"
    shutil.copyfile(shipped.__file__, path)
    shipped_file.write_shipped(path, rows)
    assert shipped_file.read_shipped(path) == rows
    assert {line[-6:] for line in path.read_text().splitlines() if len(line) > 120} == {": E501"}
    shipped_file.write_shipped(path, shipped.SHIPPED)
    assert path.read_text() == Path(shipped.__file__).read_text()
    path.write_text("SHIPPED = (")
    with pytest.raises(CheckpointError, match="git checkout"):
        shipped_file.read_shipped(path)


def test_losses_of_a_log(tmp_path: Path):
    lines = [
        '{"settings": 1}',
        '{"step": 2, "lr": 1, "a": 5, "b": 1}',
        '{"step": 4, "lr": 1, "a": 3}',
        '{"step": 5, "l',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    steps, losses = read_losses(tmp_path / "log.jsonl")
    assert steps.tolist() == [2, 4]
    assert {name: values.tolist() for name, values in losses.items()} == {"a": [5, 3]}
    slow = [np.mean(range(max(0, end - 3), end)) for end in range(1, 9)]
    assert np.allclose(running_mean(np.arange(8.0), 3), slow)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "lr": 0.1}\n')
    with pytest.raises(DataError, match="has no losses"):
        read_losses(tmp_path / "log.jsonl")


def test_a_stored_number_reaches_the_cards_and_is_compared(
    installed: tuple[Path, Path], narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    weights = installed[1]
    clone, listed = tmp_path / "clone", tmp_path / "clone/geo_pretrain/catalog/shipped.py"
    listed.parent.mkdir(parents=True)
    shutil.copyfile(narrow, listed)
    monkeypatch.setattr(measured, "catalog_file", lambda weights: listed)
    stored = clone / "x.json"
    stored.write_text(json.dumps({"runs/a": [{"recall": 0.41234567}, "text"]}))
    facts = {"task": "dense matching", "dataset": "kitchen", "metric": "recall (%)", "weights": weights}
    for place, message in (
        ("/runs~1b/0", r"has no 'runs/b' at its top; there is: \['runs/a'\]"),
        ("/runs~1a/0/x", r"no 'x' at /runs~1a/0; there is: \['recall'\]"),
        ("/runs~1a/1", "is 'text'; accepted: the place of a number"),
        ("runs", "JSON pointer"),
    ):
        with pytest.raises(DataError, match=message):
            measured.add_result(NAME, stored, place, **facts)
    with pytest.raises(UnknownName):
        measured.add_result("csc_srunet34.rooms", stored, "/runs~1a/0/recall", **facts)
    measured.add_result(NAME, stored, "/runs~1a/0/recall", **facts)
    measured.add_result(NAME, stored, "/runs~1a/0/recall", **facts, scale=100, note="random weights: 23.5")
    row = shipped_file.read_shipped(listed)[NAME]
    place = "x.json#/runs~1a/0/recall"
    assert row.measured == (Result("dense matching", "kitchen", "recall (%)", 41.23, place, "random weights: 23.5"),)
    card = (weights / "geo_pretrain_weights/geo_pretrain_weights" / NAME / "README.md").read_text()
    assert "| dense matching | kitchen | recall (%) | 41.23 | x.json: random weights: 23.5 |" in card
    verify_files(read_checkpoint(weights / "geo_pretrain_weights/geo_pretrain_weights" / NAME))
    measured.check_results(row, clone)
    stored.write_text(stored.read_text().replace("0.41", "0.51"))
    with pytest.raises(DataError, match=r"the card says 41.23 recall \(%\), x.json.* says 0.512346"):
        measured.check_results(row, clone)


def test_a_mirror_is_listed_when_its_bytes_are_those_of_the_package(
    installed: tuple[Path, Path], narrow: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    site, weights = installed
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(mirrors, "catalog_file", lambda weights: narrow)
    folder = weights / "geo_pretrain_weights/geo_pretrain_weights" / NAME
    pages = {f"/v1/{NAME}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    log = f"/v1/{NAME}/log.jsonl"
    with Hosts(pages | {log: pages[log] + b"x"}) as hosts, pytest.raises(HubError, match=r"log\.jsonl"):
        mirrors.add_mirror(NAME, f"{hosts.url}/v1", weights)
    with pytest.raises(HubError, match="hf-hub:OWNER/REPO@COMMIT"):
        mirrors.add_mirror(NAME, "/tmp/x", weights)
    with pytest.raises(HubError, match="40 hex digits"):
        mirrors.add_mirror(NAME, "hf-hub:me/x@main", weights)
    assert shipped_file.read_shipped(narrow)[NAME].mirrors == ()
    with Hosts(pages) as hosts:
        assert mirrors.add_mirror(NAME, f"{hosts.url}/v1/", weights) == (f"{hosts.url}/v1",)
        row = shipped_file.read_shipped(narrow)[NAME]
        give(monkeypatch, row.applied(as_tiny(NAME)))
        path = site / "geo_pretrain_weights" / NAME / "encoder.safetensors"
        assert [(door.place, door.is_open) for door in hub.doors(NAME)] == [
            ("package:geo_pretrain_weights", True),
            (f"{hosts.url}/v1", True),
        ]
        path.write_bytes(flipped(path.read_bytes()))
        network = load_backbone(NAME)  # from the next door
        wanted = load_file(folder / "encoder.safetensors")["conv1.weight"].float()
        assert torch.equal(network.conv1.weight, wanted)


# the hook of a wheel, as hatchling calls it


class Aborted(Exception):
    pass


@pytest.fixture
def hook(installed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    """The hook of the project, with a stand-in for hatchling, and the project."""
    folder = installed[1] / "geo_pretrain_weights"
    for name in ("hatchling", "hatchling.builders", "hatchling.builders.hooks", "hatchling.builders.hooks.plugin"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    interface = types.ModuleType("interface")
    interface.BuildHookInterface = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hatchling.builders.hooks.plugin.interface", interface)
    made = runpy.run_path(str(folder / "hatch_build.py"))["CustomBuildHook"]()

    def abort(text: str) -> None:
        raise Aborted(text)

    made.root, made.app = str(folder), types.SimpleNamespace(abort=abort)
    return made, folder


def test_a_wheel_of_damaged_or_too_big_files_is_not_built(hook, tmp_path: Path):
    made, folder = hook
    made.initialize("standard", {})
    path = folder / folder.name / NAME / "encoder.safetensors"
    whole = path.read_bytes()
    path.write_bytes(flipped(whole))
    with pytest.raises(Aborted, match=r"encoder\.safetensors: sha256 is .* expected"):
        made.initialize("standard", {})
    path.unlink()
    with pytest.raises(Aborted, match="is missing"):
        made.initialize("standard", {})
    with path.open("wb") as stream:
        stream.truncate(project.LARGEST_FILE + 1)
    with pytest.raises(Aborted, match="at most 80000000"):
        made.initialize("standard", {})
    wheel = tmp_path / "x.whl"
    with wheel.open("wb") as stream:
        stream.truncate(project.LARGEST_WHEEL + 1)
    with pytest.raises(Aborted, match="at most 100000000"):
        made.finalize("standard", {}, str(wheel))
    assert not wheel.exists()


# this repository


def git(*arguments: str) -> bytes:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout")
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout


def test_the_weights_of_this_repository_are_as_the_catalog_lists_them():
    if not (ROOT / "weights").is_dir():
        pytest.skip("an archive of the repository has no weights")
    lines = list(check.check_weights(ROOT / "weights", golden=False))
    inside = [name for name, row in shipped.SHIPPED.items() if (ROOT / "weights" / row.package).is_dir()]
    assert len(lines) == len(inside)
    assert set(shipped.SHIPPED) <= set(CATALOG)
    tracked = git("ls-files", "-z", "weights").decode().split("\0")
    assert sum((ROOT / name).stat().st_size for name in tracked if name) <= project.LARGEST_FOLDER
    for name in OUR_PACKAGES:
        assert name in (ROOT / "pyproject.toml").read_text().partition("weights = [")[2].partition("]")[0]


def test_an_archive_of_the_repository_has_no_weights():
    """torch.hub fetches such an archive."""
    tree = git("write-tree").decode().strip() if git("ls-files", "weights") else "HEAD"
    data = git("archive", "--worktree-attributes", "--format=tar", tree, "weights", "hubconf.py", ".gitattributes")
    with tarfile.open(fileobj=BytesIO(data)) as archive:
        names = archive.getnames()
    assert "hubconf.py" in names
    assert not [name for name in names if name.startswith("weights")]
    assert len(data) < project.MB


def test_a_contract_of_another_size_is_taken_over():
    row = Shipped("p", {f"{r}.safetensors": (9, "a" * 64) for r in ("encoder", "decoder")}, "x", (120, 160))
    entry = row.applied(MADE_FOR[NAME])
    assert entry.contract == ImageContract(size=(120, 160))
