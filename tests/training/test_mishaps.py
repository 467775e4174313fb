"""What happens to a run from outside: signals, dead workers and peers, full disks. One sentence, the state kept."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from geo_pretrain.errors import GeoPretrainError
from geo_pretrain.training.distributed import World
from geo_pretrain.training.loop import Budget, TrainingTask, fit
from geo_pretrain.training.runs import STATE, RunFolder, explained
from geo_pretrain.training.stops import SAME, stop_requests

ALONE = World(0, 1, torch.device("cpu"))


class Tiny(TrainingTask):
    """Four steps on noise; `event` is called with the step before its batch is given."""

    def __init__(self, event=lambda step: None, width: int = 4) -> None:
        self.module = torch.nn.Linear(width, 1)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.01)
        self.budget = Budget(steps=4, batch=2, save_every=1)
        self.event, self.width = event, width

    def batches(self, start: int) -> Iterator[torch.Tensor]:
        for step in range(start, self.budget.steps):
            self.event(step)
            yield torch.ones(2, self.width)

    def losses(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.module(batch).mean()}

    def schedule(self, step: int) -> float:
        return 0.01

    def identity(self) -> dict[str, object]:
        return {"recipe": "name: tiny\n", "data": "noise", "own_data": {}}


def run_in(folder: Path) -> RunFolder:
    run = RunFolder(folder / "out")
    run.create()
    return run


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_signals_save_the_state(number: signal.Signals, tmp_path: Path):
    run = run_in(tmp_path)
    before = signal.signal(number, signal.default_int_handler)  # whatever started the tests, nohup too
    try:
        progress = fit(Tiny(lambda step: os.kill(os.getpid(), number) if step == 1 else None), ALONE, run)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert (progress.step, progress.finished) == (2, False)
    assert run.load()["step"] == 2
    assert fit(Tiny(), ALONE, run).finished


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_terminal_and_a_launcher_that_both_send_a_signal_ask_once(number: signal.Signals, tmp_path: Path):
    run = run_in(tmp_path)

    def twice(step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), number)
            time.sleep(0.02)  # Python has come to the first one
            os.kill(os.getpid(), number)
            time.sleep(0.3)  # the step goes on for longer than it takes to act on a second one

    before = signal.signal(number, signal.default_int_handler)
    try:
        progress = fit(Tiny(twice), ALONE, run)
    finally:
        signal.signal(number, before)
    assert (progress.step, progress.finished, run.load()["step"]) == (2, False, 2)


@pytest.mark.parametrize("kept", [None, lambda: "kept."])
def test_signals_are_one_by_when_they_came_not_by_when_python_sees_them(kept: Callable[[], str] | None):
    """The second comes soon after the first, in a kernel from which Python comes back much later."""

    def theirs(number: int, _: object) -> None:
        raise InterruptedError(number)

    def send() -> None:
        for _ in range(2):
            time.sleep(0.15)
            os.kill(os.getpid(), signal.SIGTERM)

    before, sender = signal.signal(signal.SIGTERM, theirs), threading.Thread(target=send)
    try:
        with stop_requests(kept) as stop:
            sender.start()
            while not stop.is_set():
                time.sleep(0.001)
            begin = time.monotonic()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)
            assert time.monotonic() - begin > SAME
            sender.join()
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("kept", [None, lambda: "kept."])
def test_a_later_signal_ends_at_once(kept: Callable[[], str] | None):
    def theirs(number: int, _: object) -> None:
        raise InterruptedError(number)

    def ask_and_wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.signal(signal.SIGTERM, theirs)
    try:
        with stop_requests(kept) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_set()
            time.sleep(SAME + 0.1)
            with pytest.raises(InterruptedError):
                ask_and_wait()
        assert signal.getsignal(signal.SIGTERM) is theirs
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_is_ignored_stays_ignored():
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


class Deadly(Dataset):
    """Its second item kills the worker that makes it."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return torch.ones(4)


