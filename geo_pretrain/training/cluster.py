"""Jobs on a cluster by submitit: SLURM, or its local executor, which runs the same jobs on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geo_pretrain.errors import RecipeError, require, unknown

CLUSTERS = ("slurm", "local")


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


def make_executor(folder: Path, cluster: Cluster) -> Any:
    """Make submitit's executor, which keeps logs and results of jobs in `folder`.

    Raises `UnknownName` for another cluster than slurm and local, `MissingDependency` without submitit, `RecipeError`
    where the cluster is not there.
    """
    if cluster.name not in CLUSTERS:
        raise unknown("cluster", cluster.name, CLUSTERS)
    submitit = require("submitit", "cluster")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster.name)
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
    if cluster.partition is not None and cluster.name == "slurm":
        settings["slurm_partition"] = cluster.partition
    executor.update_parameters(**settings)
    return executor
