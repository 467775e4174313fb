"""Jobs of a run over hours: any number of processes over one folder, each with one thread, killed whenever one likes.

A job is done when its files are there. Who works at one holds the lock of its place, so processes do not meet, and one
that died blocks nobody: the same command goes on, within a training run too.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from geo_pretrain.errors import CheckpointError, DataError
from geo_pretrain.files import locked
from geo_pretrain.training.runs import Interrupted

PAUSE = 20.0  # s until a process that has to wait for another one's job looks again
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Job:
    """A part of the work that one process does."""

    name: str
    place: Path  # one process at a time for all jobs of a place
    is_done: Callable[[], bool]
    run: Callable[[], None]
    needs: tuple[Path, ...] = ()  # files that other jobs write

    def is_ready(self) -> bool:
        """Whether the files that it needs are there."""
        return all(path.exists() for path in self.needs)


def work(jobs: Sequence[Job], say: Callable[[str], None] = print, pause: float = PAUSE) -> None:
    """Do all jobs that are not done, in order; those of a place where another process is at work come later.

    Raises `DataError` for a job that needs a file which no job writes.
    """
    while left := [job for job in jobs if not job.is_done()]:
        ready = [job for job in left if job.is_ready()]
        if not ready:
            lacking = next(path for path in left[0].needs if not path.exists())
            raise DataError(f"{left[0].name} needs {lacking}, which no job of this run writes.")
        if not any(_do(job, say) for job in ready):  # after each one from the front again
            time.sleep(pause)


def _do(job: Job, say: Callable[[str], None]) -> bool:
    """Do a job, unless another process is at work at its place; returns whether it is done."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(job.place, busy=job.name))
        except CheckpointError:
            return False
        if not job.is_done():
            begun = time.monotonic()
            try:
                job.run()
            except Interrupted as stop:  # it was asked to; the state is saved
                say(f"{job.name}: {stop}")
                sys.exit(stop.exit_code)
            say(f"{time.strftime('%H:%M:%S')} {job.name}: {time.monotonic() - begun:.0f} s")
    return True


def run_jobs(module: str, arguments: Sequence[str], processes: int) -> int:
    """Start `python -m MODULE ARGUMENTS --worker` so many times and wait; returns the first exit code that is not 0.

    A signal that asks this process to stop is handed on: runs save their states, and the same command goes on.
    """
    command = [sys.executable, "-m", module, *arguments, "--worker"]
    children = [subprocess.Popen(command, env=os.environ | THREADS) for _ in range(processes)]

    def hand_on(number: int, _: object) -> None:
        for child in children:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hand_on)
    codes = [child.wait() for child in children]
    return next((code for code in codes if code), 0)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options that all long runs have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of runs; the same command goes on")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of each fine-tuning run")
    parser.add_argument("--rate", type=float, action="append", default=[], help="learning rates in place of the plan's")
    parser.add_argument("--pilot", action="store_true", help="all labels, one seed, from random weights: minutes")
    parser.add_argument("--table", action="store_true", help="run nothing: tables of what is there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser
