"""Triangle meshes from Wavefront OBJ files, and points drawn uniformly from their surfaces.

Only vertices and faces are read; normals, textures, materials, groups and lines are passed over.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame
from geo_pretrain.files import regular
from geo_pretrain.training.data.files import points_fault


def read_obj(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read vertices float64 [V, 3] and triangles int64 [F, 3] (polygons are cut into fans from their first corner).

    Raises `BadFrame` for a file that is missing, has no face, or is malformed; the message gives the line.
    """
    try:
        lines = regular(path).read_bytes().splitlines()
    except FileNotFoundError:
        raise BadFrame(path, "mesh is missing") from None
    except OSError as error:
        raise BadFrame(path, f"mesh cannot be read ({error.strerror})") from None
    vertices: list[list[float]] = []
    triangles: list[tuple[int, int, int]] = []
    for number, line in enumerate(lines, 1):
        try:
            if line.startswith((b"v ", b"v\t")):
                x, y, z = line.split()[1:4]
                vertices.append([float(x), float(y), float(z)])
            elif line.startswith((b"f ", b"f\t")):
                # i, i/t, i//n or i/t/n; negative ones count back from the latest vertex
                corners = [int(word.partition(b"/")[0]) for word in line.split()[1:]]
                first, *others = [c - 1 if c > 0 else len(vertices) + c for c in corners]
                triangles += [(first, b, c) for b, c in pairwise(others)]
        except ValueError:
            shown = line[:40].decode("ascii", "replace")
            raise BadFrame(path, f"line {number} is no vertex or face: {shown!r}") from None
    if not triangles:
        raise BadFrame(path, f"mesh has no faces ({len(vertices)} vertices)")
    points = np.array(vertices, np.float64).reshape(-1, 3)
    try:
        corners_of = np.array(triangles, np.int64)
    except OverflowError:
        raise BadFrame(path, "a face names a vertex of a number beyond 64 bits") from None
    if corners_of.min() < 0 or corners_of.max() >= len(points):
        raise BadFrame(path, f"a face names vertex {int(corners_of.max()) + 1} of {len(points)}")
    if (fault := points_fault(points)) is not None:
        raise BadFrame(path, fault)
    return points, corners_of


def sample_mesh(vertices: np.ndarray, triangles: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw points uniformly by area from the surface of a mesh: float64 [count, 3].

    A triangle is drawn with the probability of its share of the area, a point in it by u = sqrt(r1), v = r2 as
    (1 - u) a + u (1 - v) b + u v c. Raises ValueError for a mesh without area.
    """
    a, b, c = (vertices[triangles[:, corner]] for corner in range(3))
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    total = areas.sum()
    if not total > 0:
        raise ValueError("the mesh has no area")
    chosen = rng.choice(len(areas), count, p=areas / total)
    u, v = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    return np.asarray((1 - u) * a[chosen] + u * (1 - v) * b[chosen] + u * v * c[chosen])
