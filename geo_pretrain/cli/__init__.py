"""`geo-pretrain ...`: parses, calls, prints. Everything it does is one call into the package."""

from geo_pretrain.cli import downstream, making, zoo
from geo_pretrain.cli.shared import app, console, main

__all__ = ["app", "console", "downstream", "main", "making", "zoo"]
