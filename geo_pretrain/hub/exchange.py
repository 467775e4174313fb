"""The rules of one exchange with a web server, kept below HTTP: how long, how many bytes, and which hosts.

A server decides what it sends and how slowly. Here the reader decides how long it listens: every read from the
connection, whatever HTTP makes of the bytes (headers, 100-continues, pages, chunk sizes, trailers, bodies), is counted
against a phase and a deadline. Redirects reach public hosts only, apart from those that the user named.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from geo_pretrain.errors import HubError
from geo_pretrain.hub.links import host

REDIRECTS_VARIABLE = "GEO_PRETRAIN_REDIRECTS"
HEAD_LIMIT = 1 << 20  # bytes before a file's first byte, and between two blocks of it
PHASE = 2.0  # times the timeout: headers, a page, or one block of a file have to be whole by then
LOOPBACK = "127.0.0.1"
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Overdue(Exception):
    """The server took longer, or sent more, than it may; the message is about the server: "sends ..."."""

    def __init__(self, reason: str, *, whole: bool = False) -> None:
        super().__init__(reason)
        self.whole = whole  # the deadline of the exchange: no other attempt can help


class NotPublic(Exception):
    """A redirect to a host of this machine or of a private network that the user did not name."""


class Watch:
    """How long a server may take: `timeout` seconds without a byte, a phase's seconds and bytes, one deadline for all.

    `allowance` seconds count from the making of the watch; `clock` returns seconds.
    """

    def __init__(self, timeout: float, allowance: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout, self.clock = timeout, clock
        self.start = clock()
        self.allowance = allowance
        self.what, self.until, self.bytes_left = "", float("inf"), 0
        self.phase("its answer", HEAD_LIMIT)

    def phase(self, what: str, limit: int) -> None:
        """Begin a part of the exchange that has to be over within `PHASE` timeouts and `limit` bytes."""
        self.what, self.until, self.bytes_left = what, self.clock() + PHASE * self.timeout, limit

    def patience(self) -> float:
        """Seconds that the next read may take. Raises `Overdue`."""
        now = self.clock()
        if now >= self.start + self.allowance:
            raise Overdue(f"took longer than {self.allowance:g} s in all", whole=True)
        if self.bytes_left <= 0:
            raise Overdue(f"sends more and more bytes without an end of {self.what}")
        if now >= self.until:
            raise Overdue(f"did not get through with {self.what} within {PHASE * self.timeout:g} s")
        return min(self.timeout, self.until - now, self.start + self.allowance - now)

    def count(self, number: int) -> None:
        """Note that so many bytes came."""
        self.bytes_left -= number


class _Watched(io.RawIOBase):
    """The stream of a connection, each read of which keeps to a `Watch`."""

    def __init__(self, raw: io.RawIOBase, connection: socket.socket, watch: Watch) -> None:
        self.raw, self.connection, self.watch = raw, connection, watch

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.connection.settimeout(self.watch.patience())
        number = self.raw.readinto(buffer)
        self.watch.count(number or 0)
        return number

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Response(HTTPResponse):
    def __init__(self, connection: socket.socket, *arguments: Any, watch: Watch, **options: Any) -> None:
        super().__init__(connection, *arguments, **options)
        self.fp: Any = io.BufferedReader(_Watched(self.fp.detach(), connection, watch))


class Exchange:
    """One download: the watch, the hosts that may be asked, and the logins that the user gave.

    `urls`: addresses that the user named; their hosts may be private.
    """

    def __init__(self, watch: Watch, urls: Iterable[str]) -> None:
        self.watch = watch
        self.named = {_place(url) for url in urls if url} | _named_places()
        self.logins: dict[tuple[str, str], str] = {}  # (scheme, netloc) -> Authorization
        self.asked = ""  # the host that the current request is for; a connection to another one is to a proxy
        self.is_named = True  # of the current request

    def handlers(self) -> list[urllib.request.BaseHandler]:
        """For `urllib.request.build_opener`."""
        return [_PlainHandler(self), _SecureHandler(self)]

    def take_login(self, url: str) -> str:
        """Remember the user info of an address, for its host alone, and return the address without it."""
        parts = urlsplit(url)
        info, at, netloc = parts.netloc.rpartition("@")
        if not at:
            return url
        name, _, password = info.partition(":")
        login = f"{unquote(name)}:{unquote(password)}".encode()
        self.logins[parts.scheme, netloc] = f"Basic {base64.b64encode(login).decode()}"
        return urlunsplit(parts._replace(netloc=netloc))

    def prepare(self, url: str) -> dict[str, str]:
        """The login headers of a request for `url`. Raises `NotPublic` where its host can be seen to be private."""
        parts = urlsplit(url)
        self.asked, self.is_named = host(url), self._is_named(url)
        literal = _literal(self.asked)
        if literal is not None and not self.is_named and not is_public(literal):
            raise NotPublic(f"{self.asked} is an address of this machine or of a private network")
        login = self.logins.get((parts.scheme, parts.netloc))
        return {} if login is None else {"Authorization": login}

    def connect(self, address: tuple[str, int], timeout: Any = None, source_address: Any = None) -> socket.socket:
        """Connect to a host; of one that the user did not name, to a public address only (`NotPublic`)."""
        name, port = address
        seconds = self.watch.patience()
        found = _addresses(name, port, seconds)
        named = self.is_named or name != self.asked  # a proxy is named too, in the environment
        for text in [] if named else found:
            if not is_public(ipaddress.ip_address(text)):
                raise NotPublic(f"{name} is {text}, an address of this machine or of a private network")
        for text in found[:-1]:
            with suppress(OSError):
                return socket.create_connection((text, port), self.watch.patience(), source_address)
        return socket.create_connection((found[-1], port), self.watch.patience(), source_address)

    def _is_named(self, url: str) -> bool:
        name, port = _place(url)
        if (name, port) in self.named:
            return True
        # another port of this machine is another service; another port of a named machine may be its https
        return (name, None) in self.named or (name != LOOPBACK and name in {known for known, _ in self.named})


def _addresses(name: str, port: int, seconds: float) -> list[str]:
    """The addresses of a host. Raises TimeoutError where the system's resolver, which has no limit, takes longer."""
    answer: Future[list[str]] = Future()

    def resolve() -> None:
        try:
            answer.set_result([str(info[4][0]) for info in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)])
        except Exception as error:  # also of names that are none
            answer.set_exception(error)

    threading.Thread(target=resolve, daemon=True).start()  # it cannot be ended, and nobody waits for it
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"the name {name} was not resolved within {seconds:.3g} s") from None


