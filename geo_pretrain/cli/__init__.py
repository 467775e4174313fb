"""The command line `geo-pretrain`; each command parses its options, calls the package once and prints the result."""

<<<<<<< HEAD
from geo_pretrain.cli import awareness, backbone, bench, data, doctor, evaluate, launch, picture, predict, recipe, train
=======
from geo_pretrain.cli import backbone, bench, data, evaluate, gallery, picture, predict, recipe, train
>>>>>>> 3a181fb (Gallery: all checkpoints on one page, to search, filter and compare, with lines to copy and pictures of a folder)
from geo_pretrain.cli.shared import app, console, main

__all__ = [
    "app",
<<<<<<< HEAD
    "awareness",
=======
>>>>>>> 3a181fb (Gallery: all checkpoints on one page, to search, filter and compare, with lines to copy and pictures of a folder)
    "backbone",
    "bench",
    "console",
    "data",
<<<<<<< HEAD
    "doctor",
    "evaluate",
    "launch",
=======
    "evaluate",
    "gallery",
>>>>>>> 3a181fb (Gallery: all checkpoints on one page, to search, filter and compare, with lines to copy and pictures of a folder)
    "main",
    "picture",
    "predict",
    "recipe",
    "train",
]
