"""Download one file from the network to the disk.

`download` handles connections that break or stall, busy servers, share links that answer with a web page, full and
read-only disks. It retries what may pass; the rest becomes an error that says what to do. No partial file stays. The
caller compares the digest that it returns.

GEO_PRETRAIN_MIRROR=http://host/base fetches every address `https://drive.google.com/x?y`, redirects included, as
`http://host/base/drive.google.com/x?y`: for clusters behind a mirror, and for tests. Loopback addresses and the mirror
itself are left alone. A login (`http://name:password@host`) in it, as in a hub's address, is sent to that host alone.

How long a server is listened to: GEO_PRETRAIN_TIMEOUT seconds without a byte, twice that for the headers or a page,
`SLOWEST` bytes per second, and one deadline for a file with all attempts: GEO_PRETRAIN_DEADLINE seconds, or what its
size takes at `SLOW` bytes per second (`LONGEST` at most). Redirects do not leave https, and lead to hosts of this
machine or of private networks only if the user named them, in the address itself or in GEO_PRETRAIN_REDIRECTS (HOST or
HOST:PORT, separated by commas).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import string
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPException, HTTPResponse
from http.cookiejar import CookieJar
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any
from urllib.parse import quote, urldefrag, urljoin, urlsplit

from geo_pretrain import __version__
from geo_pretrain.errors import HubError, NotThere, first_line, shown
from geo_pretrain.hub.exchange import HEAD_LIMIT, REDIRECTS_VARIABLE, Exchange, NotPublic, Overdue, Watch
from geo_pretrain.hub.links import WebPage, confirmed_link, direct_link, google_refusal, host, is_google, is_loopback

CACHE_VARIABLE, MIRROR_VARIABLE = "GEO_PRETRAIN_CACHE", "GEO_PRETRAIN_MIRROR"
TIMEOUT_VARIABLE, DEADLINE_VARIABLE = "GEO_PRETRAIN_TIMEOUT", "GEO_PRETRAIN_DEADLINE"
TIMEOUT = 30.0  # seconds without a byte
SLOWEST = 1000  # bytes per second; a slower connection over TIMEOUT counts as stalled
SLOW = 20_000  # bytes per second on average that the deadline of a file allows for
UNKNOWN_SIZE = 500 << 20  # bytes that the deadline allows for where nobody promised a size
LARGEST = 16 << 30  # bytes that any file may have; the largest checkpoint has 1 GB
LONGEST = 12 * 3600.0  # seconds that the deadline allows for at most, unless it is given
MOST_SECONDS = 1e6  # eleven days; the system's clocks take no more than some thousand years
ATTEMPTS = 3
PAUSE = 0.3  # seconds before the second attempt; three times that before the third
LONGEST_PAUSE = 15.0  # a server that asks for more (Retry-After) is not waited for
REDIRECTS = 10  # pages that ask for a confirmation count too
BLOCK = 1 << 18
PAGE_LIMIT = 1 << 18  # bytes of a web page that are looked at

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all (None: not known)

MOVED = (301, 302, 303, 307, 308)
BUSY = (429, 500, 502, 503, 504)
BROKEN = (TimeoutError, ConnectionResetError, ConnectionAbortedError, BrokenPipeError, HTTPException)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OTHER_CACHE = f"set {CACHE_VARIABLE} (or cache_dir=) to a folder"


class _Broken(Exception):
    """A failure worth another attempt; `pause`: seconds that the server asks to wait."""

    def __init__(self, reason: str, pause: float = 0.0, *, from_start: bool = False) -> None:
        super().__init__(reason)
        self.pause, self.from_start = pause, from_start


def download(
    url: str,
    target: Path,
    *,
    limit: int | None = None,
    deadline: float | None = None,
    progress: Progress | None = None,
) -> str:
    """Write the file behind `url` (or behind a share link) to `target` and return the sha256 of its bytes.

    Truncated and stalled transfers and busy servers get `ATTEMPTS` tries, a server that can continues where it
    stopped. More than `limit` bytes (at most `LARGEST`) are refused. `deadline`: seconds for all of it, which
    GEO_PRETRAIN_DEADLINE overrides; the default follows from the size. Raises `NotThere` for a file that does not exist
    and `HubError` for everything else, the disk included; `target` does not exist then. Two processes must not share a
    `target`: see `cache.exclusive`.
    """
    written = _Written(Path(target), LARGEST if limit is None else min(limit, LARGEST), progress)
    source = _Source(url, _seconds(DEADLINE_VARIABLE, deadline), limit)
    try:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                source.fetch(written)
                return written.finish()
            except _Broken as error:
                pause = max(PAUSE * 3 ** (attempt - 1), error.pause)
                if pause > LONGEST_PAUSE:
                    wait = f"in {pause:.0f} s" if pause < 86400 else "in more than a day"
                    raise HubError(f"{source}: {error}. Try again {wait}, as the server asks.") from shown(error)
                if attempt == ATTEMPTS:
                    raise HubError(f"{source}: {error} ({ATTEMPTS} attempts). Try again later.") from shown(error)
                if error.from_start:
                    written.validator = None
            time.sleep(pause)
        raise HubError(f"{source}: no attempt was made.")  # ATTEMPTS is 0
    except BaseException:
        written.drop()
        raise


def probe(url: str, limit: int | None = None) -> int | None:
    """Ask for the file behind `url` and hang up before its content: its size in bytes, None where it is not told.

    One attempt, by the rules of `download` and with its errors.
    """
    source = _Source(url, _seconds(DEADLINE_VARIABLE), limit)
    try:
        with source.ask() as answer:
            return answer.length
    except _Broken as error:
        raise HubError(f"{source}: {error}.") from shown(error)


def disk_error(error: OSError, path: Path, missing: int | None = None) -> HubError:
    """Turn an error of the disk into one that says what to do; `missing`: bytes that were still to be written."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in FULL:
        more = f" {_size(missing)} more are needed" if missing else " more room is needed"
        return HubError(f"{path}: {reason};{more} there. Free some, or {OTHER_CACHE} on a larger disk.")
    return HubError(f"{path}: cannot be written ({reason}). Make it writable, or {OTHER_CACHE} that is.")


