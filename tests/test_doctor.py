"""doctor: a working installation has nothing wrong, and what is broken is named."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from geo_pretrain import cli, doctor
from geo_pretrain.errors import HubError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def examined(monkeypatch: pytest.MonkeyPatch, *arguments: str):
    result = CliRunner().invoke(cli.app, ["doctor", "--json", *arguments])
    return result.exit_code, [(row["state"], row["topic"], row["text"]) for row in json.loads(result.stdout)]


def test_nothing_is_wrong_here_and_nothing_is_written(monkeypatch, cache):
    code, found = examined(monkeypatch, "--no-network")
    assert code == 0
    assert not [row for row in found if row[0] == "wrong"]
    assert [row[0] for row in found if row[1] == "test"] == ["ok"] * 3
    assert not cache.exists()


def test_every_extra_for_users_is_looked_for():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {
        re.split(r"[<>=\[]", line)[0] for extra in set(extras) - {"dev", "docs", "weights"} for line in extras[extra]
    }
    assert set(doctor.EXTRAS) == named
    assert set(doctor.EXTRAS.values()) <= set(extras)


def test_a_cache_that_is_a_file_is_wrong(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path / place))
        first = next(doctor._cache())
        assert first.state == "wrong"
        assert f"{tmp_path / 'file'} is a file" in first.text


def test_what_is_broken_is_named_and_hosts_are_asked(monkeypatch, cache):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("safetensors", "timm") else "1")

    def asked(url):
        if "github" in url:
            return 10
        raise HubError(f"{url}: no route")

    def broken() -> str:
        raise RuntimeError("undefined symbol")

    monkeypatch.setattr(doctor, "probe", asked)
    monkeypatch.setattr(doctor, "_image_network", broken)
    monkeypatch.setattr(doctor, "_point_network", lambda: "fine")
    monkeypatch.setattr(doctor, "_checkpoint", lambda: "fine")
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    code, found = examined(monkeypatch)
    assert code == 1
    wrong = {topic: text for state, topic, text in found if state == "wrong"}
    assert "missing: safetensors" in wrong["libraries"]
    assert "set GEO_PRETRAIN_CACHE" in wrong["cache"]
    assert wrong["test"] == "broken: undefined symbol"
    notes = {text.partition(":")[0]: state for state, topic, text in found if topic == "host"}
    assert notes["github.com"] == "ok"
    assert notes["drive.google.com"] == "note"
    assert ("note", "extra adapters", "without timm: pip install 'geo_pretrain[adapters]'") in found


def test_lines_are_no_wider_than_a_screen_and_topics_stand_apart(monkeypatch):
    found = [
        doctor.Finding("loader's workers", "ok", "start by fork"),
        doctor.Finding("host", "note", "example.org: " + "no answer within the time that is allowed, " * 6),
    ]
    monkeypatch.setattr(doctor, "examine", lambda network: found)
    lines = CliRunner().invoke(cli.app, ["doctor"]).output.splitlines()
    assert lines[0].split("workers")[1] == "  start by fork"
    assert max(map(len, lines)) < 120
    assert len(lines) > 3
    assert all(line.startswith(" " * 25) for line in lines[2:])


def test_one_thread_is_not_many(monkeypatch):
    import torch

    for count, words in ((1, "1 thread"), (4, "4 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        text = next(finding.text for finding in doctor._machine() if finding.topic == "processor")
        assert words in text.split(", ")
