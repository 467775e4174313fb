"""The command `predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from geo_pretrain.cli.options import OPTION_HELP, OUT, data_overrides, device_option, folder_option, options_of
from geo_pretrain.cli.shared import app, console, escape, progress

DATA_HELP = "SOURCE or SOURCE:PATH of a data set, such as rooms3d, clouds:PATH, scannet3d:PATH; labels are not needed."


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="The folder of a finished fine-tuning run.")],
    files: Annotated[
        list[Path] | None, typer.Argument(help="Images, clouds as PLY, npy, npz, LAS, or folders of either.")
    ] = None,
    out: Annotated[Path, folder_option("The folder to write.", *OUT)] = Path("predictions"),
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    split: Annotated[str, typer.Option(help="Of the data set: val, train, or its test split.")] = "val",
    option: Annotated[list[str], typer.Option("--option", help=OPTION_HELP)] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many items, evenly spaced.")] = None,
    draw: Annotated[int, typer.Option(min=0, help="Clouds in predictions.png; 0: no picture.")] = 4,
    benchmark: Annotated[str | None, typer.Option(help="scannet: also its server's files, in DIR/benchmark.")] = None,
    device: Annotated[str | None, device_option("cpu, cuda; default: CPU.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images, or clouds, that go through the network together.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict with a fine-tuned run, on files or on a data set: labels, boxes or instances in the input's order.

    Clouds become PLY and npy, images label PNGs with a palette and pictures; detections.json has boxes and masks in
    COCO's format, classes.txt names the labels 1, 2, ..., predictions.json lists everything.

    Example: `geo-pretrain predict runs/srunet scan1.ply scan2.npy -o predicted`

    A data set: `geo-pretrain predict runs/srunet --data clouds:PATH --split predict -o predicted`

    For ScanNet's server: `geo-pretrain predict runs/scannet --data scannet3d:PATH --split test --benchmark scannet`

    Images: `geo-pretrain predict runs/unet photo.jpg more_photos/ --batch 8 --device cuda -o predicted`
    """
    from geo_pretrain.training.finetune.predict import INDEX, predict

    source, _, path = (data or "").partition(":")
    if data is not None:
        data_overrides(data)  # its form
    with progress(not as_json) as report:
        found = predict(
            run,
            out,
            data=source or None,
            path=path or None,
            split=split,
            options=options_of(option),
            files=files or [],
            limit=limit,
            draw=draw,
            benchmark=benchmark,
            device=device,
            batch=batch,
            progress=lambda done, total, name: report("predicting", done, total, name),
        )
    if as_json:
        typer.echo(json.dumps({"items": found.items, "skipped": found.skipped}))
        return
    for one in found.skipped:
        console.print(
            f"[yellow]Skipped {escape(one['path'])}: {escape(one['reason'])}", highlight=False, soft_wrap=True
        )
    count = f"{len(found.items)} predicted, {len(found.skipped)} skipped"
    console.print(f"Wrote {out / INDEX}   ({count})", soft_wrap=True, highlight=False, markup=False)
