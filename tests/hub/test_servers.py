"""Hostile servers: one deadline for all that they may do, redirects that stay public, logins that stay private."""

from __future__ import annotations

import ipaddress
import json
import threading
from pathlib import Path

import pytest

from geo_pretrain import hub
from geo_pretrain.errors import HubError
from geo_pretrain.hub import exchange, transfer
from geo_pretrain.hub.exchange import Exchange, NotPublic, Overdue, Watch, is_public
from geo_pretrain.hub.transfer import download
from tests.hub.hosts import Hosts
from tests.hub.raw_servers import BODY, CASES, Connection, RawServer
from tests.zoo import unsealed, write_tiny


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """One attempt and short patience: whatever these servers do, they would go on for ever."""
    monkeypatch.delenv("GEO_PRETRAIN_MIRROR", raising=False)
    monkeypatch.setenv("GEO_PRETRAIN_TIMEOUT", "0.1")
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)


@pytest.mark.parametrize("name", CASES)
def test_no_server_holds_a_client_for_ever(name: str, part: Path, impatient: None, monkeypatch: pytest.MonkeyPatch):
    case = CASES[name]
    if not case.slow:
        monkeypatch.setenv("GEO_PRETRAIN_TIMEOUT", "60")  # on a busy machine, too, it is the bytes that end it
    with RawServer(case.answer) as server:
        if not case.says:
            download(f"{server.url}/x", part, limit=2 * len(BODY))
            assert part.read_bytes() == BODY
            return
        with pytest.raises(HubError) as caught:
            download(f"{server.url}/x", part, limit=20 * len(BODY))
    assert case.says in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert not part.exists()


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_watch_bounds_every_read_every_phase_and_the_whole():
    clock = Clock()
    watch = Watch(timeout=10, allowance=45, clock=clock)
    assert watch.patience() == 10
    clock.now += 15  # one phase lasts two timeouts
    assert watch.patience() == 5
    clock.now += 5
    with pytest.raises(Overdue, match="did not get through with its answer within 20 s"):
        watch.patience()
    watch.phase("the file", 100)
    watch.count(99)
    assert watch.patience() == 10
    watch.count(1)
    with pytest.raises(Overdue, match="more and more bytes without an end of the file"):
        watch.patience()
    clock.now += 22
    watch.phase("the file", 100)
    assert watch.patience() == 3  # what is left of the whole
    clock.now += 3
    watch.phase("the file", 100)
    with pytest.raises(Overdue, match="took longer than 45 s in all") as caught:
        watch.patience()
    assert caught.value.whole


