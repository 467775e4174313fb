"""Waiting of OpenMP's threads: an idle team while the machine is busy, none when it is free or the user chose; pace."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from geo_pretrain import threads
from geo_pretrain.threads import BUSY, CALM, FREE, Delay, Pace, considerate_waiting, libgomp, run_delay, usable_cpus
from geo_pretrain.training import loop

needs_libgomp = pytest.mark.skipif(libgomp() is None, reason="this PyTorch has no libgomp of its own (not on Linux)")


@needs_libgomp
def test_a_team_is_held_while_the_machine_is_busy_and_ended_when_it_is_free_again(monkeypatch):
    for name in threads.CHOSEN_BY_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "INTERVAL", 0.001)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    looks, counts, ended = [0.0, BUSY * 2, BUSY * 2], [], threading.Event()

    def share():
        counts.append(len(list(Path("/proc/self/task").iterdir())))
        if len(counts) <= len(looks):
            return looks[len(counts) - 1]
        if len(counts) > 20 and counts[-1] == counts[0]:
            ended.set()
        return FREE / 2

    try:
        torch.ones(500, 500) @ torch.ones(500, 500)  # makes PyTorch's own team
        with considerate_waiting(share):
            assert ended.wait(30)
    finally:
        torch.set_num_threads(before)
    assert max(counts) - counts[0] >= 2  # its thread, and the rest of its team
    assert not [thread for thread in threading.enumerate() if thread.name in ("load", "idle-openmp-team")]


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
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
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
    for count, share, words in (
        (2, 0.0, "this process had its processors, so look at the disk, memory"),
        (2, None, "this system does not tell whether other programs had the processors"),
        (2, 0.5, "; set OMP_NUM_THREADS=1 or leave it"),
        (1, 0.5, "; leave it processors of its own."),
    ):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        pace = Pace(lambda share=share: share)
        said = [pace.step(0.1) for _ in range(Pace.LEARNED)] + [pace.step(1.0) for _ in range(Pace.SLOW)]
        assert words in said[-1]


def test_loaders_of_a_pinned_process_take_no_more_workers_than_it_has_processors(monkeypatch):
    """More of them would only be in each other's way, and torch warns of them."""
    chosen = {}
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    monkeypatch.setattr(loop, "DataLoader", lambda *_, **given: chosen.update(given) or [])
    made = MagicMock(recipe=SimpleNamespace(workers=4, seed=0), budget=SimpleNamespace(batch=2, accumulate=1, steps=1))
    monkeypatch.setattr(loop, "MicroBatches", MagicMock())
    list(loop.RecipeTask.batches(made, 0))
    assert chosen["num_workers"] == usable_cpus() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cpus() == 8
