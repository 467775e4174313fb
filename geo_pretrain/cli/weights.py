"""Commands for weights that travel as Python packages: weights add, check, measured, mirror, texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geo_pretrain.cli.shared import app, console, escape

weights_app = typer.Typer(help="Give trained weights away as Python packages.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")

FOLDER_HELP = "The folder of wheel projects: weights/ of a clone."


@weights_app.command("add")
def add(
    run: Annotated[Path, typer.Argument(help="The checkpoint folder of a finished training run.")],
    to: Annotated[Path, typer.Option("--to", help=FOLDER_HELP)] = Path("weights"),
    package: Annotated[str | None, typer.Option(help="The package; default: ours for images, or for clouds.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="A role to leave out: heads, teacher.")] = None,
    short: Annotated[bool, typer.Option("--short", help="Take a run of few steps, to try things out.")] = False,
) -> None:
    """Put a run into a wheel project, in float16, and list it in the catalog.

    Example: `geo-pretrain weights add runs/pri3d_view_r18.rooms`
    """
    from geo_pretrain.distribution.add import add_run
    from geo_pretrain.distribution.shipped_file import refresh_pages

    added = add_run(run, to, package=package, without=without or (), short=short)
    lines = [f"{added.checkpoint.name}: {added.size / 1e6:.1f} MB in {added.checkpoint.folder}"]
    lines += [f"Its recipe differs from the one of its name in {one}" for one in added.differences]
    if added.catalog is not None:
        refresh_pages(added.catalog)
    lines.append(
        f"Listed in {added.catalog}, cards and tables are rendered. Now: make weights, and commit."
        if added.catalog is not None
        else "This geo_pretrain runs from no clone, so no catalog lists it."
    )
    for line in lines:
        console.print(escape(line), soft_wrap=True, highlight=False)


@weights_app.command("check")
def check(
    folder: Annotated[Path, typer.Argument(help=FOLDER_HELP)] = Path("weights"),
    golden: Annotated[bool, typer.Option("--golden/--no-golden", help="Recompute golden outputs, too.")] = True,
) -> None:
    """Check every checkpoint of a folder of wheel projects: digests, sizes, license, texts, catalog, golden outputs.

    Example: `geo-pretrain weights check`
    """
    from geo_pretrain.distribution.check import check_weights

    lines = 0
    for line in check_weights(folder, golden=golden):
        console.print(escape(line), soft_wrap=True, highlight=False)
        lines += 1
    console.print(f"{lines} checkpoints are as they should be." if lines else f"{folder} holds no checkpoint yet.")


@weights_app.command("measured")
def measured(
    name: Annotated[str, typer.Argument(help="A name that a package of weights/ holds.")],
    file: Annotated[Path, typer.Argument(help="A stored result, JSON, such as benchmarks/results/x.json.")],
    place: Annotated[str, typer.Argument(help="Where the number stands in it, such as /networks/NAME/recall.")],
    task: Annotated[str, typer.Option(help="Such as 'dense matching'.")],
    dataset: Annotated[str, typer.Option(help="Such as '7-Scenes, kitchen'.")],
    metric: Annotated[str, typer.Option(help="Such as 'recall at 4 px (%)'.")],
    scale: Annotated[float, typer.Option(help="100 makes a share a percentage.")] = 1.0,
    note: Annotated[str, typer.Option(help="What stands beside it, such as the number of random weights.")] = "",
    to: Annotated[Path, typer.Option("--to", help=FOLDER_HELP)] = Path("weights"),
) -> None:
    """Put a number that was measured and stored on the card of shipped weights, apart from those of papers.

    Example: `geo-pretrain weights measured NAME benchmarks/results/x.json /networks/NAME/recall
    --task "dense matching" --dataset "7-Scenes, kitchen" --metric "recall at 4 px (%)" --scale 100`
    """
    from geo_pretrain.distribution.measured import add_result
    from geo_pretrain.distribution.shipped_file import catalog_file, refresh_pages

    facts = {"task": task, "dataset": dataset, "metric": metric, "scale": scale, "note": note}
    results = add_result(name, file, place, **facts, weights=to)  # type: ignore[arg-type]
    if (catalog := catalog_file(to)) is not None:
        refresh_pages(catalog)
    for result in results:
        line = f"{result.task}, {result.dataset}: {result.value:g} {result.metric} ({result.table})"
        console.print(escape(line), soft_wrap=True, highlight=False)


@weights_app.command("mirror")
def mirror(
    name: Annotated[str, typer.Argument(help="A name that a package of weights/ holds.")],
    place: Annotated[str, typer.Argument(help="hf-hub:OWNER/REPO@COMMIT, or a URL above NAME/.")],
    to: Annotated[Path, typer.Option("--to", help=FOLDER_HELP)] = Path("weights"),
) -> None:
    """List another door of shipped weights, after all its files were fetched from there and compared.

    Example: `geo-pretrain weights mirror pri3d_view_r18.rooms https://example.org/releases/download`
    """
    from geo_pretrain.distribution.mirrors import add_mirror
    from geo_pretrain.distribution.shipped_file import catalog_file, refresh_pages

    doors = add_mirror(name, place, to)
    if (catalog := catalog_file(to)) is not None:
        refresh_pages(catalog)
    for number, door in enumerate(doors, 1):
        console.print(escape(f"{name}: door {number} after its package is {door}"), soft_wrap=True, highlight=False)


@weights_app.command("texts")
def texts(folder: Annotated[Path, typer.Argument(help=FOLDER_HELP)] = Path("weights")) -> None:
    """Write the projects' READMEs, digests and settings anew from their checkpoints.

    Example: `geo-pretrain weights texts`
    """
    from geo_pretrain.distribution import project

    for each in project.projects(folder):
        project.write_project(each)
    project.write_overview(folder)
    console.print(f"Wrote the texts of {len(project.projects(folder))} packages in {folder}.", markup=False)
