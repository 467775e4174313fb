"""Over-segmentation of a mesh: numba's loops and one sort of integers against NumPy's normals, weights and argsort.

    OMP_NUM_THREADS=1 python -m benchmarks.oversegmentation

Writes benchmarks/results/oversegmentation.json. Both sides run in turn on one mesh and must give the same segments;
both merge components in numba's loops, as the package always did. Processor time stands beside wall time, which other
programs lengthen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from unittest.mock import patch

import numpy as np

from benchmarks.common import machine, spread, write_results
from geo_pretrain.rooms import RoomGenerator, RoomsConfig
from geo_pretrain.training.data.surfaces import oversegmentation
from geo_pretrain.training.data.surfaces.oversegmentation import edge_weights, segment_graph, vertex_normals

REPEATS = 9
EDGE, NOISE = 0.033, 0.002  # m: longest sides of flat faces; the noise of a scanned surface


def room() -> tuple[np.ndarray, np.ndarray]:
    """The mesh of one room, its vertices moved at random: vertices float32 [V, 3], faces int64 [F, 3]."""
    rooms = RoomGenerator(RoomsConfig(scenes=1))
    mesh = rooms.mesh(rooms.names()[0], edge=EDGE)
    return mesh.vertices + np.random.default_rng(0).normal(0, NOISE, mesh.vertices.shape).astype(np.float32), mesh.faces


def sides(vertices: np.ndarray, faces: np.ndarray) -> dict[str, dict[str, Callable[[], np.ndarray]]]:
    """Each step and the whole as it was and as it is; steps start from the same normals and weights."""
    a, b = faces[:, [0, 0, 2]].ravel(), faces[:, [1, 2, 1]].ravel()
    normals = vertex_normals(vertices, faces)
    weights = edge_weights(vertices, normals, a, b)

    def argsort(values: np.ndarray) -> np.ndarray:
        return np.argsort(values, kind="stable")

    def whole(numba_loops: bool) -> np.ndarray:
        own = vertex_normals(vertices, faces, compiled=numba_loops)
        change = edge_weights(vertices, own, a, b, compiled=numba_loops)
        return segment_graph(len(vertices), a, b, change, compiled=True)

    def before() -> np.ndarray:
        with patch.object(oversegmentation, "_ascending", argsort):
            return whole(False)

    return {
        "normals": {
            "before": lambda: vertex_normals(vertices, faces, compiled=False),
            "now": lambda: vertex_normals(vertices, faces, compiled=True),
        },
        "weights": {
            "before": lambda: edge_weights(vertices, normals, a, b, compiled=False),
            "now": lambda: edge_weights(vertices, normals, a, b, compiled=True),
        },
        "sort": {"before": lambda: argsort(weights), "now": lambda: oversegmentation._ascending(weights)},
        "segments": {"before": before, "now": lambda: whole(True)},
    }


def main() -> None:
    """Time every step on both sides, in turn."""
    vertices, faces = room()
    results: dict[str, object] = {"vertices": len(vertices), "faces": len(faces)}
    for step, pair in sides(vertices, faces).items():
        before, now = (run() for run in pair.values())  # numba compiles
        if before.tobytes() != now.tobytes():
            raise SystemExit(f"{step}: the two sides differ.")
        wall: dict[str, list[float]] = {"before": [], "now": []}
        processor: dict[str, list[float]] = {"before": [], "now": []}
        for _ in range(REPEATS):
            for side, run in pair.items():
                begin, begin_processor = time.perf_counter(), time.process_time()
                run()
                processor[side].append(time.process_time() - begin_processor)
                wall[side].append(time.perf_counter() - begin)
        ratio = statistics.median(processor["before"]) / statistics.median(processor["now"])
        results[step] = {
            "processor_seconds": {side: spread(values) for side, values in processor.items()},
            "wall_seconds": {side: spread(values) for side, values in wall.items()},
            "processor_before_to_now": round(ratio, 1),
        }
        if step == "segments":
            results["segments_found"] = len(np.unique(now))
    command = "OMP_NUM_THREADS=1 python -m benchmarks.oversegmentation"
    write_results("oversegmentation", command, results | {"machine": machine()})


if __name__ == "__main__":
    main()
