"""Commands that measure a backbone by what it is for: finetune, and the probes under eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from geo_pretrain.cli.making import SET_HELP, eval_app
from geo_pretrain.cli.shared import app, console, escape, progress
from geo_pretrain.errors import RecipeError

if TYPE_CHECKING:
    from geo_pretrain.training.finetune_recipe import FinetuneRecipe

LABELLED_HELP = "SOURCE or SOURCE:PATH of labelled images, such as rooms, scannet:PATH, nyuv2:PATH, coco:PATH."
BACKBONE_HELP = "A catalog name, a checkpoint folder, imagenet or scratch; with --sweep several."


@app.command()
def finetune(
    recipe: Annotated[str, typer.Argument(help="A downstream recipe's name or the path of a .yaml file.")],
    backbone: Annotated[list[str], typer.Option("--backbone", "-b", help=BACKBONE_HELP)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    data: Annotated[str | None, typer.Option(help=LABELLED_HELP)] = None,
    fraction: Annotated[list[float], typer.Option(help="Share of the training images, whole scenes.")] = [1.0],  # noqa: B006
    seed: Annotated[list[int], typer.Option(help="Of order, augmentation and new weights.")] = [0],  # noqa: B006
    sweep: Annotated[bool, typer.Option("--sweep", help="All given backbones, fractions and seeds: a table.")] = False,
    toy: Annotated[bool, typer.Option("--toy", help="The same protocol on small rooms: CPU, minutes.")] = False,
    authors_exact: Annotated[
        bool, typer.Option("--authors-exact", help="With what the released protocol does by accident.")
    ] = False,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    device: Annotated[str | None, typer.Option(help="cpu, cuda; default: CUDA where there is one.")] = None,
    hub: Annotated[str | None, typer.Option(help="Where to look for backbones first.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Fine-tune a backbone by the protocol of a paper's table and measure it. Interrupted? Give the same command again.

    Example: `geo-pretrain finetune scannet_unet_r50 -b pri3d_view_geo_r50 --data scannet:PATH --out runs/unet`

    A data-efficiency curve: `geo-pretrain finetune rooms_unet_r18 --sweep -b scratch -b runs/view --fraction 0.2
    --fraction 1 --seed 0 --seed 1 --out runs/curve`
    """
    from geo_pretrain.training.finetune_recipe import load_finetune_recipe

    overrides = [*_labelled_overrides(data), *(["authors_exact=true"] if authors_exact else []), *set_]
    spec = load_finetune_recipe(recipe, overrides, toy=toy)
    if sweep:
        _sweep(spec, backbone, fraction, seed, out, hub, device, as_json)
        return
    for option, given in (("--backbone", backbone), ("--fraction", fraction), ("--seed", seed)):
        if len(given) > 1:
            raise typer.BadParameter(f"{option} is given {len(given)} times; once is accepted, or add --sweep.")
    _finetune(spec, backbone[0], fraction[0], seed[0], out, hub, device, overwrite, as_json)


def _finetune(
    spec: FinetuneRecipe,
    backbone: str,
    fraction: float,
    seed: int,
    out: Path,
    hub: str | None,
    device: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    from geo_pretrain.training.finetune.run import finetune as run
    from geo_pretrain.training.finetune.run import result_rows
    from geo_pretrain.training.finetune.sweep import run_recipe

    with progress(not as_json) as report:
        result = run(
            run_recipe(spec, fraction, seed),
            backbone,
            out,
            init_kwargs={"hub": hub} if hub else None,
            device=device,
            overwrite=overwrite,
            on_step=lambda step: report("fine-tuning", step.step, step.steps, str(step)),
            on_data=lambda done, total: report("rendering rooms", done, total, ""),
        )
    if as_json:
        typer.echo(json.dumps(result.data, default=str))
        return
    rows = result_rows([result])
    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row.values()))
    console.print(table)
    for quirk, what in result.data.get("quirks", {}).items():
        console.print(f"{escape(quirk)}: {escape(what)}", highlight=False, soft_wrap=True)
    console.print(f"Results: {result.folder}", soft_wrap=True, highlight=False)


