"""Commands that make checkpoints and measure them: demo, train, eval, data."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from geo_pretrain.cli.shared import app, console, escape, progress

if TYPE_CHECKING:
    from geo_pretrain.training.data.frame import Skips
    from geo_pretrain.training.evaluation.recall import MatchingResult
    from geo_pretrain.training.recipe import DataSpec

eval_app = typer.Typer(help="Measure a backbone.", no_args_is_help=True)
data_app = typer.Typer(help="Look at data.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")
app.add_typer(data_app, name="data")

DATA_HELP = "SOURCE or SOURCE:PATH, such as rooms, seven_scenes:PATH, scannet:PATH."
FRAMES_HELP = "Part of each scene's frames in order of time, such as 0:0.75."
SET_HELP = "KEY=VALUE in the recipe, such as optim.lr=0.05; may be repeated."
TURN_HELP = "3D only: clouds as their camera sees them, or turned at random in full or upright (about the world's z)."


class Turn(StrEnum):
    """Typer's way to list what an option accepts; means `cloud_matching.Turn`."""

    CAMERA, FULL, UPRIGHT = "camera", "full", "upright"


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where pictures, report and checkpoint go.")] = Path("demo"),
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006 (typer copies it)
    finetune_steps: Annotated[int, typer.Option(help="Steps of each fine-tuning run.")] = 100,
) -> None:
    """Run the whole path on a CPU in minutes: rooms, pre-training, load_backbone, matching, segmentation.

    Example: `geo-pretrain demo --out demo`
    """
    from geo_pretrain.training.demo import run_demo, table_rows
    from geo_pretrain.training.finetune.in_memory import FinetuneSpec

    start = time.monotonic()
    with progress() as report:
        result = run_demo(out, overrides=set_, finetuning=FinetuneSpec(steps=finetune_steps), report=report)
    table = Table("", "without", "with pre-training", title="Does geometry help? (mean ± spread)")
    for row in table_rows(result):
        table.add_row(*row)
    console.print(table)
    console.print(f"Checkpoint: {result.folder}   (load_backbone({str(result.folder)!r}))", soft_wrap=True)
    console.print(f"Pictures:   {out / 'matches.png'}, {out / 'segmentation.png'}, {out / 'report.html'}")
    console.print(f"Took {time.monotonic() - start:.0f} s.")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or the path of a .yaml file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The checkpoint folder to write.")],
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of the recipe's length.")] = None,
    toy: Annotated[bool, typer.Option("--toy", help="The same task on small rooms: CPU, minutes.")] = False,
    frames: Annotated[str | None, typer.Option(help=FRAMES_HELP + " The rest is held out.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    device: Annotated[str | None, typer.Option(help="cpu, cuda; default: CUDA where there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished checkpoint.")] = False,
) -> None:
    """Make a checkpoint from RGB-D. Interrupted? Give the same command again: it goes on exactly where it was.

    Example: `geo-pretrain train pri3d_view_r18 --data seven_scenes:PATH --steps 500 --out runs/kitchen`

    In 3D: `geo-pretrain train pointcontrast_nce_srunet34.rooms --toy --out runs/pointcontrast`

    Both: `geo-pretrain train pri3d_view_geo_r18 --data scannet:PATH --out runs/view_geo`

    Several processes: `torchrun --nproc-per-node 8 -m geo_pretrain train ...`
    """
    from geo_pretrain.training.distributed import join
    from geo_pretrain.training.pretrain import run_recipe
    from geo_pretrain.training.recipe import load_recipe, load_stage1, retag

    of_data = _data_overrides(data, frames)
    length = [] if steps is None else [f"optim.steps={steps}", "optim.epochs=null"]
    spec = load_recipe(recipe, [*of_data, *length, *set_], toy=toy)
    stage1 = load_stage1(spec, toy=toy) if spec.needs_stage1 and spec.stage1 else None
    if data is not None:
        tag = spec.data.source + ("_toy" if toy else "")
        if not any(item.startswith("name=") for item in set_):
            spec = replace(spec, name=retag(spec.name, tag))
        stage1 = stage1 and replace(stage1, name=retag(stage1.name, tag))
    world = join(device)
    with progress(world.is_main) as report:
        outcome = run_recipe(
            spec,
            out,
            world,
            stage1=stage1,
            overwrite=overwrite,
            report=report,
            note=lambda text: console.print(f"Data: {text}", highlight=False),
        )
    if outcome.checkpoint is not None:
        units = f"{outcome.pairs} {spec.data.units}"
        console.print(f"Checkpoint: {outcome.checkpoint.folder}   ({units})", soft_wrap=True)
    if world.is_main:
        print_skips(outcome.skips)
    world.close()


@eval_app.command("matching")
def eval_matching(
    backbone: Annotated[str, typer.Argument(help="A catalog name or a checkpoint folder.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "rooms",
    frames: Annotated[str | None, typer.Option(help=FRAMES_HELP)] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH; default: that of pre-training.")] = None,
    pairs: Annotated[int, typer.Option(help="Pairs to measure, spread over the scenes.")] = 100,
    overlap: Annotated[str, typer.Option(help="Range of overlap of the pairs.")] = "0.3:1",
    threshold: Annotated[
        float | None, typer.Option(help="Within which a match is right; default: 4 px, 2 voxels.")
    ] = None,
    turn: Annotated[Turn, typer.Option(help=TURN_HELP)] = Turn.CAMERA,
    seed: Annotated[int, typer.Option(help="Of queries, turns and random weights.")] = 0,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Matching between views: how often is the nearest feature within 4 px (3D: 2 voxels) of the same surface point?

    2D backbones match the pixels of two images (an encoder without decoder by its maps side by side), 3D ones the
    voxels of two frames' clouds. A network with random weights is measured beside it; ± is the standard deviation over
    pairs.

    Example: `geo-pretrain eval matching runs/kitchen --data seven_scenes:PATH --frames 0.75:1`

    In 3D: `geo-pretrain eval matching runs/pointcontrast --data scannet:PATH --turn full`
    """
    from geo_pretrain.training.data.frame import Skips
    from geo_pretrain.training.evaluation.comparison import compare_matching

    spec = data_spec(data, frames, overlap, set_)
    skips = Skips()
    with progress() as report:
        results = compare_matching(
            backbone,
            spec,
            size=size_of(size),
            count=pairs,
            threshold=threshold,
            turn=turn.value,
            seed=seed,
            skips=skips,
            progress=lambda d, t: report("matching", d, t, ""),
        )
    _show_recall(results, skips, as_json)


@eval_app.command("pixel-to-voxel")
def eval_pixel_to_voxel(
    folder: Annotated[str, typer.Argument(help="A checkpoint folder of pri3d_geo, pri3d_view_geo, ppkt or img2pc.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "rooms",
    frames: Annotated[str | None, typer.Option(help=FRAMES_HELP)] = None,
    pairs: Annotated[int, typer.Option(help="Frames, each with its chunk, spread over the scenes.")] = 100,
    threshold: Annotated[float, typer.Option(help="Voxels within which a match is right.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Of queries and random weights.")] = 0,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Matching across modalities: how often is the voxel nearest to a pixel's feature within 2 voxels of its surface?

    Candidates are all voxels of the chunk of surface around the frame, seen or not (Pri3D); of the frame's own cloud
    (networks that a frozen one has taught). The same networks with random weights are measured beside it (the frozen
    one keeps its own); ± is the standard deviation over frames.

    Example: `geo-pretrain eval pixel-to-voxel runs/geo --data scannet:PATH --frames 0.75:1`
    """
    from geo_pretrain.training.data.frame import Skips
    from geo_pretrain.training.evaluation.comparison import compare_pixel_to_voxel

    spec = data_spec(data, frames, "0:1", set_)
    skips = Skips()
    with progress() as report:
        results = compare_pixel_to_voxel(
            folder,
            spec,
            count=pairs,
            threshold=threshold,
            seed=seed,
            skips=skips,
            progress=lambda d, t: report("matching", d, t, ""),
        )
    _show_recall(results, skips, as_json)


def _show_recall(results: Mapping[str, MatchingResult], skips: Skips, as_json: bool) -> None:
    """What the `eval` commands print: a row for each set of weights."""
    if as_json:
        typer.echo(json.dumps({name: asdict(r) | {"spread": r.spread} for name, r in results.items()}))
        return
    measure = next(iter(results.values())).measure
    table = Table("weights", measure, "chance", "pairs", "queries", box=None)
    for name, r in results.items():
        table.add_row(
            escape(name), f"{r.recall:.1%} ± {r.spread:.1%}", f"{r.chance:.1%}", str(len(r.per_pair)), str(r.queries)
        )
    console.print(table)
    print_skips(skips)


@data_app.command("preview")
def data_preview(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")] = Path("preview.png"),
    scenes: Annotated[int, typer.Option(help="Scenes to show.")] = 4,
    frames: Annotated[int, typer.Option(help="Frames of each.")] = 3,
    sets: Annotated[bool, typer.Option("--sets", help="Draw geometric sets, on the frames and the surface.")] = False,
    kind: Annotated[str, typer.Option(help="Of sets: segments of the surface, semantic or instance.")] = "segments",
    k_thresh: Annotated[float, typer.Option(help="Of segments: how much a surface may turn inside of one.")] = 0.01,
    min_vertices: Annotated[int, typer.Option(help="Of segments: smaller ones are joined to a neighbor.")] = 20,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
) -> None:
    """Draw frames of a data source: color, depth and labels; or the geometric sets of its scenes.

    Example: `geo-pretrain data preview rooms -o rooms.png`

    Sets: `geo-pretrain data preview scannet:PATH --sets --scenes 1 -o sets.png`
    """
    from geo_pretrain.training.data.sources.registry import open_source
    from geo_pretrain.training.visualize.preview import contact_sheet, sets_sheet

    preview = [] if any(s.startswith("data.options") for s in set_) else _preview_options(data, scenes)
    spec = data_spec(data, None, "0:1", [*preview, *set_])
    with progress() as report:
        source = open_source(spec, progress=lambda d, t: report("rendering rooms", d, t, ""))
    if sets:
        options: dict[str, Any] = {"kind": kind, "k_thresh": k_thresh, "min_vertices": min_vertices}
        sets_sheet(source, out, scenes=scenes, frames=frames, **options)
    else:
        contact_sheet(source, out, scenes=scenes, frames=frames)
    console.print(f"Wrote {out}", soft_wrap=True)


def _preview_options(data: str, scenes: int) -> list[str]:
    """A few small rooms instead of the full set."""
    options = f"{{scenes: {scenes}, frames: 12}}"
    return [f"data.options={options}"] if data == "rooms" else []


def _data_overrides(data: str | None, frames: str | None) -> list[str]:
    """`--data` and `--frames` as overrides of a recipe."""
    overrides = []
    if data is not None:
        source, _, path = data.partition(":")
        overrides += [f"data.source={source}", f"data.path={json.dumps(path) if path else 'null'}"]
        if source != "rooms":
            overrides.append("data.options={}")
    if frames is not None:
        overrides.append(f"data.frames={_range('--frames', frames)}")
    return overrides


def data_spec(data: str, frames: str | None, overlap: str, overrides: list[str]) -> DataSpec:
    """A data section on its own, for commands that need no recipe."""
    from geo_pretrain.training.config import apply_overrides, parse
    from geo_pretrain.training.recipe import RENAMED, Recipe

    tree: dict[str, Any] = {"name": "command line", "task": {"name": "none"}, "optim": {"steps": 1}}
    options = [*_data_overrides(data, frames), f"data.overlap={_range('--overlap', overlap)}", *overrides]
    apply_overrides(tree, options, RENAMED)
    return parse(Recipe, tree, where="command line").data


def _range(option: str, text: str) -> str:
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise typer.BadParameter(f"{option} is {text!r}; expected LOW:HIGH with numbers from 0 to 1.") from None
    return f"[{low}, {high}]"


def size_of(text: str | None) -> tuple[int, int] | None:
    """`--size` as height and width."""
    if text is None:
        return None
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise typer.BadParameter(f"--size is {text!r}; expected HEIGHTxWIDTH, such as 240x320.") from None
    return height, width


def print_skips(skips: Skips) -> None:
    """What was left out and why, if anything."""
    if skips.reasons:
        console.print(f"[yellow]{escape(skips.summary())}", soft_wrap=True, highlight=False)
