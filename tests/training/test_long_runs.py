"""What long runs meet: a full disk, a frame that breaks late, a scheduler's SIGTERM, a clock that is set."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time

import pytest

from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.errors import BadFrame, GeoPretrainError
from geo_pretrain.training import loop
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.runs import Interrupted
from tests.front_door import geo_pretrain
from tests.training.test_loop import assert_same_weights, logged, run_here

STEPS = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory, recording):
    """A run that nothing happened to."""
    from tests.training.conftest import recipe_writer

    folder = tmp_path_factory.mktemp("long")
    path = recipe_writer(folder, recording)(optim={"steps": STEPS}, save_every=2)
    run_here(path, folder / "whole")
    return path, folder / "whole"


def at_step(step, event):
    def callback(info):
        if info.step == step:
            event()

    return callback


def test_a_full_disk_ends_the_run_and_it_goes_on_where_it_was(tmp_path, whole):
    path, undisturbed = whole
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = at_step(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, limits[1])))  # a state has more
    try:
        with pytest.raises(GeoPretrainError, match=r"Free some\. The last saved state is in .*run\. Give the same"):
            run_here(path, tmp_path / "run", on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "run").exists()
    run_here(path, tmp_path / "run")
    assert_same_weights(undisturbed, tmp_path / "run")
    assert logged(undisturbed) == logged(tmp_path / "run")


def test_a_frame_that_breaks_late_is_left_out_and_counted(tmp_path, tiny_recipe, recording):
    own = shutil.copytree(recording, tmp_path / "own")
    broken = own / "frame-000020.color.png"

    def break_it():
        broken.write_bytes(broken.read_bytes()[:200])

    path = tiny_recipe(optim={"steps": STEPS}, data={"path": str(own)})
    checkpoint = run_here(path, tmp_path / "run", on_step=at_step(2, break_it))
    assert (checkpoint.finished, checkpoint.provenance["steps"]) == (True, STEPS)
    assert sum(checkpoint.provenance["skipped"].values()) == 1
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_what_was_left_out_before_a_stop_is_counted_after_it(tmp_path, tiny_recipe, recording, monkeypatch):
    """One frame cannot be read once."""
    path, load, failures = tiny_recipe(optim={"steps": STEPS}), SevenScenes.load, list[str]()

    def load_but_one(self, scene, frame_id):
        if not failures:
            failures.append(f"{scene}/{frame_id}")
            raise BadFrame(failures[0], "the disk is away")
        return load(self, scene, frame_id)

    def on_step(info):
        at_step(1, lambda: monkeypatch.setattr(SevenScenes, "load", load_but_one))(info)
        at_step(STEPS - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))(info)

    with pytest.raises(Interrupted):
        run_here(path, tmp_path / "run", on_step=on_step)
    assert failures
    assert run_here(path, tmp_path / "run").provenance["skipped"] == {"the disk is away": 1}


def test_a_scheduler_sees_no_failure_and_the_run_goes_on_whatever_the_clock_says(tmp_path, whole, monkeypatch):
    path, undisturbed = whole
    report, now = loop._Loop.report, time.time()
    jumps = iter([now, now - 1e7, now + 1e8, *[now - 5.0 * k for k in range(100_000)]])
    monkeypatch.setattr(time, "time", lambda: next(jumps))

    def send(self, losses, lr):
        report(self, losses, lr)
        if self.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "report", send)
        ended = geo_pretrain("train", path, "--out", tmp_path / "run", "--no-check", expected=0)
    assert "Stopped after step 3 of 4" in " ".join(ended.errors.split())
    assert (read_checkpoint(tmp_path / "run").finished, (tmp_path / "run.run" / "state.pt").is_file()) == (False, True)
    for number, file in enumerate(sorted((tmp_path / "run.run").iterdir())):  # as if written far from each other
        os.utime(file, (now + 1e8 * (-1) ** number, now - 1e8 * (-1) ** number))
    geo_pretrain("train", path, "--out", tmp_path / "run", "--no-check")
    assert 0 < read_checkpoint(tmp_path / "run").provenance["seconds"] < 600
    assert_same_weights(undisturbed, tmp_path / "run")
    assert logged(undisturbed) == logged(tmp_path / "run")
