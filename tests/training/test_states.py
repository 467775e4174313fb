"""Saved states: whatever happens to their files, a run ends with the right weights or says what is wrong."""

from __future__ import annotations

import json
import random
import shutil
import warnings

import pytest
import torch
from torch import nn

from geo_pretrain.errors import CheckpointError, GeoPretrainError
from geo_pretrain.training.distributed import World
from geo_pretrain.training.loop import Budget, TrainingTask, fit
from geo_pretrain.training.runs import EARLIER, LOG, STATE, RunFolder
from geo_pretrain.training.states import SEAL_SIZE, BadState, read_state, write_state

ALONE = World(0, 1, torch.device("cpu"))
STEPS, SAVE_EVERY, STOP = 10, 2, 7


class Stop(Exception):
    pass


class Line(TrainingTask):
    """Fits a line, with a batch that is a function of the step."""

    def __init__(self, lr=0.1, steps=STEPS, save_every=SAVE_EVERY, evaluations=()):
        torch.manual_seed(0)
        self.module = nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=lr, momentum=0.9)
        self.budget = Budget(steps, batch=4, save_every=save_every)
        self.evaluations = evaluations

    def batches(self, start):
        for step in range(start, self.budget.steps):
            yield torch.randn(4, 3, generator=torch.Generator().manual_seed(step))

    def losses(self, batch):
        return {"square": self.module(batch).square().mean()}

    def schedule(self, step):
        return self.optimizer.param_groups[0]["lr"]

    def identity(self):
        return {"recipe": "a: 1", "data": "x"}

    def evaluation_due(self, step):
        return step in self.evaluations


def stop_at(step):
    def callback(info):
        if info.step == step:
            raise Stop

    return callback


