"""The command that looks at the installation: doctor."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from geo_pretrain.cli.shared import app, console, escape

COLORS = {"ok": "green", "note": "yellow", "wrong": "bold red"}


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
            line = f"[{color}]{finding.state:5}[/]  {escape(finding.topic):16}{escape(finding.text)}"
            console.print(line, soft_wrap=True, highlight=False)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)
