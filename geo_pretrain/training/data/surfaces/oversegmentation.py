"""Over-segmentation of surfaces where the normal changes, as ScanNet's Segmentator does.

Felzenszwalb and Huttenlocher's graph-based segmentation (IJCV 2004) of a mesh, with ScanNet's weights and order of
edges, so that the segments equal those of its `.segs.json` files; or of points with normals, whose edges lead to their
nearest neighbors.
"""

from __future__ import annotations

import importlib.util
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

from geo_pretrain.errors import DataError, RecipeError, require
from geo_pretrain.training.data.surfaces import graph_loops

K_THRESH, MIN_VERTICES = 0.01, 20  # the parameters of the segments that come with ScanNet

NEIGHBORS, REACH = 8, 0.06  # edges per point and their greatest length, m: three times the spacing of a ScanNet mesh
# Normals are fitted to so many nearest points within so many m, weighted by a Gaussian of that width.
PLANE_NEIGHBORS, PLANE_REACH, PLANE_WIDTH = 48, 0.08, 0.04


def segment_mesh(
    vertices: np.ndarray,
    faces: np.ndarray,
    *,
    k_thresh: float = K_THRESH,
    min_vertices: int = MIN_VERTICES,
    compiled: bool | None = None,
) -> np.ndarray:
    """Segment a triangle mesh: the root vertex of each vertex's segment, int64 [V].

    As ScanNet's Segmentator, all in float32: `vertex_normals`; three edges per face, (1, 2), (1, 3), (3, 2), so that an
    edge of two faces occurs twice; `edge_weights`; then `segment_graph`. A face without area has no normal but keeps
    its edges; a vertex without a face is its own segment.

    Args:
        vertices: float [V, 3] m; faces: int [F, 3] rows of vertices, counter-clockwise seen from outside.
        k_thresh: how much normals may change within a segment: larger values give larger segments.
        min_vertices: smaller segments are merged into a neighbor.
        compiled: use numba's machine code; None: if numba is installed. The segments are the same.

    Raises:
        DataError: a vertex is not finite, or a face names a vertex that is not there.
        RecipeError: `k_thresh` or `min_vertices` is out of range.
    """
    vertices, faces = _checked_mesh(vertices, faces)
    normals = vertex_normals(vertices, faces, compiled=compiled)
    a, b = faces[:, [0, 0, 2]].ravel(), faces[:, [1, 2, 1]].ravel()
    weights = edge_weights(vertices, normals, a, b, compiled=compiled)
    return segment_graph(len(vertices), a, b, weights, k_thresh=k_thresh, min_vertices=min_vertices, compiled=compiled)


def segment_points(
    points: np.ndarray, normals: np.ndarray, *, k_thresh: float = K_THRESH, min_vertices: int = MIN_VERTICES
) -> np.ndarray:
    """Segment a surface without a mesh: the root point of each point's segment, int64 [N].

    Directed edges lead from a point to its 8 nearest neighbors within 6 cm; weights and segmentation are the mesh's.
    Meshing each depth frame instead would give as many surfaces as frames, whose segments would have to be matched:
    one graph of the scene has each segment once.

    Args:
        points: float [N, 3] m, evenly spaced by 2 to 3 cm (as ScanNet's meshes, to which `k_thresh` refers).
        normals: float [N, 3], unit, all on the side of the surface from which it is seen.
        k_thresh, min_vertices: as for `segment_mesh`.

    Raises:
        DataError: a point or a normal is not finite.
        RecipeError: `k_thresh` or `min_vertices` is out of range.
    """
    points, normals = _floats("points", points), _floats("normals", normals)
    if points.shape != normals.shape:
        raise DataError(f"{len(points)} points have {len(normals)} normals; accepted is one a point.")
    _, near = _neighbors(points, NEIGHBORS, REACH)
    a, b = np.repeat(np.arange(len(points)), near.shape[1]), near.ravel()
    a, b = a[b < len(points)], b[b < len(points)]
    weights = edge_weights(points, normals, a, b)
    return segment_graph(len(points), a, b, weights, k_thresh=k_thresh, min_vertices=min_vertices)


