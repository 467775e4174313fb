"""The commands `recipes list`, `recipes show` and `recipes copy`, for pre-training and fine-tuning recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from geo_pretrain.cli.completion import any_recipe_names
from geo_pretrain.cli.shared import app
from geo_pretrain.errors import RecipeError

recipes_app = typer.Typer(help="List, show and copy recipes.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")

NAME_HELP = "A recipe's name (`geo-pretrain recipes` lists them), or the path of its .yaml file."
COLUMNS = ("name", "command", "task", "network", "data")


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List recipes, show one, or copy one to change it. Without a command: list.

    Example: `geo-pretrain recipes`
    """
    if context.invoked_subcommand is None:
        recipes_list(as_json=False)


@recipes_app.command("list")
def recipes_list(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List recipes, one per line: name, the command that runs it, task, network and data.

    Example: `geo-pretrain recipes list | grep rooms`
    """
    from geo_pretrain.listing import columns

    rows = [*_pretraining_rows(), *_finetuning_rows()]
    if as_json:
        typer.echo(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows], indent=2))
        return
    typer.echo(columns([COLUMNS, *rows]))


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help=NAME_HELP, autocompletion=any_recipe_names)]) -> None:
    """Print a recipe's YAML file, comments included.

    Example: `geo-pretrain recipes show pri3d_view_r18`
    """
    from geo_pretrain.training.recipe import recipe_path

    typer.echo(recipe_path(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help=NAME_HELP, autocompletion=any_recipe_names)],
    file: Annotated[Path, typer.Argument(help="The .yaml file to write; it must not exist.")],
) -> None:
    """Copy a recipe to a file that you can edit and run by its path.

    Example: `geo-pretrain recipes copy pri3d_view_r18 mine.yaml`, then `geo-pretrain train mine.yaml --out runs/mine`
    """
    from geo_pretrain.training.recipe import recipe_path

    source = recipe_path(name)
    text = source.read_text(encoding="utf-8")
    if file.suffix not in (".yaml", ".yml"):
        example = file / source.name if file.is_dir() else f"{file.stem}.yaml"
        raise RecipeError(f"FILE is {str(file)!r}, accepted is a name that ends in .yaml, such as {example}.")
    if not file.parent.is_dir():
        raise RecipeError(f"FILE is {str(file)!r}, but the folder {str(file.parent)!r} does not exist; make it first.")
    try:
        with file.open("x", encoding="utf-8") as written:
            written.write(text)
    except FileExistsError:
        raise RecipeError(f"{str(file)!r} exists already and is left as it is; choose another FILE.") from None
    typer.echo(f"Wrote {file}. Change its `name` too, so that results of both recipes are told apart.")


def _pretraining_rows() -> list[tuple[str, ...]]:
    from geo_pretrain.training.recipe import list_recipes, load_recipe

    rows: list[tuple[str, ...]] = []
    for name in list_recipes():
        recipe = load_recipe(name)
        networks = [
            *([] if recipe.model is None else [recipe.model.encoder]),
            *([] if recipe.unet3d is None else [f"sr_unet{recipe.unet3d.variant}"]),
        ]
        rows.append((name, "train", str(recipe.task["name"]), " + ".join(networks), recipe.data.source))
    return rows


def _finetuning_rows() -> list[tuple[str, ...]]:
    from geo_pretrain.training.finetune_recipe import POINT_KINDS, list_finetune_recipes, load_finetune_recipe

    rows: list[tuple[str, ...]] = []
    for name in list_finetune_recipes():
        recipe = load_finetune_recipe(name)
        encoder = "" if recipe.network.kind in POINT_KINDS else f" on {recipe.network.encoder}"
        network = f"{recipe.network.kind}{encoder}"
        rows.append((name, "finetune", recipe.task, network, recipe.data.source))
    return rows
