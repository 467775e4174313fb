"""Mining pairs of overlapping frames: depth maps are projected into each other, or point clouds compared."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.errors import BadFrame, CheckpointError, DataError, RecipeError, first_line
from geo_pretrain.files import read_sealed, write_sealed
from geo_pretrain.progress import already
from geo_pretrain.training.data.frame import (
    Frame,
    OwnPairs,
    Pair,
    SampledContent,
    SkippedFrames,
    Source,
    capability,
    resize_frame,
    unposed_scenes,
)
from geo_pretrain.training.data.overlap import (
    cell_overlap_matrix,
    cloud_overlap_matrix,
    occupied_cells,
    overlap_matrix,
    thin_cloud,
)
from geo_pretrain.training.data.pair_files import PairCounts, ScenePairs, identity, mined_once, spread_evenly
from geo_pretrain.training.distributed import ALONE, World
from geo_pretrain.training.recipe import DataSpec

CLOUD_MEASURES: dict[str, tuple[Callable[[Frame], Tensor], Callable[..., np.ndarray]]] = {
    "match_released_code": (thin_cloud, cloud_overlap_matrix),
    "voxels": (occupied_cells, cell_overlap_matrix),
}
SPOT_CHECKS, MOVED = 8, 0.2  # pairs that are compared anew, and by how much other sizes do not move an overlap
MINING_HEIGHT = 60  # overlap is measured on depth maps of this height, which is accurate enough for a ratio

T = TypeVar("T")


def find_pairs(
    source: Source,
    spec: DataSpec,
    *,
    skips: SkippedFrames,
    device: str | torch.device = "cpu",
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    world: World = ALONE,
) -> list[Pair]:
    """Find all pairs of a source whose overlap ratio lies in `spec.overlap`, scene by scene in order of time.

    With `spec.units` "frames" every frame is paired with itself (overlap 1), at most `max_pairs_per_scene` per scene,
    and nothing is read: broken frames are replaced when samples are drawn. Frames that cannot be read and scenes
    without a pair are added to `skips`. Mined pairs are cached in `cache_dir`, scene by scene while they are mined:
    of a command that is killed one scene is lost, and processes of a `world` that share the folder share the work.

    Raises:
        DataError: no pair is left; the message says what was skipped and why.
    """
    if spec.units == "frames":
        return _self_pairs(source, spec)
    cached = _cache_path(source, spec, cache_dir) if cache_dir is not None else None
    known = None if cached is None else _cached_pairs(cached, source)
    if cached is not None and world.any(known is None):  # all processes take the same way, and meet at its end
        parts = cached.with_suffix(".scenes")
        known = _pairs_of(_mined_scenes(source, spec, parts, device, progress, world), spec)
        world.barrier()
        if world.is_main:
            pairs, reasons = known
            write_sealed(cached, {"pairs": [astuple(pair) for pair in pairs], "skips": reasons})
            shutil.rmtree(parts, ignore_errors=True)
    elif known is None:
        known = _pairs_of(_mined_scenes(source, spec, None, device, progress, world), spec)
    skips.reasons.update(known[1])
    return known[0]


def mine_scene(source: Source, scene: str, spec: DataSpec, device: str | torch.device = "cpu") -> ScenePairs:
    """Find the pairs of one scene whose overlap ratio lies in `spec.overlap`."""
    mined = ScenePairs()
    if scene in (unposed := unposed_scenes(source)):
        mined.skips.add(unposed[scene])
        return mined
    mined.pairs = _scene_pairs(source, scene, spec, mined.skips, mined.tested, device)
    if not mined.pairs:
        low, high = spec.overlap
        mined.skips.add(BadFrame(scene, f"scene has no pair with an overlap in [{low:g}, {high:g}]"))
    return mined


def _mined_scenes(
    source: Source,
    spec: DataSpec,
    folder: Path | None,
    device: str | torch.device,
    progress: Callable[[int, int], None] | None,
    world: World,
) -> list[ScenePairs]:
    """Mine all scenes, in their order; in a folder each once by all processes, which begin with different scenes."""
    scenes = source.scenes()
    own = range(world.rank, len(scenes), world.size) if folder is not None else range(len(scenes))
    mined: dict[int, ScenePairs] = {}
    report = progress or (lambda done, total: None)
    report(0, len(scenes))
    for number in [*own, *(set(range(len(scenes))) - set(own))]:
        mine = partial(mine_scene, source, scenes[number], spec, device)
        if folder is None:
            mined[number], now = mine(), True
        else:
            made_from = identity(source, scenes[number], spec)
            mined[number], now = mined_once(folder, scenes[number], made_from, mine)
        (report if now else partial(already, report))(len(mined), len(scenes))
    return [mined[number] for number in range(len(scenes))]


def _pairs_of(scenes: list[ScenePairs], spec: DataSpec) -> tuple[list[Pair], dict[str, str]]:
    """Join the pairs and skips of all scenes. Raises `DataError` if no pair is left."""
    skips, tested = SkippedFrames(), PairCounts()
    for scene in scenes:
        skips.reasons.update(scene.skips.reasons)
        tested.join(scene.tested)
    pairs = [pair for scene in scenes for pair in scene.pairs]
    if not pairs:
        raise tested.no_pair(spec, skips)
    return pairs, skips.reasons


def _scene_pairs(
    source: Source, scene: str, spec: DataSpec, skips: SkippedFrames, tested: PairCounts, device: str | torch.device
) -> list[Pair]:
    if spec.measure == "source":
        return _own_pairs(source, scene, spec, skips, tested)
    frames = _load_all(source, scene, lambda frame: prepared(frame, spec), skips)
    names, ratios = list(frames), compare_frames(list(frames.values()), spec, device)
    tested.add(ratios, spec.overlap)
    low, high = spec.overlap
    pairs = [
        Pair(scene, names[i], names[j], float(ratios[i, j]))
        for i, j in combinations(range(len(names)), 2)
        if low <= ratios[i, j] <= high
    ]
    return spread_evenly(pairs, spec.max_pairs_per_scene)


def own_pairs(source: Source) -> OwnPairs:
    """The source, if its data set has its own rule for pairs. Raises `RecipeError` if it has none."""
    if (found := capability(source, OwnPairs)) is None:
        raise RecipeError(
            f"'data.measure' is 'source', but source {source.name!r} has no rule of its own for pairs; accepted are "
            "projective, voxels and match_released_code."
        )
    return found


def _own_pairs(source: Source, scene: str, spec: DataSpec, skips: SkippedFrames, tested: PairCounts) -> list[Pair]:
    """The pairs of a scene by the rule of its data set."""
    pairs, ratios, (low, high) = [], [], spec.overlap
    for first, second, ratio in own_pairs(source).overlaps(scene, source.frame_ids(scene), skips):
        ratios.append(ratio)
        if low <= ratio <= high:
            pairs.append(Pair(scene, first, second, ratio))
    tested.add(np.array(ratios), spec.overlap)
    return spread_evenly(pairs, spec.max_pairs_per_scene)


def prepared(frame: Frame, spec: DataSpec) -> Any:
    """Reduce a frame to what `compare_frames` compares: a small frame, points [N, 3] m or cells [N, 3]."""
    if spec.measure == "projective":
        return resize_frame(frame, _mining_size(spec))
    return CLOUD_MEASURES[spec.measure][0](frame)


def compare_frames(frames: list[Any], spec: DataSpec, device: str | torch.device = "cpu") -> np.ndarray:
    """Compute the overlap ratio of all pairs of prepared frames by the measure of `spec`: float [N, N], diagonal 1."""
    if not frames:
        return np.eye(0)
    compare = overlap_matrix if spec.measure == "projective" else CLOUD_MEASURES[spec.measure][1]
    return compare(frames, device)


def refuse_changed(source: Source, pairs: Sequence[Pair], spec: DataSpec, folder: Path) -> None:
    """Compare a few mined pairs anew: poses, depth or units may have been changed under the same names of frames.

    Raises `DataError` where two of them, or the only one, overlap otherwise than their file in `folder` says. Frames
    that cannot be read are left to the samples, and a data set's own rule is not asked.
    """
    if spec.measure == "source":
        return
    compared, moved = 0, []
    for pair in spread_evenly(pairs, SPOT_CHECKS):
        try:
            both = [prepared(source.load(pair.scene, id), spec) for id in (pair.frame1, pair.frame2)]
        except BadFrame:
            continue
        now = float(compare_frames(both, spec)[0, 1])
        compared += 1
        if abs(now - pair.overlap) > MOVED:
            moved.append(f"{pair.frame1} and {pair.frame2} of {pair.scene} by {now:.2f}, not {pair.overlap:.2f}")
    if len(moved) >= min(2, max(compared, 1)):
        raise DataError(
            f"The frames are not those that {str(folder)!r} was mined from: of {compared} pairs that were compared "
            f"anew {len(moved)} overlap otherwise, such as {moved[0]}. Were poses or data.options changed? Mine them "
            "again, into another folder."
        )


def _self_pairs(source: Source, spec: DataSpec) -> list[Pair]:
    pairs: list[Pair] = []
    for scene in source.scenes():
        frames = [Pair(scene, id, id, 1.0) for id in source.frame_ids(scene)]
        pairs += spread_evenly(frames, spec.max_pairs_per_scene)
    if not pairs:
        raise DataError(f"Source {source.name!r} has no frame.")
    return pairs


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
    if (sampled := capability(source, SampledContent)) is not None:
        facts.append(sampled.content())  # files that were altered at equal size and time
    key = json.dumps(facts)
    return cache_dir / "pairs" / f"{source.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
