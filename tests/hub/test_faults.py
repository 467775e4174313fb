"""What goes wrong between a user and a checkpoint, each fault on purpose: the message says what to do, the cache is
clean, and the next call without the fault succeeds. `benchmarks.reliability` runs the same table.

Two doors: a checkpoint on an http hub (`hub.open`) and an authors' file (`transfer.download`). A fault that strikes
once is survived where another attempt can cure it; one that stays ends in an error within seconds.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from geo_pretrain import hub
from geo_pretrain.checkpoint import CONFIG, verify_file
from geo_pretrain.errors import HubError, UnknownName
from geo_pretrain.hub import transfer
from geo_pretrain.hub.cache import exclusive
from tests.hub.hosts import BYTE_FAULTS, OTHER_FAULTS, Fault, Hosts
from tests.zoo import write_tiny

NAME = "tiny_net_r18"
ENCODER, DECODER = f"/hub/{NAME}/encoder.safetensors", f"/hub/{NAME}/decoder.safetensors"
CONFIG_URL = f"/hub/{NAME}/{CONFIG}"
DRIVE = "https://drive.google.com/file/d/1Whl-ny5_aSH/view"
DROPBOX = "https://www.dropbox.com/s/uzr88m1lab0abbl/nce.pth?dl=0"
PLAIN = "http://kaldir.vc.in.tum.de/3dsis/pretrain/partition8_4096_20k.pth"
GITHUB = "https://github.com/valeoai/SLidR/releases/download/v1.0/minkunet_slidr_1gpu.pt"
SECONDS = 120.0  # every fault is over by then, on a very busy machine too: what hangs never is
FINE = ""


@functools.cache
def files() -> dict[str, bytes]:
    """A checkpoint folder on a hub, and an authors' file with each host."""
    with tempfile.TemporaryDirectory() as folder:
        write_tiny(Path(folder) / NAME)
        on_hub = {f"/hub/{NAME}/{path.name}": path.read_bytes() for path in (Path(folder) / NAME).iterdir()}
    return on_hub | dict.fromkeys((DRIVE, DROPBOX, PLAIN, GITHUB), on_hub[ENCODER])


@contextmanager
def hosts_of(cache: Path, fault: str = "") -> Iterator[Hosts]:
    """The hosts, and settings under which nothing takes long; patience is short only where the fault is silence."""
    patience = "0.25" if fault in ("stall", "drip", "silent") else "60"
    settings = {"GEO_PRETRAIN_CACHE": str(cache), "GEO_PRETRAIN_TIMEOUT": patience}
    unset = ("GEO_PRETRAIN_HUB", "HF_HUB_OFFLINE", "GEO_PRETRAIN_MIRROR")
    with mock.patch.dict(os.environ, settings), mock.patch.object(transfer, "PAUSE", 0.01), Hosts(files()) as hosts:
        for variable in unset:
            os.environ.pop(variable, None)
        os.environ["GEO_PRETRAIN_MIRROR"] = hosts.url
        yield hosts


@dataclass(frozen=True)
class Case:
    """A fault at one file. `once`, `always`: what comes of it, FINE or what the message says."""

    url: str
    fault: Fault
    once: str
    always: str

    @property
    def name(self) -> str:
        door = "hub" if self.url.startswith("/") else (re.findall(r"drive|dropbox|kaldir|github", self.url) or ["?"])[0]
        status = f" {self.fault.status}" if self.fault.kind == "status" else ""
        return f"{door} {self.url.rpartition('/')[2].partition('.')[0]}: {self.fault.kind}{status}"


