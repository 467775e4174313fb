"""Weights as Python packages: wheel projects that hold finished checkpoints in float16, and their catalog lines.

`geo-pretrain weights add RUN` writes them into the folder weights/ of a clone; `hub.packages` finds them installed.
"""
