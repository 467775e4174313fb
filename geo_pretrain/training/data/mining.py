"""Mining pairs of overlapping frames: depth maps are projected into each other, or point clouds compared."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.errors import BadFrame, CheckpointError, DataError, first_line
from geo_pretrain.files import read_sealed, write_sealed
from geo_pretrain.training.data.frame import Frame, Pair, SkippedFrames, Source, resize_frame, unposed_scenes
from geo_pretrain.training.data.overlap import (
    cell_overlap_matrix,
    cloud_overlap_matrix,
    occupied_cells,
    overlap_matrix,
    thin_cloud,
)
from geo_pretrain.training.recipe import DataSpec

CLOUD_MEASURES: dict[str, tuple[Callable[[Frame], Tensor], Callable[..., np.ndarray]]] = {
    "match_released_code": (thin_cloud, cloud_overlap_matrix),
    "voxels": (occupied_cells, cell_overlap_matrix),
}
MINING_HEIGHT = 60  # overlap is measured on depth maps of this height, which is accurate enough for a ratio

T = TypeVar("T")


@dataclass
class PairCounts:
    """How many pairs of frames were tested, and why those that are left out were."""

    pairs: int = 0
    below: int = 0  # pairs that overlap less than asked for
    above: int = 0
    largest: float = 0.0  # overlap of a pair below the range

    def add(self, ratios: np.ndarray, overlap: tuple[float, float]) -> None:
        """Count the pairs of a scene by their overlap ratios [N, N]."""
        values = ratios[np.triu_indices(len(ratios), 1)]
        below = values[values < overlap[0]]
        self.pairs += len(values)
        self.below += len(below)
        self.above += int((values > overlap[1]).sum())
        self.largest = max(self.largest, float(below.max(initial=0)))

    def no_pair(self, spec: DataSpec, skips: SkippedFrames) -> DataError:
        """The error when no pair is left: how many failed for which reason, and what to try."""
        low, high = spec.overlap
        reasons = []
        if self.below:
            reasons.append(f"{self.below} overlap by less than {low:g} (at most {self.largest:.2g})")
        if self.above:
            reasons.append(f"{self.above} by more than {high:g}")
        counted = f"Of {self.pairs} pairs {' and '.join(reasons)}." if reasons else "No two frames could be compared."
        hint = (
            f"\n`geo-pretrain data check {spec.source}:{spec.path}` tries other directions and axes of the poses "
            "and other units of depth, and names the options that mend it."
        )
        start = f"No pair of frames is left in source {spec.source!r}. {counted}\n{skips.summary()}"
        return DataError(start + hint if spec.path else start)


def find_pairs(
    source: Source,
    spec: DataSpec,
    *,
    skips: SkippedFrames,
    device: str | torch.device = "cpu",
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Pair]:
    """Find all pairs of a source whose overlap ratio lies in `spec.overlap`, scene by scene in order of time.

    With `spec.units` "frames" every frame is paired with itself (overlap 1), at most `max_pairs_per_scene` per scene,
    and nothing is read: broken frames are replaced when samples are drawn. Frames that cannot be read and scenes
    without a pair are added to `skips`. Mined pairs are cached in `cache_dir`.

    Raises:
        DataError: no pair is left; the message says what was skipped and why.
    """
    if spec.units == "frames":
        return _self_pairs(source, spec)
    cached = _cache_path(source, spec, cache_dir) if cache_dir is not None else None
    known = None if cached is None else _cached_pairs(cached, source)
    if known is not None:
        skips.reasons.update(known[1])
        return known[0]
    skipped, tested = SkippedFrames(), PairCounts()
    pairs: list[Pair] = []
    scenes, unposed = source.scenes(), unposed_scenes(source)
    for done, scene in enumerate(scenes):
        if progress is not None:
            progress(done, len(scenes))
        if scene in unposed:
            skipped.add(unposed[scene])
            continue
        mined = _scene_pairs(source, scene, spec, skipped, tested, device)
        if not mined:
            low, high = spec.overlap
            skipped.add(BadFrame(scene, f"scene has no pair with an overlap in [{low:g}, {high:g}]"))
        pairs += mined
    skips.reasons.update(skipped.reasons)
    if not pairs:
        raise tested.no_pair(spec, skipped)
    if cached is not None:
        write_sealed(cached, {"pairs": [astuple(pair) for pair in pairs], "skips": skipped.reasons})
    return pairs


def _scene_pairs(
    source: Source, scene: str, spec: DataSpec, skips: SkippedFrames, tested: PairCounts, device: str | torch.device
) -> list[Pair]:
    if spec.measure != "projective":
        convert, compare = CLOUD_MEASURES[spec.measure]
        clouds = _load_all(source, scene, convert, skips)
        names, ratios = list(clouds), compare(list(clouds.values()), device)
    else:
        size = _mining_size(spec)
        frames = _load_all(source, scene, lambda frame: resize_frame(frame, size), skips)
        names, ratios = list(frames), overlap_matrix(list(frames.values()), device) if frames else np.eye(0)
    tested.add(ratios, spec.overlap)
    low, high = spec.overlap
    pairs = [
        Pair(scene, names[i], names[j], float(ratios[i, j]))
        for i, j in combinations(range(len(names)), 2)
        if low <= ratios[i, j] <= high
    ]
    return spread_evenly(pairs, spec.max_pairs_per_scene)


def _self_pairs(source: Source, spec: DataSpec) -> list[Pair]:
    pairs: list[Pair] = []
    for scene in source.scenes():
        frames = [Pair(scene, id, id, 1.0) for id in source.frame_ids(scene)]
        pairs += spread_evenly(frames, spec.max_pairs_per_scene)
    if not pairs:
        raise DataError(f"Source {source.name!r} has no frame.")
    return pairs


def spread_evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """Choose at most `limit` (None: all) of the items, from the first to the last at even distances."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[k] for k in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def _mining_size(spec: DataSpec) -> tuple[int, int]:
    """The working size scaled down to a height of `MINING_HEIGHT`."""
    height, width = spec.size
    return (MINING_HEIGHT, round(width * MINING_HEIGHT / height)) if height > MINING_HEIGHT else spec.size