def _size(number: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            break
        number, unit = round(number / 1000), {"bytes": "kB", "kB": "MB", "MB": "GB"}[unit]
    return f"{number} {unit}"


class _Written:
    """The partial file: bytes written so far, their digest, and the ETag that allows to continue."""

    def __init__(self, path: Path, limit: int, progress: Progress | None) -> None:
        self.path, self.limit, self.progress = path, limit, progress
        self.total: int | None = None
        self.validator: str | None = None  # a strong ETag
        self.stream: IO[bytes] | None = None
        self._begin()

    def _begin(self) -> None:
        self.done, self.digest = 0, hashlib.sha256()

    def restart(self, total: int | None, validator: str | None) -> None:
        """Start over from the first byte; `total`: bytes that the server promises."""
        self.total, self.validator = total, validator
        self._begin()
        try:
            if self.stream is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.stream = self.path.open("wb", buffering=0)
            self.stream.seek(0)
            self.stream.truncate()
            free = shutil.disk_usage(self.path.parent).free
        except OSError as error:
            raise disk_error(error, self.path, total) from error
        if total is not None and total > free:
            raise HubError(
                f"{self.path}: {_size(total)} are needed, {_size(free)} are free there. "
                f"Free some, or {OTHER_CACHE} on a larger disk."
            )

    def add(self, block: bytes) -> None:
        view = memoryview(block)
        try:
            while self.stream is not None and view:
                view = view[self.stream.write(view) :]
        except OSError as error:
            missing = None if self.total is None else self.total - self.done
            raise disk_error(error, self.path, missing) from error
        self.digest.update(block)
        self.done += len(block)
        if self.progress is not None:
            self.progress(self.done, self.total)

    def finish(self) -> str:
        stream, self.stream = self.stream, None
        try:
            if stream is not None:
                stream.close()  # network file systems may find out only now
        except OSError as error:
            raise disk_error(error, self.path) from error
        return self.digest.hexdigest()

    def drop(self) -> None:
        if self.stream is not None:
            with suppress(OSError):
                self.stream.close()
        with suppress(OSError):
            self.path.unlink()


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: `_Source` checks and follows each itself."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Source:
    """One address being downloaded: its redirects, cookies and errors."""

    def __init__(self, url: str, deadline: float | None = None, limit: int | None = None) -> None:
        self.given = self.first = self.url = url  # asked for, its first address, the address of the last hop
        self.mirror, self.timeout = _mirror(), _seconds(TIMEOUT_VARIABLE) or TIMEOUT
        self.deadline = deadline  # None: by the size
        self.first = self.url = direct_link(
            self._checked(quote(url.strip(), safe=string.punctuation), f"{url!r} is no address")
        )
        self.watch = Watch(self.timeout, self._allowance(limit))
        self.exchange = Exchange(self.watch, (self.first, self.mirror))
        self.first = self.url = self.exchange.take_login(self.first)
        self.mirror = self.exchange.take_login(self.mirror)
        self.cookies = CookieJar()
        self.opener = urllib.request.build_opener(
            _Stay, urllib.request.HTTPCookieProcessor(self.cookies), *self.exchange.handlers()
        )

    def _allowance(self, size: int | None) -> float:
        """Seconds for a file of so many bytes, with all attempts."""
        if self.deadline is not None:
            return self.deadline
        return 10 * self.timeout + min((UNKNOWN_SIZE if size is None else size) / SLOW, LONGEST)

    def __str__(self) -> str:
        """For messages: the given address and the host that answered, no redirected address, which may hold keys."""
        notes = []
        if host(self.url) != host(self.first):
            notes.append(f"answered by {host(self.url)}")
        if self._address(self.url) != self.url:
            notes.append(f"by way of {MIRROR_VARIABLE}={self.mirror}")
        return f"{self.given} ({', '.join(notes)})" if notes else self.given

    def fetch(self, written: _Written) -> None:
        """Make one attempt. Raises `_Broken` if another may succeed."""
        ranged = {}
        if written.done and written.validator is not None:
            ranged = {"Range": f"bytes={written.done}-", "If-Range": written.validator}
        with self.ask(ranged) as answer:
            self._begin(answer, written)
            self._receive(answer, written)

    def _begin(self, answer: HTTPResponse, written: _Written) -> None:
        """Check the answer's headers; continue the partial file or start over."""
        if answer.status not in (200, 203, 206):
            raise HubError(f"{self}: HTTP {answer.status} {answer.reason[:200]}: no file comes with it. {_LOOK}")
        if (coding := answer.headers.get("Content-Encoding", "identity").lower()) not in ("identity", ""):
            raise HubError(f"{self}: comes compressed ({coding}) although the plain file was asked for. {_LOOK}")
        if answer.status == 206:
            expected = f"bytes {written.done}-", f"/{written.total}"
            given = answer.headers.get("Content-Range", "")
            same = answer.headers.get("ETag", written.validator) == written.validator
            if not (same and given.startswith(expected[0]) and given.endswith(expected[1])):
                raise _Broken(f"sends other bytes than asked for ({given or 'no Content-Range'})", from_start=True)
            return
        tag = answer.headers.get("ETag", "")
        can_continue = tag.startswith('"') and answer.headers.get("Accept-Ranges", "").lower() == "bytes"
        total = answer.length
        if total is not None:  # at most what was promised
            self.watch.allowance = self._allowance(min(total, written.limit))
        if total is not None and total > written.limit:
            raise HubError(
                f"{self}: is {total} bytes long, at most {written.limit} are accepted: another file than the one meant."
            )
        written.restart(total, tag if can_continue and total is not None else None)

    def _receive(self, answer: HTTPResponse, written: _Written) -> None:
        left = answer.length
        since, count = time.monotonic(), 0
        while block := self._next(answer):
            if written.done + len(block) > written.limit:
                raise HubError(f"{self}: goes on after {written.limit} bytes, the most that are accepted: {_OTHER}")
            written.add(block)
            left = None if left is None else left - len(block)
            count += len(block)
            if (now := time.monotonic()) - since > self.timeout:
                if count < SLOWEST * self.timeout:
                    raise _Broken(f"sent only {count} bytes in {now - since:.1f} s")
                since, count = now, 0
        if left:
            raise _Broken(f"the connection ended after {written.done} of {written.total} bytes")

    def _next(self, answer: HTTPResponse) -> bytes:
        """The next bytes of the file, b"" at its end."""
        self.watch.phase("the file", BLOCK + HEAD_LIMIT)
        block: bytes = self._guarded(partial(answer.read1, BLOCK))
        return block

    def _guarded(self, read: Callable[[], Any]) -> Any:
        """Call `read`; failures of the connection become `_Broken` or `HubError`."""
        try:
            return read()
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError as error:  # before anything was sent
            reason = error.reason if isinstance(error.reason, Exception) else error
            if isinstance(reason, BROKEN) and not isinstance(reason, TimeoutError):
                raise _Broken(first_line(reason)) from shown(error)
            raise HubError(f"{self}: {first_line(reason)}. {self._unreachable()}") from shown(error)
        except TimeoutError as error:
            try:
                self.watch.patience()
            except Overdue as overdue:
                raise self._overdue(overdue) from error
            raise _Broken(f"no byte for {self.timeout:g} s") from error
        except Overdue as error:
            raise self._overdue(error) from error
        except NotPublic as error:
            raise HubError(
                f"{self}: redirects to a host that nobody named: {error}. If that is meant, set "
                f"{REDIRECTS_VARIABLE} to its name, or HOST:PORT."
            ) from error
        except BROKEN as error:
            raise _Broken(f"the connection broke ({first_line(error)})") from shown(error)
        except (OSError, ValueError) as error:
            raise HubError(f"{self}: {first_line(error)}. {self._unreachable()}") from shown(error)

    def _overdue(self, error: Overdue) -> Exception:
        if not error.whole:
            return _Broken(str(error))
        return HubError(
            f"{self}: {error}, the deadline for a file of this size. On a slow connection set {DEADLINE_VARIABLE} to "
            "more seconds."
        )

    def _unreachable(self) -> str:
        if self._address(self.url) != self.url:
            return f"Check that the mirror runs and can be reached, or unset {MIRROR_VARIABLE}."
        return (
            "Check the address, the network and the proxy (HTTPS_PROXY). Where there is none, a mirror "
            f"({MIRROR_VARIABLE}) or a bundle (`geo-pretrain bundle`) can stand in."
        )

    def ask(self, headers: Mapping[str, str] = MappingProxyType({})) -> HTTPResponse:
        """Send the request, follow redirects and confirm pages; return the answer that holds the file."""
        self.url = self.first
        seen: list[str] = []
        while True:
            seen.append(self.url)
            if len(seen) > REDIRECTS + 1:
                circle = " in a circle" if len(set(seen)) < len(seen) else ""
                raise HubError(f"{self}: redirects{circle}, {REDIRECTS} times. {_LOOK}")
            try:
                answer = self._guarded(partial(self._open, self._address(self.url), headers))
            except urllib.error.HTTPError as error:
                with error:
                    if error.code not in MOVED or not error.headers.get("Location"):
                        raise self._refusal(error, ranged=bool(headers)) from shown(error)
                    self.url = self._hop(error.headers["Location"])
                continue
            try:
                if not self._is_page(answer):
                    return answer
                self.watch.phase("its page", PAGE_LIMIT + HEAD_LIMIT)
                text = self._guarded(partial(answer.read, PAGE_LIMIT)).decode("utf-8", "replace")
                self.url = self._hop(self._past(text))
            except BaseException:
                answer.close()
                raise
            answer.close()

    def _open(self, address: str, headers: Mapping[str, str]) -> HTTPResponse:
        self.watch.phase("its answer", HEAD_LIMIT)
        login = self.exchange.prepare(address)
        query = urllib.request.Request(address, headers={**_HEADERS, **login, **headers})
        answer: HTTPResponse = self.opener.open(query, timeout=self.watch.patience())
        return answer

    def _address(self, url: str) -> str:
        """The address that is fetched for `url`: the mirror's where one is set."""
        if not self.mirror or is_loopback(url) or f"{url}/".startswith(f"{self.mirror}/"):
            return url
        parts = urlsplit(url)
        return f"{self.mirror}/{parts.netloc}{parts.path}" + (f"?{parts.query}" if parts.query else "")

    def _hop(self, location: str) -> str:
        """Resolve a redirect or link of the page at `self.url` to an absolute address; refuse unsafe ones."""
        safe = quote(location.strip(), encoding="iso-8859-1", errors="replace", safe=string.punctuation)
        url = self._checked(safe, f"{self}: redirects to {location[:200]!r}")
        url = self.exchange.take_login(url)
        parts = urlsplit(url)
        by_mirror = self._address(url) != url
        if urlsplit(self.url).scheme == "https" and parts.scheme == "http" and not by_mirror:
            raise HubError(
                f"{self}: redirects from https to http ({parts.hostname}), where anybody can alter the file."
            )
        if parts.hostname == "accounts.google.com":
            raise HubError(
                f"{self}: Google Drive asks for a sign-in: the file is not shared with everybody. Ask its owner, or "
                "fetch it in a browser where you may see it."
            )
        return url

    def _checked(self, location: str, otherwise: str) -> str:
        """Resolve a location to an absolute http(s) URL, relative to the last hop; rejects file: URLs."""
        with suppress(ValueError):
            url = urldefrag(urljoin(self.url, location)).url
            parts = urlsplit(url)
            has_port = parts.port != 0  # a port that is no number raises
            if parts.scheme in ("http", "https") and parts.hostname and has_port:
                return url
        raise HubError(f"{otherwise}; http and https addresses are accepted.")

    def _refusal(self, error: urllib.error.HTTPError, *, ranged: bool) -> Exception:
        code, reason = error.code, f"HTTP {error.code} {str(error.reason)[:200]}".strip()
        if code == 416 and ranged:
            return _Broken("does not continue where it stopped", from_start=True)
        if is_google(self.url):
            self.watch.phase("its page", PAGE_LIMIT + HEAD_LIMIT)
            text = self._guarded(partial(error.read, PAGE_LIMIT)).decode("utf-8", "replace")
            if refusal := google_refusal(text):
                return type(refusal)(f"{self}: {refusal}")
        if code in (404, 410):
            return NotThere(f"{self}: HTTP {code}, no such file")
        if code in (401, 403):
            return HubError(
                f"{self}: {reason}: the server wants a login or does not share the file. Check the address in a "
                "browser; if the hub is yours, let everybody read it."
            )
        if code in BUSY:
            return _Broken(reason, _retry_after(error.headers.get("Retry-After")))
        return HubError(f"{self}: {reason}. {_LOOK}")

    def _is_page(self, answer: HTTPResponse) -> bool:
        """Whether the answer is a web page instead of a file, judged by its start: servers mislabel files as HTML."""
        head = self._guarded(partial(answer.peek, 512)).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        called_so = answer.headers.get_content_type() in ("text/html", "application/xhtml+xml")
        return head.startswith((b"<!doctype html", b"<html")) or (called_so and head.startswith(b"<"))

    def _past(self, text: str) -> str:
        """The link behind a page that asks for a confirmation; any other page is an error."""
        page = WebPage.parse(text)
        if is_google(self.url):
            if link := confirmed_link(page, self.url, self.cookies):
                return link
            if refusal := google_refusal(text):
                raise type(refusal)(f"{self}: {refusal}")
        title = f" ({page.title[:200]!r})" if page.title else ""
        raise HubError(
            f"{self}: sends a web page{title} in place of the file. "
            "Check the address in a browser: a login or a notice may be in the way."
        )


_LOOK = "Check the address in a browser."
_OTHER = "another file than the one meant."
_HEADERS = {"User-Agent": f"geo_pretrain/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"}


def _mirror() -> str:
    text = os.environ.get(MIRROR_VARIABLE, "").strip().rstrip("/")
    if text and not re.match(r"https?://[^/]", text):
        raise HubError(f"{MIRROR_VARIABLE}={text!r}; an address such as http://host/base is accepted.")
    host(text)  # which refuses what is no address
    return text


def _seconds(variable: str, otherwise: float | None = None) -> float | None:
    """The number of seconds in an environment variable; `otherwise` where it is not set."""
    text = os.environ.get(variable, "").strip()
    if not text:
        return otherwise
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise HubError(f"{variable}={text!r}; a number of seconds above 0 is accepted.")
    return min(seconds, MOST_SECONDS)


def _retry_after(text: str | None) -> float:
    """Parse a Retry-After header, a number or a date, into seconds; 0 for anything else."""
    if text is None:
        return 0.0
    if text.strip().isdecimal():
        return float(text)
    with suppress(ValueError, TypeError, OverflowError):
        return parsedate_to_datetime(text).timestamp() - time.time()
    return 0.0