def vertex_normals(vertices: np.ndarray, faces: np.ndarray, *, compiled: bool | None = None) -> np.ndarray:
    """Average the unit normals of the faces of each vertex, without normalizing the mean: float32 [V, 3].

    As the Segmentator, a running mean in order of faces: mean <- n / (k + 1) + (1 - 1 / (k + 1)) mean for the k-th face
    (from 0). Faces without area, whose normal would be NaN, are left out.
    """
    vertices, faces = _checked_mesh(vertices, faces)
    if _uses_numba(compiled):
        return graph_loops.compiled()["vertex_normals"](vertices, faces)
    one, two, three = (vertices[faces[:, corner]] for corner in range(3))
    face_normals, length = _unit(_cross(two - one, three - one))
    corners, values = faces[length > 0].ravel(), np.repeat(face_normals[length > 0], 3, axis=0)
    order = np.argsort(corners, kind="stable")
    count = np.bincount(corners, minlength=len(vertices))
    start = np.cumsum(count) - count
    by_count = np.argsort(-count, kind="stable")
    normals = np.zeros((len(vertices), 3), np.float32)
    for k in range(int(count.max(initial=0))):  # the k-th face of every vertex with more than k
        rows = by_count[: np.searchsorted(-count[by_count], -k)]
        share = np.float32(1) / np.float32(k + 1)
        normals[rows] = share * values[order[start[rows] + k]] + (np.float32(1) - share) * normals[rows]
    return normals


def edge_weights(
    vertices: np.ndarray, normals: np.ndarray, a: np.ndarray, b: np.ndarray, *, compiled: bool | None = None
) -> np.ndarray:
    """Weigh edges a -> b by the change of the normal: float32 [E] from 0 (flat) to 2.

    w = 1 - n_a . n_b. Convex edges, n_b . (b - a) > 0, as within one object, are discounted: w becomes w squared. An
    edge of length 0 has no direction and no discount.
    """
    if _uses_numba(compiled):
        return graph_loops.compiled()["edge_weights"](vertices, normals, a, b)
    along, _ = _unit(vertices[b] - vertices[a])
    weights = np.float32(1) - _dot(normals[a], normals[b])
    return np.where(_dot(normals[b], along) > 0, weights * weights, weights)


def segment_graph(
    count: int,
    a: np.ndarray,
    b: np.ndarray,
    weights: np.ndarray,
    *,
    k_thresh: float = K_THRESH,
    min_vertices: int = MIN_VERTICES,
    compiled: bool | None = None,
) -> np.ndarray:
    """Segment a graph of `count` vertices with edges a -> b [E]: the root of each vertex's component, int64 [count].

    Edges are visited in ascending order of weight, ties in the given order (the Segmentator's sort leaves that open).
    Two components merge when the weight is at most the threshold of both, which is `k_thresh` for one vertex and after
    a merge its weight + `k_thresh` / size. A second pass in the same order merges components of which one has fewer
    than `min_vertices` vertices. The root is that of the component of higher rank, the second's if equal (union by
    rank).
    """
    check_segmentation(k_thresh, min_vertices)
    order = _ascending(weights.astype(np.float32))
    a, b, weights = a[order].astype(np.int64), b[order].astype(np.int64), weights[order].astype(np.float32)
    shares = np.float32(k_thresh) / np.maximum(np.arange(count + 1, dtype=np.float32), 1)
    if _uses_numba(compiled):
        merge = graph_loops.compiled()["merge"]
        ints: Callable[[np.ndarray], Any] = np.ascontiguousarray
        floats: Callable[[np.ndarray], Any] = np.ascontiguousarray
    else:  # ten times faster than arrays, and as they round to float32
        merge, ints, floats = graph_loops.merge, np.ndarray.tolist, _packed
    parent, rank, size = (ints(x) for x in (np.arange(count), np.zeros(count, np.int64), np.ones(count, np.int64)))
    state = floats(shares), parent, rank, size, floats(np.full(count, k_thresh, np.float32))
    merge(ints(a), ints(b), floats(weights), 0, *state)
    roots = _roots(parent)
    across = roots[a] != roots[b]
    merge(ints(a[across]), ints(b[across]), floats(weights[across]), min_vertices, *state)
    return _roots(parent)


def check_segmentation(k_thresh: float, min_vertices: int) -> None:
    """Raise `RecipeError` for parameters of `segment_graph` that are out of range."""
    if not k_thresh > 0:
        raise RecipeError(f"'k_thresh' is {k_thresh!r}, accepted are numbers above 0, such as {K_THRESH}.")
    if not min_vertices >= 1:
        raise RecipeError(f"'min_vertices' is {min_vertices!r}, accepted are whole numbers from 1, as {MIN_VERTICES}.")