def _sweep(
    spec: FinetuneRecipe,
    backbones: list[str],
    fractions: list[float],
    seeds: list[int],
    out: Path,
    hub: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    from geo_pretrain.training.finetune.report import table_rows, write_report
    from geo_pretrain.training.finetune.sweep import run_sweep

    with progress(not as_json) as report:
        result = run_sweep(
            spec,
            backbones,
            fractions,
            seeds,
            out,
            init_kwargs={"hub": hub} if hub else None,
            device=device,
            on_run=lambda number, total, run: report("runs", number, total, f"{run}"),
            on_step=lambda step: report("fine-tuning", step.step, step.steps, str(step)),
            on_data=lambda done, total: report("rendering rooms", done, total, ""),
        )
    paths = write_report(result, out)
    if as_json:
        typer.echo(paths["summary.json"].read_text())
        return
    head, *rows = table_rows(result)
    table = Table(*head, box=None)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    for path in paths.values():
        console.print(f"Wrote {path}", soft_wrap=True, highlight=False)


@eval_app.command("probe")
def eval_probe(
    backbone: Annotated[str, typer.Argument(help="A catalog name or a checkpoint folder.")],
    data: Annotated[str, typer.Option(help=LABELLED_HELP)] = "rooms",
    probes: Annotated[str, typer.Option(help="linear, knn or both, separated by a comma.")] = "linear,knn",
    fraction: Annotated[float, typer.Option(help="Share of the training images, whole scenes.")] = 1.0,
    pixels: Annotated[int, typer.Option(help="Labelled pixels (3D: voxels) of the training images.")] = 20_000,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH; default: pre-training's; 3D: the images' own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of pixels and random weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Quick comparison without fine-tuning: a linear probe and k nearest neighbors on frozen features.

    The same architecture with random weights is measured beside it. 2D backbones are judged by the pixels of labelled
    images, 3D ones by the voxels of labelled RGB-D frames, which rooms has.

    Example: `geo-pretrain eval probe pri3d_view_geo_r50 --data scannet:PATH --fraction 0.1`

    In 3D: `geo-pretrain eval probe runs/pointcontrast`
    """
    from geo_pretrain.checkpoint import read_checkpoint
    from geo_pretrain.cli.making import size_of
    from geo_pretrain.contract import VoxelContract
    from geo_pretrain.hub import resolve
    from geo_pretrain.training.data.labelled.registry import open_labelled, subset
    from geo_pretrain.training.evaluation.probes import ProbeSpec, compare_probes

    # A name that does not exist is better known before rooms are rendered.
    in_3d = isinstance(read_checkpoint(resolve(backbone)).contract, VoxelContract)
    name, _, path = data.partition(":")
    folder = Path(path) if path else None
    with progress(not as_json) as report:
        train, val = (
            open_labelled(
                name,
                folder,
                split,
                task="segmentation",
                progress=lambda done, total: report("rendering rooms", done, total, ""),
            )
            for split in ("train", "val")
        )
        results = compare_probes(
            backbone,
            subset(train, fraction, seed) if fraction < 1 else train,
            val,
            ProbeSpec(size=size_of(size), pixels=pixels, seed=seed),
            probes=[part.strip() for part in probes.split(",")],
            progress=lambda done, total: report("probing", done, total, ""),
        )
    if as_json:
        typer.echo(json.dumps({w: {p: r.to_dict() for p, r in found.items()} for w, found in results.items()}))
        return
    table = Table("weights", "probe", "mIoU", f"{'voxel' if in_3d else 'pixel'} accuracy", box=None)
    for weights, found in results.items():
        for probe, result in found.items():
            table.add_row(escape(weights), probe, f"{result.miou:.1%}", f"{result.accuracy:.1%}")
    console.print(table)


def _labelled_overrides(data: str | None) -> list[str]:
    """`--data` as overrides of a recipe."""
    if data is None:
        return []
    source, _, path = data.partition(":")
    if not source:
        raise RecipeError(f"--data is {data!r}; accepted: {LABELLED_HELP}")
    overrides: list[Any] = [f"data.source={source}", f"data.path={json.dumps(path) if path else 'null'}"]
    return [str(override) for override in overrides]