def test_a_dead_loader_worker_is_named_and_the_state_stays(tmp_path: Path):
    run = run_in(tmp_path)
    task = Tiny()
    task.batches = lambda start: iter(DataLoader(Deadly(), 1, num_workers=1, prefetch_factor=1))  # type: ignore[method-assign]
    with pytest.raises(GeoPretrainError, match=r"A loader worker died \(DataLoader worker") as caught:
        fit(task, ALONE, run)
    assert "take fewer 'workers'" in str(caught.value)
    assert "Give the same command again" in str(caught.value)
    assert fit(Tiny(), ALONE, run).finished


@pytest.mark.parametrize("step", [0, 2])
def test_a_limit_on_files_while_saving_keeps_the_state_before(step: int, tmp_path: Path):
    run = run_in(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(now: int) -> None:
        if now == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, limits[1]))  # a state has 400 kB

    try:
        with pytest.raises(GeoPretrainError, match=r"[Ff]ile.* Free some\. (Nothing was|The last) saved") as caught:
            fit(Tiny(limit, width=100_000), ALONE, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ("The last saved state is in" in str(caught.value)) == (step > 0)
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]  # no part of a file is left
    assert (run.path / STATE).exists() == (step > 0)
    if step:
        assert run.load()["step"] == step
    assert fit(Tiny(width=100_000), ALONE, run).finished


def say(run: RunFolder | None, error: BaseException, cause: BaseException | None = None) -> None:
    with explained(run):
        raise error from cause


def test_a_full_disk_is_one_sentence(tmp_path: Path):
    says = r"^/x/state.pt: .*: there is no room .* Nothing was saved yet"
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(GeoPretrainError, match=says):
            say(run_in(tmp_path), OSError(number, os.strerror(number), "/x/state.pt"))
    hidden = RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file")
    with pytest.raises(GeoPretrainError, match="No space left"):
        say(None, hidden, OSError(errno.ENOSPC, ""))
    with pytest.raises(GeoPretrainError, match="could not be written whole"):
        say(None, hidden)


def test_a_peer_that_is_gone_is_one_sentence_and_other_errors_stay_what_they_are(tmp_path: Path):
    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"
    with pytest.raises(GeoPretrainError, match=r"Another process of this run ended .* its own message tells why"):
        say(run_in(tmp_path), RuntimeError(gloo))
    others = (RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "x"), ValueError("x"), KeyboardInterrupt())
    for error in others:
        with pytest.raises(type(error)) as caught:
            say(None, error)
        assert caught.value is error


SLOW = """
import ctypes, sys
from pathlib import Path
from tests.training.test_mishaps import ALONE, RunFolder, Tiny, fit

run = RunFolder(Path(sys.argv[1]))
run.create()
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock

def event(step):
    print(step, flush=True)
    if step == 2:  # locked twice, which no signal ends: a call that does not return to Python, as a backward pass
        lock(mutex), lock(mutex)

fit(Tiny(event), ALONE, run)
"""


def test_a_signal_in_a_long_step_is_answered_at_once_and_a_second_one_ends_it(tmp_path: Path):
    """The state that was saved last stays. Python's own handlers would wait for the end of the step."""
    command = [sys.executable, "-c", SLOW, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            process.stdout.readline()
        time.sleep(0.5)  # it is in the call by then
        process.send_signal(signal.SIGTERM)
        first = process.stderr.readline()
        time.sleep(0.6)  # sooner, it would be taken for the same
        process.send_signal(signal.SIGTERM)
        second = process.stderr.readline()
        assert process.wait(10) == 128 + signal.SIGTERM
    assert first.startswith("SIGTERM: stopping after this step, whose result is saved. A second SIGTERM ends at once: ")
    assert f"the last saved state stays in {tmp_path / 'out.run'}" in first
    assert second.startswith("SIGTERM again: ended at once; the last saved state stays")
    assert RunFolder(tmp_path / "out").load()["step"] == 2
