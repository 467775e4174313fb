"""A labelled ScanNet folder, shared by the tests of folders."""

from __future__ import annotations

import numpy as np
import pytest

from tests.labelled_layouts import (
    write_scannet_frame,
)
from tests.training.data.labelled.layouts import INDOOR, picture


@pytest.fixture(scope="module")
def scannet(tmp_path_factory):
    """(folder, {id: (image, label, number)}); read-only. One frame of the second scene shows nothing but a wall."""
    base = tmp_path_factory.mktemp("scannet")
    root, rng, truth = base / "scannet_frames_25k", np.random.default_rng(1), {}
    scenes = {"train": ["scene0001_00", "scene0000_01"], "val": ["scene0007_00"]}
    for split, names in scenes.items():
        (base / f"scannetv2_{split}.txt").write_text("\n".join(names) + "\n")
        for scene in names:
            for frame in (0, 100, 1000):
                image, label, number = picture(rng, INDOOR)
                if (scene, frame) == ("scene0000_01", 100):
                    label[:], number[:] = 1, 1
                write_scannet_frame(root, scene, frame, image, label, number, label_bits=16 if frame else 8)
                truth[f"{scene}/{frame:06d}"] = image, label, number
    return base, truth
