"""Jobs on a cluster by submitit: SLURM, or its local executor, which runs the same jobs on this machine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from geo_pretrain.errors import GeoPretrainError, RecipeError, require, unknown
from geo_pretrain.training.runs import Interrupted
from geo_pretrain.training.stops import request_stop

CLUSTERS = ("slurm", "local")
MOST_REQUEUES = 1000  # of a job that reaches its time limit; submitit's default is three
POLL = 0.5  # s between looks at a job


@dataclass(frozen=True)
class Cluster:
    """What a job asks for. `processes` of each node share its GPUs, one each."""

    name: str = "slurm"
    hours: float = 4.0
    partition: str | None = None
    nodes: int = 1
    processes: int = 1  # a node
    cpus: int = 1  # a process
    gpus: int = 0  # a node
    job_name: str = "geo-pretrain"
    more: Mapping[str, str] = field(default_factory=dict)  # further options of sbatch, such as account

    def check(self) -> None:
        """Raise `UnknownName` for another cluster than slurm and local, `RecipeError` for what that cannot do."""
        if self.name not in CLUSTERS:
            raise unknown("cluster", self.name, CLUSTERS)
        if self.name == "local" and self.nodes > 1:
            raise RecipeError(
                f"{self.nodes} nodes are asked for; accepted for the cluster 'local', this machine, is 1."
            )


def make_executor(folder: Path, cluster: Cluster) -> Any:
    """Make submitit's executor, which keeps logs and results of jobs in `folder`.

    Raises as `Cluster.check`, `MissingDependency` without submitit, `RecipeError` where the cluster is not there.
    """
    cluster.check()
    submitit = require("submitit", "cluster")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster.name, slurm_max_num_timeout=MOST_REQUEUES)
    except RuntimeError as error:
        raise RecipeError(f"No cluster {cluster.name!r} here ({error}). Accepted: {', '.join(CLUSTERS)}.") from error
    settings: dict[str, Any] = {
        "name": cluster.job_name,
        "timeout_min": max(1, round(60 * cluster.hours)),
        "nodes": cluster.nodes,
        "tasks_per_node": cluster.processes,
        "cpus_per_task": cluster.cpus,
        "gpus_per_node": cluster.gpus,
    }
    if cluster.name == "slurm":
        settings["slurm_partition"] = cluster.partition
        settings["slurm_srun_args"] = ["--kill-on-bad-exit=1"]  # one process that fails ends all
        settings["slurm_additional_parameters"] = dict(cluster.more)
    executor.update_parameters(**settings)
    return executor


class GroupJob:
    """A command that all processes of a job run as one group of torch.distributed.

    Before its time limit, or when it is preempted, a job saves its state and is queued again, where it goes on.
    """

    def __init__(self, run: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> None:
        """`run` is called with `arguments`, in each process; both are pickled."""
        self.run, self.arguments = run, list(arguments)

    def __call__(self) -> None:
        join_environment()
        number = require("submitit", "cluster").JobEnvironment._usr_sig()
        queue_again: Any = signal.getsignal(number)  # submitit's, which ends this process
        asked = False

        def save_first(number: int, frame: FrameType | None) -> None:
            nonlocal asked
            asked = request_stop()
            if not asked:
                queue_again(number, frame)

        signal.signal(number, save_first)
        try:
            self.run(self.arguments)
        except Interrupted:
            if not asked:
                raise
            queue_again(number, None)
        finally:
            signal.signal(number, queue_again)

    def checkpoint(self) -> Any:
        """The job that is queued again, for submitit: the same command, which goes on."""
        return require("submitit.helpers", "cluster").DelayedSubmission(self)


def join_environment() -> None:
    """Tell torch.distributed of the processes of the job that this process belongs to, as torchrun would."""
    group = require("submitit.helpers", "cluster").TorchDistributedEnvironment()
    group.export(set_cuda_visible_devices=False, overwrite=True)
    if group.local_world_size == group.world_size:  # one machine, whose own name may not be known to it
        os.environ["MASTER_ADDR"] = "127.0.0.1"


def wait_for(job: Any) -> None:
    """Wait until all processes of a job have ended. Raises `GeoPretrainError` with what the first that failed said."""
    submitit = require("submitit", "cluster")
    while not job.done():
        time.sleep(POLL)
    for rank in range(job.num_tasks):
        try:
            job.task(rank).result()
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
            log = job.task(rank).paths.stderr
            raise GeoPretrainError(
                f"Process {rank} of job {job.job_id} failed: {last_words(str(error))} (log: {log})"
            ) from error


def last_words(text: str) -> str:
    """What a job's program said last, in submitit's text: the message of the error, from its traceback.

    >>> last_words("Job failed:\\n-----\\nTraceback:\\n  File x\\nx.DataError: No frames.\\n-----\\nSee logs.")
    'No frames.'
    """
    parts = text.split("\n---")
    lines = [line for line in parts[1].splitlines() if line.strip("- ") and line[0] != " "] if len(parts) > 1 else []
    return (lines or [text])[-1].partition(": ")[2] or (lines or [text])[-1]
