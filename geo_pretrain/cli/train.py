"""The commands `demo`, `train` and `finetune`."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geo_pretrain.cli.completion import backbone_names, downstream_recipe_names, recipe_names
from geo_pretrain.cli.labels import MOST_ROWS, show_labels
from geo_pretrain.cli.options import (
    DATA_HELP,
    FRAMES_HELP,
    LABELLED_HELP,
    OUT,
    SET_HELP,
    data_overrides,
    device_option,
    folder_option,
    print_skips,
)
from geo_pretrain.cli.shared import app, console, escape, print_table, progress
from geo_pretrain.yaml_text import quoted

if TYPE_CHECKING:
    from geo_pretrain.progress import Display
    from geo_pretrain.training.demo.weights import Shown
    from geo_pretrain.training.finetune.folder import FinetuneResult
    from geo_pretrain.training.finetune.sweep import SweepResult
    from geo_pretrain.training.finetune_recipe import FinetuneRecipe
    from geo_pretrain.training.recipe import DataSpec

OWN_DATA = ("folder", "clouds")  # labelled data that no paper has measured
PREDICTIONS = "predictions.png"
FRACTION_HELP = "Share of the training images, whole scenes; default: the recipe's."
SEED_HELP = "Seed of sample order, augmentation and new weights; default: the recipe's."
DOWNSTREAM_HELP = "A downstream recipe's name or the path of a .yaml file."
BACKBONE_HELP = (
    "A catalog name, a checkpoint folder, imagenet, scratch, or an encoder's weights: file:PATH, package:MODULE; with "
    "--sweep several."
)
SCENES_HELP = "An official list of training scenes, or the folder of such lists, from which --fraction chooses."
POINTS_HELP = "Labelled points of each training cloud: a number, or the path of an official list."
CHECK_HELP = "Look at some frames first, and stop if poses, depth or intrinsics are surely read wrongly."
LENGTH_HELP = "Optimizer steps, instead of the recipe's length; milestones and warm-up shrink with it."
SMALL_HELP = "Sizes for a CPU, about ten minutes on two cores: 250 steps of 4 at 120x160; data as given."
TOY_HELP = "To see that it runs, a minute or two: 200 steps of 4 at 72x96; on small rooms unless --data is given."
RELEASED_HELP = "Reproduce the accidents of the released protocol."
NO_FINETUNING = "--finetune-steps changes nothing: the demo fine-tunes no more; see `geo-pretrain finetune`."


@app.command()
def demo(
    out: Annotated[Path, folder_option("Folder for figures, report, checkpoint.", *OUT)] = Path("demo"),
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006 (typer copies it)
    finetune_steps: Annotated[int | None, typer.Option(help="Changes nothing any more.")] = None,
) -> None:
    """Show what the shipped weights can do, a minute on a CPU; then pre-train for some minutes and show what it brings.

    Without the weights it says what to install, and goes on with the pre-training.

    Example: `geo-pretrain demo --out demo`
    """
    from geo_pretrain.training.demo.pretraining import RECIPE, run_pretraining
    from geo_pretrain.training.demo.report import REPORT, table_rows, verdict, what_next, write_report

    if finetune_steps is not None:
        warnings.warn(NO_FINETUNING, FutureWarning, stacklevel=1)
    start = time.monotonic()
    shown, missing = _shown_weights(out)
    console.print(f"\nNow a short pre-training, to show the path: {RECIPE}, two to five minutes on two cores.")
    with progress() as report:
        result = run_pretraining(out, overrides=set_, report=report)
    write_report(result, out, shown=shown, missing=missing)
    head = ("", "without", "with pre-training")
    print_table(head, table_rows(result), title="A short pre-training (mean ± spread)")
    console.print(verdict(result), soft_wrap=True, markup=False, highlight=False)
    console.print(
        f"Checkpoint: {result.folder}   (load_backbone({str(result.folder)!r}))", soft_wrap=True, markup=False
    )
    console.print(f"Report:     {out / REPORT}", soft_wrap=True, markup=False)
    console.print(f"Took {time.monotonic() - start:.0f} s.")
    lines = ["What next:", *what_next(result.folder, shown)]
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)


def _shown_weights(out: Path) -> tuple[Shown | None, str]:
    """Measure, draw and print the shipped weights; where they are not on this machine, the reason, which is printed."""
    from geo_pretrain.errors import HubError
    from geo_pretrain.training.demo.report import weights_head, weights_rows, weights_verdict
    from geo_pretrain.training.demo.weights import NAME, PICTURE, find_weights, show_weights, why_missing

    try:
        find_weights(NAME)
    except HubError as error:
        missing = f"The demo shows no finished weights. {why_missing(NAME, error)}"
        console.print(missing, soft_wrap=True, markup=False, highlight=False)
        return None, missing
    with progress() as report:
        shown = show_weights(NAME, out, report=report)
    print_table(weights_head(shown), weights_rows(shown), title="Finished weights on rooms never seen (mean ± spread)")
    console.print(weights_verdict(shown), soft_wrap=True, markup=False, highlight=False)
    console.print(f"Picture:    {out / PICTURE}   ({shown.seconds:.0f} s)", soft_wrap=True, markup=False)
    return shown, ""


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe's name or the path of a .yaml file.", autocompletion=recipe_names)
    ],
    out: Annotated[Path, folder_option("The checkpoint folder to write.", *OUT)],
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of the recipe's length.")] = None,
    small: Annotated[bool, typer.Option("--small", help=SMALL_HELP)] = False,
    toy: Annotated[bool, typer.Option("--toy", help=TOY_HELP)] = False,
    frames: Annotated[str | None, typer.Option(help=FRAMES_HELP + " The rest is held out.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    device: Annotated[str | None, device_option("cpu, cuda; default: CUDA where there is one.")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help=CHECK_HELP)] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished checkpoint.")] = False,
    pairs: Annotated[Path | None, typer.Option(help="A folder that `data mine` wrote; default: mined now.")] = None,
) -> None:
    """Pre-train a checkpoint on RGB-D data. Run the same command again to resume an interrupted run exactly.

    Example: `geo-pretrain train pri3d_view_r18 --small --data folder:PATH --frames 0:0.75 --out runs/mine`

    The papers' sizes, for GPUs: `geo-pretrain train pri3d_view_r18 --data seven_scenes:PATH --out runs/kitchen`

    In 3D: `geo-pretrain train pointcontrast_nce_srunet34.rooms --toy --out runs/pointcontrast`

    Both: `geo-pretrain train pri3d_view_geo_r18 --data scannet:PATH --out runs/view_geo`

    Several processes: `torchrun --nproc-per-node 8 -m geo_pretrain train ...`
    """
    from geo_pretrain.training.distributed import join
    from geo_pretrain.training.pretrain import CHECKS, load_checked_recipe, needs_stage1, run_recipe
    from geo_pretrain.training.recipe import load_stage1, retag

    of_data = data_overrides(data, frames)
    length = [] if steps is None else [f"optim.steps={steps}", "optim.epochs=null"]
    _check_one(toy, small)
    spec = load_checked_recipe(recipe, [*of_data, *length, *set_], toy=toy, small=small)
    stage1 = load_stage1(spec, toy=toy, small=small, also=CHECKS) if spec.stage1 and needs_stage1(spec) else None
    if data is not None:
        tag = spec.data.source + ("_toy" if toy else "_small" if small else "")
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
            pairs=pairs,
            overwrite=overwrite,
            check=check,
            report=report,
            note=lambda text: console.print(f"Data: {text}", highlight=False, markup=False),
        )
    if outcome.checkpoint is not None:
        console.print(_made(outcome.checkpoint.folder, outcome.pairs, spec.data), soft_wrap=True, markup=False)
    if world.is_main:
        print_skips(outcome.skips)
    world.close()


@app.command()
def finetune(
    recipe: Annotated[str, typer.Argument(help=DOWNSTREAM_HELP, autocompletion=downstream_recipe_names)],
    backbone: Annotated[list[str], typer.Option("--backbone", "-b", help=BACKBONE_HELP, autocompletion=backbone_names)],
    out: Annotated[Path, folder_option("The folder to write.", *OUT)],
    data: Annotated[str | None, typer.Option(help=LABELLED_HELP)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help=LENGTH_HELP)] = None,
    epochs: Annotated[float | None, typer.Option(help="The same in passes over the training data.")] = None,
    fraction: Annotated[list[float], typer.Option(help=FRACTION_HELP)] = [],  # noqa: B006
    scenes: Annotated[str | None, typer.Option(help=SCENES_HELP)] = None,
    labelled_points: Annotated[str | None, typer.Option(help=POINTS_HELP)] = None,
    seed: Annotated[list[int], typer.Option(help=SEED_HELP)] = [],  # noqa: B006
    sweep: Annotated[bool, typer.Option("--sweep", help="Run all combinations and write a table.")] = False,
    toy: Annotated[bool, typer.Option("--toy", help="The same protocol on small rooms: CPU, minutes.")] = False,
    match_released_code: Annotated[
        bool, typer.Option("--match-released-code", "--authors-exact", help=RELEASED_HELP)
    ] = False,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    device: Annotated[str | None, device_option("cpu, cuda; default: CUDA where there is one.")] = None,
    hub: Annotated[str | None, typer.Option(help="Where to look for backbones first.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fine-tune and evaluate a backbone by a paper's protocol. Run the same command again to resume.

    Example: `geo-pretrain finetune scannet_unet_r50 -b pri3d_view_geo_r50 --data scannet:PATH --out runs/unet`

    Your own images: `geo-pretrain finetune folder_unet -b pri3d_view_geo_r50 --data folder:PATH --out runs/mine`

    A data-efficiency curve: `geo-pretrain finetune rooms_unet_r18 --sweep -b scratch -b runs/view --fraction 0.2
    --fraction 1 --seed 0 --seed 1 --out runs/curve`

    In 3D: `geo-pretrain finetune rooms3d_srunet34 -b runs/csc --fraction 0.1 --out runs/srunet`

    Few labelled points: `geo-pretrain finetune rooms3d_srunet34 -b runs/csc --labelled-points 20 --out runs/points`

    Several processes: `torchrun --nproc-per-node 8 -m geo_pretrain finetune ...`
    """
    from geo_pretrain.training.distributed import join
    from geo_pretrain.training.finetune import run
    from geo_pretrain.training.finetune import sweep as sweeps
    from geo_pretrain.training.finetune.registry import load_checked_finetune_recipe

    released = ["match_released_code=true"] if match_released_code else []
    overrides = [*data_overrides(data), *_limits(scenes, labelled_points), *released, *set_]
    spec = _of_length(load_checked_finetune_recipe(recipe, overrides, toy=toy), steps, epochs)
    _check_once({"--backbone": backbone, "--fraction": fraction, "--seed": seed}, sweep)
    fraction, seed, world = fraction or [spec.data.fraction], seed or [spec.seed], join(device)
    talks = world.is_main and not as_json
    with progress(talks) as report:
        options = {"init_kwargs": {"hub": hub} if hub else None, "world": world, **_watched(report, talks)}
        if sweep:
            options["on_run"] = lambda number, total, run: report("runs", number, total, f"{run}")
            swept = sweeps.run_sweep(spec, backbone, fraction, seed, out, **options)
        else:
            spec = sweeps.run_recipe(spec, fraction[0], seed[0])
            result = run.finetune(spec, backbone[0], out, overwrite=overwrite, **options)
    world.close()
    if world.is_main:
        _show_sweep(swept, out, as_json) if sweep else _show_result(result, as_json)


