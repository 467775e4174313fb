"""How OpenMP's threads wait beside other programs: spinning where the machine is ours, sleeping where it is not.

PyTorch's threads spin for milliseconds when they wait for each other (GNU libgomp). Beside another busy program the
spinning threads keep the processor from those that they wait for, and a step takes ten times as long. A library cannot
change how libgomp waits once it is loaded, but libgomp stops spinning (GOMP_SPINCOUNT 1000 instead of billions) as soon
as it manages more threads than there are processors. So while our threads are kept waiting for a processor, one more
thread holds an idle team of its own.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHOSEN_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # environment variables that say how to wait
INTERVAL = 0.5  # s between looks at the load
BUSY, FREE = 0.15, 0.03  # seconds that a second of our threads' work waits for a processor: above, below
CALM = 6  # looks in a row below FREE before threads spin again


def usable_cpus() -> int:
    """The processors that this process may use: fewer than the machine has where it is pinned, as schedulers do."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_delay() -> tuple[float, float] | None:
    """Seconds that this process's threads ran, and that they were ready but had no processor; None: not known.

    Of the threads that live, from the kernel's schedstat (Linux).
    """
    ran = waited = 0
    try:
        for task in Path("/proc/self/task").iterdir():
            try:
                fields = (task / "schedstat").read_text().split()
            except (FileNotFoundError, ProcessLookupError):  # the thread has ended
                continue
            ran, waited = ran + int(fields[0]), waited + int(fields[1])
    except (OSError, ValueError, IndexError):
        return None
    return (ran / 1e9, waited / 1e9) if ran else None


class Delay:
    """The share of its ready time that this process waited for a processor, since it was last asked."""

    def __init__(self) -> None:
        self.before = run_delay()

    def share(self) -> float | None:
        """From 0 (alone) to 1; None where the kernel does not tell, or nothing ran since."""
        now, before = run_delay(), self.before
        self.before = now
        if now is None or before is None:
            return None
        ran, waited = (max(0.0, a - b) for a, b in zip(now, before, strict=True))  # threads that ended are gone
        return waited / (ran + waited) if ran + waited > 0.01 else None


class IdleTeam:
    """A thread with an OpenMP team that does nothing, which makes libgomp's waiting threads sleep; `close` ends it."""

    def __init__(self, openmp: ctypes.CDLL, size: int) -> None:
        self._end = threading.Event()
        ready = threading.Event()

        def hold() -> None:
            nothing = ctypes.cast(openmp.omp_get_num_threads, ctypes.c_void_p)  # a function that only reads
            openmp.GOMP_parallel(nothing, None, ctypes.c_uint(size), ctypes.c_uint(0))
            ready.set()
            self._end.wait()  # the team lives as long as its thread

        self._thread = threading.Thread(target=hold, name="idle-openmp-team", daemon=True)
        self._thread.start()
        ready.wait()

    def close(self) -> None:
        self._end.set()
        self._thread.join()


def libgomp() -> ctypes.CDLL | None:
    """The GNU OpenMP library that this process has loaded; None without one, or with several."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line}
    return ctypes.CDLL(paths.pop()) if len(paths) == 1 else None


@contextmanager
def considerate_waiting(share: Callable[[], float | None] | None = None) -> Iterator[None]:
    """Within the context, let OpenMP's threads sleep while other programs want the processors, and spin otherwise.

    Does nothing where OMP_WAIT_POLICY or GOMP_SPINCOUNT is set, with one thread, and without libgomp (macOS, Windows).
    `share`: how busy the machine is, see `Delay.share`.
    """
    import torch  # loads OpenMP

    openmp = libgomp()
    if openmp is None or torch.get_num_threads() == 1 or any(name in os.environ for name in CHOSEN_BY_USER):
        yield
        return
    # Together with the team of PyTorch's main thread, one more thread than there are processors.
    size = max(2, len(os.sched_getaffinity(0)) - torch.get_num_threads() + 2)
    end = threading.Event()
    watch = threading.Thread(
        target=_watch, args=(share or Delay().share, lambda: IdleTeam(openmp, size), end), name="load", daemon=True
    )
    watch.start()
    try:
        yield
    finally:
        end.set()
        watch.join()


def _watch(share: Callable[[], float | None], open_team: Callable[[], IdleTeam], end: threading.Event) -> None:
    """Hold a team from the first look at a busy machine until several looks in a row at a free one."""
    team: IdleTeam | None = None
    calm = 0
    while not end.wait(INTERVAL):
        busy = share()
        if busy is None:
            continue
        calm = calm + 1 if busy < FREE else 0
        if team is None and busy > BUSY:
            team = open_team()
        elif team is not None and calm >= CALM:
            team.close()
            team = None
    if team is not None:
        team.close()


class Pace:
    """Notices when steps have become several times slower than they were, and says why."""

    LEARNED, SLOW, FACTOR = 20, 5, 5.0  # steps that set the pace, steps that are compared with it, how much slower

    def __init__(self, delay: Callable[[], float | None] | None = None) -> None:
        self._first: list[float] = []
        self._last: list[float] = []
        self._delay = delay or Delay().share
        self._said = False

    def step(self, seconds: float) -> str | None:
        """Take note of a step; the first time that steps are slow, what is to be said about it."""
        if len(self._first) < self.LEARNED:
            self._first.append(seconds)
            if len(self._first) == self.LEARNED:
                self._delay()
            return None
        self._last = [*self._last, seconds][-self.SLOW :]
        usual, now = statistics.median(self._first), min(self._last)
        if self._said or len(self._last) < self.SLOW or now < self.FACTOR * usual:
            return None
        self._said = True
        return f"Steps take {now:.2g} s, {now / usual:.0f} times the {usual:.2g} s of the first ones: {self._reason()}"

    def _reason(self) -> str:
        import torch

        share = self._delay()
        if share is None:
            return (
                "this system does not tell whether other programs had the processors. Look at the load, then at the "
                "disk, memory (swap) or the data."
            )
        if share < BUSY:
            return "this process had its processors, so look at the disk, memory (swap) or the data."
        cure = "leave it processors of its own"
        if torch.get_num_threads() > 1:  # one alone waits for no other
            cure = f"set OMP_NUM_THREADS=1 or {cure}"
            if not any(name in os.environ for name in CHOSEN_BY_USER):
                cure = f"set OMP_WAIT_POLICY=PASSIVE, {cure}"
        return f"it waited {share:.0%} of its time for a processor that other programs had; {cure}."