def plane_normals(points: np.ndarray, towards: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Fit a normal to each point's neighborhood by principal components: float32 [N, 3], unit.

    The direction of least variance of a point and its 48 nearest neighbors within 8 cm, oriented to the side of
    `towards` [N, 3], the direction of the viewer. Neighbors are weighted by `weights` [N] (the inverse variance of
    their position; default: equal) and by a Gaussian of 4 cm around the point. Points with fewer than three neighbors
    get `towards` itself, normalized; zero gives (0, 0, 0).
    """
    points, towards = _floats("points", points), _floats("directions", towards)
    confidence = np.ones(len(points)) if weights is None else np.asarray(weights, np.float64)
    normals, _ = _unit(towards)
    distance, near = _neighbors(points, PLANE_NEIGHBORS, PLANE_REACH)
    for start in range(0, len(points), 1 << 14):
        rows = slice(start, start + (1 << 14))
        own = np.arange(len(points))[rows, None]
        group = np.concatenate([own, near[rows]], axis=1)
        valid = group < len(points)
        group = np.where(valid, group, 0)
        squared = np.concatenate([np.zeros(own.shape), np.where(valid[:, 1:], distance[rows], 0) ** 2], axis=1)
        share = np.where(valid, confidence[group] * np.exp(-squared / (2 * PLANE_WIDTH**2)), 0)
        share /= share.sum(axis=1, keepdims=True)
        around = points[group] - points[rows, None].astype(np.float64)
        around -= (around * share[..., None]).sum(axis=1, keepdims=True)
        around *= np.sqrt(share)[..., None]
        _, axes = np.linalg.eigh(around.transpose(0, 2, 1) @ around)
        thin = axes[:, :, 0]
        side = np.sign((thin * normals[rows]).sum(axis=1, keepdims=True))
        fitted = (valid.sum(axis=1) > 3)[:, None] & (side != 0)
        normals[rows] = np.where(fitted, thin * side, normals[rows])
    return normals


def _uses_numba(compiled: bool | None) -> bool:
    return importlib.util.find_spec("numba") is not None if compiled is None else compiled


def _packed(values: np.ndarray) -> array[float]:
    return array("f", values.tobytes())


def _ascending(weights: np.ndarray) -> np.ndarray:
    """A stable argsort of float32 weights [E], by one sort of integers that hold weight and position."""
    bits = (weights + np.float32(0)).view(np.int32)  # -0 becomes 0
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the numbers
    keys[np.isnan(weights)] = 0x7FFFFFFF  # last
    packed = (keys.astype(np.int64) << 32) | np.arange(len(weights))
    packed.sort()
    return packed & 0xFFFFFFFF


def _roots(parent: Any) -> np.ndarray:
    roots = np.asarray(parent, dtype=np.int64)
    while (roots[roots] != roots).any():
        roots = roots[roots]
    return roots


def _neighbors(points: np.ndarray, count: int, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Find the `count` nearest other points within `reach`: distances and rows, nearest first; row N for none."""
    tree = require("scipy.spatial", "training").cKDTree(points)
    distance, near = tree.query(points, k=count + 1, distance_upper_bound=reach)
    own = near == np.arange(len(points))[:, None]
    own[~own.any(axis=1), -1] = True  # more equal points than asked for: the last one goes
    shape = (len(points), count)
    return distance[~own].reshape(shape), near[~own].reshape(shape)


def _checked_mesh(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    vertices, faces = _floats("vertices", vertices), np.asarray(faces)
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype.kind not in "iu":
        raise DataError(f"Faces are {faces.dtype} {list(faces.shape)}, accepted are integers [F, 3].")
    if len(faces) and not 0 <= faces.min() <= faces.max() < len(vertices):
        raise DataError(f"Faces name vertices {faces.min()} to {faces.max()}, there are 0 to {len(vertices) - 1}.")
    return vertices, faces.astype(np.int64)


def _floats(what: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or values.shape[1] != 3:
        raise DataError(f"The {what} are {list(values.shape)}, accepted are [N, 3].")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).any(axis=1).sum())
        raise DataError(f"{bad} of {len(values)} {what} are not finite; drop them first.")
    return values.astype(np.float32)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products of rows, term by term: a library may add in another order or keep more digits."""
    product: np.ndarray = a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1] + a[:, 2] * b[:, 2]
    return product


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    x, y, z = a.T
    u, v, w = b.T
    return np.stack([y * w - z * v, z * u - x * w, x * v - y * u], axis=1)


def _unit(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalize vectors [N, 3]; those of length 0 stay. Returns their lengths [N], too."""
    length = np.sqrt(_dot(vectors, vectors))
    return vectors / np.where(length > 0, length, np.float32(1))[:, None], length
