"""`geo-pretrain ...`: parses, calls, prints. Everything it does is one call into the package."""

from geo_pretrain.cli import bench, downstream, making, visualize, zoo
from geo_pretrain.cli.shared import app, console, main

__all__ = ["app", "bench", "console", "downstream", "main", "making", "visualize", "zoo"]
