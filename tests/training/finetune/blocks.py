"""Clouds of colored blocks on a floor, in memory: what tests of detection in clouds learn from."""

from __future__ import annotations

import numpy as np

from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D, LabelledCloud

SIZES = {"cube": (0.5, 0.5, 0.5), "bar": (1.2, 0.4, 0.3)}
COLORS = np.array([[90, 90, 90], [220, 30, 30], [30, 30, 220]], np.uint8)
PLACES = np.array([[-1.0, -1, 0], [1, -1, 0], [-1, 1, 0], [1, 1, 0]])


def block_surface(rng, size, count):
    """Points on the surface of a block at the origin: [count, 3]."""
    points = rng.uniform(-0.5, 0.5, (count, 3))
    axis = rng.integers(0, 3, count)
    points[np.arange(count), axis] = rng.choice([-0.5, 0.5], count)
    return 0.99 * points * size  # not on the very surface, where rounding decides


def blocks(number, *, count=3, points=150):
    """A floor with `count` blocks of two classes, turned at random; instances are their numbers."""
    rng = np.random.default_rng(number)
    floor = np.concatenate([rng.uniform(-2, 2, (400, 2)), np.zeros((400, 1))], axis=1)
    clouds, labels, instances = [floor], [np.zeros(400, np.int64)], [np.zeros(400, np.int64)]
    rows = []
    for place in range(count):
        kind = int(rng.integers(1, 3))
        size = np.array(list(SIZES.values())[kind - 1]) * rng.uniform(0.9, 1.1, 3)
        heading = rng.uniform(-np.pi / 2, np.pi / 2)
        center = PLACES[place] + [*rng.uniform(-0.3, 0.3, 2), size[2] / 2]
        turn = np.array([[np.cos(heading), -np.sin(heading), 0], [np.sin(heading), np.cos(heading), 0], [0, 0, 1]])
        clouds.append(block_surface(rng, size, points) @ turn.T + center)
        labels.append(np.full(points, kind))
        instances.append(np.full(points, place + 1))
        rows.append([*center, *size, heading, kind])
    table = np.array(rows).reshape(-1, 8)
    boxes = Boxes3D(
        *(table[:, part].astype(np.float32) for part in (slice(3), slice(3, 6), 6)), table[:, 7].astype(int)
    )
    kinds = np.concatenate(labels)
    return LabelledCloud(
        f"blocks/{number}",
        np.concatenate(clouds).astype(np.float32),
        COLORS[kinds],
        kinds,
        np.concatenate(instances),
        boxes,
    )


class Blocks:
    """A source of such clouds."""

    name, classes = "blocks", tuple(SIZES)

    def __init__(self, split, clouds, **options):
        self.split, self.clouds, self.options = split, clouds, options

    def ids(self):
        return [f"{self.split}/{k}" for k in range(self.clouds)]

    def scene_of(self, id):
        return id

    def load(self, id):
        return blocks(int(id.split("/")[1]) + (1000 if self.split == "val" else 0), **self.options)

    def fingerprint(self):
        return f"{self.split} {self.clouds} {self.options}"
