"""The graph cut of surfaces against its description, edge by edge in float32, and on shapes with known segments."""

from __future__ import annotations

import numpy as np
import pytest

from geo_pretrain.errors import DataError, RecipeError
from geo_pretrain.rooms import RoomGenerator, RoomsConfig
from geo_pretrain.training.data.surfaces import graph_loops
from geo_pretrain.training.data.surfaces import oversegmentation as module
from geo_pretrain.training.data.surfaces.oversegmentation import (
    edge_weights,
    plane_normals,
    segment_graph,
    segment_mesh,
    segment_points,
    vertex_normals,
)

F = np.float32
# Unit squares of a cube's faces: origin, first and second direction; their product points out of the cube.
SIDES = [
    ((0, 0, 0), (0, 1, 0), (1, 0, 0)), ((0, 0, 1), (1, 0, 0), (0, 1, 0)), ((0, 0, 0), (1, 0, 0), (0, 0, 1)),
    ((0, 1, 0), (0, 0, 1), (1, 0, 0)), ((0, 0, 0), (0, 0, 1), (0, 1, 0)), ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
]  # fmt: skip


# The slow twin: methods.md 4.7, one number at a time.


def twin_unit(v):
    length = np.sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2])
    return [c / length for c in v] if length > 0 else None


def twin_normals(vertices, faces):
    points = [[F(c) for c in p] for p in vertices]
    normals, counts = [[F(0)] * 3 for _ in points], [0] * len(points)
    for face in faces:
        one, two, three = (points[i] for i in face)
        x, y, z = (q - p for p, q in zip(one, two, strict=True))
        u, v, w = (q - p for p, q in zip(one, three, strict=True))
        normal = twin_unit([y * w - z * v, z * u - x * w, x * v - y * u])
        if normal is None:
            continue
        for i in face:
            share = F(1) / (F(counts[i]) + F(1))
            normals[i] = [share * n + (F(1) - share) * m for n, m in zip(normal, normals[i], strict=True)]
            counts[i] += 1
    return normals


def twin_weight(p_a, p_b, n_a, n_b):
    direction = twin_unit([F(q) - F(p) for p, q in zip(p_a, p_b, strict=True)])
    w = F(1) - (n_a[0] * n_b[0] + n_a[1] * n_b[1] + n_a[2] * n_b[2])
    if direction is not None and n_b[0] * direction[0] + n_b[1] * direction[1] + n_b[2] * direction[2] > 0:
        w = w * w
    return w


def twin_cut(count, edges, k_thresh, min_vertices):
    """Edges are (weight, a, b). Components are lists; each has a rank, a root and a threshold."""
    edges = sorted(edges, key=lambda edge: edge[0])
    group = [{"root": i, "rank": 0, "rows": [i], "threshold": F(k_thresh)} for i in range(count)]

    def join(a, b):
        keep, lose = (a, b) if a["rank"] > b["rank"] else (b, a)
        keep["rank"] += a["rank"] == b["rank"]
        keep["rows"] += lose["rows"]
        for row in lose["rows"]:
            group[row] = keep
        return keep

    for w, i, j in edges:
        a, b = group[i], group[j]
        if a is not b and w <= a["threshold"] and w <= b["threshold"]:
            both = join(a, b)
            both["threshold"] = w + F(k_thresh) / F(len(both["rows"]))
    for _, i, j in edges:
        a, b = group[i], group[j]
        if a is not b and (len(a["rows"]) < min_vertices or len(b["rows"]) < min_vertices):
            join(a, b)
    return np.array([g["root"] for g in group])


def twin_mesh(vertices, faces, k_thresh, min_vertices):
    normals, edges = twin_normals(vertices, faces), []
    for i1, i2, i3 in faces:
        for a, b in ((i1, i2), (i1, i3), (i3, i2)):
            edges.append((twin_weight(vertices[a], vertices[b], normals[a], normals[b]), a, b))
    return twin_cut(len(vertices), edges, k_thresh, min_vertices)


