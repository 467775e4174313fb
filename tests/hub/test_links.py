"""Share links of every host, and the pages that their hosts show in place of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from geo_pretrain.errors import HubError, NotThere
from geo_pretrain.hub.links import direct_link
from tests.hub.downloads import DATA, DRIVE, DROPBOX, GITHUB, PLAIN, check, refused
from tests.hub.hosts import Fault, Hosts

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(
    "link",
    [
        DRIVE,
        f"{DRIVE}?usp=sharing",
        "https://drive.google.com/open?id=1Whl-ny5_aSH",
        "https://drive.google.com/uc?id=1Whl-ny5_aSH",
        "https://drive.google.com/uc?export=view&id=1Whl-ny5_aSH",
        "https://docs.google.com/uc?export=download&id=1Whl-ny5_aSH",
        "https://drive.google.com/file/u/0/d/1Whl-ny5_aSH/edit#top",
    ],
)
def test_google_drive_links_become_downloads(hosts: Hosts, part: Path, link: str):
    check(link, part)
    assert hosts.requests == [
        "/drive.google.com/uc?export=download&id=1Whl-ny5_aSH",
        "/drive.usercontent.google.com/download?id=1Whl-ny5_aSH&export=download",
        "/drive.usercontent.google.com/download?id=1Whl-ny5_aSH&export=download&confirm=t&uuid=1a2b-3c",
    ]
    assert hosts.bytes_sent == {DRIVE: len(DATA)}


def test_small_files_of_google_drive_come_without_a_question(part: Path, monkeypatch):
    with Hosts({DRIVE: DATA}, scan_limit=len(DATA)) as hosts:
        monkeypatch.setenv("GEO_PRETRAIN_MIRROR", hosts.url)
        check(DRIVE, part)
        assert len(hosts.requests) == 2


@pytest.mark.parametrize("kind", ["old-link", "old-cookie"])
def test_older_confirmations_of_google_drive(hosts: Hosts, part: Path, kind: str):
    hosts.fault(DRIVE, Fault(kind))
    check(DRIVE, part)
    assert "confirm=old" in hosts.requests[1]
    assert len(hosts.requests) == 2
    sent = hosts.headers[1].get("cookie", "")
    assert ("download_warning" in sent) == (kind == "old-cookie")
    # the next download begins without the cookies of this one
    check(DRIVE, part)
    assert "cookie" not in hosts.headers[2]


@pytest.mark.parametrize(
    ("kind", "match", "error"),
    [
        ("quota", r"quota for this file is used up .* Try again in a day, or fetch it in a browser", HubError),
        ("sign-in", "asks for a sign-in: the file is not shared with everybody. Ask its owner", HubError),
        ("deleted", "has no such file: its owner removed it, or the link is wrong", NotThere),
        ("trash", "has no such file: its owner removed it, or the link is wrong", NotThere),
        ("infected", "calls the file infected", HubError),
        ("form-elsewhere", r"sends a web page \('Google Drive - Virus scan warning'\)", HubError),
    ],
)
def test_what_google_drive_says_instead_of_a_file(hosts: Hosts, part: Path, kind: str, match: str, error: type):
    hosts.fault(DRIVE, Fault(kind))
    refused(DRIVE, part, match, error)
    assert len(hosts.requests) == 1  # asking again would not help, and nothing leads to other sites


def test_an_unknown_file_of_google_drive(hosts: Hosts, part: Path):
    refused("https://drive.google.com/file/d/1nothing/view", part, "Google Drive has no such file", NotThere)


@pytest.mark.parametrize("link", [DROPBOX, DROPBOX.replace("dl=0", "dl=1"), DROPBOX.removesuffix("?dl=0")])
def test_dropbox_links_become_downloads(hosts: Hosts, part: Path, link: str):
    check(link, part)
    assert hosts.requests[0] == "/www.dropbox.com/s/uzr88m1lab0abbl/nce.pth?dl=1"
    assert hosts.requests[1].startswith("/uc0ffee.dl.dropboxusercontent.com/")


def test_links_of_dropbox_keep_their_key():
    link = "https://www.dropbox.com/scl/fi/abc/x.pth?rlkey=k1&dl=0"
    assert direct_link(link) == "https://www.dropbox.com/scl/fi/abc/x.pth?rlkey=k1&dl=1"
    link = "https://drive.google.com/file/d/0B/view?resourcekey=0-xyz&usp=sharing"
    assert direct_link(link) == "https://drive.google.com/uc?export=download&id=0B&resourcekey=0-xyz"


@pytest.mark.parametrize(
    "link", [PLAIN, GITHUB, "https://drive.google.com/drive/folders/1Abc", "https://x.org/uc?id=1"]
)
def test_other_links_stay_as_they_are(link: str):
    assert direct_link(link) == link


def test_release_assets_come_from_another_host(hosts: Hosts, part: Path):
    check(GITHUB, part)
    assert hosts.requests[1].startswith("/objects.githubusercontent.com/")
    check(PLAIN, part)
    assert hosts.requests[2:] == ["/kaldir.vc.in.tum.de/3dsis/pretrain/partition8_4096_20k.pth"]
