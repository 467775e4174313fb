"""What the shell completes: names of recipes and of checkpoints, without loading torch; else file names."""

from __future__ import annotations


def recipe_names(incomplete: str) -> list[str]:
    """Pre-training recipes that begin so."""
    from geo_pretrain.training.recipe import list_recipes

    return [name for name in list_recipes() if name.startswith(incomplete)]


def downstream_recipe_names(incomplete: str) -> list[str]:
    """Fine-tuning recipes that begin so."""
    from geo_pretrain.training.finetune_recipe import list_finetune_recipes

    return [name for name in list_finetune_recipes() if name.startswith(incomplete)]


def any_recipe_names(incomplete: str) -> list[str]:
    """Recipes of either kind that begin so."""
    return recipe_names(incomplete) + downstream_recipe_names(incomplete)


def backbone_names(incomplete: str) -> list[str]:
    """Names of the catalog that begin so; none where a path is typed, which the shell completes by itself."""
    from geo_pretrain.catalog import CATALOG

    return [name for name in sorted(CATALOG) if name.startswith(incomplete)]