def _check_one(toy: bool, small: bool) -> None:
    if toy and small:
        raise typer.BadParameter("--toy and --small are given; accepted is one of the two.")


def _made(folder: Path, pairs: int, data: DataSpec) -> str:
    """The line that ends a training run."""
    most = f", at most {data.max_pairs_per_scene} a scene" if data.max_pairs_per_scene else ""
    return f"Checkpoint: {folder}   ({pairs} {data.units}{most})"


def _watched(report: Display, talks: bool) -> dict[str, Any]:
    """Arguments of a run that show its progress and, if it `talks`, what labels are."""
    return {
        "on_step": lambda step: report("fine-tuning", step.step, step.steps, str(step)),
        "on_data": report.stage("rendering rooms"),
        "on_labels": show_labels if talks else None,
    }


def _of_length(spec: FinetuneRecipe, steps: int | None, epochs: float | None) -> FinetuneRecipe:
    from geo_pretrain.training.finetune_recipe import with_length

    if steps is None and epochs is None:
        return spec
    if steps is not None and epochs is not None:
        raise typer.BadParameter(f"--steps {steps} and --epochs {epochs:g} are given; accepted is one of the two.")
    if epochs is not None and not 0 < epochs < math.inf:
        raise typer.BadParameter(f"--epochs is {epochs:g}; accepted: a number above 0, also below 1.")
    return with_length(spec, steps=steps, epochs=epochs)


