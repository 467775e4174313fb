"""Processes that are killed, disks that are full or read-only, damaged caches: each is survived or explained."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import pytest

from geo_pretrain import hub
from geo_pretrain.checkpoint import CONFIG, verify_file
from geo_pretrain.errors import HubError
from tests.hub.hosts import Fault, Hosts
from tests.hub.test_faults import CONFIG_URL, DECODER, ENCODER, NAME, files, hosts_of, left

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


def begun(cache: Path) -> bool:
    """Whether a part of some size lies there; folders may go while they are looked through."""
    with suppress(FileNotFoundError):
        return any(path.stat().st_size >= 20_000 for path in cache.rglob("*.part"))
    return False


def killed_process(cache: Path, hosts: Hosts) -> None:
    """SIGKILL in the middle of a download: the next process is not blocked and finishes."""
    hosts.fault(ENCODER, Fault("stall", times=1, after=20_000))
    process = start(hosts)
    deadline = time.monotonic() + 300
    while not begun(cache):
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