def _load_all(source: Source, scene: str, convert: Callable[[Frame], T], skips: SkippedFrames) -> dict[str, T]:
    """Load and `convert` every readable frame of a scene, by the frame's name."""

    def load(frame_id: str) -> T | BadFrame:
        try:
            return convert(source.load(scene, frame_id))
        except BadFrame as bad:
            return bad

    names = source.frame_ids(scene)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        loaded = dict(zip(names, pool.map(load, names), strict=True))
    for item in loaded.values():
        if isinstance(item, BadFrame):
            skips.add(item)
    return {name: item for name, item in loaded.items() if not isinstance(item, BadFrame)}


def _cached_pairs(path: Path, source: Source) -> tuple[list[Pair], dict[str, str]] | None:
    """Pairs and skips of an earlier mining; None without one, where it is damaged, or where scenes were renamed since.

    A file that cannot be used is named in a warning.
    """
    try:
        tree = read_sealed(path)
        pairs = [Pair(str(scene), str(first), str(second), float(r)) for scene, first, second, r in tree["pairs"]]
        skips = {str(name): str(reason) for name, reason in tree["skips"].items()}
    except FileNotFoundError:
        return None
    except (OSError, CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        warnings.warn(f"{path} cannot be used ({first_line(error)}); pairs are found anew.", stacklevel=3)
        return None
    # a scene may have the name of its folder, which is no part of the fingerprint
    return (pairs, skips) if {pair.scene for pair in pairs} <= set(source.scenes()) else None


def _cache_path(source: Source, spec: DataSpec, cache_dir: Path) -> Path:
    facts = [2, source.name, source.fingerprint(), spec.size, spec.overlap, spec.measure, spec.max_pairs_per_scene]
    key = json.dumps(facts)
    return cache_dir / "pairs" / f"{source.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