def _check_once(given: Mapping[str, Sized], sweep: bool) -> None:
    for option, values in given.items():
        if len(values) > 1 and not sweep:
            raise typer.BadParameter(f"{option} is given {len(values)} times; once is accepted, or add --sweep.")


def _limits(scenes: str | None, labelled_points: str | None) -> list[str]:
    """Overrides of a recipe for a part of the labels."""
    overrides = [f"data.scenes={quoted(scenes)}"] if scenes is not None else []
    return overrides + ([f"data.cloud.labelled_points={_number_or_path(labelled_points)}"] if labelled_points else [])


def _number_or_path(text: str) -> str:
    """The YAML of a number of points, or of the path of a list."""
    return text if text.isdecimal() else quoted(text)


def _show_result(result: FinetuneResult, as_json: bool) -> None:
    from geo_pretrain.training.finetune.folder import class_rows, result_rows

    if as_json:
        typer.echo(json.dumps(result.data, default=str))
        return
    rows = result_rows([result])
    print_table(rows[0], (row.values() for row in rows))
    what, classes = class_rows(result)
    if 0 < len(classes) <= MOST_ROWS:
        print_table(("class", f"{what} (%)"), classes)
    if result.data["data"]["source"] not in OWN_DATA:  # there is no paper to compare with
        for quirk, done in result.data.get("quirks", {}).items():
            console.print(f"{escape(quirk)}: {escape(done)}", highlight=False, soft_wrap=True)
    console.print(f"Pictures of some predictions: {result.folder / PREDICTIONS}", soft_wrap=True, markup=False)
    _show_left_out(result.left_out())
    console.print(f"Results: {result.folder}", soft_wrap=True, highlight=False, markup=False)


def _show_left_out(lines: Iterable[str]) -> None:
    for line in lines:
        console.print(f"[yellow]{escape(line)}", highlight=False, soft_wrap=True)


def _show_sweep(result: SweepResult, out: Path, as_json: bool) -> None:
    from geo_pretrain.training.finetune.report import table_rows, verdicts, write_report

    paths = write_report(result, out)
    if as_json:
        typer.echo(paths["summary.json"].read_text(encoding="utf-8"))
        return
    head, *rows = table_rows(result)
    print_table(head, rows)
    for line in verdicts(result):
        console.print(escape(line), highlight=False, soft_wrap=True)
    _show_left_out(result.left_out)
    for path in paths.values():
        console.print(f"Wrote {path}", soft_wrap=True, highlight=False, markup=False)
