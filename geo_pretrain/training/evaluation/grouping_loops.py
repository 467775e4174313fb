"""The loops of grouping points into clusters, for numba (extra `fast`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from geo_pretrain.errors import require


def grow(
    points: np.ndarray,
    classes: np.ndarray,
    order: np.ndarray,
    starts: np.ndarray,
    cells: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    radius: float,
    limit: int,
) -> np.ndarray:
    """Number each point's cluster: see `grouping.clusters`; `order` to `last` are the fields of its `_Cells`."""
    count = len(points)
    cluster = np.full(count, -1, np.int64)
    queue, near = np.empty((2, count), np.int64)
    here, end = np.empty((2, 27), np.int64)  # in each cell around a point: what is next in `order`, and the end
    clusters = 0
    for seed in range(count):
        if cluster[seed] >= 0:
            continue
        cluster[seed], queue[0] = clusters, seed
        waiting, done = 1, 0
        while done < waiting:
            point = queue[done]
            done += 1
            x, y, z = points[point, 0], points[point, 1], points[point, 2]
            around, candidates = 0, 0
            for column in range(9):
                for cell in range(first[cells[point], column], last[cells[point], column]):
                    here[around], end[around] = starts[cell], starts[cell + 1]
                    candidates += starts[cell + 1] - starts[cell]
                    around += 1
            # Only the first `limit` neighbors by index count: points are looked at up to an index that doubles.
            bound = count if candidates <= limit else 4 * limit
            found = 0
            while True:
                for one in range(around):
                    position = here[one]
                    while position < end[one] and order[position] < bound:
                        other = order[position]
                        dx, dy, dz = points[other, 0] - x, points[other, 1] - y, points[other, 2] - z
                        if dx * dx + dy * dy + dz * dz < radius * radius:
                            near[found] = other
                            found += 1
                        position += 1
                    here[one] = position
                if found >= limit or bound >= count:
                    break
                bound *= 2
            if found > limit:
                put_first(near, found, limit)
                found = limit
            for one in range(found):
                other = near[one]
                if cluster[other] < 0 and classes[other] == classes[seed]:
                    cluster[other] = clusters
                    queue[waiting] = other
                    waiting += 1
        clusters += 1
    return cluster


def put_first(values: np.ndarray, count: int, lowest: int) -> None:
    """Reorder the first `count` values so that the `lowest` lowest ones come first."""
    low, high = 0, count - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if lowest - 1 <= j:
            high = j
        elif lowest - 1 >= i:
            low = i
        else:
            break


def grow_all(
    points: np.ndarray,
    classes: np.ndarray,
    order: np.ndarray,
    starts: np.ndarray,
    cells: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    radius: float,
) -> np.ndarray:
    """`grow` without a limit, for points whose cells hold one class each; taken points leave their cells."""
    count = len(points)
    cluster = np.full(count, -1, np.int64)
    queue = np.empty(count, np.int64)
    left = order.copy()
    ends = starts[1:].copy()
    clusters = 0
    for seed in range(count):
        if cluster[seed] >= 0:
            continue
        cluster[seed] = clusters
        queue[0] = seed
        waiting, done = 1, 0
        while done < waiting:
            point = queue[done]
            done += 1
            x, y, z = points[point, 0], points[point, 1], points[point, 2]
            for column in range(9):
                for cell in range(first[cells[point], column], last[cells[point], column]):
                    position = starts[cell]
                    while position < ends[cell]:
                        other = left[position]
                        dx, dy, dz = points[other, 0] - x, points[other, 1] - y, points[other, 2] - z
                        if cluster[other] < 0 and dx * dx + dy * dy + dz * dz >= radius * radius:
                            position += 1
                            continue
                        if cluster[other] < 0:
                            cluster[other] = clusters
                            queue[waiting] = other
                            waiting += 1
                        ends[cell] -= 1
                        left[position] = left[ends[cell]]
        clusters += 1
    return cluster


@cache
def compiled() -> dict[str, Callable[..., Any]]:
    """Compile the loops; the code is cached on disk where there is a folder for it."""
    numba = require("numba", "fast")
    require("numba.extending", "fast").register_jitable(put_first)  # called by `grow`
    loops = grow, grow_all
    try:
        return {loop.__name__: numba.njit(cache=True)(loop) for loop in loops}
    except RuntimeError:
        return {loop.__name__: numba.njit(loop) for loop in loops}
