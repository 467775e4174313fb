"""The shared parts of all commands: the Typer application, its console, error messages, tables."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Column, Table

from geo_pretrain import __version__
from geo_pretrain.errors import GeoPretrainError
from geo_pretrain.progress import progress
from geo_pretrain.redact import safe

__all__ = ["app", "console", "escape", "main", "print_table", "progress"]

app = typer.Typer(
    name="geo-pretrain",
    help="Backbones pre-trained with 3D geometry: list them, load them, make them.",
    no_args_is_help=True,
    add_completion=True,  # --install-completion, --show-completion: docs/install.md
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console()


def main() -> None:
    """Run the command line; errors of the package and of the disk become one message and exit code 1.

    A run that a signal stopped has saved its state: its exit code is 0 after SIGTERM, 130 after others. Of several
    processes the first one alone warns: all of them see the same recipe and data.
    """
    warnings.formatwarning = _format_warning
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
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
    return re.sub(r"(?m)^Without a network: load_backbone\(.*\n", "", str(error))  # Python's way out, not the command's


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
    """Print a table without lines; cells are texts, not markup. Where it is too narrow, cells are folded, not cut."""
    table = Table(*(Column(one, overflow="fold") for one in head), box=None, title=title)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
