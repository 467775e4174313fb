"""One loopback server that imitates the hosts where checkpoints lie, their pages and redirects, and what goes wrong.

    with Hosts({"https://drive.google.com/file/d/1Abc/view": path, "/hub/tiny/config.json": b"{}"}) as hosts:
        monkeypatch.setenv("GEO_PRETRAIN_MIRROR", hosts.url)     # the first file, by its own address
        hub.open("tiny", hub=f"{hosts.url}/hub").fetch("encoder")  # the second, without a mirror
        hosts.fault("/hub/tiny/config.json", Fault("truncate", times=1))

It is a mirror: `https://host/path?query` is asked of it as `/host/path?query`, redirects name the real addresses.
Imitated from their documented and observed behavior: Google Drive (its confirmation form, the older link and cookie,
quota, sign-in, deleted and infected files), Dropbox (`dl=1` and its content host), GitHub's release assets (signed
addresses on another host). Every other address is a plain http server with ranges.
"""

from __future__ import annotations

import hashlib
import html
import os
import re
import socket
import ssl
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

# what a fault does to an answer; the first group to the file's bytes, the second in place of them
BYTE_FAULTS = {
    "truncate": "the connection ends after `after` bytes",
    "reset": "the connection is reset after `after` bytes",
    "stall": "nothing more comes after `after` bytes",
    "drip": "after `after` bytes one byte comes every `delay` seconds",
    "slow": "`delay` seconds pass after every 16 kB",
    "corrupt": "one bit in the middle is wrong",
    "short": "half of the file, with a Content-Length to match",
    "endless": "a MiB more than the file, with a Content-Length to match",
    "unsized": "no Content-Length; the connection ends with the file",
    "chunked": "chunked transfer coding",
    "chunked-cut": "chunked transfer coding that ends after `after` bytes",
    "changed": "the file and its ETag are others (all bytes are inverted)",
    "wrong-range": "ranges start one byte too early",
    "compressed": "Content-Encoding: gzip",
    "called-page": "a Content-Type of text/html for the file's bytes",
}
OTHER_FAULTS = {
    "status": "an error status (`status`, `headers`)",
    "silent": "no answer at all",
    "hang-up": "the connection is closed without an answer",
    "page": "a web page with status 200",
    "unlabelled-page": "a web page that calls itself application/octet-stream",
    "loop": "a redirect to itself",
    "chain": "one more redirect, without end",
    "to-http": "a redirect from https to http",
    "to-file": "a redirect to a local file",
    "relative": "a redirect to a relative address, once; then the file",
    "quota": "Google Drive: too many downloads",
    "sign-in": "Google Drive: a redirect to the sign-in page",
    "deleted": "Google Drive: a page that says the file does not exist",
    "trash": "Google Drive: a page that says the file is in the trash",
    "infected": "Google Drive: a page that calls the file infected",
    "old-link": "Google Drive until 2023: a confirmation page with a link; then the file",
    "old-cookie": "Google Drive until 2020: a confirmation page with a cookie; then the file",
    "form-elsewhere": "Google Drive: a confirmation form that leads to another site",
}


@dataclass(frozen=True)
class Fault:
    """What goes wrong, `times` times."""

    kind: str
    times: int = sys.maxsize
    after: int = 1000
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in BYTE_FAULTS | OTHER_FAULTS:
            raise KeyError(self.kind)


