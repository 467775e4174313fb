"""Checkpoints that this project publishes: from a Hugging Face repository at one commit, every byte compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128

from geo_pretrain.checkpoint import read_checkpoint
from tests.forked import Forked, import_anew
from tests.hub.loopback_hub import Fault, LoopbackHub
from tests.zoo import unsealed, write_tiny

NAME, REPO = "pri3d_view_r18.rooms", "lab/pri3d_view_r18.rooms"


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def published(server: LoopbackHub, tmp_path: Path) -> list[dict[str, Any]]:
    """The entry's files as the catalog would list them, and the same name with other weights on a later commit."""
    found = write_tiny(tmp_path / "made", name=NAME)
    content = {path.name: path for path in found.folder.iterdir()}
    commit = server.push(REPO, content)
    server.push(REPO, {"encoder.safetensors": b"something else"})
    sources = [f"hf-hub:{REPO}@{commit}"]
    return [
        {"role": stored.role, "name": name, "size": stored.size, "sha256": stored.sha256, "sources": sources}
        for name, stored in found.files.items()
    ]


def resolve(server: LoopbackHub, home: Path, files: list[dict[str, Any]], **options: Any) -> str:
    def work() -> None:
        import_anew("huggingface_hub", "geo_pretrain", "tests")  # which read their settings when they are imported
        from geo_pretrain import hub
        from geo_pretrain.catalog import File
        from geo_pretrain.errors import GeoPretrainError
        from geo_pretrain.progress import progress
        from tests.zoo import as_tiny

        pinned = tuple(File(**file | {"sources": tuple(file["sources"])}) for file in files)
        entry = replace(as_tiny(NAME), files=pinned, status="published-here")
        hub.find = {entry.name: entry}.get
        try:
            with progress():  # as commands do: what the client downloads is shown there
                folder = hub.open(entry.name, **options).fetch("encoder").folder
            print(json.dumps(str(folder)))
        except GeoPretrainError as error:
            print(json.dumps(f"{type(error).__name__}: {error}"))

    process = Forked(work, server.environment(home))
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return str(json.loads(printed.splitlines()[-1]))


def test_the_pinned_commit_is_loaded_and_only_what_is_needed(server, published, tmp_path: Path):
    folder = Path(resolve(server, tmp_path / "home", published))
    assert f"hf-hub:{REPO}@{folder.name}" == published[0]["sources"][0]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "encoder.safetensors"]
    found = read_checkpoint(folder)
    assert found.files["encoder.safetensors"].sha256 == published[0]["sha256"]
    assert not any("decoder" in request for request in server.requests)
    server.forget()
    assert resolve(server, tmp_path / "home", published, local_files_only=True) == str(folder)
    assert server.requests == []


def test_an_altered_byte_is_fetched_again(server, published, tmp_path: Path):
    server.fault(Fault("GET .*" + published[0]["sha256"], "corrupt", times=1))
    folder = Path(resolve(server, tmp_path / "home", published))
    assert folder.is_dir()
    assert read_checkpoint(folder).files["encoder.safetensors"].sha256 == published[0]["sha256"]


def test_bytes_that_stay_altered_are_refused(server, published, tmp_path: Path):
    server.fault(Fault("GET .*" + published[0]["sha256"], "corrupt"))
    answer = resolve(server, tmp_path / "home", published)
    assert answer.startswith("HubError")
    assert published[0]["sha256"] in answer
    server.fault()
    assert Path(resolve(server, tmp_path / "home", published)).is_dir()


def test_a_cached_file_is_compared_by_its_pin_whatever_config_says(server, published, tmp_path: Path):
    folder = Path(resolve(server, tmp_path / "home", published))
    path, config = folder / "encoder.safetensors", folder / "config.json"
    was = read_checkpoint(folder).files[path.name].xxh3
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    config.write_text(json.dumps(unsealed(folder)).replace(str(was), xxh3_128(path.read_bytes()).hexdigest()))
    answer = resolve(server, tmp_path / "home", published, local_files_only=True)
    assert f"expected {published[0]['sha256']}" in answer


def test_a_repository_with_other_weights_than_the_catalog_promises_is_refused(server, published, tmp_path: Path):
    published[0]["sha256"] = "0" * 64
    answer = resolve(server, tmp_path / "home", published)
    assert f"expected {'0' * 64}" in answer
    assert not any("encoder" in request for request in server.requests)


def test_the_next_source_is_used_when_the_first_is_down(server, published, tmp_path: Path):
    write_tiny(tmp_path / "cache/bundles" / NAME, name=NAME)
    server.fault(Fault(".*", "status", status=401))
    environment = {"cache_dir": str(tmp_path / "cache")}
    assert resolve(server, tmp_path / "home", published, **environment) == str(tmp_path / "cache/bundles" / NAME)
    answer = resolve(server, tmp_path / "home", published)
    assert f"- {published[0]['sources'][0]}: " in answer
    assert "geo-pretrain train pri3d_view_r18.rooms --out DIR" in answer
