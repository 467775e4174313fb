"""Jobs of long runs: in order, once, beside other processes, and again after a kill."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from benchmarks import jobs
from benchmarks.jobs import Job, parser_of, work
from geo_pretrain.errors import DataError
from geo_pretrain.files import locked
from geo_pretrain.training.runs import Interrupted


@pytest.fixture
def made(tmp_path):
    """Makes jobs that write a file and note that they ran."""
    ran = []

    def make(name, *, place=None, needs=()):
        def run():
            ran.append(name)
            (tmp_path / name).write_text("done")

        paths = tuple(tmp_path / need for need in needs)
        return Job(name, tmp_path / f"{place or name}.job", (tmp_path / name).exists, run, paths)

    make.ran = ran
    return make


def test_jobs_are_done_in_order_each_once(made, tmp_path):
    (tmp_path / "b").write_text("done before")
    told = []
    work([made("a"), made("b"), made("c")], told.append)
    assert made.ran == ["a", "c"]
    assert [line.split()[1] for line in told] == ["a:", "c:"]
    work([made("a"), made("b"), made("c")], told.append)
    assert made.ran == ["a", "c"]


def test_a_job_waits_for_what_it_needs_and_others_are_done_meanwhile(made):
    work([made("table", needs=["weights"]), made("other"), made("weights")])
    assert made.ran == ["other", "weights", "table"]


def test_a_job_that_was_asked_to_stop_says_so_and_ends_the_process(made, tmp_path):
    def stopped():
        raise Interrupted("Stopped after step 3 of 9.", terminated=True)

    told = []
    with pytest.raises(SystemExit) as ended:
        work([Job("sweep", tmp_path / "sweep.job", lambda: False, stopped), made("other")], told.append)
    assert ended.value.code == 0  # as the package's own commands end where a scheduler takes a job back
    assert told == ["sweep: Stopped after step 3 of 9."]
    assert made.ran == []


def test_a_need_that_nobody_writes_is_named(made):
    with pytest.raises(DataError, match=r"table needs .*weights, which no job"):
        work([made("table", needs=["weights"]), made("other")])
    assert made.ran == ["other"]


def test_a_place_where_another_process_is_at_work_comes_later(made, tmp_path, monkeypatch):
    held = locked(tmp_path / "sweep.job", busy="held")
    held.__enter__()
    waited = []

    def end_of_the_other(seconds):
        waited.append(seconds)
        (tmp_path / "a").write_text("by the other process")
        held.__exit__(None, None, None)

    monkeypatch.setattr(jobs.time, "sleep", end_of_the_other)
    work([made("a", place="sweep"), made("b", place="sweep"), made("c")], pause=7)
    assert (made.ran, waited) == (["c", "b"], [7])  # a was done by the other


def test_a_killed_process_blocks_nobody(made, tmp_path):
    job = made("a")
    process = multiprocessing.get_context("fork").Process(target=_work_and_die, args=(job,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    work([job])
    assert made.ran == ["a"]


def _work_and_die(job):
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    work([Job(job.name, job.place, job.is_done, die)])


def test_processes_have_one_thread_each_and_hand_signals_on(tmp_path, monkeypatch):
    started = []

    class Child:
        def __init__(self, command, env):
            started.append((command[1:], {name: env[name] for name in jobs.THREADS}))
            self.signals = []

        def send_signal(self, number):
            self.signals.append(number)

        def wait(self):
            return [0, 130][len(started) - 1]

    handlers = {}
    monkeypatch.setattr(jobs.subprocess, "Popen", Child)
    monkeypatch.setattr(jobs.signal, "signal", handlers.__setitem__)
    assert jobs.run_jobs("benchmarks.few_labels", ["out", "--seeds", "2"], 2) == 130
    assert [command for command, _ in started] == [
        ["-m", "benchmarks.few_labels", "out", "--seeds", "2", "--worker"]
    ] * 2
    assert all(set(threads.values()) == {"1"} for _, threads in started)
    assert set(handlers) == {signal.SIGINT, signal.SIGTERM}
    handlers[signal.SIGTERM](signal.SIGTERM, None)


def test_the_worker_takes_the_same_options():
    options = parser_of("text").parse_args(["out", "--jobs", "3", "--worker"])
    assert (options.jobs, options.seeds, options.steps, options.worker) == (3, 3, 400, True)
