"""Overlaps of frames: agreement of the quick measure with the released script's, and the pairs per second of both.

Run: OMP_NUM_THREADS=1 python -m benchmarks.mining DATA [--pairs 300] [--frames 200] [--repeats 3]; two minutes; writes
benchmarks/results/mining.json. DATA is a folder in 7-Scenes layout. One core. The slow twin is written from the
released procedure (PointContrast, CSC and Pri3D share it): every cloud thinned to means in 5 cm voxels, two k-d trees a
pair, the share of points with a neighbor within 7.5 cm, the larger of both directions. It asks scipy's k-d tree for all
points of a cloud at once; the released script loops over points in Python, and is slower still.
"""

from __future__ import annotations

import argparse
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree

from benchmarks.common import machine, spread, write_results
from geo_pretrain.training.data.frame import Frame
from geo_pretrain.training.data.overlap import cell_overlap_matrix, occupied_cells
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes

VOXEL, RADIUS, KEEP = 0.05, 0.075, 0.3
SCENES, FRAMES_A_SCENE, CORES = 1513, 66, 16  # ScanNet, every 25th of 2.5 million frames


def thinned(frame: Frame) -> np.ndarray:
    """World points of a frame, averaged in voxels of 5 cm that start half a voxel below the lowest: [N, 3] m."""
    rows, columns = np.nonzero(frame.depth)
    z = frame.depth[rows, columns].astype(np.float64)
    (fx, _, cx), (_, fy, cy) = frame.intrinsics[:2]
    points = np.stack([(columns - cx) * z / fx, (rows - cy) * z / fy, z], axis=1)
    points = points @ frame.cam_to_world[:3, :3].T + frame.cam_to_world[:3, 3]
    cells = np.floor((points - points.min(0) + VOXEL / 2) / VOXEL).astype(np.int64)
    width, height = cells[:, 1:].max(0) + 1
    key = (cells[:, 0] * width + cells[:, 1]) * height + cells[:, 2]  # one number a voxel: rows are slow to sort
    _, voxel = np.unique(key, return_inverse=True)
    return np.stack([np.bincount(voxel, points[:, axis]) for axis in range(3)], 1) / np.bincount(voxel)[:, None]


def released(cloud1: np.ndarray, cloud2: np.ndarray) -> float:
    """The overlap of two thinned clouds as the released script writes it."""
    tree1, tree2 = cKDTree(cloud1), cKDTree(cloud2)
    shares = [
        np.isfinite(tree.query(cloud, distance_upper_bound=RADIUS)[0]).mean()
        for tree, cloud in ((tree2, cloud1), (tree1, cloud2))
    ]
    return float(max(shares))


def agreement(source: SevenScenes, ids: list[str], count: int, seed: int) -> dict[str, Any]:
    """Share of random pairs of a scene that both measures keep, or both drop, at 30 %."""
    scene = source.scenes()[0]
    every = list(combinations(range(len(ids)), 2))
    chosen = [every[k] for k in np.random.default_rng(seed).choice(len(every), count, replace=False)]
    frames = {k: source.load(scene, ids[k]) for k in sorted({k for pair in chosen for k in pair})}
    place = {k: row for row, k in enumerate(frames)}
    quick = cell_overlap_matrix([occupied_cells(frame) for frame in frames.values()])
    clouds = {k: thinned(frame) for k, frame in frames.items()}
    slow = np.array([released(clouds[i], clouds[j]) for i, j in chosen])
    fast = np.array([quick[place[i], place[j]] for i, j in chosen])
    return {
        "pairs": count,
        "agree": float(((slow >= KEEP) == (fast >= KEEP)).mean()),
        "kept_released": int((slow >= KEEP).sum()),
        "kept_quick": int((fast >= KEEP).sum()),
        "mean_difference": round(float((fast - slow).mean()), 4),
        "rms_difference": round(float(np.sqrt(np.square(fast - slow).mean())), 4),
        "near_threshold": int((np.abs(slow - KEEP) < 0.02).sum()),
    }


def rates(source: SevenScenes, ids: list[str], frames: int, repeats: int) -> dict[str, Any]:
    """Pairs per second of processor time of both procedures, alternating, thinning of frames included."""
    scene = source.scenes()[0]
    chosen = [ids[k] for k in np.linspace(0, len(ids) - 1, frames).astype(int)]
    begin = time.process_time()
    loaded = [source.load(scene, id) for id in chosen]
    reading = (time.process_time() - begin) / frames
    count = frames * (frames - 1) // 2
    found: dict[str, list[float]] = {"quick": [], "released": [], "ratio": [], "prepare": []}
    for _ in range(repeats):
        begin = time.process_time()
        cells = [occupied_cells(frame) for frame in loaded]
        prepared = time.process_time() - begin
        cell_overlap_matrix(cells)
        quick = count / (time.process_time() - begin)
        begin = time.process_time()
        clouds = [thinned(frame) for frame in loaded[:8]]
        thinning = (time.process_time() - begin) / 8 * frames
        some = list(combinations(range(8), 2))
        begin = time.process_time()
        for i, j in some:
            released(clouds[i], clouds[j])
        slow = count / (thinning + (time.process_time() - begin) / len(some) * count)
        for key, value in (
            ("quick", quick),
            ("released", slow),
            ("ratio", quick / slow),
            ("prepare", prepared / frames),
        ):
            found[key].append(value)
    hours = SCENES * (
        FRAMES_A_SCENE * reading + FRAMES_A_SCENE * (FRAMES_A_SCENE - 1) / 2 / float(np.median(found["quick"]))
    )
    return {
        "frames": frames,
        "pairs": count,
        "pairs_per_second": {key: spread(found[key]) for key in ("quick", "released")},
        "times_faster": spread(found["ratio"]),
        "seconds_to_read_a_frame": round(reading, 4),
        "seconds_to_prepare_a_frame": spread(found["prepare"]),
        "scannet_hours_extrapolated": {
            "cores": CORES,
            "scenes": SCENES,
            "frames_a_scene": FRAMES_A_SCENE,
            "hours": round(hours / 3600 / CORES, 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1, help="Draws of pairs, each with its own frames.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = SevenScenes(options.data)
    ids = source.frame_ids(source.scenes()[0])
    begin = time.process_time()
    results = {
        "machine": machine(),
        "agreement": [agreement(source, ids, options.pairs, seed) for seed in range(options.seeds)],
        "rates": rates(source, ids, options.frames, options.repeats),
        "processor_seconds": round(time.process_time() - begin, 1),
    }
    command = f"OMP_NUM_THREADS=1 python -m benchmarks.mining DATA --pairs {options.pairs} --frames {options.frames}"
    write_results("mining", f"{command} --repeats {options.repeats} --seeds {options.seeds}", results)


if __name__ == "__main__":
    main()