LATER = r"\(3 attempts\)\. Try again later"
BROWSER = "Check the address in a browser"
DIGEST = r"fetched twice: .*sha256 is [0-9a-f]{64} .*, expected [0-9a-f]{64} .* Fetch or write it again"
GONE = "HTTP {}, no such file"
# kind, once, always; both doors
BYTES = (
    (Fault("truncate"), FINE, rf"the connection ended after \d+ of \d+ bytes {LATER}"),
    (Fault("reset"), FINE, rf"the connection broke \(.*reset.*\) {LATER}"),
    (Fault("stall"), FINE, rf"no byte for 0\.25 s {LATER}"),
    (Fault("drip"), FINE, rf"sent only \d+ bytes in \d+\.\d s {LATER}"),
    (Fault("chunked-cut"), FINE, rf"the connection broke .*{LATER}"),
    (Fault("corrupt"), FINE, DIGEST),
    (Fault("short"), FINE, DIGEST),
    (Fault("changed"), FINE, DIGEST),
    (Fault("endless"), "at most", "at most"),
    (Fault("compressed"), "although the plain file was asked for", "although the plain file was asked for"),
    (Fault("unsized"), FINE, FINE),
    (Fault("chunked"), FINE, FINE),
    (Fault("slow", delay=0.001), FINE, FINE),
    (Fault("called-page"), FINE, FINE),
)
ANSWERS = (
    *((Fault("status", status=n), FINE, rf"HTTP {n} .*{LATER}") for n in (429, 500, 502, 503, 504)),
    *((Fault("status", status=n), GONE.format(n), GONE.format(n)) for n in (404, 410)),
    *((Fault("status", status=n), BROWSER, BROWSER) for n in (400, 401, 403, 418)),
    (Fault("status", status=204), "no file comes with it", "no file comes with it"),
    (Fault("status", headers={"Retry-After": "600"}), "Try again in 600 s", "Try again in 600 s"),
    (Fault("silent"), FINE, rf"no byte for 0\.25 s {LATER}"),
    (Fault("hang-up"), FINE, rf"the connection broke .*{LATER}"),
    (Fault("page"), BROWSER, BROWSER),
    (Fault("unlabelled-page"), BROWSER, BROWSER),
    (Fault("loop"), FINE, f"in a circle, 10 times. {BROWSER}"),
    (Fault("chain"), BROWSER, BROWSER),
    (Fault("to-file"), "http and https addresses are accepted", "http and https addresses are accepted"),
    (Fault("relative"), FINE, FINE),
)
GOOGLE = (
    (Fault("quota"), "Try again in a day", "Try again in a day"),
    (Fault("sign-in"), "Ask its owner", "Ask its owner"),
    (Fault("deleted"), "its owner removed it", "its owner removed it"),
    (Fault("trash"), "its owner removed it", "its owner removed it"),
    (Fault("infected"), "hands it to its owner only", "hands it to its owner only"),
    (Fault("form-elsewhere"), BROWSER, BROWSER),
    (Fault("old-link"), FINE, FINE),
    (Fault("old-cookie"), FINE, FINE),
    (Fault("truncate"), FINE, LATER),
)
# whole answers with wrong bytes: the hub compares digests and tries once more. So does whoever calls `download` for an
# authors' file: test_authors.py
WRONG = {"corrupt", "short", "changed", "endless"}
WAITING = {"stall", "drip", "silent"}  # they take their time, so one door has to do; test_transfer.py has the other
CASES = (
    *(Case(ENCODER, *row) for row in (*BYTES, *ANSWERS)),
    *(Case(PLAIN, *row) for row in (*BYTES, *ANSWERS) if row[0].kind not in WAITING | WRONG),
    *(Case(DRIVE, *row) for row in GOOGLE),
    *(
        Case(url, f, o, a)
        for url in (DROPBOX, GITHUB)
        for f, o, a in BYTES[:2] + ANSWERS
        if f.kind in ("status", "truncate")
    ),
    Case(CONFIG_URL, Fault("truncate", after=100), FINE, rf"the connection ended after \d+ of \d+ bytes {LATER}"),
    Case(CONFIG_URL, Fault("short"), FINE, "is not JSON"),
    Case(CONFIG_URL, Fault("page"), BROWSER, BROWSER),
    Case(CONFIG_URL, Fault("status", status=404), "Not on these hubs either", "Not on these hubs either"),
    Case(DECODER, Fault("truncate"), FINE, LATER),
)

# (case, whether it strikes always); once tells nothing new where the same is expected
RUNS = tuple((case, always) for case in CASES for always in ((False, True) if case.once != case.always else (True,)))


def use(case: Case, hosts: Hosts, cache: Path) -> None:
    """What a user does; raises unless the right bytes are there."""
    if case.url.startswith("/"):
        found = hub.open(NAME, hub=f"{hosts.url}/hub").fetch(*roles_of(case))
        for role in roles_of(case):
            verify_file(found, found.file_of(role))
        return
    part = cache / "authors" / NAME / "download.part"
    with exclusive(part.parent):
        digest = transfer.download(case.url, part)
        part.unlink()
    assert digest == hashlib.sha256(files()[case.url]).hexdigest()


def roles_of(case: Case) -> tuple[str, ...]:
    return ("encoder", "decoder") if case.url == DECODER else ("encoder",)


def left(cache: Path) -> list[str]:
    """Files in the cache, without locks that guard a folder."""
    found = [path for path in cache.rglob("*") if not path.is_dir()]
    locks = [path for path in found if path.suffix == ".lock"]
    guarding = [path for path in locks if path.with_name(path.stem.removeprefix(".")).is_dir()]
    return sorted(path.name for path in found if path not in guarding)


def check_case(case: Case, cache: Path, *, always: bool) -> float:
    """Run a case in an empty cache; `AssertionError` when it does not go as it should. Returns the seconds it took."""
    expected = case.always if always else case.once
    with hosts_of(cache, case.fault.kind) as hosts:
        hosts.fault(case.url, case.fault if always else Fault(**vars(case.fault) | {"times": 1}))
        begin = time.monotonic()
        message = FINE
        try:
            use(case, hosts, cache)
        except (HubError, UnknownName) as error:
            message = str(error)
        seconds = time.monotonic() - begin
        assert bool(message) == bool(expected), message or f"no error, but {expected!r} was expected"
        assert re.search(expected, message, re.DOTALL), message
        assert seconds < SECONDS
        if message == FINE:
            names = [CONFIG, *(f"{role}.safetensors" for role in roles_of(case))]
            assert left(cache) == (sorted(names) if case.url.startswith("/") else [])
        else:
            # a file that came whole before the fault is kept, and not fetched again
            assert left(cache) == (["encoder.safetensors"] if case.url == DECODER else [])
            assert hosts.url.removeprefix("http://") in message  # who it was
        assert hosts.served[case.url] > 0 or message or case.fault.kind == "chain"
        # and without the fault
        hosts.fault(case.url, None)
        use(case, hosts, cache)
        assert not [name for name in left(cache) if name.endswith(".part")]
        return seconds


@pytest.mark.parametrize("case, always", RUNS, ids=lambda value: getattr(value, "name", str(value)))
def test_a_fault_is_survived_or_explained(case: Case, always: bool, tmp_path: Path):
    check_case(case, tmp_path / "cache", always=always)


def test_the_table_holds_every_fault_that_the_hosts_know():
    kinds = {case.fault.kind for case in CASES}
    # to-http and wrong-range need a setting of their own: test_transfer.py
    assert set(BYTE_FAULTS | OTHER_FAULTS) - kinds == {"to-http", "wrong-range"}
    assert len({(case.name, str(case.fault)) for case in CASES}) == len(CASES) >= 80
