"""What pyproject.toml promises about other libraries, and the versions that development is locked to."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
NEEDED = [Requirement(text) for text in (*PROJECT["dependencies"], *(t for extra in EXTRAS.values() for t in extra))]
LOCK = ROOT / "constraints.txt"
# tools and readers of which no major release has broken us
UNBOUNDED = {"build", "hypothesis", "laspy", "mypy", "onnx", "onnxruntime", "onnxscript", "pytest", "pytest-xdist"}
UNBOUNDED |= {"ruff", "types-pyyaml", "uv", "submitit", "scenezoo"}


def locked() -> dict[str, Version]:
    """Library -> version in the lock file."""
    lines = [line for line in LOCK.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    pairs = [re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;@]+)( ; .*)?", line) for line in lines]
    assert all(pairs), [line for line, pair in zip(lines, pairs, strict=True) if not pair]
    return {canonical(pair[1]): Version(pair[2]) for pair in pairs if pair}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_library_has_a_lowest_version_and_one_that_broke_things_has_a_highest():
    for needed in NEEDED:
        signs = {part.operator for part in needed.specifier}
        assert ">=" in signs, needed
        assert ("<" in signs) == (canonical(needed.name) not in UNBOUNDED), needed


def test_a_library_has_the_same_bounds_wherever_it_is_named():
    bounds: dict[str, set[str]] = {}
    for needed in NEEDED:
        bounds.setdefault(canonical(needed.name), set()).add(str(needed.specifier))
    assert not {name: texts for name, texts in bounds.items() if len(texts) > 1}


def test_the_lock_file_pins_all_that_development_needs_within_the_bounds():
    """Names and versions alone: where they come from is the installer's setting, no address is in the file."""
    assert "://" not in LOCK.read_text("utf-8")
    versions = locked()
    of_development = [Requirement(text) for text in (*PROJECT["dependencies"], *EXTRAS["dev"])]
    for needed in of_development:
        name = canonical(needed.name)
        assert name in versions, f"{name}: make lock"
        assert needed.specifier.contains(versions[name], prereleases=True), (str(needed), versions[name])


def test_what_is_installed_for_development_is_what_is_locked():
    """`make install` installs by the lock file; who installed otherwise is told what differs."""
    if not (ROOT / ".venv" / "installed").exists() or Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("the tests run in another environment than make's .venv")
    have = {canonical(found.name): Version(found.version) for found in metadata.distributions()}
    other = {
        name: (str(have[name]), str(version))
        for name, version in locked().items()
        if have.get(name, version) != version
    }
    assert not other, f"installed, locked: {other}; rm -rf .venv, then make install, or make lock"
