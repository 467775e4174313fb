"""Waiting of OpenMP's threads: an idle team while the machine is busy, none when it is free or the user chose; pace."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch  # noqa: F401 (loads OpenMP)

from geo_pretrain import threads
from geo_pretrain.threads import BUSY, CALM, FREE, Delay, Pace, considerate_waiting, libgomp, run_delay

needs_libgomp = pytest.mark.skipif(libgomp() is None, reason="this PyTorch has no libgomp of its own (not on Linux)")

WATCHED = """
import os, threading, time, torch
from geo_pretrain import threads
torch.set_num_threads(2); torch.ones(1000, 1000) @ torch.ones(1000, 1000)
threads.INTERVAL = 0.001
looks = [0.0, {busy}, {busy}]
counts, done = [], threading.Event()
def share():
    counts.append(len(os.listdir("/proc/self/task")))
    if len(counts) <= len(looks):
        return looks[len(counts) - 1]
    if len(counts) > 20 and counts[-1] == counts[0]:
        done.set()
    return {free}
with threads.considerate_waiting(share):
    ended = done.wait(30)
print(max(counts) - counts[0], int(ended), sum(thread.name == "load" for thread in threading.enumerate()))
"""


def watched(**environment):
    text = WATCHED.format(busy=BUSY * 2, free=FREE / 2)
    run = subprocess.run(
        [sys.executable, "-c", text], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return [int(word) for word in run.stdout.split()]


@needs_libgomp
def test_a_team_is_held_while_the_machine_is_busy_and_ended_when_it_is_free_again():
    most, ended, watching = watched()
    assert most >= 2  # its thread, and the rest of its team
    assert ended
    assert not watching


def test_what_the_user_set_is_left_alone(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with considerate_waiting(lambda: pytest.fail("looked at the load")):
        assert not [thread for thread in threading.enumerate() if thread.name == "load"]


def test_a_team_waits_for_several_calm_looks():
    events = []

    class Team:
        def close(self):
            events.append("closed")

    looks = iter([BUSY, BUSY * 1.1, FREE, 0.0, BUSY * 0.9, *[0.0] * CALM, None])
    end = threading.Event()

    def share():
        events.append(next(looks))
        if events[-1] is None:
            end.set()
        return events[-1]

    def open_team():
        events.append("opened")
        return Team()

    interval, threads.INTERVAL = threads.INTERVAL, 0
    try:
        threads._watch(share, open_team, end)
    finally:
        threads.INTERVAL = interval
    assert events == [BUSY, BUSY * 1.1, "opened", FREE, 0.0, BUSY * 0.9, *[0.0] * CALM, "closed", None]


@pytest.mark.skipif(run_delay() is None, reason="this kernel does not count how long threads wait for a processor")
def test_the_share_of_time_without_a_processor_is_the_kernels(monkeypatch):
    samples = iter([(10.0, 1.0), (13.0, 2.0), (13.0, 2.0), (12.0, 1.5), (14.0, 1.5)])
    monkeypatch.setattr(threads, "run_delay", lambda: next(samples))
    delay = Delay()
    assert delay.share() == pytest.approx(0.25)
    assert delay.share() is None  # nothing ran
    assert delay.share() is None  # a thread ended
    assert delay.share() == 0.0


def test_steps_that_became_slow_are_told_once_with_the_reason(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    pace = Pace(lambda: 0.7)
    assert [pace.step(0.1 + 0.3 * (n == 0)) for n in range(Pace.LEARNED)] == [None] * Pace.LEARNED
    assert [pace.step(seconds) for seconds in (9.0, 9.0, 0.1, 9.0, 0.6, 0.7, 0.6)] == [None] * 7
    said = pace.step(0.6)
    assert said is not None
    assert "Steps take 0.6 s, 6 times the 0.1 s" in said
    assert "waited 70%" in said
    assert "OMP_WAIT_POLICY=PASSIVE" in said
    assert pace.step(0.6) is None
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    for share, words in ((0.0, "disk, memory"), (None, "disk, memory"), (0.5, "; set OMP_NUM_THREADS=1")):
        pace = Pace(lambda share=share: share)
        said = [pace.step(0.1) for _ in range(Pace.LEARNED)] + [pace.step(1.0) for _ in range(Pace.SLOW)]
        assert words in said[-1]
