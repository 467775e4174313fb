"""The command `launch`: training on many machines by a cluster's queue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from geo_pretrain.cli.options import folder_option
from geo_pretrain.cli.shared import app, console, escape

LAUNCHED = ("train", "finetune")  # commands of several processes
SLURM_HELP = "KEY=VALUE, a further option of sbatch, such as account=NAME; may be repeated."


@app.command(context_settings={"allow_interspersed_args": False})
def launch(
    command: Annotated[list[str], typer.Argument(help="train or finetune, with its arguments and options.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each, and processes: one a GPU.")] = 8,
    processes_per_node: Annotated[int | None, typer.Option(min=1, help="Processes without GPUs, on CPUs.")] = None,
    cpus_per_process: Annotated[int, typer.Option(min=1, help="CPUs of each, for its loader workers too.")] = 5,
    hours: Annotated[float, typer.Option(help="Time limit; a job that reaches it is queued again and goes on.")] = 4.0,
    partition: Annotated[str | None, typer.Option(help="SLURM's partition.")] = None,
    slurm: Annotated[list[str], typer.Option("--slurm", help=SLURM_HELP)] = [],  # noqa: B006 (typer copies it)
    cluster: Annotated[str, typer.Option(help="slurm, or local: on this machine.")] = "slurm",
    logs: Annotated[Path | None, folder_option("Folder for logs; default: OUT.jobs beside the result.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, and fail if the job does.")] = False,
) -> None:
    """Train on many machines: one job whose processes train together, by submitit (extra cluster).

    Options of launch stand before `train` or `finetune`, the command's own behind it. The job is checked before it is
    sent: a wrong option or recipe costs no time in the queue.

    Example: `geo-pretrain launch --nodes 4 --partition gpu train pri3d_view_geo_r50 --data scannet:PATH --out runs/geo`

    On this machine, without GPUs: `geo-pretrain launch --cluster local --processes-per-node 2 --wait train ...`
    """
    from geo_pretrain.training.cluster import Cluster, GroupJob, make_executor, wait_for

    out = checked(command)
    job = Cluster(
        cluster,
        hours=hours,
        partition=partition,
        nodes=nodes,
        processes=processes_per_node or max(1, gpus_per_node),
        cpus=cpus_per_process,
        gpus=0 if processes_per_node else gpus_per_node,
        job_name=f"geo-pretrain-{out.name}",
        more=dict(_pair(text) for text in slurm),
    )
    folder = logs or out.with_name(f"{out.name}.jobs")
    sent = make_executor(folder, job).submit(GroupJob(run_command, command))
    console.print(
        f"Job {sent.job_id}: {nodes} x {job.processes} processes; logs: {escape(str(sent.paths.stdout))}",
        soft_wrap=True,
        highlight=False,
    )
    if wait:
        wait_for(sent)
        console.print(f"Job {sent.job_id} has ended.", highlight=False)


def checked(command: Sequence[str]) -> Path:
    """Parse a command without running it. Returns its --out; raises for what it would refuse at once."""
    from geo_pretrain.training.recipe import recipe_path

    name, *arguments = command
    if name not in LAUNCHED:
        raise typer.BadParameter(f"launch is given {name!r}; accepted: {' or '.join(LAUNCHED)}, with its arguments.")
    group: Any = typer.main.get_command(app)
    with group.commands[name].make_context(name, arguments) as context:
        recipe_path(context.params["recipe"], name)
        return Path(context.params["out"])


def run_command(command: Sequence[str]) -> None:
    """Run a command of the command line in this process; errors are raised."""
    app(list(command), standalone_mode=False)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise typer.BadParameter(f"--slurm is {text!r}; accepted: KEY=VALUE.")
    return key.strip("-"), value
