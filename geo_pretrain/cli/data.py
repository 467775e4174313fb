"""Commands on data: check finds what is wrong, preview draws, convert prepares, mine finds pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geo_pretrain.cli.labels import TASK_HELP, check_labels, preview_labels, show_findings
from geo_pretrain.cli.options import (
    DATA_HELP,
    FRAMES_HELP,
    OUT,
    SET_HELP,
    checked_folder,
    data_spec,
    device_option,
    file_option,
    folder_option,
    print_skips,
    shard_of,
    size_of,
)
from geo_pretrain.cli.shared import app, console, escape, progress
from geo_pretrain.targets import PICTURES

if TYPE_CHECKING:
    from geo_pretrain.training.data.check.report import Report

data_app = typer.Typer(help="Check, preview and convert data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("check")
def data_check(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    out: Annotated[Path, file_option("The PNG to write.", PICTURES, *OUT)] = Path("check.png"),
    frames: Annotated[str | None, typer.Option(help=FRAMES_HELP)] = None,
    overlap: Annotated[str, typer.Option(help="Range of the overlap of pairs, for their expected number.")] = "0.3:1",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    task: Annotated[str | None, typer.Option(help=TASK_HELP)] = None,
) -> None:
    """Tell what is wrong with a data source, which options mend it, and draw a picture to look at.

    Labelled images and clouds: every file is read, all that cannot be used is listed, with the share of each class.

    RGB-D, in seconds: some frames are projected into each other under every direction and axes of poses and many units
    of depth; edges of depth are laid on edges of color. Exit code 1: something is surely wrong.

    Example: `geo-pretrain data check seven_scenes:PATH -o check.png`

    With the options that it suggests: `geo-pretrain data check scannet:PATH --set data.options.depth_scale=5000`

    Your own images with labels: `geo-pretrain data check folder:PATH`
    """
    from geo_pretrain.training.data.check.labelled import labelled_task
    from geo_pretrain.training.data.check.report import Level
    from geo_pretrain.training.data.check.source import check_source, with_registration
    from geo_pretrain.training.data.sources.registry import open_source
    from geo_pretrain.training.visualize.check import draw_check

    if (labels := labelled_task(*_parts(data), task)) is not None:
        check_labels(data, labels, out, set_, as_json)
        return
    small = data == "rooms" and not any(s.startswith("data.options") for s in set_)  # instead of the full set
    few = ["data.options={scenes: 2, frames: 12}"] if small else []
    spec = data_spec(data, frames, ["data.measure=voxels", *few, *set_], overlap)  # as recipes and `data mine`
    with progress(not as_json) as report_progress:
        source = open_source(spec, progress=report_progress.stage("rendering rooms"))
        report = check_source(source, spec, progress=report_progress.stage("checking"))
    drawn = out if report.sample.frames else None
    if drawn is not None:
        draw_check(report, drawn)
        report = with_registration(report, drawn.with_suffix(".registration.json"))
    if as_json:
        typer.echo(json.dumps(report.to_dict() | {"picture": None if drawn is None else str(drawn)}))
    else:
        _show_check(report, drawn)
    if report.level == Level.WRONG:
        raise typer.Exit(1)


def _parts(data: str) -> tuple[str, str | None]:
    """Source and path of SOURCE:PATH."""
    source, _, path = data.partition(":")
    return source, path or None


def _show_check(report: Report, drawn: Path | None) -> None:
    """Print findings, the options to paste, and where the picture is."""
    show_findings(report.findings)
    if report.options:
        console.print(f"Suggested: {escape(report.paste())}", soft_wrap=True, highlight=False)
    if drawn is not None:
        console.print(f"Wrote {escape(str(drawn))}", soft_wrap=True, highlight=False)
    print_skips(report.sample.skips)


@data_app.command("preview")
def data_preview(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    out: Annotated[Path, file_option("The PNG to write.", PICTURES, *OUT)] = Path("preview.png"),
    scenes: Annotated[int, typer.Option(help="Scenes to show.")] = 4,
    frames: Annotated[int, typer.Option(help="Frames of each.")] = 3,
    sets: Annotated[bool, typer.Option("--sets", help="Draw geometric sets, on the frames and the surface.")] = False,
    kind: Annotated[str, typer.Option(help="Of sets: segments of the surface, semantic or instance.")] = "segments",
    k_thresh: Annotated[float, typer.Option(help="Of segments: how much a surface may turn inside of one.")] = 0.01,
    min_vertices: Annotated[int, typer.Option(help="Of segments: smaller ones are joined to a neighbor.")] = 20,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    task: Annotated[str | None, typer.Option(help=TASK_HELP)] = None,
) -> None:
    """Draw frames of a data source: color, depth and labels; or its geometric sets; or labelled images.

    Example: `geo-pretrain data preview rooms -o rooms.png`

    Sets: `geo-pretrain data preview scannet:PATH --sets --scenes 1 -o sets.png`
    """
    from geo_pretrain.training.data.check.labelled import labelled_task
    from geo_pretrain.training.data.sources.registry import open_source
    from geo_pretrain.training.visualize.preview import contact_sheet, sets_sheet

    if (labels := labelled_task(*_parts(data), task)) is not None:
        preview_labels(data, labels, out, set_, rows=scenes)
        return
    small = data == "rooms" and not any(s.startswith("data.options") for s in set_)  # instead of the full set
    options = [f"data.options={{scenes: {scenes}, frames: 12}}"] if small else []
    spec = data_spec(data, None, [*options, *set_])
    with progress() as report:
        source = open_source(spec, progress=report.stage("rendering rooms"))
    if sets:
        chosen: dict[str, Any] = {"kind": kind, "k_thresh": k_thresh, "min_vertices": min_vertices}
        sets_sheet(source, out, scenes=scenes, frames=frames, **chosen)
    else:
        contact_sheet(source, out, scenes=scenes, frames=frames)
    console.print(f"Wrote {out}", soft_wrap=True, markup=False)


@data_app.command("convert")
def data_convert(
    name: Annotated[str, typer.Argument(help="The data set, such as s3dis.")],
    raw: Annotated[Path, typer.Argument(help="The folder of the published files.")],
    out: Annotated[
        Path, typer.Argument(help="The folder to write, which --data NAME:OUT then reads.", callback=checked_folder)
    ],
    workers: Annotated[int, typer.Option(min=1, help="Processes that convert side by side.")] = 1,
    set_: Annotated[list[str], typer.Option("--set", help="KEY=VALUE, a setting, such as voxel_size=0.01.")] = [],  # noqa: B006
) -> None:
    """Convert a published data set once, as its papers' preprocessing does, to files that are read quickly.

    An interrupted command goes on where it stopped. What cannot be read is left out, and told with its path and reason;
    the next call tries it again. Faults of raw files that were mended stand in OUT/conversion.jsonl.

    Example: `geo-pretrain data convert s3dis Stanford3dDataset_v1.2 s3dis --workers 8`
    """
    from geo_pretrain.training.data.labelled.convert import conversion_settings, convert_data

    settings = conversion_settings(name, set_)
    with progress() as report:
        result = convert_data(
            name,
            raw,
            out,
            settings=settings,
            workers=workers,
            progress=report.stage(f"converting {name}"),
        )
    console.print(escape(result.summary()), soft_wrap=True, highlight=False)
    print_skips(result.skips)


@data_app.command("mine")
def data_mine(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    out: Annotated[Path, folder_option("The folder to write, which train --pairs then reads.", *OUT)],
    frames: Annotated[str | None, typer.Option(help=FRAMES_HELP)] = None,
    overlap: Annotated[str, typer.Option(help="Range of the overlap of pairs, LOW:HIGH.")] = "0.3:1",
    shard: Annotated[str, typer.Option(help="I/N: every N-th scene from the I-th on, I = 1..N.")] = "1/1",
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side, of each job.")] = 1,
    jobs: Annotated[int | None, typer.Option(min=1, help="Jobs on a cluster, by submitit (extra cluster).")] = None,
    cluster: Annotated[str, typer.Option(help="With --jobs: slurm, or local: on this machine.")] = "slurm",
    partition: Annotated[str | None, typer.Option(help="With --jobs: SLURM's partition.")] = None,
    hours: Annotated[float, typer.Option(help="With --jobs: the time limit of a job.")] = 4.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate pairs, hours and gigabytes.")] = False,
    device: Annotated[str, device_option("cpu or cuda, for the comparison of frames.")] = "cpu",
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
) -> None:
    """Find the overlapping frames of every scene, before training: one file a scene, by many processes or machines.

    The overlap is `data.measure=voxels`, that of the papers' recipes; --set data.measure=match_released_code is the
    released script to the letter. Scenes that have a file are kept: the same command goes on where it stopped.

    Example: `geo-pretrain data mine scannet:PATH --out pairs --workers 16`

    One of four machines: `geo-pretrain data mine scannet:PATH --out pairs --shard 1/4`

    On SLURM: `geo-pretrain data mine scannet:PATH --out pairs --jobs 32 --workers 8 --partition cpu`
    """
    from geo_pretrain.training.cluster import Cluster, make_executor
    from geo_pretrain.training.data.mining_jobs import estimate, mine_pairs
    from geo_pretrain.training.data.sources.registry import open_source

    spec = data_spec(data, frames, ["data.measure=voxels", *set_], overlap)
    _check_mining(partition, jobs)
    if dry_run:
        with progress() as report:
            source = open_source(spec, device=device, progress=report.stage("rendering rooms"))
        console.print(str(estimate(source, spec, workers=workers * (jobs or 1), device=device)), highlight=False)
        return
    job = Cluster(cluster, hours=hours, partition=partition, cpus=workers)
    executor = None if jobs is None else make_executor(out.with_name(f"{out.name}.jobs"), job)
    with progress() as report:
        mined = mine_pairs(
            spec,
            out,
            shard=shard_of(shard),
            workers=workers,
            executor=executor,
            jobs=jobs,
            device=device,
            progress=report.stage("mining pairs"),
        )
    console.print(
        f"{mined.pairs} of {mined.tested} pairs, in {mined.made} scenes mined now and {mined.present} that were there: "
        f"{escape(str(out))}",
        soft_wrap=True,
        highlight=False,
    )
    print_skips(mined.skips)


def _check_mining(partition: str | None, jobs: int | None) -> None:
    if partition is not None and jobs is None:
        raise typer.BadParameter("--partition goes with --jobs, which sends jobs to SLURM.")


@data_app.command("shards")
def data_shards(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    out: Annotated[Path, folder_option("The folder to write, which --data shards:OUT then reads.", *OUT)],
    frames: Annotated[str | None, typer.Option(help=FRAMES_HELP)] = None,
    frames_per_shard: Annotated[int, typer.Option(min=1, help="Frames of each tar file.")] = 1000,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH, the recipe's data.size; default: as they are.")
    ] = None,
    jpeg: Annotated[int | None, typer.Option(min=1, max=95, help="Quality of color; default: PNG, exact.")] = None,
    shard: Annotated[str, typer.Option(help="I/N: every N-th shard from the I-th on, I = 1..N.")] = "1/1",
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and encode side by side.")] = 4,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
) -> None:
    """Write the frames of a source into tar files in webdataset's layout: few large files, for network disks.

    Shards that are there are kept: the same command goes on where it stopped.

    Example: `geo-pretrain data shards scannet:PATH --out shards --size 240x320`
    """
    from geo_pretrain.training.data.shard_files import write_shards
    from geo_pretrain.training.data.sources.registry import open_source

    spec = data_spec(data, frames, set_)
    with progress() as report:
        source = open_source(spec, progress=report.stage("rendering rooms"))
        written = write_shards(
            source,
            out,
            frames=frames_per_shard,
            size=size_of(size),
            jpeg=jpeg,
            shard=shard_of(shard),
            workers=workers,
            progress=report.stage("writing shards"),
        )
    console.print(
        f"{written.frames} frames, {written.bytes / 1e9:.3g} GB, in {written.made} shards written now and "
        f"{written.present} that were there: --data shards:{escape(str(out))}",
        soft_wrap=True,
        highlight=False,
    )
    print_skips(written.skips)
