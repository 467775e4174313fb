"""Helpers of the tests of labelled folders: random pictures, copies with something changed."""

from __future__ import annotations

import shutil

from tests.labelled_layouts import (
    random_image,
    random_objects,
)
from tests.training.data.labelled.twins import (
    NYU9,
    NYU13,
)

H, W = 45, 60
NYU9_IDS = [NYU13.index(label) + 1 for label in NYU9]
INDOOR = [0, 1, 2, 3, 5, 7, 13, 14, 16, 39, 40]


def picture(rng, labels, size=(H, W)):
    return random_image(rng, *size), *random_objects(rng, *size, labels)


def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def remove(*names):
    def change(base):
        for name in names:
            shutil.rmtree(base / name) if (base / name).is_dir() else (base / name).unlink()

    return change


S25K = "scannet_frames_25k"
