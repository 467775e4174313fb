"""Wheel, sdist, editable install and bare checkout: each gives the same package, in environments made for the test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from geo_pretrain import __version__
from geo_pretrain.catalog import CATALOG

ROOT = Path(__file__).parents[1]
CHECK = (
    "import geo_pretrain as gp, geo_pretrain.training.recipe as r; "
    "assert len(r.list_recipes()) >= 4 and r.TOY.exists(); print(gp.__file__); print(len(gp.list_backbones()))"
)


def call(*command, cwd, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "PYTHONPATH", "VIRTUAL"))}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=clean | environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def project_files(folder):
    """Files of the project under `folder`: tracked or new, not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {line for line in listed.stdout.splitlines() if (ROOT / line).exists()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project as a clone would have it, links included."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout, to know which files belong to the project")
    folder = tmp_path_factory.mktemp("checkout")
    for name in project_files(".") - project_files("weights"):  # packages of their own
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    """The sdist, and the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--outdir", out, "--installer", "uv", checkout, cwd=out)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.fixture
def environment(tmp_path):
    """A fresh venv that sees the installed libraries, but not this checkout."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    # Paths in a .pth file are added as they are: the editable install's own .pth in that folder is not read.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python, *what):
    call(
        Path(sys.executable).parent / "uv", "pip", "install", "--quiet", "--no-deps", "--python", python, *what, cwd="/"
    )


def assert_works(python, tmp_path, inside):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    file, count = call(python, "-c", CHECK, cwd=elsewhere).split()
    assert Path(file).is_relative_to(inside)
    assert int(count) >= 15
    command = python.parent / "geo-pretrain"
    assert "Commands" in call(command, "--help", cwd=elsewhere)
    assert __version__ in call(command, "--version", cwd=elsewhere)
    assert "pri3d_view_r18.rooms" in call(command, "list", cwd=elsewhere)


def test_wheel_holds_the_package_and_nothing_else(built):
    names = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    assert names == project_files("geo_pretrain")
    assert {"geo_pretrain/py.typed", "geo_pretrain/training/recipes/overlays/toy.yaml"} <= names
    assert len(names) > 50


def test_sdist_holds_what_a_build_and_the_tests_need(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert project_files("geo_pretrain") | project_files("tests") <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "hubconf.py"} <= names
    assert not any(name.startswith("training/") for name in names)


def test_wheel_installs_and_runs_from_another_folder(built, environment, tmp_path):
    install(environment, built[1])
    assert_works(environment, tmp_path, environment.parents[1])


def test_editable_install_runs_from_another_folder(checkout, environment, tmp_path):
    install(environment, "--editable", checkout)
    assert_works(environment, tmp_path, checkout)


def test_bare_checkout_works(checkout, environment):
    file, _ = call(environment, "-c", CHECK, cwd=checkout).split()
    assert Path(file).is_relative_to(checkout)
    assert "pri3d_view_geo_r50" in call(environment, "-m", "geo_pretrain", "list", cwd=checkout)


def test_link_training_leads_into_the_package():
    assert (ROOT / "training").is_symlink()
    assert os.readlink(ROOT / "training") == "geo_pretrain/training"


def test_urls_of_the_metadata_are_papers_of_the_catalog_under_labels_that_an_index_takes():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert set(urls.values()) <= {entry.paper.url for entry in CATALOG.values()}
    assert all(len(label) <= 32 for label in urls)
