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
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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


# faults of processes, disks and caches

RESOLVE = """
import sys
from geo_pretrain import hub
roles = sys.argv[2].split(",")
try:
    print(hub.open({name!r}, hub=sys.argv[1]).fetch(*roles).folder, flush=True)
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}", flush=True)
"""


def start(hosts: Hosts, prelude: str = "", roles: str = "encoder") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", prelude + RESOLVE.format(name=NAME), f"{hosts.url}/hub", roles]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "GEO_PRETRAIN_TIMEOUT": "45"}
    )


def resolve(hosts: Hosts, cache: Path | None = None, roles: tuple[str, ...] = ("encoder",)) -> Path:
    found = hub.open(NAME, hub=f"{hosts.url}/hub", cache_dir=cache).fetch(*roles)
    for role in roles:
        verify_file(found, found.file_of(role))
    return found.folder


def refusal(hosts: Hosts, cache: Path | None = None, roles: tuple[str, ...] = ("encoder",), **options: bool) -> str:
    try:
        hub.open(NAME, hub=f"{hosts.url}/hub", cache_dir=cache, **options).fetch(*roles)
    except HubError as error:
        return str(error)
    raise AssertionError("no error")


def killed_process(cache: Path, hosts: Hosts) -> None:
    """SIGKILL in the middle of a download: the next process is not blocked and finishes."""
    hosts.fault(ENCODER, Fault("stall", times=1, after=20_000))
    process = start(hosts)
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size >= 20_000 for path in cache.rglob("*.part")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [name for name in left(cache) if name.endswith(".part")], "the killed process left its part"
    out, _ = start(hosts).communicate(timeout=600)
    assert Path(out.strip()).is_dir(), out
    assert left(cache) == [CONFIG, "encoder.safetensors"]
    resolve(hosts)


def killed_between_files(cache: Path, hosts: Hosts) -> None:
    """SIGKILL after one of two files: the whole one is kept and is not fetched again."""
    hosts.fault(DECODER, Fault("stall", times=1, after=10))
    process = start(hosts, roles="encoder,decoder")
    deadline = time.monotonic() + 300
    while not hosts.served[DECODER]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resolve(hosts, roles=("encoder", "decoder"))
    assert hosts.served[ENCODER] == 1
    assert left(cache) == [CONFIG, "decoder.safetensors", "encoder.safetensors"]


def six_processes(cache: Path, hosts: Hosts) -> None:
    """Six processes at once: every file is transferred exactly once."""
    hosts.fault(ENCODER, Fault("slow", delay=0.01))
    running = [start(hosts) for _ in range(6)]
    folders = {process.communicate(timeout=600)[0].strip() for process in running}
    assert len(folders) == 1
    assert Path(folders.pop()).is_dir()
    assert hosts.served == {ENCODER: 1, CONFIG_URL: 1}
    assert hosts.bytes_sent[ENCODER] == len(files()[ENCODER])
    assert left(cache) == [CONFIG, "encoder.safetensors"]


def killed_while_others_wait(cache: Path, hosts: Hosts) -> None:
    """The process that downloads is killed while three wait: one of them takes over."""
    hosts.fault(ENCODER, Fault("stall", times=1))
    first = start(hosts)
    deadline = time.monotonic() + 300
    while not hosts.served[ENCODER]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    others = [start(hosts) for _ in range(3)]
    time.sleep(0.3)
    first.send_signal(signal.SIGKILL)
    first.wait()
    folders = {process.communicate(timeout=600)[0].strip() for process in others}
    assert len(folders) == 1
    assert Path(folders.pop()).is_dir()
    assert hosts.served[ENCODER] == 2
    assert left(cache) == [CONFIG, "encoder.safetensors"]


