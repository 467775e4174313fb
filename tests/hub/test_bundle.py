"""Bundles: what goes in comes out byte for byte, and nothing else ever comes out, whatever the file holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from geo_pretrain import checkpoint
from geo_pretrain.catalog import CATALOG
from geo_pretrain.catalog.entry import File
from geo_pretrain.checkpoint import read_checkpoint, verify_files
from geo_pretrain.errors import CheckpointError, DigestMismatch, HubError
from geo_pretrain.hub import bundle as bundles
from geo_pretrain.hub import names
from geo_pretrain.hub.bundle import install_bundle, list_bundle, write_bundle
from tests.zoo import resolve, write_tiny, write_tiny_3d

NAME, NAME_3D = "tiny_net_r18", "tiny_net_srunet34"
ROOT = Path(__file__).resolve().parents[2]


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, but for locks."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_bundle_is_a_plain_tar_of_the_folders_files(folders: tuple[Path, Path], bundle: Path):
    """Read by the standard library's own reader."""
    with tarfile.open(bundle, "r:") as tar:
        members = tar.getmembers()
        stored = {member.name: tar.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    two, three = folders
    expected = {f"{NAME}/{name}": data for name, data in content(two).items()}
    expected |= {f"{NAME_3D}/{name}": data for name, data in content(three).items()}
    assert stored == expected
    texts = ["README.md", "log.jsonl", "recipe.yaml"]
    assert [member.name for member in members] == [
        *(
            f"{NAME}/{file}"
            for file in sorted([*texts, *(f"{r}.safetensors" for r in ("encoder", "decoder", "golden"))])
        ),
        f"{NAME}/config.json",
        *(f"{NAME_3D}/{file}" for file in sorted([*texts, "golden.safetensors", "model.safetensors"])),
        f"{NAME_3D}/config.json",
    ]
    facts = {(m.type, m.mode, m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members}
    assert facts == {(tarfile.REGTYPE, 0o644, 0, 0, 0, "", "")}


def test_what_goes_in_comes_out_and_is_found_by_name(folders: tuple[Path, Path], bundle: Path, tmp_path: Path):
    installed = install_bundle(bundle, tmp_path)
    assert installed == [tmp_path / "bundles" / NAME, tmp_path / "bundles" / NAME_3D]
    for folder, original in zip(installed, folders, strict=True):
        assert content(folder) == content(original)
        verify_files(read_checkpoint(folder))
    roles = ("encoder", "decoder", "golden")
    assert resolve(NAME, roles=roles, cache_dir=tmp_path, local_files_only=True) == installed[0]
    umask = os.umask(0)
    os.umask(umask)
    assert (installed[0] / "encoder.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_default_cache_is_used(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path / "own"))
    assert install_bundle(str(bundle))[0] == tmp_path / "own/bundles" / NAME


def test_equal_folders_make_equal_bundles(folders: tuple[Path, Path], bundle: Path, tmp_path: Path):
    two = tmp_path / "elsewhere"
    two.mkdir()
    for name, data in reversed(content(folders[0]).items()):
        (two / name).write_bytes(data)
        (two / name).chmod(0o600)
        os.utime(two / name, (1, 1))
    (two / "notes.txt").write_text("mine")
    other = write_bundle([folders[1], str(two)], tmp_path / "new folder" / "other.tar")
    assert other.read_bytes() == bundle.read_bytes()
    assert os.listdir(other.parent) == ["other.tar"]


def test_listing_tells_names_sizes_and_what_they_are(bundle: Path, folders: tuple[Path, Path]):
    two, three = list_bundle(bundle)
    assert (two.checkpoint.name, three.checkpoint.name) == (NAME, NAME_3D)
    assert two.size == sum(map(len, content(folders[0]).values()))
    assert two.checkpoint.arch == read_checkpoint(folders[0]).arch
    assert {name: span.size for name, span in three.spans.items()} == {
        name: len(data) for name, data in content(folders[1]).items() if name != "config.json"
    }


def test_texts_may_be_missing_but_not_what_loading_and_verifying_need(tmp_path: Path):
    write_tiny(tmp_path / "part")
    for name in ("README.md", "log.jsonl"):
        (tmp_path / "part" / name).unlink()
    (folder,) = install_bundle(write_bundle([tmp_path / "part"], tmp_path / "x.tar"), tmp_path)
    assert sorted(content(folder)) == sorted(content(tmp_path / "part"))
    for name in ("decoder.safetensors", "golden.safetensors", "encoder.safetensors"):
        whole = write_tiny(tmp_path / "whole")
        (whole.folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name}: is missing"):
            write_bundle([whole.folder], tmp_path / "y.tar")
    assert not (tmp_path / "y.tar").exists()


def test_an_unfinished_checkpoint_stays_one(tmp_path: Path):
    write_tiny(tmp_path / "run", finished=False)
    (folder,) = install_bundle(write_bundle([tmp_path / "run"], tmp_path / "x.tar"), tmp_path)
    assert read_checkpoint(folder).finished is False


def test_what_cannot_be_bundled_leaves_the_old_bundle(folders: tuple[Path, Path], tmp_path: Path):
    out = write_bundle(folders[:1], tmp_path / "x.tar")
    old = out.read_bytes()
    bad = write_tiny(tmp_path / "bad").folder
    data = bytearray((bad / "decoder.safetensors").read_bytes())
    data[-1] ^= 1
    (bad / "decoder.safetensors").write_bytes(data)
    with pytest.raises(DigestMismatch, match=r"decoder\.safetensors"):
        write_bundle([folders[1], bad], out)
    with pytest.raises(CheckpointError, match=f"both called '{NAME}'; each name is accepted once"):
        write_bundle([folders[0], folders[1], folders[0]], out)
    with pytest.raises(CheckpointError, match="No checkpoint folder is given"):
        write_bundle([], out)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        write_bundle([tmp_path], out)
    with pytest.raises(HubError, match="is a folder; the name of a file"):
        write_bundle(folders, tmp_path)
    with pytest.raises(HubError, match=r"cannot be written .*Choose another place"):
        write_bundle(folders, out / "below" / "x.tar")
    long = write_tiny(tmp_path / "long", name="n" * 200)
    with pytest.raises(CheckpointError, match="does not fit into a tar file"):
        write_bundle([long.folder], out)
    assert out.read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == ["bad", "long", "x.tar"]


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_tiny(tmp_path / "two").folder
    real, target = checkpoint.verify_file, folder / "encoder.safetensors"

    def verify_then_change(found: checkpoint.Checkpoint, name: str) -> None:
        real(found, name)
        if name == target.name:
            target.write_bytes(bytes(target.stat().st_size))

    monkeypatch.setattr(bundles, "verify_file", verify_then_change)
    with pytest.raises(DigestMismatch, match=r"encoder\.safetensors"):
        write_bundle([folder], tmp_path / "x.tar")
    assert os.listdir(tmp_path) == ["two"]


def test_an_installed_checkpoint_is_left_alone(bundle: Path, tmp_path: Path):
    def facts() -> dict[str, tuple[int, int]]:
        found = (path.stat() for path in (tmp_path / "bundles").rglob("*.*") if path.is_file())
        return {str(stat.st_ino): (stat.st_ino, stat.st_mtime_ns) for stat in found}

    install_bundle(bundle, tmp_path)
    before = facts()
    assert len(install_bundle(bundle, tmp_path)) == 2
    assert facts() == before


def test_another_checkpoint_of_the_same_name_is_replaced_and_a_damaged_one_repaired(bundle: Path, tmp_path: Path):
    place = tmp_path / "bundles" / NAME
    write_tiny(place, provenance={"steps": 8, "seed": 1}, recipe_yaml=None)
    (place / "notes.txt").write_text("mine")
    neighbor = write_tiny(tmp_path / "bundles" / "tiny_other_r18", name="tiny_other_r18").folder
    kept = content(neighbor)
    install_bundle(bundle, tmp_path)
    assert read_checkpoint(place).provenance == {"steps": 7, "seed": 0}
    assert (place / "recipe.yaml").is_file()
    assert (place / "notes.txt").read_text() == "mine"
    assert content(neighbor) == kept
    whole = content(place)
    for damage in (b"", whole["encoder.safetensors"][:-1] + b"!"):
        (place / "encoder.safetensors").write_bytes(damage)
        install_bundle(bundle, tmp_path)
        assert content(place) == whole
    (place / "config.json").write_text("{")
    install_bundle(bundle, tmp_path)
    assert content(place) == whole
    assert {path.name for path in (tmp_path / "bundles").iterdir() if path.is_dir()} == {
        NAME,
        NAME_3D,
        "tiny_other_r18",
    }


def test_a_name_of_the_catalog_keeps_its_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entry = CATALOG["pri3d_geo_r18.rooms"]
    found = write_tiny(tmp_path / "mine", name=entry.name)
    out = write_bundle([tmp_path / "mine"], tmp_path / "x.tar")

    def publish(name: str, digest: str) -> None:
        source = (f"http://localhost/{entry.name}/{name}",)
        file = File("encoder", name, 1, digest, source)
        facts = {"name": entry.name, "arch": found.arch, "contract": found.contract, "files": (file,)}
        monkeypatch.setattr(names, "CATALOG", {entry.name: type("Entry", (), facts)})

    digest = found.files["encoder.safetensors"].sha256
    publish("encoder.safetensors", "0" * 64)
    with pytest.raises(
        DigestMismatch, match=f"published with sha256 {'0' * 64} .* has {digest}.*never changes meaning"
    ):
        install_bundle(out, tmp_path)
    publish("heads.safetensors", digest)
    with pytest.raises(DigestMismatch, match="has no such file"):
        install_bundle(out, tmp_path)
    assert not (tmp_path / "bundles").exists()
    publish("encoder.safetensors", digest)
    assert len(install_bundle(out, tmp_path)) == 1


def test_a_name_of_the_catalog_keeps_its_network(tmp_path: Path):
    write_tiny(tmp_path / "mine", name="pri3d_view_geo_r50")
    out = write_bundle([tmp_path / "mine"], tmp_path / "x.tar")
    with pytest.raises(CheckpointError, match=r"whose network is .*depth=50.*; this one's is .*depth=18.* by its path"):
        install_bundle(out, tmp_path)
    assert not (tmp_path / "bundles").exists()


def script(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    head = "import os, signal, sys\nfrom pathlib import Path\nfrom geo_pretrain.hub.bundle import *\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, **options)


KILLED = """
bundle, cache, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
real, count = Path.replace, 0
def replace(self, target):
    global count
    count += self.is_dir()
    if self.is_dir() and count == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)
Path.replace = replace
install_bundle(bundle, cache)
"""


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_killed_installer_leaves_the_old_or_the_new_checkpoint(bundle: Path, tmp_path: Path, number: int):
    """It replaces two checkpoints with two renames each; it dies between them."""
    places = [tmp_path / "bundles" / NAME, tmp_path / "bundles" / NAME_3D]
    write_tiny(places[0], provenance={"steps": 1})
    write_tiny_3d(places[1], provenance={"steps": 1})
    process = script(KILLED, bundle, tmp_path, number)
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL
    steps = []
    for place in places:
        found = read_checkpoint(place)
        verify_files(found)
        steps.append(found.provenance["steps"])
    assert steps == ([1, 1] if number < 3 else [7, 1])
    install_bundle(bundle, tmp_path)
    assert [read_checkpoint(place).provenance["steps"] for place in places] == [7, 7]
    assert sorted(path.name for path in (tmp_path / "bundles").iterdir() if path.suffix != ".lock") == [NAME, NAME_3D]


def test_many_installers_at_once_agree(bundle: Path, folders: tuple[Path, Path], tmp_path: Path):
    write_tiny(tmp_path / "bundles" / NAME, provenance={"steps": 1})
    processes = [script("install_bundle(sys.argv[1], sys.argv[2])", bundle, tmp_path) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    assert content(tmp_path / "bundles" / NAME) == content(folders[0])
    assert content(tmp_path / "bundles" / NAME_3D) == content(folders[1])


def test_what_a_killed_installer_left_is_cleared_away(bundle: Path, folders: tuple[Path, Path], tmp_path: Path):
    """It died after its renames, before the old checkpoint was gone, or while it unpacked."""
    place = tmp_path / "bundles" / NAME
    write_tiny(place, provenance={"steps": 2})
    write_tiny(place.with_name(f".{NAME}.old"), provenance={"steps": 1})
    place.with_name(f".{NAME_3D}.writing").mkdir()
    (place.with_name(f".{NAME_3D}.writing") / "model.safetensors").write_bytes(b"half")
    install_bundle(bundle, tmp_path)
    assert content(place) == content(folders[0])
    assert sorted(path.name for path in place.parent.iterdir() if path.suffix != ".lock") == [NAME, NAME_3D]


def test_who_had_to_wait_finds_the_work_done(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = bundles.exclusive
    first: dict[Path, int] = {}

    @contextmanager
    def exclusive(folder: Path) -> Iterator[None]:
        monkeypatch.setattr(bundles, "exclusive", real)
        if not first:
            install_bundle(bundle, tmp_path)  # another process, while this one waits
            first.update({path: path.stat().st_ino for path in tmp_path.rglob("*.safetensors")})
        with real(folder):
            yield

    monkeypatch.setattr(bundles, "exclusive", exclusive)
    install_bundle(bundle, tmp_path)
    assert len(first) == 5
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*.safetensors")} == first


LIMITED = """
import resource
from geo_pretrain.errors import HubError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # every write beyond fails, as on a full disk
try:
    install_bundle(sys.argv[1], sys.argv[2])
except HubError as error:
    print(error)
try:
    write_bundle([sys.argv[3]], sys.argv[4])
except HubError as error:
    print(error)
"""


def test_a_full_disk_leaves_nothing_behind(bundle: Path, folders: tuple[Path, Path], tmp_path: Path):
    process = script(LIMITED, bundle, tmp_path / "cache", folders[0], tmp_path / "out/x.tar")
    answers, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    installing, writing = answers.splitlines()
    assert "cannot be written (File too large)" in installing
    assert "GEO_PRETRAIN_CACHE" in installing
    assert writing == f"{tmp_path}/out/x.tar: cannot be written (File too large). Choose another place for it."
    assert content(tmp_path) == {}
    assert not list((tmp_path / "cache").rglob("*.writing"))


def test_a_cache_that_cannot_be_written_says_so_unless_nothing_needs_writing(bundle: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="GEO_PRETRAIN_CACHE"):
        install_bundle(bundle, tmp_path / "file" / "cache")
    installed = install_bundle(bundle, tmp_path)
    locks = list(tmp_path.rglob("*.lock"))
    for lock in locks:
        lock.unlink()
    assert install_bundle(bundle, tmp_path) == installed
    assert not list(tmp_path.rglob("*.lock"))  # an installed bundle takes no lock: a read-only cache is enough


def test_a_checkpoint_is_not_mistaken_for_its_bundled_twin(tmp_path: Path):
    """The same files under another config, such as another license, are another checkpoint."""
    first = write_tiny(tmp_path / "first")
    install_bundle(write_bundle([first.folder], tmp_path / "1.tar"), tmp_path)
    license = replace(first.license, code="Apache-2.0")
    write_tiny(tmp_path / "second", license=license)
    (folder,) = install_bundle(write_bundle([tmp_path / "second"], tmp_path / "2.tar"), tmp_path)
    assert read_checkpoint(folder).license == license


def test_a_file_that_is_no_bundle_stays(folders: tuple[Path, Path], tmp_path: Path):
    out = tmp_path / "mine.tar"
    out.write_text("keep me")
    with pytest.raises(HubError, match=r"mine\.tar is there and no bundle\. Choose another name"):
        write_bundle(folders, out)
    assert out.read_text() == "keep me"
    out.unlink()
    write_bundle(folders[:1], out)
    assert len(list_bundle(write_bundle(folders, out))) == 2
