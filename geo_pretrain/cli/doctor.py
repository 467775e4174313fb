"""The command that looks at the installation: doctor."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import Annotated

import typer

from geo_pretrain.cli.shared import app, console, escape

COLORS = {"ok": "green", "note": "yellow", "wrong": "bold red"}
WIDTH = 110  # of topics and texts; the state stands before them


@app.command()
def doctor(
    network: Annotated[bool, typer.Option("--network/--no-network", help="Ask the hosts of weights.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, engines, threads, cache and hosts, and test the installation; exit with 1 if something is wrong.

    Example: `geo-pretrain doctor`
    """
    from geo_pretrain.doctor import examine

    findings = []
    for finding in examine(network=network):
        findings.append(finding)
        if not as_json:
            color = COLORS[finding.state]
            text = textwrap.fill(
                f"{finding.topic:18}{finding.text}",
                WIDTH,
                subsequent_indent=" " * 25,
                break_long_words=False,  # of paths and addresses, which are copied
                break_on_hyphens=False,
            )
            console.print(f"[{color}]{finding.state:5}[/]  {escape(text)}", soft_wrap=True, highlight=False)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)
