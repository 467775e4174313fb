"""The loops of geometry in 3D, for numba (extra `fast`); nothing is imported or compiled before the first call."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from geo_pretrain.errors import require


def farthest(points: np.ndarray, reach: np.ndarray, chosen: np.ndarray) -> None:
    """Fill `chosen` [M]; `reach` [N] holds each point's squared distance to the nearest chosen one, < 0: left out."""
    best = 0
    for place in range(1, len(chosen)):
        x, y, z = points[best, 0], points[best, 1], points[best, 2]
        best, most = 0, np.float32(-1)
        for k in range(len(points)):
            dx, dy, dz = points[k, 0] - x, points[k, 1] - y, points[k, 2] - z
            squared = dx * dx + dy * dy + dz * dz
            if squared < reach[k]:
                reach[k] = squared
            if reach[k] > most:
                best, most = k, reach[k]
        chosen[place] = best


def ball(points: np.ndarray, centers: np.ndarray, squared_radius: np.float32, found: np.ndarray) -> None:
    """Fill each row of `found` [M, S] with the first points inside the ball, the rest with the first of all."""
    for row in range(len(centers)):
        x, y, z = centers[row, 0], centers[row, 1], centers[row, 2]
        count = 0
        for k in range(len(points)):
            dx, dy, dz = points[k, 0] - x, points[k, 1] - y, points[k, 2] - z
            if dx * dx + dy * dy + dz * dz < squared_radius:
                if count == 0:
                    found[row, :] = k
                found[row, count] = k
                count += 1
                if count == found.shape[1]:
                    break


def nearest_three(targets: np.ndarray, sources: np.ndarray, squared: np.ndarray, index: np.ndarray) -> None:
    """Fill `squared` (infinite before) and `index` [N, 3] with the three sources nearest to each target, rising."""
    for row in range(len(targets)):
        x, y, z = targets[row, 0], targets[row, 1], targets[row, 2]
        for k in range(len(sources)):
            dx, dy, dz = x - sources[k, 0], y - sources[k, 1], z - sources[k, 2]
            distance = dx * dx + dy * dy + dz * dz
            place = 3
            while place > 0 and distance < squared[row, place - 1]:
                place -= 1
            for later in range(2, place, -1):
                squared[row, later], index[row, later] = squared[row, later - 1], index[row, later - 1]
            if place < 3:
                squared[row, place], index[row, place] = distance, k


def overlap_areas(a: np.ndarray, b: np.ndarray, areas: np.ndarray) -> None:
    """Fill `areas` [P] with the overlap of pairs of rectangles (x, y, length, width, heading), by clipping."""
    ring, clipped = np.empty((12, 2)), np.empty((12, 2))
    for pair in range(len(a)):
        cosine, sine = math.cos(a[pair, 4] - b[pair, 4]), math.sin(a[pair, 4] - b[pair, 4])
        own, own_sine = math.cos(b[pair, 4]), math.sin(b[pair, 4])
        dx, dy = a[pair, 0] - b[pair, 0], a[pair, 1] - b[pair, 1]
        x, y = own * dx + own_sine * dy, own * dy - own_sine * dx  # a's center in b's frame, where b is upright
        for corner in range(4):
            u = a[pair, 2] * (0.5 if corner == 0 or corner == 3 else -0.5)
            v = a[pair, 3] * (0.5 if corner < 2 else -0.5)
            ring[corner, 0], ring[corner, 1] = x + cosine * u - sine * v, y + sine * u + cosine * v
        count = 4
        for side in range(4):
            axis, sign = side % 2, 1.0 if side < 2 else -1.0
            limit, kept = b[pair, 2 + axis] / 2, 0
            for k in range(count):
                before = ring[k - 1 if k > 0 else count - 1]
                depth, last = limit - sign * ring[k, axis], limit - sign * before[axis]
                if (depth >= 0) != (last >= 0):
                    share = last / (last - depth)
                    clipped[kept, 0] = before[0] + share * (ring[k, 0] - before[0])
                    clipped[kept, 1] = before[1] + share * (ring[k, 1] - before[1])
                    kept += 1
                if depth >= 0:
                    clipped[kept, 0], clipped[kept, 1] = ring[k, 0], ring[k, 1]
                    kept += 1
            ring, clipped, count = clipped, ring, kept
        doubled = 0.0
        for k in range(count):
            before = ring[k - 1 if k > 0 else count - 1]
            doubled += before[0] * ring[k, 1] - before[1] * ring[k, 0]
        areas[pair] = abs(doubled) / 2


def suppress(overlapping: np.ndarray, kept: np.ndarray) -> None:
    """Set `kept` [K]: the first always, a later one unless one kept before overlaps it in `overlapping` [K, K]."""
    for k in range(len(kept)):
        kept[k] = True
        for earlier in range(k):
            if kept[earlier] and overlapping[earlier, k]:
                kept[k] = False
                break


@cache
def compiled() -> dict[str, Callable[..., Any]]:
    """Compile the loops; the code is cached on disk where there is a folder for it."""
    numba = require("numba", "fast")
    loops = farthest, ball, nearest_three, overlap_areas, suppress
    try:
        return {loop.__name__: numba.njit(cache=True)(loop) for loop in loops}
    except RuntimeError:
        return {loop.__name__: numba.njit(loop) for loop in loops}
