"""The command line `geo-pretrain`; each command parses its options, calls the package once and prints the result."""

from geo_pretrain.cli import (
    awareness,
    backbone,
    bench,
    data,
    doctor,
    evaluate,
    export,
    gallery,
    launch,
    picture,
    predict,
    recipe,
    recommend,
    train,
    weights,
)
from geo_pretrain.cli.shared import app, console, main

__all__ = [
    "app",
    "awareness",
    "backbone",
    "bench",
    "console",
    "data",
    "doctor",
    "evaluate",
    "export",
    "gallery",
    "launch",
    "main",
    "picture",
    "predict",
    "recipe",
    "recommend",
    "train",
    "weights",
]
