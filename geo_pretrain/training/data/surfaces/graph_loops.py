"""The loops of over-segmentation, for numba (extra `fast`); `merge` also runs as it is on lists."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from geo_pretrain.errors import require

ONE = np.float32(1)


def merge(
    a: Any, b: Any, weights: Any, least: int, shares: Any, parent: Any, rank: Any, size: Any, threshold: Any
) -> None:
    """Merge components along edges a -> b, in place: by weight if `least` is 0, else those with fewer vertices."""
    for edge in range(len(a)):
        x = a[edge]
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        y = b[edge]
        while parent[y] != y:
            parent[y] = parent[parent[y]]
            y = parent[y]
        if x == y:
            continue
        weight = weights[edge]
        fits = least == 0 and weight <= threshold[x] and weight <= threshold[y]
        if fits or size[x] < least or size[y] < least:
            if rank[x] > rank[y]:
                x, y = y, x
            parent[x] = y
            size[y] += size[x]
            if rank[x] == rank[y]:
                rank[y] += 1
            threshold[y] = weight + shares[size[y]]


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Compute `oversegmentation.vertex_normals` face by face."""
    normals = np.zeros((len(vertices), 3), np.float32)
    seen = np.zeros(len(vertices), np.int64)
    for face in range(len(faces)):
        i, j, k = faces[face, 0], faces[face, 1], faces[face, 2]
        x, y, z = vertices[j, 0] - vertices[i, 0], vertices[j, 1] - vertices[i, 1], vertices[j, 2] - vertices[i, 2]
        u, v, w = vertices[k, 0] - vertices[i, 0], vertices[k, 1] - vertices[i, 1], vertices[k, 2] - vertices[i, 2]
        x, y, z = y * w - z * v, z * u - x * w, x * v - y * u
        length = math.sqrt(x * x + y * y + z * z)
        if length > 0:
            x, y, z = x / length, y / length, z / length
            for corner in (i, j, k):
                share = ONE / np.float32(seen[corner] + 1)
                normals[corner, 0] = share * x + (ONE - share) * normals[corner, 0]
                normals[corner, 1] = share * y + (ONE - share) * normals[corner, 1]
                normals[corner, 2] = share * z + (ONE - share) * normals[corner, 2]
                seen[corner] += 1
    return normals


def edge_weights(vertices: np.ndarray, normals: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute `oversegmentation.edge_weights` edge by edge."""
    weights = np.empty(len(a), np.float32)
    for edge in range(len(a)):
        i, j = a[edge], b[edge]
        x, y, z = vertices[j, 0] - vertices[i, 0], vertices[j, 1] - vertices[i, 1], vertices[j, 2] - vertices[i, 2]
        length = math.sqrt(x * x + y * y + z * z)
        if length > 0:
            x, y, z = x / length, y / length, z / length
        u, v, w = normals[j, 0], normals[j, 1], normals[j, 2]
        weight = ONE - (normals[i, 0] * u + normals[i, 1] * v + normals[i, 2] * w)
        weights[edge] = weight * weight if u * x + v * y + w * z > 0 else weight
    return weights


@cache
def compiled() -> dict[str, Callable[..., Any]]:
    """Compile the loops; the code is cached on disk where there is a folder for it."""
    numba = require("numba", "fast")
    loops = merge, vertex_normals, edge_weights
    try:
        return {loop.__name__: numba.njit(cache=True)(loop) for loop in loops}
    except RuntimeError:
        return {loop.__name__: numba.njit(loop) for loop in loops}
