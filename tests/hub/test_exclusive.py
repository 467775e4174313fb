"""One process and thread at a time on a folder of the cache, whoever dies, waits or clears it meanwhile."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sized
from pathlib import Path

import pytest

from geo_pretrain import files
from geo_pretrain.errors import HubError
from geo_pretrain.hub.cache import exclusive


def hold(folder: str, name: str, seconds: float) -> None:
    with exclusive(Path(folder)):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / name).touch()
        time.sleep(seconds)


def test_one_process_at_a_time(tmp_path: Path):
    folder = tmp_path / "hub" / "tiny"
    inside, most = [], []

    def work() -> None:
        with exclusive(folder):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6
    # nothing was made, so nothing is left
    assert list(folder.parent.iterdir()) == []


SHARED = """
import sys, time
from pathlib import Path
from geo_pretrain.hub.cache import exclusive
folder, mode = Path(sys.argv[1]), sys.argv[2]
with exclusive(folder):
    if mode == "hold":
        folder.mkdir(exist_ok=True)
        (folder / ".5.part").write_bytes(b"half")
        (folder / "whole").write_bytes(b"whole")
        print("holding", flush=True)
        time.sleep(600)
    before = int((folder / "count").read_text())
    time.sleep(0.01)
    (folder / "count").write_text(str(before + 1))
"""


def start(folder: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SHARED, str(folder), mode], stdout=subprocess.PIPE, text=True)


def test_processes_take_turns(tmp_path: Path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "count").write_text("0")
    running = [start(folder, "count") for _ in range(4)]
    assert [process.wait(600) for process in running] == [0] * 4
    assert (folder / "count").read_text() == "4"


def test_a_killed_process_blocks_nobody_and_its_parts_go(tmp_path: Path):
    folder = tmp_path / "tiny"
    process = start(folder, "hold")
    assert process.stdout.readline() == "holding\n"
    (folder / "tree.part").mkdir()
    (folder / "tree.part/x").touch()
    process.send_signal(signal.SIGKILL)
    process.wait()
    begin = time.monotonic()
    with exclusive(folder):
        assert sorted(path.name for path in folder.iterdir()) == ["whole"]
    assert time.monotonic() - begin < 300  # the killed one would have held it for 600
    # the lock lies beside the folder, not in it
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "tiny"]


def leave_when_said(caught: Sized, leave: threading.Event) -> None:
    """Let go once there is a warning, or at last anyhow."""
    deadline = time.monotonic() + 60
    while not len(caught) and time.monotonic() < deadline:
        time.sleep(0.01)
    leave.set()


def test_waiting_is_said(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(files, "WAIT_NOTE", 0.05)
    folder = tmp_path / "tiny"
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with exclusive(folder):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threading.Thread(target=leave_when_said, args=(caught, leave)).start()
        with exclusive(folder):
            pass
    thread.join()
    assert len(caught) == 1
    assert re.search(r"Another process is working on .*tiny; waiting for it", str(caught[0].message))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with exclusive(folder):
            pass


def test_a_cache_that_is_cleared_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    class Lock:
        """The folder goes between its making and the lock's, once."""

        def __init__(self, path: Path) -> None:
            self.lock_file = path

        def acquire(self, timeout: float) -> None:
            asked.append(timeout)
            if len(asked) == 1:
                (tmp_path / "hub").rmdir()
                raise FileNotFoundError

        def release(self) -> None:
            pass

    monkeypatch.setattr("filelock.FileLock", Lock)
    with files.locked(tmp_path / "hub" / "tiny"):
        assert len(asked) == 2
        assert (tmp_path / "hub").is_dir()


def test_an_empty_folder_does_not_stay(tmp_path: Path):
    with exclusive(tmp_path / "tiny"):
        (tmp_path / "tiny").mkdir()
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_gives_the_lock_back(tmp_path: Path):
    for _ in range(2):
        with pytest.raises(ValueError, match="mine"), exclusive(tmp_path / "tiny"):
            raise ValueError("mine")


def test_a_cache_below_a_file_says_so(tmp_path: Path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "tiny"
    with pytest.raises(HubError, match=r"cannot be written \(.*\). Make it writable, or set GEO_"), exclusive(folder):
        pass
