"""The command `eval awareness`: what backbones know of 3D."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geo_pretrain.cli.evaluate import eval_app
from geo_pretrain.cli.options import (
    DATA_HELP,
    FRAMES_HELP,
    OUT,
    SET_HELP,
    data_spec,
    device_option,
    folder_option,
    print_skips,
    size_of,
)
from geo_pretrain.cli.shared import console, escape, print_table, progress

if TYPE_CHECKING:
    from geo_pretrain.training.evaluation.awareness.run import Awareness
    from geo_pretrain.training.recipe import DataSpec

NAMES_HELP = (
    "Catalog names, checkpoint folders, encoders with ImageNet weights (timm/NAME, resnet50), or ENCODER=START with a "
    "start such as scratch, imagenet, file:PATH, package:MODULE."
)
ALL = "matching,depth,normals,semantic"
ROOMS = {"scenes": 10, "frames": 12}  # that are rendered where none are described


@eval_app.command("awareness")
def eval_awareness(
    names: Annotated[list[str], typer.Argument(help=NAMES_HELP)],
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "rooms",
    frames: Annotated[str | None, typer.Option(help=FRAMES_HELP)] = None,
    encoder: Annotated[str, typer.Option(help="The encoder of a file:PATH or package:MODULE given alone.")] = "",
    measures: Annotated[str, typer.Option(help="Some of the four, separated by commas.")] = ALL,
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of the frames.")] = "240x320",
    views: Annotated[int, typer.Option(min=4, help="Frames to read, spread over the scenes.")] = 120,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of each bin of angles (3D: of overlaps), a seed.")] = 25,
    threshold: Annotated[float | None, typer.Option(min=0, help="Of a right match; default: 4 px, 2 voxels.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds: held-out frames, pairs, random weights.")] = 3,
    random: Annotated[bool, typer.Option(help="Measure each architecture with random weights, too.")] = True,
    device: Annotated[str, device_option("cpu or cuda; for the networks.")] = "cpu",
    features: Annotated[Path | None, folder_option("Folder that keeps feature maps for the next call.")] = None,
    out: Annotated[Path | None, folder_option("Folder for tables and curves.", *OUT)] = None,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what frozen backbones know of 3D: matching by viewpoint, probes of depth, normals and classes, by layer.

    On any posed RGB-D: labels of depth and normals come from the depth itself, classes where the source has them.
    Networks with random weights are measured beside them, and what position and color alone tell. Scenes are held out;
    of a source with one scene, blocks in time.

    Example: `geo-pretrain eval awareness runs/view timm/convnext_tiny --data seven_scenes:PATH --out awareness`

    Own weights: `geo-pretrain eval awareness resnet50=file:my.pth timm/efficientnet_lite0=package:MODULE`
    """
    from geo_pretrain.training.config import parse
    from geo_pretrain.training.data.frame import SkippedFrames
    from geo_pretrain.training.data.sources.registry import open_on_disk, open_source
    from geo_pretrain.training.evaluation.awareness.networks import find_subject, with_random
    from geo_pretrain.training.evaluation.awareness.run import measure_awareness
    from geo_pretrain.training.evaluation.awareness.spec import AwarenessSpec

    wanted = [part.strip() for part in measures.split(",")]
    settings: dict[str, Any] = {"frames": views, "pairs": pairs, "seeds": seeds, "measures": wanted}
    settings |= {} if threshold is None else {"threshold": threshold}
    spec = parse(AwarenessSpec, settings | {"size": list(size_of(size) or ())}, where="awareness")
    source_spec = _rooms(replace(data_spec(data, frames, set_), size=spec.size))
    on_disk = open_on_disk(source_spec, split="val")
    subjects = [find_subject(name, encoder) for name in dict.fromkeys(names)]
    skips = SkippedFrames()
    with progress(not as_json) as report:
        rendering = report.stage("rendering rooms")
        source = open_source(source_spec, split="val", progress=rendering) if on_disk is None else on_disk
        results = measure_awareness(
            with_random(subjects) if random else subjects,
            source,
            spec,
            features=features,
            device=device,
            skips=skips,
            report=report,
        )
    _show(results, out, as_json)
    if not as_json:
        print_skips(skips)


def _show(results: Awareness, out: Path | None, as_json: bool) -> None:
    """Write tables and curves into a folder, print the best layers or all as JSON."""
    from geo_pretrain.training.evaluation.awareness.report import best_tables, setting, verdicts, write_report

    command = shlex.join(["geo-pretrain", *sys.argv[1:]])
    if out is not None:
        from geo_pretrain.training.visualize.awareness import draw_awareness

        write_report(results, out, command)
        draw_awareness(results, out / "awareness.png")
    if as_json:
        typer.echo(json.dumps({"command": command} | results.to_dict()))
        return
    console.print(escape(setting(results)), highlight=False, soft_wrap=True)
    for title, head, rows in best_tables(results):
        print_table(head, rows, title=title)
    for line in verdicts(results):
        console.print(escape(line), highlight=False, soft_wrap=True)
    if out is not None:
        console.print(f"All layers and curves: {escape(str(out))}", highlight=False, soft_wrap=True)


def _rooms(spec: DataSpec) -> DataSpec:
    """Rooms of the frames' size where none are described."""
    if spec.source != "rooms" or spec.options:
        return spec
    height, width = spec.size
    return replace(spec, options={**ROOMS, "height": height, "width": width})
