"""How long each recipe trains, in a few words for `geo-pretrain list`, which has no time to read recipes."""

from __future__ import annotations

from pathlib import Path

from geo_pretrain.catalog import backbone_info, list_backbones
from geo_pretrain.files import write_text
from geo_pretrain.training.recipe import load_recipe

LENGTHS = "geo_pretrain/catalog/lengths.py"  # of a checkout


def length_of(recipe: str) -> str:
    """The length of a recipe, such as "60k steps of 24" or "5 epochs of 64"; a step's samples are of all processes."""
    optim = load_recipe(recipe).optim
    if optim.steps is None:
        return f"{optim.epochs:g} epochs of {optim.batch}"
    count = f"{optim.steps // 1000}k" if optim.steps % 1000 == 0 else f"{optim.steps:,}"
    return f"{count} steps of {optim.batch}"


def lengths_text() -> str:
    """The text of catalog/lengths.py."""
    entries = map(backbone_info, list_backbones())
    rows = [f'    "{one.name}": "{length_of(one.recipe)}",' for one in entries if one.recipe is not None]
    doc = '"""How long the recipes of the catalog train: steps or epochs, and samples a step. From `make cards`."""'
    return "\n".join([doc, "", "LENGTHS = {", *rows, "}"]) + "\n"


def write_lengths(root: Path) -> None:
    """Write the file into a checkout."""
    write_text(root / LENGTHS, lengths_text())