def weights(task):
    return torch.cat([p.detach().flatten() for p in task.module.parameters()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights and the log of a run that was not stopped."""
    run = RunFolder(tmp_path_factory.mktemp("whole") / "out")
    run.create()
    task = Line()
    fit(task, ALONE, run)
    return weights(task), run.log_file.read_bytes()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was killed in step 7, with states of steps 4 and 6."""
    run = RunFolder(tmp_path_factory.mktemp("stopped") / "out")
    run.create()
    with pytest.raises(Stop):
        fit(Line(), ALONE, run, on_step=stop_at(STOP))
    return run.path


def resumed(stopped, folder, spoil):
    """The weights and log of the run that goes on after `spoil(its folder)`, and its warnings."""
    run = RunFolder(folder / "out")
    shutil.rmtree(run.path, ignore_errors=True)
    shutil.copytree(stopped, run.path)
    spoil(run.path)
    task = Line()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(task, ALONE, run)
    assert sorted(path.name for path in run.path.iterdir()) == [LOG, EARLIER, STATE]
    return (weights(task), run.log_file.read_bytes()), [str(warning.message) for warning in caught]


def same(one, other):
    return torch.equal(one[0], other[0]) and one[1] == other[1]


def test_the_last_two_states_are_kept_and_each_goes_on_to_the_same_end(tmp_path, stopped, whole):
    assert [read_state(stopped / name)["step"] for name in (EARLIER, STATE)] == [4, 6]
    found, said = resumed(stopped, tmp_path, lambda run: None)
    assert same(found, whole)
    assert not said
    found, said = resumed(stopped, tmp_path, lambda run: (run / STATE).unlink())  # killed between two renames
    assert same(found, whole)
    assert not said


def flip(path, position, bit):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_every_flipped_bit_and_every_cut_of_a_state_is_noticed(tmp_path, stopped):
    good, path, rng = (stopped / STATE).read_bytes(), tmp_path / STATE, random.Random(0)
    want = read_state(stopped / STATE)
    for position in [*rng.sample(range(len(good)), 150), *range(len(good) - SEAL_SIZE - 22, len(good))]:
        path.write_bytes(good)
        flip(path, position, rng.randrange(8))
        with pytest.raises(BadState):
            read_state(path)
    for size in [0, 1, 22, *rng.sample(range(len(good)), 40), len(good) - 1]:
        path.write_bytes(good[:size])
        with pytest.raises(BadState):
            read_state(path)
    path.write_bytes(good + good[-30:])
    with pytest.raises(BadState):
        read_state(path)
    path.write_bytes(good[:-SEAL_SIZE])  # as an older version wrote it
    with pytest.warns(UserWarning, match="older version"):
        assert torch.equal(read_state(path)["module"]["weight"], want["module"]["weight"])
    assert torch.load(stopped / STATE, weights_only=True)["step"] == 6  # torch reads it past the digest


def test_damage_to_a_state_without_digest_is_noticed_by_the_zip_s_checksums(tmp_path, stopped):
    path = tmp_path / STATE
    data = bytearray((stopped / STATE).read_bytes()[:-SEAL_SIZE])
    raw = read_state(stopped / STATE)["module"]["weight"].numpy().tobytes()
    data[data.index(raw) + 2] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(BadState, match="checksum"):
        read_state(path)


def overwrite(name, change):
    """Write a state again with another content, and a right digest."""

    def spoil(run):
        state = read_state(run / name)
        change(state)
        write_state(state, run / name)

    return spoil


DAMAGE = {
    "flipped": lambda run: flip(run / STATE, 2000, 3),
    "empty": lambda run: (run / STATE).write_bytes(b""),
    "pickle": lambda run: (run / STATE).write_bytes(b"cos\nsystem\n(S'false'\ntR."),
    "text": lambda run: (run / STATE).write_text('{"step": 1}'),
    "step 1000": overwrite(STATE, lambda state: state.update(step=1000)),
    "step -3": overwrite(STATE, lambda state: state.update(step=-3)),
    "NaN": overwrite(STATE, lambda state: state["module"]["weight"].fill_(float("nan"))),
    "momentum": overwrite(STATE, lambda state: state["optimizer"]["state"][0]["momentum_buffer"].fill_(float("-inf"))),
    "log of another length": overwrite(STATE, lambda state: state["log"].update(bytes=9999)),
    "log of a negative length": overwrite(STATE, lambda state: state["log"].update(bytes=-5)),
    "log without facts": overwrite(STATE, lambda state: state.update(log=None)),
    "step True": overwrite(STATE, lambda state: state.update(step=True)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_state_is_named_and_the_older_one_is_used(tmp_path, stopped, whole, damage):
    found, (said,) = resumed(stopped, tmp_path, DAMAGE[damage])
    assert same(found, whole)
    assert f"out.run: {STATE} " in said
    assert f"The run goes on from {EARLIER}, saved after step 4." in said
    run = RunFolder(tmp_path / "out")
    assert run.load(STEPS)["step"] == 8  # saved again, and the bad one did not push out the good one
    assert read_state(run.path / EARLIER)["step"] == 6


def test_a_log_that_was_cut_behind_the_older_state_leads_back_to_it(tmp_path, stopped, whole):
    def cut(run):
        lines = (run / LOG).read_bytes().splitlines(keepends=True)
        (run / LOG).write_bytes(b"".join(lines[:5]))

    found, (said,) = resumed(stopped, tmp_path, cut)
    assert same(found, whole)
    assert "log.jsonl, whose first" in said
    assert "was cut off" in said


LOGS = {
    "removed": lambda log: log.unlink(),
    "binary": lambda log: log.write_bytes(b"\xff\xfe\0"),
    "altered": lambda log: log.write_text(log.read_text().replace('"step": 2', '"step": 3', 1)),
    "of another run": lambda log: log.write_text(json.dumps({"step": 1, "lr": 0.1}) + "\n"),
}


@pytest.mark.parametrize("what", LOGS)
@pytest.mark.parametrize("noted", [True, False])
def test_states_whose_log_is_another_one_are_refused_by_name(tmp_path, stopped, what, noted):
    def spoil(run):
        if not noted:  # as states of older versions, which know the number of steps alone
            for name in (STATE, EARLIER):
                overwrite(name, lambda state: state.pop("log"))(run)
        LOGS[what](run / LOG)

    with pytest.raises(CheckpointError, match=rf"No saved state in .*{STATE}.*{LOG}.*{EARLIER}.*remove that folder"):
        resumed(stopped, tmp_path, spoil)


def spoiled_at(run, step, spoil):
    """Take all steps, with `spoil(the log)` after one of them; the weights and the log."""
    run.create()
    task = Line()
    fit(task, ALONE, run, on_step=lambda info: spoil(run.log_file) if info.step == step else None)
    return weights(task), run.log_file.read_bytes()


def replace(log):
    text = log.read_bytes()
    log.unlink()
    log.write_bytes(text[:50])


@pytest.mark.parametrize("step", [5, STEPS])
@pytest.mark.parametrize("spoil", [LOGS["removed"], replace, lambda log: shutil.rmtree(log.parent)])
def test_a_log_that_is_removed_under_a_run_is_put_back(tmp_path, whole, step, spoil):
    with pytest.warns(UserWarning, match=f"{LOG} was removed or replaced while the run was writing it"):
        assert same(spoiled_at(RunFolder(tmp_path / "out"), step, spoil), whole)


@pytest.mark.parametrize("step", [5, STEPS])
@pytest.mark.parametrize("what", ["binary", "altered", "of another run"])
def test_a_log_that_is_altered_under_a_run_ends_it_and_no_state_vouches_for_it(tmp_path, step, what):
    run = RunFolder(tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"{LOG}, whose first .* while the run was writing it"):
        spoiled_at(run, step, LOGS[what])
    assert read_state(run.path / STATE)["step"] == (4 if step == 5 else 8)
    with pytest.raises(CheckpointError, match="No saved state"):
        run.load(STEPS)


def test_a_kill_while_lines_of_the_log_are_dropped_leaves_a_run_that_goes_on(tmp_path, stopped, whole, monkeypatch):
    run = RunFolder(tmp_path / "out")
    shutil.copytree(stopped, run.path)

    def killed(path, data):
        path.open("wb").close()
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.write_bytes", killed)
        with pytest.raises(Stop):
            fit(Line(), ALONE, run)
    task = Line()
    fit(task, ALONE, run)
    assert same((weights(task), run.log_file.read_bytes()), whole)


def test_a_run_whose_states_were_removed_says_that_it_starts_again(tmp_path, stopped, whole):
    found, (said,) = resumed(stopped, tmp_path, lambda run: [(run / name).unlink() for name in (STATE, EARLIER)])
    assert same(found, whole)
    assert "no saved state, though its log reaches step 7" in said


def test_states_that_do_not_fit_are_one_sentence(tmp_path, stopped):
    def momentum(state):
        state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(2, 2)

    def setting(state):
        state["optimizer"]["param_groups"][0]["momentum"] = "much"

    changes = {
        "KeyError: 'module'": lambda state: state.pop("module"),
        "RuntimeError: ": lambda state: state["module"].pop("weight"),
        r"momentum_buffer of the optimizer is shaped \[2, 2\], its weight \[2, 3\]": momentum,
        "momentum of group 0 of the optimizer is the text 'much'": setting,
    }
    for reason, change in changes.items():
        with pytest.raises(CheckpointError, match=f"(?s)does not fit this run.*{reason}"):
            resumed(stopped, tmp_path, overwrite(STATE, change))


def test_a_folder_in_place_of_a_state_is_named(tmp_path, stopped):
    def spoil(run):
        (run / STATE).unlink()
        (run / STATE).mkdir()

    with pytest.raises(CheckpointError, match=f"{STATE} is a folder"):
        resumed(stopped, tmp_path, spoil)


@pytest.mark.parametrize("steps, evaluations", [(2, ()), (2, (1,)), (1, ())])
def test_a_run_that_diverged_neither_ends_nor_is_saved(tmp_path, steps, evaluations):
    run = RunFolder(tmp_path / "out")
    run.create()
    task = Line(lr=1e38, steps=steps, save_every=1, evaluations=evaluations)
    task.losses = lambda batch: {"steep": 99 * task.module(batch).sum()}
    with pytest.raises(GeoPretrainError, match=r"module\.\w+ is not finite after step 1; try a lower optim\.lr"):
        fit(task, ALONE, run)
    assert not run.has_state()
