"""Fixtures of several files of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from geo_pretrain.hub import transfer
from geo_pretrain.hub.bundle import write_bundle
from tests.hub.downloads import DATA, DRIVE, DROPBOX, GITHUB, OWN, PLAIN
from tests.hub.hosts import Hosts
from tests.zoo import write_tiny, write_tiny_3d


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("folders")
    write_tiny(root / "two")
    write_tiny_3d(root / "three")
    return root / "two", root / "three"


@pytest.fixture(scope="module")
def bundle(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(folders, tmp_path_factory.mktemp("bundle") / "both.tar")


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    with Hosts(dict.fromkeys((DRIVE, DROPBOX, PLAIN, GITHUB, OWN), DATA)) as hosts:
        monkeypatch.setenv("GEO_PRETRAIN_MIRROR", hosts.url)
        yield hosts


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, long patience, no mirror."""
    monkeypatch.delenv("GEO_PRETRAIN_MIRROR", raising=False)
    monkeypatch.setenv("GEO_PRETRAIN_TIMEOUT", "60")
    monkeypatch.setattr(transfer, "PAUSE", 0.01)


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / ".1.part"
