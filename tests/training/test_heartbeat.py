"""A process that is killed, or hangs, ends the run of all; the state that was saved is gone on from."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist

from geo_pretrain.errors import RecipeError
from geo_pretrain.training import heartbeat
from geo_pretrain.training.distributed import join
from geo_pretrain.training.heartbeat import DONE, SETTING, Heartbeat
from geo_pretrain.training.loop import Budget, fit
from geo_pretrain.training.runs import RunFolder
from tests.forked import Forked
from tests.training.test_mishaps import Tiny


def listener(store, seconds=0.09):
    """A beat of process 0 of two, and the event of its leaving with the reason."""
    left, reasons = threading.Event(), []

    def leave(reason):
        reasons.append(reason)
        left.set()

    return Heartbeat(lambda: store, 0, 2, seconds, leave), left, reasons


def test_a_neighbor_that_stops_beating_is_dead_and_one_that_is_done_is_not():
    store = dist.HashStore()
    store.set("1", DONE)
    beat, left, reasons = listener(store)
    assert not left.wait(0.3)
    store.set("1", "7")
    assert left.wait(20)
    assert reasons[0].startswith("Process 1 of 2 has given no sign of life for 0.09 s")
    assert store.get(heartbeat.DEAD) == b"1"  # so that all others leave too
    beat.close()
    assert int(store.get("0")) > 9


def test_a_store_that_does_not_answer_any_more_is_gone():
    class Gone(dist.Store):
        def __getattribute__(self, name):
            if answers:
                return getattr(store, name)
            raise RuntimeError("Broken pipe")

    store, answers = dist.HashStore(), [True]
    beat, left, reasons = listener(Gone())
    while not store.check(["0"]):
        time.sleep(0.01)
    assert not left.is_set()
    answers.clear()
    assert left.wait(20)
    assert "store has not answered for 0.09 s: its machine is gone" in reasons[0]
    beat.close()


def test_the_end_of_a_process_is_told():
    store = dist.HashStore()
    beat, left, _ = listener(store, seconds=900)
    beat.close()
    assert store.get("0") == DONE.encode()
    assert not left.is_set()


def test_the_setting_is_a_number_of_seconds(monkeypatch):
    for text in ("soon", "-1", "nan", "1e9"):
        monkeypatch.setenv(SETTING, text)
        with pytest.raises(RecipeError, match=f"{SETTING} is '{text}', accepted are seconds from 0"):
            heartbeat.dead_after()
    monkeypatch.setenv(SETTING, "0")
    assert heartbeat.dead_after() == 0
    assert Heartbeat.of_environment(0, 2) is None
    monkeypatch.delenv(SETTING)
    assert heartbeat.dead_after() < 60


def group_of_two(out, event=lambda rank, step: None, seconds=60):
    """Six steps of a tiny task in two processes, with their own beats; `event` is called before each step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def work(rank):
        world = join("cpu")
        run = RunFolder(out, writes=world.is_main)
        run.create()
        task = Tiny(lambda step: event(rank, step))
        task.budget = Budget(steps=6, batch=2, save_every=1)
        assert fit(task, world, run).finished
        world.close()

    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, SETTING: str(seconds)}
    return [Forked(partial(work, rank), group | {"RANK": str(rank)}) for rank in range(2)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_a_process_that_is_gone_ends_the_run_with_a_state_to_go_on_from(number, tmp_path):
    """Killed, its connection is closed; stopped, it is as silent as a machine without power."""
    torch.optim.SGD([torch.zeros(1)], lr=1.0)  # imports what forks then have
    out = tmp_path / "out"
    first, second = group_of_two(
        out, lambda rank, step: os.kill(os.getpid(), number) if (rank, step) == (1, 4) else None, seconds=2
    )
    begin = time.monotonic()
    told = " ".join(first.communicate(timeout=60)[0].split())
    assert time.monotonic() - begin < 60
    second.kill()
    second.communicate()
    assert first.returncode == 1
    reason = "Another process of this run ended" if number == signal.SIGKILL else "Process 1 of 2 has given no sign"
    assert reason in told
    assert "ive the same command again to go on" in told
    assert RunFolder(out).load()["step"] == 4
    for process in group_of_two(out):
        output = process.communicate()[0]
        assert process.returncode == 0, output
    steps = [json.loads(line)["step"] for line in RunFolder(out).log_file.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
