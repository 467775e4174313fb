"""The command `bench pretext`, which compares pretext tasks."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from geo_pretrain.cli.options import SET_HELP
from geo_pretrain.cli.shared import app, console, print_table, progress

bench_app = typer.Typer(help="Compare pretext tasks.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


@bench_app.command("pretext")
def bench_pretext(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for checkpoints and results.")] = Path("bench"),
    task: Annotated[list[str], typer.Option(help="A pretext task; may be repeated. Default: all.")] = [],  # noqa: B006
    seed: Annotated[list[int], typer.Option(help="Seed of training and measurements; may be repeated.")] = [0, 1, 2],  # noqa: B006
    toy: Annotated[bool, typer.Option("--toy", help="Small networks and rooms: under an hour on a CPU.")] = False,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of every task.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples per step of every task.")] = None,
    finetune_steps: Annotated[int | None, typer.Option(help="Steps of every fine-tuning run.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Parallel processes; default: one per core, one on a GPU.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    list_: Annotated[bool, typer.Option("--list", help="List the planned trainings and exit.")] = False,
    render: Annotated[Path | None, typer.Option(help="Markdown page to insert the table into.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train every pretext task with the same budget on rooms; compare each to random initialization in one table.

    Matching on held-out rooms, a linear probe and fine-tuning, in 2D or 3D, over seeds. Interrupted? Give the same
    command again: finished cells are kept. Exit code 1 when a task failed; the others are in the table.

    Example: `geo-pretrain bench pretext --toy --out runs/pretext`

    Some tasks: `geo-pretrain bench pretext --toy --task pri3d_view --task csc --seed 0 --out runs/two`
    """
    from geo_pretrain.cards.markdown import around_marks
    from geo_pretrain.training.bench.plan import FULL, BenchSpec, rows
    from geo_pretrain.training.bench.report import BEGIN, END
    from geo_pretrain.training.bench.report import render as render_page
    from geo_pretrain.training.bench.run import run_bench

    changes: dict[str, Any] = {"overrides": tuple(set_)}
    given = {"steps": steps, "batch": batch, "finetune_steps": finetune_steps}
    changes |= {key: value for key, value in given.items() if value is not None}
    spec, chosen = replace(BenchSpec() if toy else FULL, **changes), rows(task)
    if list_:
        _show_plan(chosen, spec)
        return
    if render is not None:
        around_marks(render, BEGIN, END)  # fail early if the page has no place for the table
    with progress(not as_json) as report:
        results = run_bench(
            chosen,
            seed,
            spec,
            out,
            jobs=jobs,
            device=device,
            command=shlex.join(["geo-pretrain", *sys.argv[1:]]),
            report=lambda done, total, text: report("cells", done, total, text),
            on_rooms=lambda done, total: report("rendering rooms", done, total, ""),
        )
    if render is not None:
        render_page(render, results)
    if as_json:
        typer.echo(json.dumps(results))
    else:
        _show_results(results, out)
    if results["failed"] or results["not available"]:
        raise typer.Exit(1)


def _show_results(results: dict[str, Any], out: Path) -> None:
    from geo_pretrain.training.bench.report import HEAD, table
    from geo_pretrain.training.bench.run import RESULTS

    print_table(HEAD, table(results), title="in %, mean ± deviation over seeds")
    console.print(f"Results: {out / RESULTS}", soft_wrap=True, highlight=False)


def _show_plan(chosen: list[Any], spec: Any) -> None:
    from geo_pretrain.training.bench.plan import plan

    rows = []
    for row in chosen:
        if row.recipe is None:
            rows.append((row.task, f"not available: {row.why}", "", ""))
            continue
        first = plan(row, spec, 0).stage1
        stage = "" if first is None else f"{first.recipe.name}, {first.recipe.optim.steps} steps"
        rows.append((row.task, row.recipe, row.kind, stage))
    print_table(("task", "recipe", "", "first stage"), rows)
