"""Slow, obvious versions of what the readers compute, and where the samples of real files lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

SAMPLES = Path(__file__).resolve().parents[5] / "shared" / "data" / "downstream_samples"

# Straight from the protocols: ids in files in the order of the classes.
NYU40_20 = [*range(1, 13), 14, 16, 24, 28, 33, 34, 36, 39]
NYU13 = ["bed", "books", "ceiling", "chair", "floor", "furniture", "objects"]
NYU13 += ["painting", "sofa", "table", "tv", "wall", "window"]
NYU9 = ["bed", "books", "chair", "furniture", "painting", "sofa", "table", "tv", "window"]
CITYSCAPES = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def sample(name):
    """A folder of real files, or the test is skipped."""
    if not (SAMPLES / name).is_dir():
        pytest.skip(f"no samples of real files at {SAMPLES / name}")
    return SAMPLES / name


def mapped(ids, order):
    """The class of each pixel, one at a time: the place of its id in `order`, from 1, or 0."""
    out = np.zeros(ids.shape, np.uint8)
    for place, given in np.ndenumerate(ids):
        out[place] = order.index(given) + 1 if given in order else 0
    return out


def objects(label, number, order, *, min_pixels, unnumbered=False):
    """[(class, pixels)] of the objects of an image by ascending (label, number)."""
    pixels = {}
    for row in range(label.shape[0]):
        for column in range(label.shape[1]):
            pixels.setdefault((int(label[row, column]), int(number[row, column])), []).append((row, column))
    found = []
    for (given, count), where in sorted(pixels.items()):
        if given in order and len(where) >= min_pixels and (count > 0 or unnumbered):
            found.append((order.index(given) + 1, where))
    return found


def assert_objects(instances, expected, shape):
    """Classes, masks and boxes are those of `objects`."""
    assert instances.classes.tolist() == [label for label, _ in expected]
    assert instances.classes.dtype == np.int64
    assert instances.masks.shape == (len(expected), *shape)
    assert instances.masks.dtype == bool
    assert instances.boxes.shape == (len(expected), 4)
    assert instances.boxes.dtype == np.float32
    assert instances.crowd.tolist() == [False] * len(expected)
    assert instances.crowd.dtype == bool
    for mask, box, (_, where) in zip(instances.masks, instances.boxes, expected, strict=True):
        assert {(int(r), int(c)) for r, c in np.argwhere(mask)} == set(where)
        rows, columns = zip(*where, strict=True)
        assert box.tolist() == [min(columns), min(rows), max(columns) + 1, max(rows) + 1]
