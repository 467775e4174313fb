"""The commands `bench pretext`, which compares pretext tasks, and `bench table`, the papers' tables."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from geo_pretrain.cli.options import OUT, SET_HELP, device_option, folder_option
from geo_pretrain.cli.shared import app, console, escape, print_table, progress

bench_app = typer.Typer(help="Compare pretext tasks; run the papers' tables.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


@bench_app.command("pretext")
def bench_pretext(
    out: Annotated[Path, folder_option("Folder for checkpoints and results.", *OUT)] = Path("bench"),
    task: Annotated[list[str], typer.Option(help="A pretext task; may be repeated. Default: all.")] = [],  # noqa: B006
    seed: Annotated[list[int], typer.Option(help="Seed of training and measurements; may be repeated.")] = [0, 1, 2],  # noqa: B006
    toy: Annotated[bool, typer.Option("--toy", help="Small networks and rooms: under an hour on a CPU.")] = False,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of every task.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples per step of every task.")] = None,
    finetune_steps: Annotated[int | None, typer.Option(help="Steps of every fine-tuning run.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Parallel processes; default: one per core, one on a GPU.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    device: Annotated[str, device_option("cpu or cuda.")] = "cpu",
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
            on_rooms=report.stage("rendering rooms"),
        )
    if render is not None:
        render_page(render, results)
    if as_json:
        typer.echo(json.dumps(results))
    else:
        _show_results(results, out)
    if results["failed"] or results["not available"]:
        raise typer.Exit(1)


@bench_app.command("table")
def bench_table(
    name: Annotated[str | None, typer.Argument(help="A paper's table, such as 'PPKT T1'; without: the list.")] = None,
    data: Annotated[list[str], typer.Option(help="SOURCE:PATH of a data set; may be repeated.")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the runs of all rows.")] = Path("tables"),
    seed: Annotated[list[int], typer.Option(help="Seed of the runs; may be repeated.")] = [0],  # noqa: B006
    toy: Annotated[bool, typer.Option("--toy", help="The same runs on small rooms: CPU, minutes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a paper's table with the command of each row; after the runs, our numbers stand beside the paper's.

    The commands write into --out; give the same --out again to see what they measured. A row that cannot be run here
    says why.

    Example: `geo-pretrain bench table "PPKT T1" --data s3dis:PATH --out runs/ppkt_t1`

    The list of tables: `geo-pretrain bench table`
    """
    from geo_pretrain.training.bench.tables import WEIGHTS, list_tables, plan_table

    if name is None:
        _list_tables(list_tables(), as_json)
        return
    plan = plan_table(name, out, data, seeds=seed, toy=toy)
    if as_json:
        typer.echo(json.dumps(plan.to_dict()))
        return
    _show_table(plan)
    if not out.is_dir():
        console.print(escape(f"\nThe commands write into folders of {out}: mkdir -p {out / WEIGHTS}"), soft_wrap=True)


def _list_tables(tables: dict[str, Any], as_json: bool) -> None:
    rows = [
        (
            name,
            str(len(table.rows)),
            ", ".join(dict.fromkeys(f"{task.partition(',')[0]} on {d}" for task, d, _ in table.columns)),
        )
        for name, table in tables.items()
    ]
    if as_json:
        typer.echo(json.dumps([{"table": name, "rows": int(count), "benchmarks": what} for name, count, what in rows]))
        return
    print_table(("table", "rows", "benchmarks"), rows)


def _show_table(plan: Any) -> None:
    from geo_pretrain.training.bench.tables import HEAD, cells, heading

    print_table(HEAD, cells(plan), title=f"{plan.table.name}, in %")
    if plan.toy:
        console.print("Ours are of small rooms (--toy): not to be compared with the paper's.", soft_wrap=True)
    for one in plan.rows:
        note = f"  # {one.row.note}" if one.row.note else ""
        console.print(f"\n[bold]{escape(one.row.label)}[/]{escape(note)}", highlight=False, soft_wrap=True)
        for command in one.commands:
            console.print(f"  {escape(command)}", highlight=False, soft_wrap=True)
    for column, why in plan.without.items():
        console.print(f"[yellow]{escape(heading(column))}: {why}", highlight=False, soft_wrap=True)


def _show_results(results: dict[str, Any], out: Path) -> None:
    from geo_pretrain.training.bench.report import HEAD, table, verdicts
    from geo_pretrain.training.bench.run import RESULTS

    print_table(HEAD, table(results), title="in %, mean ± deviation over seeds")
    for line in verdicts(results):
        console.print(escape(line), highlight=False, soft_wrap=True)
    console.print(f"Results: {out / RESULTS}", soft_wrap=True, highlight=False, markup=False)


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
