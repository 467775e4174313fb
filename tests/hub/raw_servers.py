"""Servers that speak bytes, not HTTP: what a hub could do to whoever asks it, one function a case.

    with RawServer(CASES["headers without an end"].answer) as server:
        hub.open("tiny", hub=f"{server.url}/hub")

`benchmarks.reliability` runs the same table as the test.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

BODY = bytes(range(256)) * 40
ROUND = 0.02  # seconds between two pieces of a slow answer
Answer = Callable[["Connection"], None]


class Connection:
    """One request: its first line and headers, and what is sent back until the client has gone."""

    def __init__(self, connection: socket.socket, request: str, stop: threading.Event) -> None:
        self.socket, self.request, self.stop = connection, request, stop

    @property
    def path(self) -> str:
        return self.request.split()[1]

    def send(self, *pieces: bytes) -> None:
        self.socket.sendall(b"".join(pieces))

    def head(self, *lines: str, status: str = "200 OK") -> None:
        self.send("\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1"))

    def file(self, data: bytes = BODY, *lines: str) -> None:
        self.head(f"Content-Length: {len(data)}", *lines)
        self.send(data)

    def drip(self, data: bytes) -> None:
        """Send the same bytes again and again, slowly, for ever."""
        while not self.stop.wait(ROUND):
            self.send(data)

    def pour(self, data: bytes) -> None:
        """Send the same bytes again and again, quickly, for ever."""
        block = data * (1 + (1 << 16) // len(data))
        while not self.stop.is_set():
            self.send(block)


class RawServer:
    """Answers every connection by a function, in a thread of its own."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.requests = answer, list[str]()
        self.stop = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.listener.settimeout(0.05)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _serve(self) -> None:
        while not self.stop.is_set():
            with suppress(TimeoutError, OSError):
                connection, _ = self.listener.accept()
                connection.settimeout(60)
                threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                block = connection.recv(65536)
                if not block:
                    return
                request += block
            self.requests.append(request.decode("latin-1"))
            self.answer(Connection(connection, self.requests[-1], self.stop))
            connection.shutdown(socket.SHUT_WR)
            time.sleep(0)

    def __enter__(self) -> RawServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.listener.close()


@dataclass(frozen=True)
class Case:
    """A server's doing; `says`: what the error has to name, "" where the file arrives whole; `slow`: by waiting."""

    answer: Answer
    says: str = ""
    slow: bool = False


CASES: dict[str, Case] = {}


def case(name: str, says: str = "") -> Callable[[Answer], Answer]:
    """Add a function to `CASES`."""

    def add(answer: Answer) -> Answer:
        CASES[name] = Case(answer, says, slow=any(word in name for word in ("drip", "slowly")))
        return answer

    return add


@case("an honest server")
def _(to: Connection) -> None:
    to.file()


LATE = "did not get through with its answer within"


@case("headers that drip without an end", LATE)
def _(to: Connection) -> None:
    to.send(b"HTTP/1.1 200 OK\r\nX-A: ")
    to.drip(b"a")


@case("a status line that drips", LATE)
def _(to: Connection) -> None:
    to.drip(b"H")


@case("100 Continue without an end", "sends more and more bytes without an end of its answer")
def _(to: Connection) -> None:
    to.pour(b"HTTP/1.1 100 Continue\r\n\r\n")