def file_size_limit(cache: Path, hosts: Hosts) -> None:
    """A limit on file sizes (ulimit -f), which looks like a full disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
    out, _ = start(hosts, limit).communicate(timeout=600)
    assert out.startswith("HubError"), out
    assert re.search(r"File too large; \d+ kB more are needed there. Free some, or set GEO_PRETRAIN_CACHE", out), out
    assert left(cache) == []
    resolve(hosts)


class NoMount(Exception):
    """Only root may mount, and not in every container."""


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Callable[[str], None]]:
    """A small disk of its own at `folder`; gives the function that changes its options."""
    folder.mkdir(parents=True)
    if os.geteuid() != 0:
        raise NoMount("a small disk needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        raise NoMount(f"mount: {done.stderr.strip()}")

    def change(new: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{new}", str(folder)], check=True, capture_output=True)

    try:
        yield change
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def full_disk(cache: Path, hosts: Hosts) -> None:
    """A disk that fills up on the way, when nobody knew how much would come."""
    hosts.fault(ENCODER, Fault("unsized", times=1))
    with mounted(cache / "disk", "size=128k") as change:
        message = refusal(hosts, cache / "disk")
        assert "No space left on device; more room is needed there. Free some, or set GEO_PRETRAIN_CACHE" in message
        assert str(cache / "disk") in message
        assert left(cache) == []
        change("size=16m")
        resolve(hosts, cache / "disk")


def nearly_full_disk(cache: Path, hosts: Hosts) -> None:
    """A disk that is too small for what the server announces: nothing is transferred."""
    with mounted(cache / "disk", "size=128k") as change:
        message = refusal(hosts, cache / "disk")
        assert re.search(r"\d+ kB are needed, \d+ kB are free there. Free some, or set GEO_PRETRAIN_CACHE", message)
        assert left(cache) == []
        change("size=16m")
        resolve(hosts, cache / "disk")


def read_only_cache(cache: Path, hosts: Hosts) -> None:
    """What is in a read-only cache loads; what is not says where it could go."""
    with read_only(cache / "disk", fill=lambda: resolve(hosts, cache / "disk")) as make_writable:
        hosts.forget()
        resolve(hosts, cache / "disk")
        assert hosts.requests == []
        message = refusal(hosts, cache / "disk", roles=("encoder", "decoder"))
        assert re.search(r"cannot be written \(.*\). Make it writable, or set GEO_PRETRAIN_CACHE", message), message
        make_writable()
        resolve(hosts, cache / "disk", roles=("encoder", "decoder"))


def read_only_and_empty_cache(cache: Path, hosts: Hosts) -> None:
    """An empty read-only cache: nothing is even asked of the network."""
    with read_only(cache / "disk", fill=lambda: None) as make_writable:
        message = refusal(hosts, cache / "disk")
        assert re.search(r"cannot be written \(.*\). Make it writable, or set GEO_PRETRAIN_CACHE", message), message
        assert hosts.requests == []
        make_writable()
        resolve(hosts, cache / "disk")


@contextmanager
def read_only(folder: Path, fill: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """Root writes in spite of permissions, so it gets a read-only disk."""
    if os.geteuid() == 0:
        with mounted(folder, "size=16m") as change:
            fill()
            change("ro")
            yield functools.partial(change, "rw")
        return
    folder.mkdir(parents=True)
    fill()
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]

    def set_mode(mode: int) -> None:
        for one in folders:
            one.chmod(mode)

    set_mode(0o555)
    try:
        yield functools.partial(set_mode, 0o755)
    finally:
        set_mode(0o755)


def damaged_cache(cache: Path, hosts: Hosts) -> None:
    """Bits, lengths, missing files and half a config.json: noticed and fetched again."""
    folder = resolve(hosts)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    damages: tuple[Callable[[Path], object], ...] = (
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 50),
        lambda path: path.unlink(),
    )
    for name in good:
        for damage in (*damages, flip) if name != CONFIG else damages:
            damage(folder / name)
            hosts.forget()
            assert resolve(hosts) == folder
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == good
            assert hosts.served[ENCODER] == (name != CONFIG)  # what is whole is not fetched again


def offline(cache: Path, hosts: Hosts) -> None:
    """Without network what is there loads, what is not says so; nothing is asked and nothing is made."""
    assert "downloads are off" in refusal(hosts, local_files_only=True)
    assert not cache.exists() or left(cache) == []
    resolve(hosts)
    hosts.forget()
    hub.open(NAME, hub=f"{hosts.url}/hub", local_files_only=True).fetch("encoder")
    assert "downloads are off" in refusal(hosts, roles=("decoder",), local_files_only=True)
    with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
        resolve(hosts)
        assert "downloads are off" in refusal(hosts, roles=("decoder",))
        (resolve(hosts) / "encoder.safetensors").write_bytes(b"damaged")
        assert "downloads are off" in refusal(hosts)
    assert hosts.requests == []
    resolve(hosts)


def dead_server(cache: Path, hosts: Hosts) -> None:
    """A hub that is down, before and after the first use."""
    gone = Hosts({})
    gone.stop()
    message = refusal(gone)
    assert "Connection refused" in message
    assert "Check the address, the network and the proxy" in message
    assert left(cache) == []
    # the next source is tried
    folder = hub.open(NAME, hub=[f"{gone.url}/hub", f"{hosts.url}/hub"]).fetch("encoder").folder
    assert (folder / CONFIG).is_file()


def interrupted(cache: Path, hosts: Hosts) -> None:
    """Ctrl-C in the middle of a download."""
    hosts.fault(ENCODER, Fault("stall", times=1, after=20_000))
    process = start(hosts)
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size >= 20_000 for path in cache.rglob("*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=600)
    assert process.returncode != 0
    assert left(cache) == []
    resolve(hosts)


SPECIAL: tuple[Callable[[Path, Hosts], None], ...] = (
    killed_process,
    killed_between_files,
    six_processes,
    killed_while_others_wait,
    interrupted,
    file_size_limit,
    full_disk,
    nearly_full_disk,
    read_only_cache,
    read_only_and_empty_cache,
    damaged_cache,
    offline,
    dead_server,
)


@pytest.mark.parametrize("fault", SPECIAL, ids=lambda fault: fault.__name__)
def test_processes_disks_and_caches(fault: Callable[[Path, Hosts], None], tmp_path: Path):
    with hosts_of(tmp_path / "cache") as hosts:
        try:
            fault(tmp_path / "cache", hosts)
        except NoMount as reason:
            pytest.skip(str(reason))
