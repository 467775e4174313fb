"""`geo-pretrain ...`: parses, calls, prints. Everything it does is one call into the package."""

from geo_pretrain.cli import backbone, bench, data, evaluate, picture, recipe, train
from geo_pretrain.cli.shared import app, console, main

__all__ = ["app", "backbone", "bench", "console", "data", "evaluate", "main", "picture", "recipe", "train"]
