"""Labelled data on the command line: what labels are, before training, and the check of a data set."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from geo_pretrain.cli.options import options_of
from geo_pretrain.cli.shared import console, escape, print_table, progress
from geo_pretrain.errors import some

if TYPE_CHECKING:
    from geo_pretrain.training.data.check.labelled import LabelledReport
    from geo_pretrain.training.data.check.report import Finding
    from geo_pretrain.training.data.labelled.shares import LabelTable

MOST_ROWS = 60  # of a table before training
MOST_FAULTS = 50  # kinds of them, that are printed; --json has all
MARKS = {"ok": "[green]ok[/]", "unknown": "[dim]?[/]", "doubtful": "[yellow]doubtful[/]", "wrong": "[bold red]WRONG[/]"}
TASK_HELP = "Of labelled data: segmentation, detection, segmentation3d, ...; default: what the folder holds."


def show_findings(findings: Iterable[Finding]) -> None:
    """Print a line for each finding of a check."""
    for finding in findings:
        mark = MARKS[finding.level.name.lower()]
        console.print(f"{escape(finding.topic)}: {mark} {escape(finding.text)}", soft_wrap=True, highlight=False)


def show_labels(table: LabelTable) -> None:
    """Print which label is which class, its share, and remarks."""
    looked = "all" if table.looked == table.total else f"{table.looked} of {table.total}"
    console.print(f"Labels in {looked} training files. Does each class have the share you expect?", highlight=False)
    cells = table.cells()
    print_table(("id", "class", table.counted, "in files"), cells[:MOST_ROWS])
    if len(cells) > MOST_ROWS:
        console.print(f"and {len(cells) - MOST_ROWS} more: geo-pretrain data check shows all", highlight=False)
    if table.note is not None and not table.unknown:  # what is wrong ends the run, which says all of it
        console.print(f"[yellow]{escape(table.note)}", soft_wrap=True, highlight=False)


def data_set_options(set_: list[str]) -> dict[str, Any]:
    """Convert `--set data.options.KEY=VALUE`s to options of a labelled data set."""
    prefix = "data.options."
    for text in set_:
        if not text.startswith(prefix):
            raise typer.BadParameter(f"--set {text!r}; accepted for labelled data: --set {prefix}KEY=VALUE.")
    return options_of([text.removeprefix(prefix) for text in set_]) or {}


def check_labels(data: str, task: Any, out: Path, set_: list[str], as_json: bool) -> None:
    """Check labelled data, print what was found, and draw some of it. Exit code 1: something is wrong."""
    from geo_pretrain.training.data.check.labelled import check_labelled
    from geo_pretrain.training.data.check.report import Level
    from geo_pretrain.training.visualize.labelled import draw_labelled

    source, _, path = data.partition(":")
    with progress(not as_json) as report_progress:
        report = check_labelled(source, path or None, task, data_set_options(set_), report_progress)
    drawn = out if draw_labelled(report.opened, out) else None
    if as_json:
        typer.echo(json.dumps(report.to_dict() | {"picture": None if drawn is None else str(drawn)}))
    else:
        _show_report(report, drawn)
    if report.level == Level.WRONG:
        raise typer.Exit(1)


def preview_labels(data: str, task: Any, out: Path, set_: list[str], rows: int) -> None:
    """Draw some labelled images or clouds."""
    from geo_pretrain.errors import DataError
    from geo_pretrain.training.data.labelled.registry import open_labelled
    from geo_pretrain.training.visualize.labelled import draw_labelled

    source, _, path = data.partition(":")
    opened = open_labelled(source, Path(path) if path else None, "train", task=task, options=data_set_options(set_))
    if not draw_labelled({"train": opened}, out, rows=rows):
        raise DataError(f"{data}: no image or cloud with labels to draw.")
    console.print(f"Wrote {out}", soft_wrap=True, markup=False)


def _show_report(report: LabelledReport, drawn: Path | None) -> None:
    if report.tables:
        print_table(("id", "class", *report.tables), report.rows())
    show_findings(report.findings)
    groups = list(report.fault_groups().items())
    for reason, files in groups[:MOST_FAULTS]:
        text = f"{files[0]}: {report.faults[files[0]]}"
        if len(files) > 1:
            text = f"{len(files)} files: {reason}: {some(files)}"
        console.print(f"  {escape(text)}", soft_wrap=True, highlight=False)
    if len(groups) > MOST_FAULTS:
        left = sum(len(files) for _, files in groups[MOST_FAULTS:])
        console.print(f"  and {left} more: --json lists all", highlight=False)
    end = "No picture: nothing with labels could be read." if drawn is None else f"Wrote {escape(str(drawn))}"
    console.print(end, soft_wrap=True, highlight=False)