def grid_faces(rows, columns):
    cell = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel()
    a, b, c, d = cell, cell + columns, cell + columns + 1, cell + 1
    return np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])


def cube(cells):
    """A cube whose faces are grids of cells x cells squares, vertices on edges and corners shared."""
    n = cells + 1
    step = np.arange(n) / cells
    vertices, faces = [], []
    for k, (origin, first, second) in enumerate(SIDES):
        spread = step[:, None, None] * np.array(first) + step[None, :, None] * np.array(second)
        vertices.append((origin + spread).reshape(-1, 3))
        faces.append(grid_faces(n, n) + k * n * n)
    vertices = np.concatenate(vertices).round(9)
    vertices, row = np.unique(vertices, axis=0, return_inverse=True)
    return vertices.astype(F), row.reshape(-1)[np.concatenate(faces)]


def bumpy(seed, rows=17, columns=23, noise=0.002):
    """A folded, noisy sheet with a hole, a face without an area, two equal vertices and a vertex without a face."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(rows) * 0.02, np.arange(columns) * 0.02, indexing="ij")
    z = 0.1 * np.abs(np.sin(9 * x)) - 0.07 * np.abs(np.cos(8 * y)) + rng.normal(0, noise, x.shape)
    vertices = np.stack([x, y, z], -1).reshape(-1, 3).astype(F)
    faces = grid_faces(rows, columns)
    faces = faces[rng.permutation(len(faces))[: int(0.95 * len(faces))]]
    vertices = np.concatenate([vertices, vertices[40:41], [[9, 9, 9]]]).astype(F)
    twin = len(vertices) - 2
    extra = [[3, 3, 8], [40, twin, 41], [twin, 60, 61]]
    return vertices, np.concatenate([faces[:100], extra, faces[100:]])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("seed, k_thresh, min_vertices", [(0, 0.01, 20), (1, 0.05, 1), (2, 0.002, 7), (3, 0.1, 3)])
def test_segments_of_a_mesh_are_those_of_the_description(seed, k_thresh, min_vertices, compiled):
    vertices, faces = bumpy(seed)
    got = segment_mesh(vertices, faces, k_thresh=k_thresh, min_vertices=min_vertices, compiled=compiled)
    want = twin_mesh(vertices.tolist(), faces.tolist(), k_thresh, min_vertices)
    assert got.dtype == np.int64
    assert 3 < len(np.unique(want)) < len(vertices) / 2
    np.testing.assert_array_equal(got, want)


def test_normals_and_weights_are_those_of_the_description_to_the_bit():
    vertices, faces = bumpy(5)
    normals = vertex_normals(vertices, faces)
    want = np.array(twin_normals(vertices.tolist(), faces.tolist()))
    assert normals.dtype == F
    np.testing.assert_array_equal(normals, want)
    assert not normals[-1].any()
    assert np.linalg.norm(normals, axis=1).min(where=normals.any(1), initial=1) < 0.97  # means of unlike unit vectors
    a, b = faces[:, 0], faces[:, 1]
    weights = edge_weights(vertices, normals, a, b)
    want = [twin_weight(*vertices[[i, j]].tolist(), normals[i], normals[j]) for i, j in zip(a, b, strict=True)]
    np.testing.assert_array_equal(weights, want)


@pytest.mark.parametrize("scene, noise", [(0, 0), (1, 0.002)])
def test_numba_gives_the_same_bits_on_rooms(scene, noise):
    """Without noise many weights are equal: their order counts."""
    rooms = RoomGenerator(RoomsConfig(scenes=2))
    mesh = rooms.mesh(rooms.names()[scene], edge=0.2)
    vertices = mesh.vertices + np.random.default_rng(0).normal(0, noise, mesh.vertices.shape).astype(F)
    a, b = mesh.faces[:, 0], mesh.faces[:, 1]
    slow, fast = ({"compiled": compiled} for compiled in (False, True))
    normals = vertex_normals(vertices, mesh.faces, **slow)
    np.testing.assert_array_equal(as_bits(vertex_normals(vertices, mesh.faces, **fast)), as_bits(normals))
    weights = edge_weights(vertices, normals, a, b, **slow)
    np.testing.assert_array_equal(as_bits(edge_weights(vertices, normals, a, b, **fast)), as_bits(weights))
    segments = segment_mesh(vertices, mesh.faces, **slow)
    np.testing.assert_array_equal(segment_mesh(vertices, mesh.faces, **fast), segments)
    assert 100 < len(np.unique(segments)) < len(vertices) / 20


def as_bits(values):
    assert values.dtype == F
    return values.view(np.int32)


def test_edges_are_sorted_as_a_stable_argsort_sorts_them():
    rng = np.random.default_rng(0)
    weights = (rng.integers(-30, 30, 3000) / 8).astype(F)  # many ties
    weights[::7], weights[::11], weights[::13] = -0.0, np.nan, -np.nan
    weights[::17], weights[::19] = np.inf, -np.inf
    np.testing.assert_array_equal(module._ascending(weights), np.argsort(weights, kind="stable"))


def test_convex_edges_are_discounted_and_concave_ones_are_not():
    """A roof seen from outside (convex) and from inside (concave): normals turn by the same angle."""
    points = np.array([[-1, 0, 0], [1, 0, 0], [0, 0, 0]], F)
    normals = np.array([[-0.6, 0, 0.8], [0.6, 0, 0.8], [0, 0, 0]], F)
    along = np.array([0, 1]), np.array([1, 0])
    flat = 1 - (0.64 - 0.36)
    np.testing.assert_allclose(edge_weights(points, normals, *along), [flat**2] * 2, rtol=1e-6)
    inside = normals * np.array([-1, 1, 1], F)
    np.testing.assert_allclose(edge_weights(points, inside, *along), [flat] * 2, rtol=1e-6)
    assert edge_weights(points, normals, np.array([2]), np.array([2])).tolist() == [1.0]  # no length, no normal


@pytest.mark.parametrize("cells", [6, 10, 16])
def test_a_cube_has_six_segments(cells):
    vertices, faces = cube(cells)
    assert len(vertices) == 6 * cells**2 + 2
    segments = segment_mesh(vertices, faces)
    np.testing.assert_array_equal(segments, twin_mesh(vertices.tolist(), faces.tolist(), 0.01, 20))
    assert len(np.unique(segments)) == 6
    assert (segments[segments] == segments).all()
    inner = ((vertices > 0.01) & (vertices < 0.99)).sum(1) == 2
    for axis in range(3):
        for end in (0, 1):
            assert len(np.unique(segments[inner & (vertices[:, axis] == end)])) == 1


def test_small_segments_are_joined_only_below_the_minimum():
    vertices, faces = cube(6)  # 49 vertices a face
    whole = segment_mesh(vertices, faces, min_vertices=1)
    sizes = np.bincount(whole)[np.unique(whole)]
    assert len(sizes) > 6  # the corners, at least, are segments of their own
    assert sizes.min() < 20
    joined = segment_mesh(vertices, faces, min_vertices=20)
    assert np.bincount(joined)[np.unique(joined)].min() >= 20


def test_ties_are_taken_in_the_order_given():
    """A chain of equal weights: which end the root comes from tells who was joined first."""
    a, b, weights = np.array([0, 1, 2]), np.array([1, 2, 3]), np.full(3, 0.5, F)
    for compiled in (False, True):
        for step, root in ((1, 1), (-1, 3)):
            got = segment_graph(4, a[::step], b[::step], weights, k_thresh=0.5, min_vertices=1, compiled=compiled)
            assert got.tolist() == [root] * 4


def test_threshold_is_kept_in_32_bits():
    """0.1f + 0.2f / 3 rounds to another number than in 64 bits, and the last weight lies between the two."""
    k = F(0.2)
    first, second = F(0.01), F(0.1)
    threshold = second + k / F(3)
    exact = float(second) + float(k) / 3
    assert float(threshold) != exact
    between = threshold if float(threshold) > exact else np.nextafter(threshold, F(1))
    want = 1 if float(threshold) > exact else 2
    edges = np.array([0, 1, 3]), np.array([1, 2, 2]), np.array([first, second, between])
    for compiled in (False, True):
        got = segment_graph(4, *edges, k_thresh=0.2, min_vertices=1, compiled=compiled)
        assert len(np.unique(got)) == want
        np.testing.assert_array_equal(got, twin_cut(4, [(w, *e) for *e, w in zip(*edges, strict=True)], k, 1))


def test_random_graphs_compiled_or_not_are_the_twins():
    rng = np.random.default_rng(0)
    for count, k, least in ((1, 0.1, 1), (30, 0.02, 3), (200, 0.05, 9), (300, 1.0, 2)):
        a, b = rng.integers(count, size=(2, 4 * count))
        weights = (rng.integers(40, size=4 * count) / 50).astype(F)  # many ties
        want = twin_cut(count, list(zip(weights, a.tolist(), b.tolist(), strict=True)), k, least)
        for compiled in (False, True):
            got = segment_graph(count, a, b, weights, k_thresh=k, min_vertices=least, compiled=compiled)
            np.testing.assert_array_equal(got, want)


def test_without_numba_it_is_the_same_code(monkeypatch):
    vertices, faces = cube(6)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(graph_loops, "compiled", lambda: pytest.fail("numba was asked for"))
    assert len(np.unique(segment_mesh(vertices, faces))) == 6


def folded_points(seed=0):
    """Points of two walls and a floor that meet, with their normals into the room; which of the three each is."""
    rng = np.random.default_rng(seed)
    points, normals = [], []
    for axis in range(3):
        side = rng.random((700, 3)) * 0.7
        side[:, axis] = 0
        points.append(side)
        normals.append(np.tile(np.eye(3)[axis], (700, 1)))
    order = rng.permutation(2100)
    which = np.repeat(np.arange(3), 700)[order]
    return np.concatenate(points)[order].astype(F), np.concatenate(normals)[order].astype(F), which


def twin_points(points, normals, k_thresh, min_vertices):
    edges = []
    for i, p in enumerate(points.astype(np.float64)):
        gap = np.linalg.norm(points.astype(np.float64) - p, axis=1)
        gap[i] = np.inf
        for j in np.argsort(gap, kind="stable")[:8]:
            if gap[j] < 0.06:
                edges.append((twin_weight(points[i], points[j], normals[i], normals[j]), i, int(j)))
    edges.sort(key=lambda edge: edge[1])
    return twin_cut(len(points), edges, k_thresh, min_vertices)


def test_segments_of_points_are_those_of_the_graph_of_neighbors():
    points, normals, which = folded_points()
    rng = np.random.default_rng(1)
    noisy = normals + rng.normal(0, 0.03, normals.shape).astype(F)
    noisy = (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(F)
    np.testing.assert_array_equal(segment_points(points, noisy), twin_points(points, noisy, 0.01, 20))
    clean = segment_points(points, normals)
    for k in range(3):
        assert len(np.unique(clean[which == k])) == 1
    assert len(np.unique(clean)) == 3


def test_gaps_are_not_bridged_and_equal_points_are_no_trouble():
    points, normals, _ = folded_points()
    far = points + np.array([5, 0, 0], F)
    segments = segment_points(np.concatenate([points, far]), np.concatenate([normals, normals]))
    assert len(np.unique(segments)) == 6
    same = np.zeros((30, 3), F)
    up = np.tile(np.array([0, 0, 1], F), (30, 1))
    assert len(np.unique(segment_points(same, up))) == 1


@pytest.mark.parametrize("weighted", [False, True])
def test_plane_normals_are_those_of_the_nearest_points(weighted):
    """A dense ball of points, with more neighbors than are taken, and two points apart."""
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.random((400, 3)) * 0.25, [[2, 2, 2], [2, 2, 2.01]]]).astype(F)
    towards = rng.normal(size=points.shape).astype(F)
    weights = rng.random(len(points)) + 0.01 if weighted else np.ones(len(points))
    got = plane_normals(points, towards, weights if weighted else None)
    taken = set()
    for i, point in enumerate(points.astype(float)):
        gap = np.linalg.norm(points.astype(float) - point, axis=1)
        near = [j for j in np.argsort(gap)[:49] if gap[j] < 0.08]
        taken.add(len(near))
        share = weights[near] * np.exp(-(gap[near] ** 2) / (2 * 0.04**2))
        spread = np.cov(points[near].astype(float).T, aweights=share, ddof=0)
        values, axes = np.linalg.eigh(spread)
        if len(near) <= 3:
            want = towards[i] / np.linalg.norm(towards[i])
        elif values[0] / values[1] > 0.98:
            continue  # two directions are nearly as good
        else:
            want = axes[:, 0] * np.sign(axes[:, 0] @ towards[i])
        np.testing.assert_allclose(got[i], want, atol=1e-4)
    assert {2, 49} <= taken
    assert len(taken) > 5
    assert (np.einsum("ni,ni->n", got, towards) > 0).all()


def test_plane_normals_of_a_tilted_plane_far_from_the_origin():
    rng = np.random.default_rng(0)
    across = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    flat = np.concatenate([rng.random((500, 2)), np.zeros((500, 1))], axis=1)
    points = (flat @ across.T + 200).astype(F)
    normals = plane_normals(points, np.tile(across[:, 2], (500, 1)))
    np.testing.assert_allclose(normals, np.tile(across[:, 2], (500, 1)), atol=2e-3)
    nowhere = plane_normals(points, np.zeros((500, 3)))
    assert not nowhere.any()


def test_a_plane_is_fitted_to_four_points_and_not_to_three():
    square = np.array([[0, 0, 0], [0.01, 0, 0.01], [0, 0.01, 0], [0.01, 0.01, 0.01]], F)
    towards = np.tile(np.array([0, 0, 1], F), (4, 1))
    np.testing.assert_allclose(plane_normals(square, towards), [[-(0.5**0.5), 0, 0.5**0.5]] * 4, atol=1e-6)
    np.testing.assert_allclose(plane_normals(square[:3], towards[:3]), towards[:3])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"vertices": np.array([[0, 0, np.nan]] * 3)}, DataError, "3 of 3 vertices are not finite"),
        ({"vertices": np.zeros((3, 2))}, DataError, r"vertices are \[3, 2\], accepted are \[N, 3\]"),
        ({"faces": np.array([[0, 1, 3]])}, DataError, "name vertices 0 to 3, there are 0 to 2"),
        ({"faces": np.array([[0, 1, -1]])}, DataError, "name vertices -1 to 1"),
        ({"faces": np.array([[0, 1]])}, DataError, r"\[1, 2\], accepted are integers \[F, 3\]"),
        ({"faces": np.array([[0, 1, 2.5]])}, DataError, "float64"),
        ({"k_thresh": 0.0}, RecipeError, "'k_thresh' is 0.0, accepted are numbers above 0"),
        ({"k_thresh": float("nan")}, RecipeError, "'k_thresh' is nan"),
        ({"min_vertices": 0}, RecipeError, "'min_vertices' is 0, accepted are whole numbers from 1"),
    ],
)
def test_what_cannot_be_segmented_is_an_error(change, error, message):
    given = {"vertices": np.eye(3), "faces": np.array([[0, 1, 2]])} | change
    vertices, faces = given.pop("vertices"), given.pop("faces")
    with pytest.raises(error, match=message):
        segment_mesh(vertices, faces, **given)


def test_points_need_a_normal_each():
    with pytest.raises(DataError, match="3 points have 2 normals"):
        segment_points(np.eye(3), np.eye(3)[:2])
    with pytest.raises(DataError, match="1 of 3 normals are not finite"):
        segment_points(np.eye(3), np.diag([1, 1, np.inf]))


def test_a_mesh_without_faces_is_all_single_vertices():
    assert segment_mesh(np.eye(3), np.zeros((0, 3), int)).tolist() == [0, 1, 2]
    assert segment_mesh(np.zeros((0, 3)), np.zeros((0, 3), int)).tolist() == []
