"""One file under the addresses of all hosts, and what a test says of its download."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from geo_pretrain.errors import HubError
from geo_pretrain.hub.transfer import download

DRIVE = "https://drive.google.com/file/d/1Whl-ny5_aSH/view"
DROPBOX = "https://www.dropbox.com/s/uzr88m1lab0abbl/nce.pth?dl=0"
PLAIN = "http://kaldir.vc.in.tum.de/3dsis/pretrain/partition8_4096_20k.pth"
GITHUB = "https://github.com/valeoai/SLidR/releases/download/v1.0/minkunet_slidr_1gpu.pt"
OWN = "/hub/tiny/encoder.safetensors"
DATA = random.Random(0).randbytes(300_000)
DIGEST = hashlib.sha256(DATA).hexdigest()


def check(url: str, part: Path, **options: object) -> None:
    """Download, and compare with what the server has."""
    assert download(url, part, **options) == DIGEST
    assert part.read_bytes() == DATA


def refused(url: str, part: Path, match: str, kind: type[Exception] = HubError, **options: object) -> str:
    """The message; no file is left."""
    with pytest.raises(HubError, match=match) as caught:
        download(url, part, **options)
    assert type(caught.value) is kind
    assert not part.exists()
    assert url in str(caught.value)
    return str(caught.value)
