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
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType

from geo_pretrain.progress import tell

SAME = 0.5  # s: signals that follow each other so quickly are one, which a terminal and a launcher both send
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

    first: dict[int, float] = {}

    def request(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number not in first:
            first[number], stop.number = now, number
            stop.set()
        elif now - first[number] >= SAME:
            signal.signal(number, previous[signal.Signals(number)])
            signal.raise_signal(number)

    previous = {number: signal.getsignal(number) for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN}
    for number in previous:
        signal.signal(number, request)
    _STOPS.append(stop)
    try:
        with nullcontext() if kept is None else _answered(set(previous), kept):
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


@contextmanager
def _answered(numbers: set[signal.Signals], kept: Callable[[], str]) -> Iterator[None]:
    """Answer signals from a thread."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    left = threading.Event()
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_answer, args=(ours, numbers, kept, left), daemon=True)
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
    signals: socket.socket, numbers: set[signal.Signals], kept: Callable[[], str], left: threading.Event
) -> None:
    latest: dict[int, float] = {}
    with suppress(OSError):
        while data := signals.recv(1):
            number, now = data[0], time.monotonic()
            if number not in numbers or now - latest.get(number, -SAME) < SAME:
                continue
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            if number not in latest:
                latest[number] = now
                tell(f"{name}: stopping after this step, whose result is saved. A second {name} ends at once: {kept()}")
                continue
            tell(f"{name} again: ended at once; {kept()}")
            if not left.wait(GRACE):
                os._exit(128 + number)
            return


def _after_fork() -> None:
    """Loader workers are forks: signals that they get must not be written to the file of the run's process."""
    if _STOPS:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
