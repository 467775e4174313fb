"""`geo-pretrain launch`: jobs are checked before they are sent, train together, and save before they queue again."""

from __future__ import annotations

import os
import signal
import sys
import types

import pytest
from typer.testing import CliRunner

from geo_pretrain import cli
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.cli.launch import checked
from geo_pretrain.errors import DataError, GeoPretrainError, MissingDependency, RecipeError, UnknownName
from geo_pretrain.training.cluster import Cluster, GroupJob, make_executor, wait_for
from geo_pretrain.training.loop import fit
from geo_pretrain.training.runs import Interrupted, RunFolder
from geo_pretrain.training.stops import request_stop
from tests.training.conftest import recording, tiny_recipe  # noqa: F401 (fixtures)
from tests.training.test_mishaps import ALONE, Tiny


def launch(*arguments):
    result = CliRunner().invoke(cli.app, ["launch", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_job_is_checked_before_it_is_sent(tmp_path):
    out = tmp_path / "out"
    assert checked(["train", "pri3d_view_r18", "--out", str(out), "--set", "optim.lr=1"]) == out
    assert "launch is given 'demo'; accepted: train or finetune" in launch("demo").output
    assert "No such option: --nodes" in launch("train", "pri3d_view_r18", "-o", out, "--nodes", 2).output
    assert "Missing option '--out'" in launch("--nodes", 2, "train", "pri3d_view_r18").output
    assert "--slurm is 'account'" in launch("--slurm", "account", "train", "pri3d_view_r18", "-o", out).output
    with pytest.raises(UnknownName, match="Closest: 'pri3d_view_r18'"):
        launch("train", "pri3d_veiw_r18", "-o", out)
    with pytest.raises(
        RecipeError, match="2 nodes are asked for; accepted for the cluster 'local', this machine, is 1"
    ):
        launch("--nodes", 2, "--cluster", "local", "train", "pri3d_view_r18", "-o", out)
    with pytest.raises((MissingDependency, RecipeError), match=r"geo_pretrain\[cluster\]|No cluster 'slurm' here"):
        launch("--nodes", 4, "train", "pri3d_view_r18", "-o", out)


@pytest.fixture
def stand_in(monkeypatch):
    """What a job uses of submitit: its signal, and the environment of one process."""

    class Environment:
        world_size = local_world_size = 1

        def export(self, **options):
            assert options == {"set_cuda_visible_devices": False, "overwrite": True}

    class JobEnvironment:
        @staticmethod
        def _usr_sig():
            return signal.SIGUSR2

    helpers = types.SimpleNamespace(
        TorchDistributedEnvironment=Environment, DelayedSubmission=lambda job: ("again", job)
    )
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(JobEnvironment=JobEnvironment, helpers=helpers))
    monkeypatch.setitem(sys.modules, "submitit.helpers", helpers)
    monkeypatch.setenv("MASTER_ADDR", "somewhere")
    before = signal.getsignal(signal.SIGUSR2)
    yield
    signal.signal(signal.SIGUSR2, before)


def test_a_job_at_its_time_limit_saves_its_state_and_is_queued_again(tmp_path, stand_in):
    run, queued = RunFolder(tmp_path / "out"), []
    run.create()
    signal.signal(signal.SIGUSR2, lambda number, frame: queued.append(run.load()["step"]))

    def train(arguments):
        at = int(arguments[0])
        progress = fit(Tiny(lambda step: os.kill(os.getpid(), signal.SIGUSR2) if step == at else None), ALONE, run)
        if not progress.finished:
            raise progress.interrupted(run)

    job = GroupJob(train, ["1"])
    assert job.checkpoint() == ("again", job)
    job()
    assert queued == [2]
    GroupJob(train, ["9"])()
    assert queued == [2]
    assert run.load()["step"] == 3  # the last is not saved as a state
    assert not request_stop()


def test_a_signal_outside_of_training_is_submitits_and_other_stops_are_errors(stand_in):
    queued = []
    signal.signal(signal.SIGUSR2, lambda number, frame: queued.append(number))
    GroupJob(lambda arguments: os.kill(os.getpid(), signal.SIGUSR2), [])()
    assert queued == [signal.SIGUSR2]

    def stopped(arguments):
        raise Interrupted("Stopped.")

    with pytest.raises(Interrupted):
        GroupJob(stopped, [])()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_two_processes_of_submitits_local_executor_train_together(tmp_path, tiny_recipe):  # noqa: F811
    pytest.importorskip("submitit", reason="submitit is an optional library, the extra 'cluster'")
    out = tmp_path / "out"
    common = ["--cluster", "local", "--processes-per-node", 2, "--wait", "train"]
    path = tiny_recipe(optim={"steps": 2})
    output = launch(*common, path, "--out", out, "--device", "cpu").output
    assert "1 x 2 processes; logs:" in output
    assert "has ended." in output
    assert read_checkpoint(out).provenance["processes"] == 2


def test_a_job_that_failed_is_told_by_its_own_words(tmp_path):
    pytest.importorskip("submitit", reason="submitit is an optional library, the extra 'cluster'")

    def fail():
        raise DataError("No folder 'nowhere': expected one with frames.")

    executor = make_executor(tmp_path, Cluster("local"))
    with pytest.raises(
        GeoPretrainError, match=r"Process 0 of job \d+ failed: No folder 'nowhere': expected .*_0_log.err"
    ):
        wait_for(executor.submit(fail))


def test_what_a_job_asks_for_is_what_slurm_is_told(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit", reason="submitit is an optional library, the extra 'cluster'")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/srun")
    job = Cluster("slurm", hours=2, partition="gpu", nodes=4, processes=8, cpus=5, gpus=8, more={"account": "abc"})
    executor = make_executor(tmp_path, job)
    text = executor._executor._make_submission_file_text("COMMAND", "1")
    for line in (
        "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=5", "--time=120", "--partition=gpu",
        "--account=abc", "--signal=USR2@90",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    assert "--kill-on-bad-exit=1 COMMAND" in text
    assert executor._executor.max_num_timeout == 1000