class _PlainHandler(urllib.request.HTTPHandler):
    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(_connection, HTTPConnection, self.exchange), request)


class _SecureHandler(urllib.request.HTTPSHandler):
    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(_connection, HTTPSConnection, self.exchange), request)


def _connection(kind: type[HTTPConnection], exchange: Exchange, place: str, **options: Any) -> HTTPConnection:
    connection = kind(place, **options)
    connection.response_class = partial(_Response, watch=exchange.watch)  # type: ignore[assignment]
    connection._create_connection = exchange.connect  # type: ignore[attr-defined]
    return connection


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public network: neither this machine's, nor private, nor reserved."""
    inside = getattr(address, "ipv4_mapped", None)
    if inside is None and address.version == 6 and address in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
        inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    address = inside or address
    return address.is_global and not address.is_multicast


def _literal(name: str) -> Address | None:
    """The address that a host name writes out, in any notation that systems understand; None for other names."""
    name = name.removesuffix(".")  # the root of all names, which may be written out
    if name == "localhost" or name.endswith(".localhost"):
        return ipaddress.IPv4Address(LOOPBACK)
    with suppress(ValueError):
        return ipaddress.ip_address(name.partition("%")[0])
    if name[:1].isdigit():
        with suppress(OSError):
            return ipaddress.IPv4Address(socket.inet_aton(name))  # 0177.0.0.1, 127.1, 2130706433
    return None


def _place(url: str) -> tuple[str, int | None]:
    parts = urlsplit(url)
    return _one_name(parts.hostname or ""), parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _one_name(name: str) -> str:
    """The host name, one for all names of this machine."""
    literal = _literal(name)
    return LOOPBACK if literal is not None and literal.is_loopback else name


def _named_places() -> set[tuple[str, int | None]]:
    """Hosts, with or without a port, that the environment names."""
    places = set()
    for text in os.environ.get(REDIRECTS_VARIABLE, "").split(","):
        if not text.strip():
            continue
        try:
            parts = urlsplit(f"//{text.strip()}")
            places.add((_one_name(parts.hostname or ""), parts.port))
        except ValueError as error:
            raise HubError(
                f"{REDIRECTS_VARIABLE}={text!r}: HOST or HOST:PORT, separated by commas, is accepted."
            ) from error
    return places
