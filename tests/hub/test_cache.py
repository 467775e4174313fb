"""What the cache lists and what may be taken out of it, on real folders."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from geo_pretrain.errors import HubError, UnknownName
from geo_pretrain.hub.cache import cached, default_cache, exclusive, remove
from tests.zoo import write_tiny


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one folder of each kind and what others keep there."""
    root = tmp_path / "cache"
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(root))
    write_tiny(root / "hub/localhost-1234/tiny_net_r18")
    write_tiny(root / "authors/tiny_authors_r18", name="tiny_authors_r18")
    write_tiny(root / "bundles/tiny_bundle_r18", name="tiny_bundle_r18")
    (root / "authors/digests.json").write_text("{}")
    (root / "surfaces").mkdir()
    (root / "surfaces/a.safetensors").write_bytes(b"1")
    return root


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


KEPT = ["authors/digests.json", "surfaces/a.safetensors"]


def test_the_default_is_the_variable_or_the_home_folder(monkeypatch):
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", "~/elsewhere")
    assert default_cache() == Path.home() / "elsewhere"
    for text in ("", None):
        monkeypatch.setenv("GEO_PRETRAIN_CACHE", text) if text is not None else monkeypatch.delenv("GEO_PRETRAIN_CACHE")
        assert default_cache() == Path.home() / ".cache/geo_pretrain"


def test_every_folder_is_listed_by_kind_and_name(cache: Path):
    write_tiny(cache / "hub/other-5678/tiny_net_r18")
    newest = cache / "bundles/tiny_bundle_r18/README.md"
    os.utime(newest, (4e9, 4e9))
    found = cached()
    assert [(one.kind, one.name) for one in found] == [
        ("authors", "tiny_authors_r18"),
        ("bundle", "tiny_bundle_r18"),
        ("hub", "tiny_net_r18"),
        ("hub", "tiny_net_r18"),
    ]
    assert found[2].folder == cache / "hub/localhost-1234/tiny_net_r18"
    assert found[3].folder == cache / "hub/other-5678/tiny_net_r18"
    for one in found:
        assert one.size == sum(path.stat().st_size for path in one.folder.iterdir())
        assert one.broken == ""
    assert found[1].modified == 4e9
    assert found == cached(cache) == cached(str(cache))


def test_an_empty_cache_is_no_error(tmp_path: Path):
    assert cached(tmp_path / "nowhere") == []
    assert remove(None, tmp_path / "nowhere") == []
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(UnknownName, match=r"Unknown cached checkpoint 'tiny'. The cache .*nowhere holds none"):
        remove("tiny", tmp_path / "nowhere")


def test_broken_folders_are_listed_as_such_and_can_be_removed(cache: Path):
    (cache / "hub/localhost-1234/tiny_net_r18/config.json").unlink()
    (cache / "authors/tiny_authors_r18/config.json").write_text("{")
    (cache / "bundles/empty").mkdir()
    broken = {one.name: one.broken for one in cached()}
    assert "has no config.json" in broken["tiny_net_r18"]
    assert "is not JSON" in broken["tiny_authors_r18"]
    assert "has no config.json" in broken["empty"]
    assert broken["tiny_bundle_r18"] == ""
    assert len(remove(["tiny_net_r18", "tiny_authors_r18", "empty"])) == 3
    assert [one.name for one in cached()] == ["tiny_bundle_r18"]


def test_hidden_names_and_files_are_not_listed(cache: Path):
    (cache / "hub/localhost-1234/.tiny_net_r18.lock").touch()
    (cache / "hub/stray").touch()
    (cache / "authors/.tiny_authors_r18.writing").mkdir()
    (cache / "hub/.old/x").mkdir(parents=True)
    assert len(cached()) == 3