class Hosts:
    """Serves `files`: by their published address, or by a path of this server's own ("/hub/name/config.json").

    `requests`: the paths asked for, in order. `served` counts the answers that held a file or a part of it, and
    `bytes_sent` their bytes, by the keys of `files`. `ranges=False`: servers that cannot continue; `weak`: their
    tags are weak. `scan_limit`: Google
    Drive asks for a confirmation above so many bytes. `certificate`: a PEM file with its key; the server speaks https.
    """

    def __init__(
        self,
        files: Mapping[str, Path | bytes],
        *,
        ranges: bool = True,
        weak: bool = False,
        scan_limit: int = 0,
        certificate: Path | None = None,
    ) -> None:
        self.files = dict(files)
        self.ranges, self.weak, self.scan_limit = ranges, weak, scan_limit
        self.ignores_if_range = False  # a server that continues a file that has changed
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.served: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()
        self._faults: dict[str, tuple[Fault, int]] = {}
        self.lock, self.stopping = threading.Lock(), threading.Event()
        self.http = _Server(("127.0.0.1", 0), partial(_Handler, self))
        self.scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
            self.scheme = "https"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        """The value for GEO_PRETRAIN_MIRROR."""
        return f"{self.scheme}://127.0.0.1:{self.http.server_port}"

    def fault(self, url: str, fault: Fault | None) -> None:
        """From now on this goes wrong with the file; None: nothing does."""
        if url not in self.files:
            raise KeyError(url)
        with self.lock:
            self._faults.pop(url, None)
            if fault is not None:
                self._faults[url] = (fault, fault.times)

    def faults_left(self, url: str) -> int:
        return self._faults.get(url, (None, 0))[1]

    def forget(self) -> None:
        """Empty the records."""
        self.requests.clear()
        self.headers.clear()
        self.served.clear()
        self.bytes_sent.clear()

    def take_fault(self, url: str, kinds: Mapping[str, str]) -> Fault | None:
        with self.lock:
            fault, left = self._faults.get(url, (None, 0))
            if fault is None or fault.kind not in kinds or left == 0:
                return None
            self._faults[url] = (fault, left - 1)
            return fault

    def count(self, url: str, number: int) -> None:
        with self.lock:
            self.bytes_sent[url] += number

    def stop(self) -> None:
        self.stopping.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def drive_id(url: str) -> str | None:
    """The id in a Google Drive share link."""
    found = re.search(r"drive\.google\.com/(?:file/d/|open\?id=|uc\?.*?\bid=)([\w-]+)", url)
    return found.group(1) if found else None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are expected."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, owner: Hosts, *arguments: Any) -> None:
        self.owner = owner
        super().__init__(*arguments)

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self.close_connection = True
        self.owner.requests.append(self.path)
        self.owner.headers.append({key.lower(): value for key, value in self.headers.items()})
        if self.path in self.owner.files:
            self._plain(self.path)
            return
        host, _, rest = self.path.lstrip("/").partition("/")
        parts = urlsplit(f"https://{host}/{rest}")
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        if host == "drive.google.com":
            self._drive(parts.path, query)
        elif host == "drive.usercontent.google.com":
            self._drive_content(query)
        elif host in ("www.dropbox.com", "dropbox.com"):
            self._dropbox(parts.path, query)
        elif host.endswith("dl.dropboxusercontent.com"):
            self._file(self._by_token(parts.path))
        elif host == "github.com":
            self._github(parts.path)
        elif host == "objects.githubusercontent.com":
            url = self._by_token(parts.path)
            self._file(url) if "X-Amz-Signature" in query else self._error(403)
        else:
            path = self.path.lstrip("/").removesuffix("?again")
            urls = [url for url in self.owner.files if path in (url.partition("://")[2], url.lstrip("/"))]
            self._plain(urls[0]) if urls else self._error(404)

    # the hosts

    def _plain(self, url: str) -> None:
        if not self._in_place_of_the_file(url):
            self._file(url)

    def _drive(self, path: str, query: Mapping[str, str]) -> None:
        if path.startswith("/file/"):
            self._page("tiny.pth - Google Drive", "<p>The viewer shows no preview.</p>")
            return
        url = self._by_drive_id(query.get("id"))
        if url is None or query.get("export") != "download":
            self._drive_page("Page not found", "Sorry, the file you have requested does not exist.", status=404)
        elif not self._in_place_of_the_file(url, query):
            content = "https://drive.usercontent.google.com/download"
            self._redirect(f"{content}?id={query['id']}&export=download", status=303)

    def _drive_content(self, query: Mapping[str, str]) -> None:
        url = self._by_drive_id(query.get("id"))
        if url is None:
            self._drive_page("Page not found", "Sorry, the file you have requested does not exist.", status=404)
        elif self._size(url) <= self.owner.scan_limit or {"confirm", "uuid"} <= set(query):
            self._file(url)
        else:
            action = "https://drive.usercontent.google.com/download"
            fields = {"id": query["id"], "export": "download", "confirm": "t", "uuid": "1a2b-3c"}
            self._drive_warning(_form(action, fields))

    def _drive_warning(self, body: str, headers: Mapping[str, str] | None = None) -> None:
        text = (
            "<p>Google Drive can't scan this file for viruses.</p>"
            '<p><a href="https://support.google.com/drive/answer/2423534">Learn more</a></p>'
            f"<p>tiny.pth (290M) is too large. Would you still like to download this file?</p>{body}"
        )
        self._page("Google Drive - Virus scan warning", text, headers=headers)

    def _drive_page(self, title: str, text: str, status: int = 200) -> None:
        self._page(f"Google Drive - {title}", f"<p class='uc-error-caption'>{text}</p>", status=status)

    def _dropbox(self, path: str, query: Mapping[str, str]) -> None:
        urls = [url for url in self.owner.files if urlsplit(url).netloc.endswith("dropbox.com")]
        urls = [url for url in urls if urlsplit(url).path == path]
        if not urls:
            self._page("Dropbox - 404", "<p>That link isn't working</p>", status=404)
        elif query.get("dl") != "1":
            self._page("Dropbox - nce.pth - Simplify your life", "<p>Preview</p>")
        elif not self._in_place_of_the_file(urls[0]):
            self._redirect(f"https://uc0ffee.dl.dropboxusercontent.com/cd/0/get/{_token(urls[0])}/file?dl=1")

    def _github(self, path: str) -> None:
        url = f"https://github.com{path}"
        if url not in self.owner.files:
            self._error(404)
        elif not self._in_place_of_the_file(url):
            self._redirect(
                f"https://objects.githubusercontent.com/github-production-release-asset/{_token(url)}"
                "?X-Amz-Signature=secret123"
            )

    def _by_drive_id(self, identity: str | None) -> str | None:
        return next((url for url in self.owner.files if identity and drive_id(url) == identity), None)

    def _by_token(self, path: str) -> str | None:
        return next((url for url in self.owner.files if _token(url) in path.split("/")), None)

    # the faults that strike before the file

    def _in_place_of_the_file(self, url: str, query: Mapping[str, str] | None = None) -> bool:
        """Whether something else was answered."""
        query = query or {}
        if "confirm" in query and query["confirm"] == "old":  # the second visit after an older confirmation
            self._file(url)
            return True
        if "again" in self.path.rpartition("?")[2].split("&"):
            self._file(url)
            return True
        fault = self.owner.take_fault(url, OTHER_FAULTS)
        if fault is None:
            return False
        getattr(self, "_fault_" + fault.kind.replace("-", "_"))(fault, url)
        return True

    def _fault_status(self, fault: Fault, url: str) -> None:
        self._error(fault.status, fault.headers)

    def _fault_silent(self, fault: Fault, url: str) -> None:
        self.owner.stopping.wait(60)

    def _fault_hang_up(self, fault: Fault, url: str) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)

    def _fault_page(self, fault: Fault, url: str) -> None:
        self._page("Welcome to the\n guest network &amp; more", "<p>Accept the terms.</p>")

    def _fault_unlabelled_page(self, fault: Fault, url: str) -> None:
        self._page("Login", "<p>Sign in.</p>", headers={"Content-Type": "application/octet-stream"})

    def _fault_loop(self, fault: Fault, url: str) -> None:
        self._redirect(self._own(self.path))

    def _fault_chain(self, fault: Fault, url: str) -> None:
        self.owner.files[self.path + "x"] = b""
        self.owner.fault(self.path + "x", fault)
        self._redirect(self._own(self.path) + "x")

    def _fault_to_http(self, fault: Fault, url: str) -> None:
        self._redirect("http://example.org/file")

    def _fault_to_file(self, fault: Fault, url: str) -> None:
        self._redirect("file:///etc/hostname")

    def _fault_relative(self, fault: Fault, url: str) -> None:
        self._redirect(f"{self.path.rpartition('/')[2]}?again")

    def _fault_quota(self, fault: Fault, url: str) -> None:
        text = "Sorry, you can't view or download this file at this time. Too many users have viewed or downloaded it."
        self._drive_page("Quota exceeded", text)

    def _fault_sign_in(self, fault: Fault, url: str) -> None:
        self._redirect("https://accounts.google.com/ServiceLogin?continue=" + quote(url, safe=""))

    def _fault_deleted(self, fault: Fault, url: str) -> None:
        self._drive_page("Page not found", "Sorry, the file you have requested does not exist.")

    def _fault_trash(self, fault: Fault, url: str) -> None:
        self._drive_page("File is in owner's trash", "The file is in the owner's trash.")

    def _fault_infected(self, fault: Fault, url: str) -> None:
        self._drive_page("Infected file", "Sorry, this file is infected with a virus. Only the owner may download it.")

    def _fault_old_link(self, fault: Fault, url: str) -> None:
        link = f"/uc?export=download&confirm=old&id={drive_id(url)}"
        self._drive_warning(f'<a id="uc-download-link" href="{html.escape(link)}">Download anyway</a>')

    def _fault_old_cookie(self, fault: Fault, url: str) -> None:
        self._drive_warning("", {"Set-Cookie": "download_warning_13058876669334088843=old; Path=/"})

    def _fault_form_elsewhere(self, fault: Fault, url: str) -> None:
        self._drive_warning(_form("https://example.org/download", {"id": "x", "confirm": "t"}))

    # answers

    def _own(self, path: str) -> str:
        """The address of a request as the host itself would name it."""
        host, _, rest = path.lstrip("/").partition("/")
        return f"https://{host}/{rest}" if "." in host else f"{self.owner.url}{path}"

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Connection": "close"} | dict(headers)).items():
            self.send_header(key, value)
        self.end_headers()

    def _error(self, status: int, headers: Mapping[str, str] | None = None) -> None:
        self._head(status, {"Content-Length": "0", **(headers or {})})

    def _redirect(self, location: str, status: int = 302) -> None:
        self._head(status, {"Location": location, "Content-Length": "0"})

    def _page(self, title: str, body: str, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        text = f"<!DOCTYPE html>\n<html><head><title>{title}</title></head><body>{body}</body></html>".encode()
        kind = {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(text))}
        self._head(status, kind | dict(headers or {}))
        self.wfile.write(text)

    def _size(self, url: str) -> int:
        file = self.owner.files[url]
        return len(file) if isinstance(file, bytes) else file.stat().st_size

    def _file(self, url: str | None) -> None:
        if url is None:
            self._error(404)
            return
        file = self.owner.files[url]
        if isinstance(file, Path) and not file.is_file():
            self._error(404)
            return
        fault = self.owner.take_fault(url, BYTE_FAULTS)
        kind = fault.kind if fault else ""
        data = file if isinstance(file, bytes) else file.read_bytes()
        if kind == "changed":
            data = bytes(255 - byte for byte in data)
        headers = {"Content-Type": "application/octet-stream"}
        tag = ("W/" if self.owner.weak else "") + f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        continues = self.owner.ranges and "google" not in self.path
        if continues:
            headers |= {"Accept-Ranges": "bytes", "ETag": tag}
        status, start = 200, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        current = self.headers.get("If-Range", tag) == tag or self.owner.ignores_if_range
        if continues and wanted and current:
            status, start = 206, int(wanted.group(1)) - (kind == "wrong-range")
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if kind == "corrupt":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        elif kind == "short":
            body = body[: len(body) // 2]
        elif kind == "endless":
            body += bytes(1 << 20)
        elif kind == "compressed":
            headers["Content-Encoding"] = "gzip"
        elif kind == "called-page":
            headers["Content-Type"] = "text/html"
        if kind.startswith("chunked"):
            headers["Transfer-Encoding"] = "chunked"
        elif kind != "unsized":
            headers["Content-Length"] = str(len(body))
        with self.owner.lock:
            self.owner.served[url] += 1
        self._head(status, headers)
        with suppress(OSError):
            self._send(url, body, fault)

    def _send(self, url: str, body: bytes, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        cut = fault.after if fault and kind in ("truncate", "reset", "stall", "drip", "chunked-cut") else len(body)
        for block in _blocks(body[:cut], 1 << 14 if kind in ("slow", "chunked", "chunked-cut") else 1 << 20):
            self.owner.count(url, len(block))  # before: who has received all of it may look at once
            self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if kind.startswith("chunked") else block)
            if fault and kind == "slow":
                time.sleep(fault.delay)
        if kind == "chunked":
            self.wfile.write(b"0\r\n\r\n")
        elif kind == "reset":
            time.sleep(0.05)  # a reset overtakes bytes that were not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # with SO_LINGER 0: RST; no shutdown before it
        elif kind == "stall":
            self.owner.stopping.wait(60)
        elif fault and kind == "drip":
            for block in _blocks(body[cut:], 1):
                if self.owner.stopping.wait(fault.delay):
                    break
                self.wfile.write(block)


def _blocks(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def _form(action: str, fields: Mapping[str, str]) -> str:
    hidden = "".join(f'<input type="hidden" name="{key}" value="{html.escape(v)}">' for key, v in fields.items())
    button = '<input type="submit" id="uc-download-link" value="Download anyway"/>'
    return f'<form id="download-form" action="{html.escape(action)}" method="get">{button}{hidden}</form>'


def _token(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:20]
