"""Where there is no network, names give up at once; where somebody answers, the client's own patience is left to it."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import huggingface_hub
import pytest

from geo_pretrain import load_backbone
from geo_pretrain.errors import HubError
from geo_pretrain.online import hub_fault

CLOSED = "http://127.0.0.1:1/config.json"  # nobody listens on port 1


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that refuses connections in place of Hugging Face, and a client that must not be called."""
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *args, **more: CLOSED)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **more: pytest.fail("the client was called"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("name", "hub"), [("hf-hub:lab/net", None), ("gsc_r50", "hf:lab")])
def test_a_hub_that_cannot_be_reached_is_given_up_at_once(name: str, hub: str | None, tmp_path: Path):
    with pytest.raises(HubError, match=r"Hugging Face, 'lab/\w+': .*Connection refused.*Check the network.*bundle"):
        load_backbone(name, hub=hub, cache_dir=tmp_path)


def raised_by(cause: BaseException) -> Exception:
    """An error as HTTP libraries raise it: their own, from the system's."""
    try:
        raise Exception("all connection attempts failed") from cause
    except Exception as error:
        return error


class ConnectTimeout(Exception):
    """Named as the HTTP libraries' error for a connection that was never answered."""


@pytest.mark.parametrize(
    ("cause", "fault"),
    [
        (socket.gaierror(-3, "Temporary failure in name resolution"), "Temporary failure in name resolution"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "Network is unreachable"),
        (ConnectTimeout("timed out"), "timed out"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset"), None),
        (TimeoutError("the read operation timed out"), None),
        (RuntimeError("503 Server Error"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_no_pause_mends_counts(
    cause: BaseException, fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def answer(*args: object, **more: object) -> None:
        raise raised_by(cause)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
    found = hub_fault("lab/net", "config.json", cache=str(tmp_path))
    assert found is None if fault is None else fault in str(found)


def test_nobody_is_asked_for_what_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *args: pytest.fail("somebody was asked"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **more: str(tmp_path / "config.json"))
    assert hub_fault("lab/net", "config.json") is None