@case("100 Continue, slowly", LATE)
def _(to: Connection) -> None:
    to.drip(b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\n")


@case("102 Processing", "HTTP 102")
def _(to: Connection) -> None:
    to.pour(b"HTTP/1.1 102 Processing\r\nA: b\r\n\r\n")


@case("a thousand headers", "more than 100 headers")
def _(to: Connection) -> None:
    to.head(*["A: b"] * 1000)


@case("a header of 10 MB", "header line")
def _(to: Connection) -> None:
    to.head("A: " + "b" * 10_000_000)


@case("no HTTP at all", "the connection broke")
def _(to: Connection) -> None:
    to.send(b"\x00\xff SSH-2.0-OpenSSH\r\n\r\n")


@case("a web page that drips", "did not get through with its page within")
def _(to: Connection) -> None:
    to.head("Content-Type: text/html", "Content-Length: 1000000")
    to.send(b"<!doctype html><html>")
    to.drip(b"x")


@case("a web page without an end", "sends a web page")
def _(to: Connection) -> None:
    to.head("Content-Type: text/html")
    to.send(b"<!doctype html><html>")
    to.pour(b"<p>")


@case("the body of an error that drips", "HTTP 418")
def _(to: Connection) -> None:
    to.head("Content-Length: 1000000", status="418 I'm a teapot")
    to.drip(b"x")


@case("trailers without an end", "sends more and more bytes without an end of the file")
def _(to: Connection) -> None:
    to.head("Transfer-Encoding: chunked")
    to.send(b"%x\r\n" % len(BODY), BODY, b"\r\n0\r\n")
    to.pour(b"T: x\r\n")


@case("trailers that drip", "did not get through with the file within")
def _(to: Connection) -> None:
    to.head("Transfer-Encoding: chunked")
    to.send(b"%x\r\n" % len(BODY), BODY, b"\r\n0\r\n")
    to.drip(b"T: x\r\n")


@case("a chunk size without an end", "chunk size")
def _(to: Connection) -> None:
    to.head("Transfer-Encoding: chunked")
    to.pour(b"0")


@case("chunk extensions that drip", "did not get through with its answer within")
def _(to: Connection) -> None:
    to.head("Transfer-Encoding: chunked")
    to.send(b"5;")
    to.drip(b"x")


@case("a negative chunk size", "the connection broke")
def _(to: Connection) -> None:
    to.head("Transfer-Encoding: chunked")
    to.send(b"-5\r\nhello\r\n0\r\n\r\n")


@case("a chunk of 2^60 bytes", "the connection broke")
def _(to: Connection) -> None:
    to.head("Transfer-Encoding: chunked")
    to.send(b"1000000000000000\r\nhello")


@case("a body that drips", "sent only")
def _(to: Connection) -> None:
    to.head(f"Content-Length: {10 * len(BODY)}")
    to.send(BODY)
    to.drip(b"x")


@case("a body without an end", "goes on after")
def _(to: Connection) -> None:
    to.head()
    to.send(BODY)
    to.pour(b"\0" * 1000)


@case("a compressed body", "comes compressed (gzip)")
def _(to: Connection) -> None:
    to.file(BODY, "Content-Encoding: gzip")


@case("Retry-After: a year", "Try again in more than a day")
def _(to: Connection) -> None:
    to.head("Retry-After: " + "9" * 5000, "Content-Length: 0", status="503 Busy")


@case("cookies without an end", "redirects")
def _(to: Connection) -> None:
    cookies = [f"Set-Cookie: a{number}={'x' * 8000}; Path=/" for number in range(90)]
    to.head(*cookies, f"Location: {to.path}1", "Content-Length: 0", status="302 Found")


def _redirect(location: str, says: str) -> Case:
    def answer(to: Connection) -> None:
        to.head(*([f"Location: {location}"] if location else []), "Content-Length: 0", status="302 Found")

    return Case(answer, says)


SCHEMES, PRIVATE = "http and https addresses are accepted", "redirects to a host that nobody named"
LOCATIONS = {
    "file:///etc/passwd": SCHEMES,
    "ftp://127.0.0.1/x": SCHEMES,
    "data:,hello": SCHEMES,
    "gopher://127.0.0.1:70/1": SCHEMES,
    "javascript:1": SCHEMES,
    "http://127.0.0.1:99999/": SCHEMES,
    "http://[::1/": "Invalid IPv6",
    "//127.0.0.1:1/x": PRIVATE,
    "http://127.0.0.1:22/": PRIVATE,
    "http://user:word@127.0.0.1:1/": PRIVATE,
    "http://localhost:1/": PRIVATE,
    "http://service.localhost:1/": PRIVATE,
    "http://localhost.:1/": PRIVATE,
    "http://127.0.0.1.:1/": PRIVATE,
    "http://0177.0.0.1:1/": PRIVATE,
    "http://2130706433:1/": PRIVATE,
    "http://127.1:1/": PRIVATE,
    "http://0.0.0.0:1/": PRIVATE,
    "http://[::1]:1/": PRIVATE,
    "http://[::ffff:127.0.0.1]:1/": PRIVATE,
    "http://[64:ff9b::7f00:1]:1/": PRIVATE,
    "http://[fe80::1%25lo]:1/": PRIVATE,
    "http://10.0.0.1/": PRIVATE,
    "http://172.16.0.1/": PRIVATE,
    "http://192.168.1.1/": PRIVATE,
    "http://100.64.0.1/": PRIVATE,
    "http://169.254.169.254/latest/meta-data/": PRIVATE,
    "http://[fd00::1]/": PRIVATE,
    "http://224.0.0.1/": PRIVATE,
    "http://127.0.0.1:1/" + "a" * 60000: PRIVATE,
}
CASES |= {f"a redirect to {location[:40]}": _redirect(location, says) for location, says in LOCATIONS.items()}
CASES["a redirect without an address"] = _redirect("", "HTTP 302")
