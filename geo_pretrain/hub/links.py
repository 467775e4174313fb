"""Share links, and the web pages that stand between such a link and its file.

Google Drive shows a page before large files, which has to be confirmed, and one in place of files that it refuses.
"""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from html.parser import HTMLParser
from http.cookiejar import CookieJar
from urllib.parse import SplitResult, parse_qsl, urldefrag, urlencode, urljoin, urlsplit, urlunsplit

from geo_pretrain.errors import HubError, NotThere, first_line


def split_address(url: str) -> SplitResult:
    """`urlsplit`. Raises `HubError` for what is no address."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # which is read when it is asked for
    except ValueError as error:
        raise HubError(f"{url!r} is no address ({first_line(error)}); accepted: http(s)://host[:port]/path.") from None
    return parts


def direct_link(url: str) -> str:
    """The address that sends the file, for the share links that people publish; others stay as they are.

    >>> direct_link("https://drive.google.com/file/d/1Abc/view?usp=sharing")
    'https://drive.google.com/uc?export=download&id=1Abc'
    >>> direct_link("https://www.dropbox.com/s/1abc/nce.pth?dl=0")
    'https://www.dropbox.com/s/1abc/nce.pth?dl=1'
    """
    parts = urlsplit(urldefrag(url).url)
    query = dict(parse_qsl(parts.query))
    if parts.hostname in ("drive.google.com", "docs.google.com"):
        by_path = re.search(r"/file/(?:u/\d+/)?d/([^/]+)", parts.path)
        identity = by_path.group(1) if by_path else query.get("id")
        if identity:
            # links to older files carry a key that belongs to them
            key = {"resourcekey": query["resourcekey"]} if "resourcekey" in query else {}
            return f"https://drive.google.com/uc?{urlencode({'export': 'download', 'id': identity} | key)}"
    if parts.hostname in ("dropbox.com", "www.dropbox.com"):
        return urlunsplit(parts._replace(query=urlencode(query | {"dl": "1"})))
    return urlunsplit(parts)


def confirmed_link(page: WebPage, url: str, cookies: CookieJar) -> str | None:
    """The link that confirms a page of Google Drive at `url`; None: it asks for nothing."""
    for action, inputs in page.forms:
        if "id" in inputs and is_google(urljoin(url, action)):
            base, _, query = action.partition("?")
            return f"{base}?{urlencode(dict(parse_qsl(query)) | inputs)}"
    for link in page.links:
        if "confirm=" in link and is_google(urljoin(url, link)):
            return link
    for cookie in cookies:
        if cookie.name.startswith("download_warning") and "confirm=" not in url:
            return f"{url}{'&' if '?' in url else '?'}confirm={cookie.value}"
    return None


def google_refusal(text: str) -> HubError | None:
    """The error for a page on which Google Drive refuses a file; None for another page."""
    lower = text.lower()
    if "quota exceeded" in lower or "too many users have viewed or downloaded" in lower:
        return HubError(
            "Google Drive's quota for this file is used up (too many downloads). Try again in a day, or fetch it in a "
            "browser where you are signed in."
        )
    if "does not exist" in lower or "in owner's trash" in lower or "in the owner's trash" in lower:
        return NotThere("Google Drive has no such file: its owner removed it, or the link is wrong.")
    if "infected with a virus" in lower:
        return HubError("Google Drive calls the file infected and hands it to its owner only.")
    return None


class WebPage(HTMLParser):
    """The title, links and hidden form fields of a web page."""

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self.links: list[str] = []
        self.forms: list[tuple[str, dict[str, str]]] = []  # action and hidden fields
        self.in_title = False

    @classmethod
    def parse(cls, text: str) -> WebPage:
        """Read a page, however broken."""
        page = cls()
        page.feed(text)
        page.title = " ".join(page.title.split())
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.in_title = tag == "title" or (self.in_title and tag != "body")
        if tag == "form":
            self.forms.append((values.get("action", ""), {}))
        elif tag == "input" and self.forms and values.get("type") == "hidden" and values.get("name"):
            self.forms[-1][1][values["name"]] = values.get("value", "")
        elif tag == "a" and values.get("href"):
            self.links.append(values["href"])

    def handle_endtag(self, tag: str) -> None:
        self.in_title = self.in_title and tag != "title"

    def handle_data(self, data: str) -> None:
        if self.in_title:
            self.title += data


def host(url: str) -> str:
    """The host name of an address, or "". Raises as `split_address`."""
    return split_address(url).hostname or ""


def is_google(url: str) -> bool:
    """Whether an address belongs to Google, whose pages stand before large files."""
    return f".{host(url)}".endswith((".google.com", ".googleusercontent.com"))


def is_loopback(url: str) -> bool:
    """Whether an address is of this machine itself."""
    name = host(url)
    with suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost"