def test_removing_takes_every_folder_of_the_name_and_its_empty_parents(cache: Path):
    write_tiny(cache / "bundles/tiny_net_r18")
    (cache / "hub/localhost-1234/.tiny_net_r18.lock").touch()
    removed = remove("tiny_net_r18")
    assert [(one.kind, one.name) for one in removed] == [("bundle", "tiny_net_r18"), ("hub", "tiny_net_r18")]
    assert not (cache / "hub").exists()
    assert sorted(path.name for path in (cache / "bundles").iterdir()) == ["tiny_bundle_r18"]
    assert [one.name for one in cached()] == ["tiny_authors_r18", "tiny_bundle_r18"]


def test_removing_all_keeps_the_digests_and_other_rooms(cache: Path):
    beside = cache / "authors"
    (beside / ".gone_net_r18.work").mkdir()
    (beside / ".gone_net_r18.work/download.part").touch()
    (beside / ".tiny_authors_r18.writing").mkdir()
    (beside / ".tiny_authors_r18.old").mkdir()
    (cache / "hub/localhost-1234/.gone_net_r18.lock").touch()
    (beside / ".digests.json.lock").touch()
    assert len(remove(None)) == 3
    assert files(cache) == ["authors/.digests.json.lock", *KEPT]
    assert sorted(path.name for path in cache.iterdir()) == ["authors", "surfaces"]
    assert cached() == []


def test_an_unknown_name_removes_nothing(cache: Path):
    before = files(cache)
    with pytest.raises(UnknownName, match=r"'tiny_net_r50'. Closest: 'tiny_net_r18'.*`geo-pretrain cache ls`"):
        remove(["tiny_net_r18", "tiny_net_r50"])
    for name in ("..", "../cache", "/", "", "hub", "localhost-1234", "digests.json", "surfaces", "*"):
        with pytest.raises(UnknownName):
            remove(name)
    assert files(cache) == before


def test_links_are_removed_and_what_they_point_to_is_not(cache: Path, tmp_path: Path):
    mine = write_tiny(tmp_path / "mine" / "my_net_r18", name="my_net_r18").folder
    (cache / "bundles/my_net_r18").symlink_to(mine)
    (cache / "hub/linked").symlink_to(mine.parent)
    with pytest.raises(HubError, match=r"hub/linked/my_net_r18 lies outside the cache .* remove it yourself"):
        remove("my_net_r18")
    (cache / "hub/linked").unlink()
    before = files(mine)
    assert [one.folder for one in remove("my_net_r18")] == [cache / "bundles/my_net_r18"]
    assert not (cache / "bundles/my_net_r18").is_symlink()
    assert files(mine) == before
    # a link inside a folder goes, its target stays
    (cache / "bundles/tiny_bundle_r18/link").symlink_to(mine)
    remove("tiny_bundle_r18")
    assert files(mine) == before
    # the cache itself may be a link
    (tmp_path / "alias").symlink_to(cache)
    assert len(remove(None, tmp_path / "alias")) == 2
    assert files(cache) == KEPT


def test_a_removal_that_fails_leaves_no_promise_behind(cache: Path, monkeypatch):
    def fail(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("geo_pretrain.hub.cache.shutil.rmtree", fail)
    with pytest.raises(HubError, match=r"tiny_net_r18: cannot be removed \(Permission denied\)"):
        remove("tiny_net_r18")
    assert {one.name: bool(one.broken) for one in cached()}["tiny_net_r18"]


def test_removing_waits_for_who_is_filling_the_folder(cache: Path):
    folder = cache / "hub/localhost-1234/tiny_net_r18"
    entered, order = threading.Event(), []

    def fill() -> None:
        with exclusive(folder):
            entered.set()
            threading.Event().wait(0.2)
            order.append("filled")
            assert (folder / "config.json").is_file()

    thread = threading.Thread(target=fill)
    thread.start()
    entered.wait()
    remove("tiny_net_r18")
    order.append("removed")
    thread.join()
    assert order == ["filled", "removed"]
    assert not folder.exists()
