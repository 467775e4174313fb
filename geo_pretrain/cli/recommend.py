"""The command `recommend`: which checkpoint for a task, and why."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from geo_pretrain.cli.shared import app

TASK_HELP = "What comes out: segmentation, instances, detection, classification, parts, matching or depth."
INPUT_HELP = "What goes in: rgb, rgb-d, depth, points, colored-points or lidar."
LICENSE_HELP = "Of the weights: any, permissive, non-commercial (permissive ones, too) or an SPDX identifier."


@app.command()
def recommend(
    task: Annotated[str | None, typer.Option("--for", help=TASK_HELP)] = None,
    input: Annotated[str, typer.Option("--input", help=INPUT_HELP)] = "rgb",
    license: Annotated[str, typer.Option(help=LICENSE_HELP)] = "any",
    like: Annotated[str | None, typer.Option(help="The benchmark most like your data, such as Cityscapes.")] = None,
    network: Annotated[str, typer.Option(help="A part of the network's title, such as ResNet-18.")] = "",
    offline: Annotated[bool, typer.Option("--offline", help="Only what loads here without a network.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many, for each kind of network.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the lines for every pick.")] = False,
) -> None:
    """Recommend checkpoints for a task, say why, and print the lines to paste.

    The order follows from the papers' numbers, the networks' inputs, the licenses and how the weights can be had.
    Where nothing here fits, it says so and names what others offer.

    Example: `geo-pretrain recommend --for segmentation --input rgb --license permissive`
    """
    from geo_pretrain.advice import recommend as answer

    if task is None:
        raise typer.BadParameter(f"{TASK_HELP} Such as --for segmentation.", param_hint="--for")
    found = answer(task, input, license=license, like=like, network=network, offline=offline, limit=limit)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))
