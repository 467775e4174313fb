"""One file over a real connection: share links of every host, what is tried again, what is refused in which words."""

from __future__ import annotations

import email.utils
import hashlib
import shutil
import socket
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from geo_pretrain.errors import HubError, NotThere
from geo_pretrain.hub import transfer
from geo_pretrain.hub.transfer import download
from tests.hub.downloads import DATA, GITHUB, OWN, PLAIN, check, refused
from tests.hub.hosts import Fault, Hosts

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def impatient(quick: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the faults that are over when patience is; a busy machine must not look like them."""
    if request.node.callspec.params["kind"] in ("stall", "drip", "silent"):
        monkeypatch.setenv("GEO_PRETRAIN_TIMEOUT", "0.2")


# what is tried again


@pytest.mark.parametrize(
    ("kind", "url"),
    [("truncate", PLAIN), ("truncate", GITHUB), ("truncate", OWN), ("reset", OWN), ("stall", GITHUB), ("drip", OWN)],
)
@pytest.mark.usefixtures("impatient")
def test_a_broken_transfer_continues_where_it_stopped(hosts: Hosts, part: Path, kind: str, url: str):
    hosts.fault(url, Fault(kind, times=2, after=100_000))
    check(f"{hosts.url}{url}" if url == OWN else url, part)
    assert hosts.served[url] == 3
    extra = hosts.bytes_sent[url] - len(DATA)
    assert extra == 0 or kind in ("drip", "reset")  # a reset overtakes bytes; what drips is counted at once
    ranges = [int(h["range"].removeprefix("bytes=").removesuffix("-")) for h in hosts.headers if "range" in h]
    assert sorted(set(ranges)) == sorted(ranges[-1:] + ranges[:1])
    if kind in ("truncate", "stall"):
        assert set(ranges) == {100_000, 200_000}
    assert all(h["if-range"].startswith('"') for h in hosts.headers if "range" in h)


@pytest.mark.parametrize("kind", ["truncate", "reset", "chunked-cut"])
def test_servers_that_cannot_continue_start_again(part: Path, kind: str):
    with Hosts({OWN: DATA}, ranges=False) as hosts:
        hosts.fault(OWN, Fault(kind, times=2, after=200_000))
        check(hosts.url + OWN, part)
        assert hosts.served[OWN] == 3
        assert not any("range" in headers for headers in hosts.headers)
        assert hosts.bytes_sent[OWN] == len(DATA) + 2 * 200_000


def test_weak_tags_are_not_continued(part: Path):
    with Hosts({OWN: DATA}, weak=True) as hosts:
        hosts.fault(OWN, Fault("truncate", times=1, after=200_000))
        check(hosts.url + OWN, part)
        assert not any("range" in headers for headers in hosts.headers)


@pytest.mark.parametrize("new", [DATA[::-1], DATA[1:1000]], ids=["same length", "shorter"])
@pytest.mark.parametrize("ignores_if_range", [False, True])
def test_two_versions_of_a_file_are_never_mixed(hosts: Hosts, part: Path, ignores_if_range: bool, new: bytes):
    """The file is replaced between two attempts: the server answers the stale If-Range with the whole new file.

    One that ignores If-Range gives itself away by the new tag.
    """
    hosts.ignores_if_range = ignores_if_range and len(new) == len(DATA)
    hosts.fault(OWN, Fault("truncate", times=1, after=200_000))

    def replace(done: int, total: int | None) -> None:
        hosts.files[OWN] = new

    assert download(hosts.url + OWN, part, progress=replace) == hashlib.sha256(new).hexdigest()
    assert part.read_bytes() == new
    assert hosts.headers[1]["range"] == "bytes=200000-"
    assert hosts.served[OWN] == 2 + hosts.ignores_if_range


def test_ranges_that_do_not_fit_are_noticed(hosts: Hosts, part: Path):
    hosts.fault(OWN, Fault("truncate", times=1, after=200_000))
    once = iter([Fault("wrong-range", times=1)])

    def then(done: int, total: int | None) -> None:
        for fault in once:
            hosts.fault(OWN, fault)

    check(hosts.url + OWN, part, progress=then)
    assert ["range" in headers for headers in hosts.headers] == [False, True, False]


def test_a_range_that_cannot_be_satisfied_starts_again(hosts: Hosts, part: Path):
    hosts.fault(OWN, Fault("truncate", times=1, after=200_000))
    once = iter([Fault("status", times=1, status=416)])

    def then(done: int, total: int | None) -> None:
        for fault in once:
            hosts.fault(OWN, fault)

    check(hosts.url + OWN, part, progress=then)
    assert ["range" in headers for headers in hosts.headers] == [False, True, False]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_busy_servers_are_asked_again(hosts: Hosts, part: Path, status: int):
    hosts.fault(OWN, Fault("status", times=2, status=status))
    check(hosts.url + OWN, part)
    hosts.fault(OWN, Fault("status", status=status))
    hosts.forget()
    refused(hosts.url + OWN, part, rf"HTTP {status} .*\(3 attempts\). Try again later\.")
    assert len(hosts.requests) == 3


@pytest.mark.parametrize("kind", ["silent", "hang-up"])
@pytest.mark.usefixtures("impatient")
def test_servers_that_do_not_answer_are_asked_again(hosts: Hosts, part: Path, kind: str):
    hosts.fault(OWN, Fault(kind, times=2))
    check(hosts.url + OWN, part)
    assert len(hosts.requests) == 3


def test_the_time_a_server_asks_for_is_waited(hosts: Hosts, part: Path, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(transfer.time, "sleep", slept.append)
    hosts.fault(OWN, Fault("status", times=1, headers={"Retry-After": "2"}))
    check(hosts.url + OWN, part)
    assert slept == [2.0]
    monkeypatch.setattr(transfer.time, "time", lambda: 1_700_000_000.0)
    soon = email.utils.formatdate(1_700_000_008, usegmt=True)
    hosts.fault(OWN, Fault("status", times=1, status=429, headers={"Retry-After": soon}))
    check(hosts.url + OWN, part)
    assert slept[1] == 8
    hosts.fault(OWN, Fault("status", times=2))
    check(hosts.url + OWN, part)
    assert slept[2:] == pytest.approx([0.01, 0.03])


@pytest.mark.parametrize("text", ["3600", email.utils.formatdate(1_700_003_600, usegmt=True)], ids=("s", "date"))
def test_a_long_time_is_not_waited(hosts: Hosts, part: Path, monkeypatch, text: str):
    slept: list[float] = []
    monkeypatch.setattr(transfer.time, "sleep", slept.append)
    monkeypatch.setattr(transfer.time, "time", lambda: 1_700_000_000.0)
    hosts.fault(OWN, Fault("status", headers={"Retry-After": text}))
    refused(hosts.url + OWN, part, r"HTTP 503 Service Unavailable. Try again in 3600 s, as the server asks")
    assert slept == []
    assert len(hosts.requests) == 1


@pytest.mark.parametrize("text", ["soon", "", "-5", "0", "Thu, 01 Jan 1970 00:00:00 GMT"])
def test_a_time_that_is_none_is_ignored(hosts: Hosts, part: Path, monkeypatch, text: str):
    slept: list[float] = []
    monkeypatch.setattr(transfer.time, "sleep", slept.append)
    hosts.fault(OWN, Fault("status", times=1, headers={"Retry-After": text}))
    check(hosts.url + OWN, part)
    assert slept == [0.01]


# what is refused


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("truncate", r"the connection ended after 3000 of 300000 bytes \(3 attempts\). Try again later"),
        ("reset", r"the connection broke \(.*reset by peer\) \(3 attempts\)"),
        ("stall", r"no byte for 0\.2 s \(3 attempts\)"),
        ("drip", r"sent only \d+ bytes in \d+\.\d s \(3 attempts\)"),
        ("silent", r"no byte for 0\.2 s \(3 attempts\)"),
        ("hang-up", r"the connection broke .*\(3 attempts\)"),
        ("chunked-cut", r"the connection broke \(IncompleteRead.*\(3 attempts\)"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_what_breaks_three_times_is_an_error(hosts: Hosts, part: Path, kind: str, match: str):
    hosts.fault(OWN, Fault(kind))
    refused(hosts.url + OWN, part, match)
    assert len(hosts.requests) == 3


@pytest.mark.parametrize(
    ("status", "match", "error"),
    [
        (404, "HTTP 404, no such file", NotThere),
        (410, "HTTP 410, no such file", NotThere),
        (401, "HTTP 401 Unauthorized: the server wants a login or does not share the file. Check the add", HubError),
        (403, "HTTP 403 Forbidden: the server wants a login or does not share the file. Check the addre", HubError),
        (418, "HTTP 418 .*Check the address in a browser", HubError),
        (204, "HTTP 204 No Content: no file comes with it", HubError),
        (304, "HTTP 304 Not Modified", HubError),
    ],
)
@pytest.mark.parametrize("url", [OWN, GITHUB])
def test_refusals_are_final(hosts: Hosts, part: Path, status: int, match: str, error: type, url: str):
    hosts.fault(url, Fault("status", status=status))
    refused(hosts.url + url if url == OWN else url, part, match, error)
    assert len(hosts.requests) == 1


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("page", r"sends a web page \('Welcome to the guest network & more'\) in place of the file. Check the addr"),
        ("unlabelled-page", r"sends a web page \('Login'\) in place of the file"),
        ("loop", r"redirects in a circle, 10 times"),
        ("chain", r"redirects, 10 times"),
        ("to-file", r"redirects to 'file:///etc/hostname'; http and https addresses are accepted"),
        ("compressed", r"comes compressed \(gzip\) although the plain file was asked for"),
    ],
)
def test_what_is_no_file_is_an_error_at_once(hosts: Hosts, part: Path, kind: str, match: str):
    hosts.fault(PLAIN, Fault(kind))
    refused(PLAIN, part, match)
    assert len(hosts.requests) == (11 if kind in ("loop", "chain") else 1)


@pytest.mark.parametrize("kind", ["called-page", "unsized", "chunked", "slow", "relative"])
def test_unusual_answers_are_understood(hosts: Hosts, part: Path, kind: str):
    hosts.fault(PLAIN, Fault(kind, delay=0.001))
    check(PLAIN, part)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/hostname", "ftp://127.0.0.1/x", "/etc/hostname", "http://", "http://[::1/x", "http://a:b/x", ""],
)
def test_only_web_addresses_are_fetched(part: Path, url: str):
    refused(url, part, "is no address; http and https addresses are accepted")


def test_addresses_may_hold_spaces_and_umlauts(part: Path):
    with Hosts({"/a%20b/%C3%BC.pth": DATA}) as hosts:
        check(f"{hosts.url}/a b/ü.pth", part)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_servers_that_cannot_be_reached(part: Path, monkeypatch):
    port = free_port()
    text = refused(f"http://127.0.0.1:{port}/x", part, "Connection refused")
    assert "Check the address, the network and the proxy" in text
    assert "`geo-pretrain bundle`" in text
    monkeypatch.setenv("GEO_PRETRAIN_MIRROR", f"http://127.0.0.1:{port}")
    text = refused(PLAIN, part, "Connection refused. Check that the mirror runs")
    assert f"GEO_PRETRAIN_MIRROR=http://127.0.0.1:{port}" in text


def test_a_connection_that_breaks_in_its_greeting_is_made_again(part: Path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted = []

        def hang_up() -> None:
            for _ in range(3):
                connection, _ = listener.accept()
                accepted.append(connection.recv(1))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()  # a reset, in the middle of the TLS handshake

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        refused(f"https://127.0.0.1:{listener.getsockname()[1]}/x", part, r"reset by peer \(3 attempts\)")
        thread.join(10)
    assert len(accepted) == 3


def test_keys_in_redirects_are_not_shown(hosts: Hosts, part: Path):
    hosts.fault(GITHUB, Fault("truncate"))
    text = refused(GITHUB, part, r"answered by objects\.githubusercontent\.com")
    assert "secret123" not in text


def test_the_limit_is_in_bytes(hosts: Hosts, part: Path):
    check(hosts.url + OWN, part, limit=len(DATA))
    refused(hosts.url + OWN, part, "is 300000 bytes long, at most 299999 are accepted", limit=len(DATA) - 1)
    hosts.forget()
    for kind in ("unsized", "chunked"):
        hosts.fault(OWN, Fault(kind))
        check(hosts.url + OWN, part, limit=len(DATA))
        refused(hosts.url + OWN, part, "goes on after 299999 bytes, the most that are acc", limit=len(DATA) - 1)
    assert len(hosts.requests) == 4


def test_progress_is_told(hosts: Hosts, part: Path):
    told: list[tuple[int, int | None]] = []
    check(hosts.url + OWN, part, progress=lambda *numbers: told.append(numbers))
    assert told[-1] == (len(DATA), len(DATA))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    hosts.fault(OWN, Fault("unsized"))
    check(hosts.url + OWN, part, progress=lambda *numbers: told.append(numbers))
    assert told[-1] == (len(DATA), None)


def test_an_interrupted_download_leaves_nothing(hosts: Hosts, part: Path):
    def interrupt(done: int, total: int | None) -> None:
        assert part.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(hosts.url + OWN, part, progress=interrupt)
    assert not part.exists()


def test_an_older_file_at_the_target_is_replaced(hosts: Hosts, part: Path):
    part.write_bytes(DATA * 2)
    check(hosts.url + OWN, part)


def test_an_empty_file_is_a_file(part: Path):
    with Hosts({"/log.jsonl": b""}) as hosts:
        assert download(f"{hosts.url}/log.jsonl", part) == hashlib.sha256(b"").hexdigest()
    assert part.read_bytes() == b""


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf"])
def test_a_timeout_is_a_number_of_seconds(part: Path, monkeypatch, text: str):
    monkeypatch.setenv("GEO_PRETRAIN_TIMEOUT", text)
    with pytest.raises(HubError, match=f"GEO_PRETRAIN_TIMEOUT='{text}'; a number of seconds above 0 is accepted"):
        download("http://127.0.0.1:1/x", part)


# mirror and https


@pytest.mark.parametrize("text", ["localhost:8000", "ftp://host", "http://"])
def test_a_mirror_is_an_address(part: Path, monkeypatch, text: str):
    monkeypatch.setenv("GEO_PRETRAIN_MIRROR", text)
    with pytest.raises(HubError, match=r"GEO_PRETRAIN_MIRROR='.*'; an address such as http://host/base is accepted"):
        download(PLAIN, part)


def test_the_mirror_may_lie_under_a_path(part: Path, monkeypatch):
    files = {f"/mirrors/{PLAIN.removeprefix('http://')}": DATA}
    with Hosts(files) as hosts:
        monkeypatch.setenv("GEO_PRETRAIN_MIRROR", f"{hosts.url}/mirrors/")
        check(PLAIN, part)
        check(f"{hosts.url}/mirrors/{PLAIN.removeprefix('http://')}", part)  # the mirror itself is not mirrored
        assert len(set(hosts.requests)) == 1


def test_the_mirror_itself_is_asked_directly(monkeypatch):
    """Its redirects to itself, on a machine of its own (which a test has not)."""
    monkeypatch.setenv("GEO_PRETRAIN_MIRROR", "http://mirror.lan/base")
    source = transfer._Source(PLAIN)
    assert source._address(PLAIN) == f"http://mirror.lan/base/{PLAIN.removeprefix('http://')}"
    for url in ("http://mirror.lan/base", "http://mirror.lan/base/x?y"):
        assert source._address(url) == url
    assert source._address("http://mirror.lan/other") == "http://mirror.lan/base/mirror.lan/other"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate of this test")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command.split(), *files], cwd=folder, check=True, capture_output=True)
    (folder / "both.pem").write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    return folder / "both.pem"


def test_https_never_becomes_http(certificate: Path, part: Path, monkeypatch):
    with Hosts({OWN: DATA}, certificate=certificate) as hosts:
        refused(hosts.url + OWN, part, "certificate verify failed")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("cert.pem")))
        check(hosts.url + OWN, part)
        hosts.fault(OWN, Fault("to-http"))
        refused(hosts.url + OWN, part, r"redirects from https to http \(example\.org\), where anybody can alter")


def test_a_target_below_a_file_says_so(tmp_path: Path):
    (tmp_path / "file").touch()
    with Hosts({OWN: DATA}) as hosts, pytest.raises(HubError, match=r"cannot be written .* GEO_PRETRAIN_CACHE"):
        download(hosts.url + OWN, tmp_path / "file" / "x.part")
