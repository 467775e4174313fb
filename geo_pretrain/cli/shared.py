"""The shared parts of all commands: the Typer application, its console, error messages, progress."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from geo_pretrain import __version__
from geo_pretrain.errors import GeoPretrainError
from geo_pretrain.redact import safe

app = typer.Typer(
    name="geo-pretrain",
    help="Backbones pre-trained with 3D geometry: list them, load them, make them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console()
QUIET_INTERVAL = 5.0  # seconds between progress lines where there is no terminal


def main() -> None:
    """Run the command line; errors of the package and of the disk become one message and exit code 1.

    A run that a signal stopped has saved its state: its exit code is 0 after SIGTERM, 130 after others.
    """
    warnings.formatwarning = _format_warning
    try:
        app()
    except (GeoPretrainError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(_message(error))}", highlight=False)
        sys.exit(getattr(error, "exit_code", 1))


def escape(text: str) -> str:
    """Text for the console: no markup, no control characters, no logins; a server or a file may have written it."""
    return escape_markup(safe(text))


def _message(error: GeoPretrainError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}."
    return str(error)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning of this package as one line; warnings of libraries keep their file and line."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"Warning: {safe(str(message))}\n"
    return f"{filename}:{lineno}: {category.__name__}: {safe(str(message))}\n"


def _version(value: bool) -> None:
    if value:
        typer.echo(f"geo-pretrain {__version__}")
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Backbones pre-trained with 3D geometry: list them, load them, make them."""


def print_table(head: Iterable[str], rows: Iterable[Iterable[str]], title: str | None = None) -> None:
    """Print a table without lines; cells are texts, not markup."""
    table = Table(*head, box=None, title=title)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


@contextmanager
def progress(show: bool = True) -> Iterator[Callable[[str, int, int, str], None]]:
    """A callable (stage, done, total, detail): live bars in a terminal, otherwise a line every few seconds.

    On standard error: what a command answers on standard output can go into a file.
    """
    errors = Console(stderr=True)
    if not show:
        yield lambda stage, done, total, detail: None
        return
    if not errors.is_terminal:
        yield _quiet_progress()
        return
    columns = (  # together under 80 characters
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=errors) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int, detail: str) -> None:
            if stage not in tasks:
                for task in tasks.values():  # an earlier stage is over when the next one begins
                    bars.update(task, completed=next(t.total or 0 for t in bars.tasks if t.id == task))
                tasks[stage] = bars.add_task(escape(stage), total=total, detail="")
            elif done < bars.tasks[tasks[stage]].completed:  # the same stage of the next run
                bars.reset(tasks[stage])
            bars.update(tasks[stage], completed=done, total=total, detail=escape(detail))

        yield report


def _quiet_progress() -> Callable[[str, int, int, str], None]:
    begin: dict[str, float] = {}
    shown: dict[str, float] = {}
    reached: dict[str, int] = {}  # the last `done` of a stage

    def report(stage: str, done: int, total: int, detail: str) -> None:
        now = time.monotonic()
        if stage not in begin or done < reached[stage]:  # it begins, or begins again in the next run
            begin[stage] = now
        reached[stage] = done
        if done < total and now - shown.get(stage, -QUIET_INTERVAL) < QUIET_INTERVAL:
            return
        left = (now - begin[stage]) / done * (total - done) if done else float("nan")
        ending = f", {left:.0f} s left" if done and done < total else ""
        typer.echo(safe(f"{stage}: {done}/{total} {detail}{ending}".rstrip()), err=True)
        shown[stage] = now

    return report
