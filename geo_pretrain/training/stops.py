"""Requests to stop a run: the first signal is answered at once and ends the run after its step, a second ends it now.

A step can take minutes, and Python runs a signal's handler only when torch's kernels return to it. So a thread listens
to the file to which the interpreter writes each signal's number the moment it arrives (`signal.set_wakeup_fd`).
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from geo_pretrain.progress import tell

SAME = 0.5  # s: signals that follow each other so quickly are one, which a terminal and a launcher both send
HANDLED = 0.05  # s in which Python's handler of a signal runs where nothing keeps it
GRACE = 1.0  # s that a second signal leaves Python to end by itself
FURTHER = [getattr(signal, name) for name in ("SIGHUP", "SIGBREAK") if hasattr(signal, name)]  # the last: Windows
NUMBERS = (signal.SIGINT, signal.SIGTERM, *FURTHER)

_STOPS: list[threading.Event] = []  # of the runs of this process that listen for signals


class StopRequest(threading.Event):
    """Set by the first signal that asks a run to stop, whose number it keeps."""

    number: int | None = None

    @property
    def terminated(self) -> bool:
        """Whether it was SIGTERM, which schedulers send before they end a job."""
        return self.number == signal.SIGTERM


@contextmanager
def stop_requests(kept: Callable[[], str] | None = None) -> Iterator[StopRequest]:
    """An event set by the first SIGINT, SIGTERM or SIGHUP; a second one of the kind acts at once, as without this.

    With `kept`, which says what of the run is saved, the first is answered at once with what happens now, and a second
    ends the process within a second also where Python does not come to act on it. A signal that is ignored (SIGHUP
    under nohup) stays ignored.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    again = _Again()

    def request(number: int, frame: FrameType | None) -> None:
        if number in again.numbers:
            again.acted.set()
            signal.signal(number, previous[signal.Signals(number)])
            signal.raise_signal(number)
        else:
            stop.number = number
            stop.set()

    previous = {number: signal.getsignal(number) for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN}
    for number in previous:
        signal.signal(number, request)
    _STOPS.append(stop)
    try:
        with _answered(set(previous), again, kept):
            yield stop
    finally:
        _STOPS.remove(stop)
        for number, handler in previous.items():
            signal.signal(number, handler)


def request_stop() -> bool:
    """Ask the run of this process to stop as a signal would; False where none is under way."""
    for stop in _STOPS:
        stop.set()
    return bool(_STOPS)


class _Again:
    """Signals that came a second time. Only the thread knows: Python's handler may run long after they came."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self.acted = threading.Event()  # the handler has seen it


@contextmanager
def _answered(numbers: set[signal.Signals], again: _Again, kept: Callable[[], str] | None) -> Iterator[None]:
    """Answer signals from a thread."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    left = threading.Event()
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_answer, args=(ours, numbers, again, kept, left), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        left.set()
        theirs.close()  # the thread reads the end
        thread.join(GRACE)
        ours.close()


def _answer(
    signals: socket.socket,
    numbers: set[signal.Signals],
    again: _Again,
    kept: Callable[[], str] | None,
    left: threading.Event,
) -> None:
    latest: dict[int, float] = {}
    with suppress(OSError):
        while data := signals.recv(1):
            number, now = data[0], time.monotonic()
            if number not in numbers or number in again.numbers or now - latest.get(number, -SAME) < SAME:
                continue
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            if number not in latest:
                latest[number] = now
                if kept is not None:
                    second = f"A second {name} ends at once: {kept()}"
                    tell(f"{name}: stopping after this step, whose result is saved. {second}")
                continue
            if kept is not None:
                tell(f"{name} again: ended at once; {kept()}")
            again.acted.clear()
            again.numbers.add(number)
            if not again.acted.wait(HANDLED) and not left.is_set():
                _send(number)  # its handler ran before it could know
            if kept is not None and not left.wait(GRACE):
                os._exit(128 + number)


def _send(number: int) -> None:
    """Send a signal to the main thread, which wakes it where it sleeps."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)  # Windows


def _after_fork() -> None:
    """Loader workers are forks: signals that they get must not be written to the file of the run's process."""
    if _STOPS:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