def test_the_deadline_follows_the_size_and_can_be_set(part: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEO_PRETRAIN_TIMEOUT", "30")
    source = transfer._Source("http://host/x", None, 300_000_000)
    assert source.watch.allowance == 10 * 30 + 300_000_000 / transfer.SLOW
    assert transfer._Source("http://host/x", None, 10**15).watch.allowance == 300 + transfer.LONGEST
    assert transfer._Source("http://host/x", 5.0, 10**15).watch.allowance == 5
    monkeypatch.setattr(transfer, "SLOWEST", 0)
    monkeypatch.setenv("GEO_PRETRAIN_DEADLINE", "0.2")
    says = r"took longer than 0.2 s in all, .* set GEO_PRETRAIN_DEADLINE to more"
    with RawServer(CASES["a body that drips"].answer) as server, pytest.raises(HubError, match=says):
        download(f"{server.url}/x", part)
    assert not part.exists()


def test_the_lock_of_the_cache_is_not_held_by_a_server(impatient: None, tmp_path: Path):
    """Two clients of a server that never ends an answer both get their error."""
    errors = []

    def ask() -> None:
        try:
            hub.open("tiny_net_r18", hub=f"{server.url}/hub", cache_dir=tmp_path)
        except HubError as error:
            errors.append(str(error))

    with RawServer(CASES["headers that drip without an end"].answer) as server:
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(errors) == 2
    assert len(server.requests) == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_promise_of_too_many_bytes_is_refused(impatient: None, tmp_path: Path):
    folder = write_tiny(tmp_path / "tiny_net_r18").folder
    config = unsealed(folder)
    config["files"]["encoder.safetensors"]["size"] = 10**15
    files = {"/hub/tiny_net_r18/config.json": json.dumps(config).encode()}
    with Hosts(files) as hosts:
        opened = hub.open("tiny_net_r18", hub=f"{hosts.url}/hub", cache_dir=tmp_path / "cache")
        with pytest.raises(HubError, match=f"promises {10**15} bytes; at most"):
            opened.fetch("encoder")
        assert hosts.requests == ["/hub/tiny_net_r18/config.json"]


# redirects


def test_redirects_reach_private_hosts_that_the_user_named(part: Path, monkeypatch: pytest.MonkeyPatch):
    with RawServer(lambda to: to.file()) as inner:

        def answer(to: Connection) -> None:
            to.head(f"Location: {inner.url}/admin?key=1", "Content-Length: 0", status="302 Found")

        with RawServer(answer) as outer:
            for name in ("127.0.0.1", "localhost"):
                url = f"http://{name}:{outer.port}/x"
                with pytest.raises(HubError, match=r"redirects to a host .* set GEO_PRETRAIN_REDIRECTS to its name"):
                    download(url, part)
            assert not inner.requests
            for named in (f"localhost:{inner.port}", "127.0.0.1", f"example.org, 127.0.0.1:{inner.port}"):
                monkeypatch.setenv("GEO_PRETRAIN_REDIRECTS", named)
                download(f"{outer.url}/x", part)
            monkeypatch.setenv("GEO_PRETRAIN_REDIRECTS", "127.0.0.1:1")
            with pytest.raises(HubError, match="that nobody named"):
                download(f"{outer.url}/x", part)


def test_a_name_that_leads_to_a_private_address_is_not_connected_to(monkeypatch: pytest.MonkeyPatch):
    """The address is looked at where the connection is made, so that a name cannot change in between."""
    found = [(2, 1, 6, "", ("93.184.216.34", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(exchange.socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(exchange.socket, "create_connection", lambda address, *_: address)
    rules = Exchange(Watch(1, 60), ["http://hub.example.org/x", ""])
    rules.prepare("http://rebound.example.org/x")
    with pytest.raises(NotPublic, match=r"rebound.example.org is 10.0.0.1, an address of this machine or of a private"):
        rules.connect(("rebound.example.org", 80))
    assert rules.connect(("proxy.lan", 3128)) == ("93.184.216.34", 3128)  # named in the environment
    found.pop()
    assert rules.connect(("rebound.example.org", 80)) == ("93.184.216.34", 80)
    rules.prepare("https://hub.example.org/y")  # named by the user, on any port
    found[:] = [(2, 1, 6, "", ("10.0.0.1", 443))]
    assert rules.connect(("hub.example.org", 443)) == ("10.0.0.1", 443)


def test_a_name_that_is_not_resolved_is_waited_for_as_long_as_a_server(part, impatient, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(exchange.socket, "getaddrinfo", lambda *_, **__: never.wait(60) or [])
    with pytest.raises(HubError, match=r"hub\.example\.org.* was not resolved within 0\.1 s"):
        download("http://hub.example.org/x", part)
    never.set()


@pytest.mark.parametrize("text", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(text: str):
    assert is_public(ipaddress.ip_address(text))


# logins


def test_a_login_goes_to_its_host_alone_and_into_no_message(part: Path, monkeypatch: pytest.MonkeyPatch):
    with RawServer(lambda to: to.file()) as other, RawServer(lambda to: to.file()) as own:
        url = f"http://me:s%40cret@127.0.0.1:{own.port}/x"
        download(url, part)
        assert "Authorization: Basic bWU6c0BjcmV0\r\n" in own.requests[-1]  # me:s@cret
        monkeypatch.setenv("GEO_PRETRAIN_MIRROR", f"http://me:s%40cret@127.0.0.1:{own.port}/base")
        download("https://example.org/file?x=1", part)
        assert own.requests[-1].startswith("GET /base/example.org/file?x=1 ")
        assert "bWU6c0BjcmV0" in own.requests[-1]
        monkeypatch.delenv("GEO_PRETRAIN_MIRROR")
        monkeypatch.setenv("GEO_PRETRAIN_REDIRECTS", "127.0.0.1")
        own.answer = lambda to: to.head(f"Location: {other.url}/y", "Content-Length: 0", status="302 Found")
        download(url, part)
        assert "Authorization" not in other.requests[-1]
        own.answer = lambda to: to.head("Content-Length: 0", status="403 No")
        with pytest.raises(HubError) as caught:
            download(url, part)
    assert "http://***@127.0.0.1:" in str(caught.value)
    assert "cret" not in str(caught.value)


def test_hubs_with_a_login_or_a_signature(tmp_path: Path):
    folder = write_tiny(tmp_path / "tiny_net_r18").folder
    plain = {path.name: path.read_bytes() for path in folder.iterdir()}

    def answer(to: Connection) -> None:
        path, _, query = to.path.partition("?")
        allowed = query == "sig=KEY" or "Authorization: Basic bWU6d29yZA==" in to.request
        to.file(plain[path.rpartition("/")[2]]) if allowed else to.head("Content-Length: 0", status="403 No")

    with RawServer(answer) as server:
        place = f"127.0.0.1:{server.port}/hub"
        for number, options in enumerate(
            (
                {"hub": f"http://me:word@{place}"},
                {"hub": f"http://{place}?sig=KEY"},
                {"name_or_path": f"http://me:word@{place}/tiny_net_r18"},
                {"name_or_path": f"http://{place}/tiny_net_r18?sig=KEY"},
            )
        ):
            options = {"name_or_path": "tiny_net_r18", "cache_dir": tmp_path / str(number)} | options
            checkpoint = hub.open(**options).fetch("encoder")
            assert checkpoint.folder.name == "tiny_net_r18"
            assert "word" not in str(checkpoint.folder)
            assert "KEY" not in str(checkpoint.folder)
        with pytest.raises(HubError) as caught:
            hub.open(f"http://me:wrong@{place}/tiny_net_r18?sig=BAD", cache_dir=tmp_path / "other")
    assert "wrong" not in str(caught.value)
    assert "BAD" not in str(caught.value)


def test_what_a_server_says_cannot_steer_a_terminal(part: Path, quick: None):
    evil = "\x1b]0;pwned\x07\x1b[31mevil"
    for status in (f"418 {evil}", f"404 {evil}", f"503 {evil}"):

        def answer(to: Connection, status: str = status) -> None:
            to.head("Content-Length: 0", status=status)

        with RawServer(answer) as server, pytest.raises(HubError) as caught:
            download(f"{server.url}/x", part)
        error: BaseException | None = caught.value
        while error is not None:  # a traceback prints the causes too
            assert not any(ord(character) < 32 for character in str(error).replace("\n", ""))
            error = error.__cause__
