"""Matching by the nearest feature: pixels of two images, voxels of two clouds, or the pixels and voxels of a frame.

Each asks how often the candidate whose feature is nearest (cosine) lies where the query's surface point truly is.
`evaluate_matching` measures one feature extractor; `compare_matching` and `compare_pixel_to_voxel` measure a backbone
beside its random-init baseline, as `geo-pretrain eval` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from geo_pretrain.backbones.feature_pair import FeaturePair
from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.geometry import centered, match_pixels, radius_matches
from geo_pretrain.training.data.frame import Frame, Pair, SkippedFrames, Source, Surface, resize_frame
from geo_pretrain.training.data.mining import find_pairs, spread_evenly
from geo_pretrain.training.data.samples.augment import random_rotation
from geo_pretrain.training.data.sources.registry import open_on_disk, open_source
from geo_pretrain.training.data.surfaces.fusing import Surfaces, cubic_voxel_size
from geo_pretrain.training.evaluation.features import (
    RANDOM,
    CloudExtractor,
    FeatureExtractor,
    Features,
    ImageExtractor,
    PairedExtractor,
    cloud_of,
    load_extractor,
    load_paired,
    open_checkpoint,
    paired_extractor,
    pretraining_size,
)
from geo_pretrain.training.evaluation.metrics import Interval, paired_difference
from geo_pretrain.training.evaluation.progress import Progress, part_of
from geo_pretrain.training.recipe import DataSpec, recipe_of
from geo_pretrain.training.tasks.matching import one_match_each, sample_matches

COUNTERPART = 1.5  # voxels: a voxel nearer than this, in the world, is a true counterpart, as in pre-training
THRESHOLDS = {"px": 4.0, "voxels": 2.0}  # within which a match is right

# How the cloud of a frame is held before it is voxelized. "camera": as its camera sees it. "full": rotated about its
# centroid at random, as PointContrast does; "upright": the world rotated about its z axis, as CSC does.
Turn = Literal["camera", "full", "upright"]
Unit = Literal["px", "voxels"]
T = TypeVar("T")


@dataclass(frozen=True)
class MatchingResult:
    """Matching recall of a network; `per_pair` has one value per pair, in order."""

    recall: float  # mean over pairs of the share of queries matched within `threshold`
    threshold: float
    per_pair: tuple[float, ...]
    queries: int  # in all
    chance: float  # recall of a uniformly drawn candidate
    unit: Unit = "px"  # of the threshold
    scenes: tuple[str, ...] = ()  # of each pair

    @property
    def spread(self) -> float:
        """Standard deviation over pairs."""
        return float(np.std(self.per_pair))

    def above(self, other: MatchingResult) -> Interval:
        """How far the recall lies above that of another network on the same pairs, with a confidence interval."""
        return paired_difference(self.per_pair, other.per_pair, self.scenes)

    @property
    def measure(self) -> str:
        """The name of the measure, such as "recall at 4 px"."""
        return f"recall {'at' if self.unit == 'px' else 'within'} {self.threshold:g} {self.unit}"


@dataclass(frozen=True)
class Matches:
    """Matches of one pair of frames: the true position and the nearest-feature position of each query.

    Images: (u, v) px. Clouds: points in the world, m, where query and truth are the same. Pixels and voxels of a frame:
    voxel coordinates.
    """

    pair: Pair
    frames: tuple[Frame, ...]  # at the size that was matched
    query: np.ndarray  # float64 [N, D]
    truth: np.ndarray  # float64 [N, D]
    predicted: np.ndarray  # float64 [N, D]
    error: np.ndarray  # float64 [N], distance between truth and prediction: px or voxels
    chance: float  # share of the candidates that would be right


def evaluate_matching(
    extractor: FeatureExtractor | PairedExtractor,
    source: Source,
    pairs: Sequence[Pair],
    *,
    size: tuple[int, int],
    threshold: float | None = None,
    turn: Turn = "camera",
    queries: int = 500,
    seed: int = 0,
    skips: SkippedFrames | None = None,
    progress: Progress | None = None,
) -> MatchingResult:
    """Measure matching recall over held-out pairs, whose frames are brought to `size` (height, width).

    A 2D network matches the pixels of two images, a 3D one the voxels of two clouds; two networks with one feature
    space match pixels of a pair's first frame with its voxels.

    Args:
        threshold: within which a match is right; None: 4 pixels (of images of `size`), 2 voxels.
        turn: of clouds.
        queries: drawn for each pair among those whose counterpart is known.

    Raises:
        DataError: no pair could be read.
    """
    unit = unit_of(extractor)
    within = THRESHOLDS[unit] if threshold is None else threshold
    skips = skips if skips is not None else SkippedFrames()
    options: dict[str, Any] = {"size": size, "threshold": within, "turn": turn, "queries": queries}
    recalls, chances, scenes, total = [], [], [], 0
    for number, pair in enumerate(pairs):
        if progress is not None:
            progress(number, len(pairs))
        try:
            matches = match_pair(extractor, source, pair, seed=seed + number, **options)
        except BadFrame as bad:
            skips.add(bad)
            continue
        recalls.append(float((matches.error <= within).mean()))
        chances.append(matches.chance)
        scenes.append(pair.scene)
        total += len(matches.error)
    if progress is not None:
        progress(len(pairs), len(pairs))
    if not recalls:
        raise DataError(f"No pair of source {source.name!r} could be evaluated.\n{skips.summary()}")
    return MatchingResult(
        float(np.mean(recalls)), within, tuple(recalls), total, float(np.mean(chances)), unit, tuple(scenes)
    )


def unit_of(extractor: FeatureExtractor | PairedExtractor) -> Unit:
    """Unit of the distance between matches."""
    return "px" if isinstance(extractor, ImageExtractor) else "voxels"


@torch.no_grad()
def match_pair(
    extractor: FeatureExtractor | PairedExtractor,
    source: Source,
    pair: Pair,
    *,
    size: tuple[int, int],
    threshold: float | None = None,
    turn: Turn = "camera",
    queries: int = 500,
    seed: int = 0,
) -> Matches:
    """Match one pair by the nearest feature; arguments as for `evaluate_matching`. Raises `BadFrame`."""
    threshold = THRESHOLDS[unit_of(extractor)] if threshold is None else threshold
    if isinstance(extractor, PairedExtractor):
        frame = resize_frame(source.load(pair.scene, pair.frame1), size)
        return _match_modalities(extractor, pair, frame, threshold, queries, seed)
    frame1, frame2 = (resize_frame(source.load(pair.scene, frame), size) for frame in (pair.frame1, pair.frame2))
    if isinstance(extractor, CloudExtractor):
        return _match_clouds(extractor, pair, frame1, frame2, turn, threshold, queries, seed)
    return _match_images(extractor, pair, frame1, frame2, threshold, queries, seed)


def _match_images(
    extractor: FeatureExtractor, pair: Pair, frame1: Frame, frame2: Frame, threshold: float, queries: int, seed: int
) -> Matches:
    """Match pixels of frame 1 that frame 2 sees (projection, depth within 5 cm) among all cells of the other map.

    A cell of a map at half resolution stands for its center, between four pixels; of a map as large as the image for
    its pixel.
    """
    pixel1, pixel2, has_match = sample_matches(true_pixels(frame1, frame2)[None], [seed], queries)
    if not has_match.item():
        raise _no_match(pair)
    features1, features2 = extractor.extract_frame(frame1), extractor.extract_frame(frame2)
    best = nearest_row(features1.rows_at(pixel1[0]), features2.rows)
    height, width = frame1.depth.shape
    chance = min(1.0, float(np.pi * threshold**2 / (height * width)))
    query, truth, predicted = _uv(pixel1[0], width), _uv(pixel2[0], width), features2.positions[best].numpy()
    return Matches(pair, (frame1, frame2), query, truth, predicted, _distance(truth, predicted), chance)


def _match_clouds(
    extractor: CloudExtractor,
    pair: Pair,
    frame1: Frame,
    frame2: Frame,
    turn: Turn,
    threshold: float,
    queries: int,
    seed: int,
) -> Matches:
    """Match voxels of cloud 1 with a counterpart in cloud 2 among all its voxels; a voxel lies at its first point."""
    generator, voxel_size = torch.Generator().manual_seed(seed), extractor.voxel_size
    features1, features2 = (extract_turned(extractor, frame, turn, generator)[1] for frame in (frame1, frame2))
    world1, world2 = features1.positions, features2.positions
    counterparts = radius_matches(world1, world2, COUNTERPART * voxel_size)
    if not len(counterparts):
        raise _no_match(pair)
    row = one_match_each(counterparts, queries, generator)[:, 0]
    best = nearest_row(features1.rows[row], features2.rows)
    chance = chance_within(world1[row], world2, threshold * voxel_size)
    query, predicted = world1[row].numpy(), world2[best].numpy()
    error = _distance(query, predicted) / voxel_size
    return Matches(pair, (frame1, frame2), query, query, predicted, error, chance)


def extract_turned(
    extractor: CloudExtractor, frame: Frame, turn: Turn, generator: torch.Generator
) -> tuple[Surface, Features]:
    """A frame's cloud and its features after rotating it as `turn` says; positions stay those in the world."""
    cloud = cloud_of(frame)
    if turn == "camera":
        to_network = torch.linalg.inv(torch.from_numpy(frame.cam_to_world).double())
    else:
        to_network = random_rotation(generator, turn) @ centered(torch.from_numpy(cloud.points).double())
    return cloud, extractor.extract_surface(cloud, [], to_network=to_network)


def _match_modalities(
    extractor: PairedExtractor, pair: Pair, frame: Frame, threshold: float, queries: int, seed: int
) -> Matches:
    """Match pixels of a frame among all its voxels; see `PairedExtractor.correspond`."""
    generator = torch.Generator().manual_seed(seed)
    shown = extractor.correspond(frame, queries, generator)
    best = nearest_row(shown.pixels, shown.candidates.rows)
    voxels = shown.candidates.positions
    chance = chance_within(voxels[shown.voxels], voxels, threshold)
    truth, predicted = voxels[shown.voxels].numpy(), voxels[best].numpy()
    return Matches(pair, (frame,), truth, truth, predicted, _distance(truth, predicted), chance)


def compare_matching(
    backbone: str,
    spec: DataSpec,
    *,
    size: tuple[int, int] | None = None,
    count: int = 100,
    threshold: float | None = None,
    turn: Turn = "camera",
    seed: int = 0,
    skips: SkippedFrames | None = None,
    progress: Progress | None = None,
) -> dict[str, MatchingResult]:
    """Measure matching recall of a backbone (catalog name or folder) and of its random-init baseline.

    Pixels for a 2D backbone, voxels for a 3D one. An encoder without a decoder matches its maps, see `EncoderMaps`.

    Args:
        size: of the frames; None: that of pre-training.
        count: pairs, spread evenly over all that `spec` allows.
        threshold: None: 4 pixels, or 2 voxels.
        turn: of the clouds of a 3D backbone.
        seed: of queries, turns and random weights.
    """
    source = open_on_disk(spec, split="val")
    checkpoint = open_checkpoint(backbone)
    if isinstance(checkpoint.contract, VoxelContract):
        cubic_voxel_size(checkpoint.contract)  # refuse what cannot be measured before anything is rendered
    spec = replace(spec, size=size or pretraining_size(checkpoint, spec.size))
    skips = skips if skips is not None else SkippedFrames()
    source = open_source(spec, split="val") if source is None else source
    pairs = spread_evenly(find_pairs(source, spec, skips=skips), count)
    extractors = {
        RANDOM: load_extractor(checkpoint.folder, random_init=True, seed=seed),
        backbone: load_extractor(checkpoint.folder),
    }
    options: dict[str, Any] = {"size": spec.size, "threshold": threshold, "turn": turn, "seed": seed, "skips": skips}
    return _evaluate_each(extractors, source, pairs, progress, options)


def compare_pixel_to_voxel(
    folder: str,
    spec: DataSpec,
    *,
    count: int = 100,
    threshold: float = 2.0,
    seed: int = 0,
    skips: SkippedFrames | None = None,
    progress: Progress | None = None,
) -> dict[str, MatchingResult]:
    """Compare pixel-to-voxel recall of a pri3d_geo, pri3d_view_geo, ppkt or img2pc folder with random initialization.

    The random-init baseline re-initializes all of Pri3D; of taught networks only the student and the projections.
    Frames have the size of pre-training; `count` of them are spread evenly over those of `spec`.
    """
    source = open_on_disk(spec, split="val")
    networks = {RANDOM: load_paired(folder, random_init=True, seed=seed), folder: load_paired(folder)}
    recipe = recipe_of(open_checkpoint(folder))
    spec = replace(spec, size=spec.size if recipe is None else recipe.data.size)
    skips = skips if skips is not None else SkippedFrames()
    taught = isinstance(networks[folder], FeaturePair)
    if taught:
        spec = replace(spec, units="frames")
    source = open_source(spec, split="val") if source is None else source
    frames = spread_evenly(find_pairs(source, spec, skips=skips), count) if taught else spread_frames(source, count)
    surfaces = Surfaces(source)
    extractors = {name: paired_extractor(both, surfaces) for name, both in networks.items()}
    options: dict[str, Any] = {"size": spec.size, "threshold": threshold, "seed": seed, "skips": skips}
    return _evaluate_each(extractors, source, frames, progress, options)


def _evaluate_each(
    extractors: Mapping[str, FeatureExtractor | PairedExtractor],
    source: Source,
    pairs: Sequence[Pair],
    progress: Progress | None,
    options: Mapping[str, Any],
) -> dict[str, MatchingResult]:
    """Measure several extractors on the same pairs, with one progress for all."""
    return {
        name: evaluate_matching(
            extractor, source, pairs, progress=part_of(progress, number, len(extractors)), **options
        )
        for number, (name, extractor) in enumerate(extractors.items())
    }


def spread_frames(source: Source, count: int) -> list[Pair]:
    """Choose at most `count` frames, each paired with itself, spread evenly over all scenes two neighbors at a time."""
    twos = []
    for scene in source.scenes():
        ids = source.frame_ids(scene)
        twos += [(scene, first, second) for first, second in zip(ids[::2], ids[1::2], strict=False)]
    chosen = spread_evenly(twos, max(1, count // 2))
    return [Pair(scene, frame, frame, 1.0) for scene, *frames in chosen for frame in frames]


def nearest_row(query: Tensor, candidates: Tensor) -> Tensor:
    """Find for each query [Q, C] the row of `candidates` [N, C] with the largest cosine: int64 [Q], CPU."""
    return (F.normalize(query, dim=-1) @ F.normalize(candidates, dim=-1).T).argmax(-1).cpu()


def chance_within(truth: Tensor, candidates: Tensor, radius: float) -> float:
    """Share of candidate positions [N, 3] within `radius` of a true position [Q, 3], mean over queries."""
    exact = "donot_use_mm_for_euclid_dist"
    near = [torch.cdist(part, candidates, compute_mode=exact) <= radius for part in truth.split(64)]
    return float(torch.cat(near).double().mean())


def _distance(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Euclidean distance of each row: float64 [N]."""
    distance: np.ndarray = np.linalg.norm(predicted - truth, axis=-1)
    return distance


def _no_match(pair: Pair) -> BadFrame:
    return BadFrame(f"{pair.scene}/{pair.frame1}-{pair.frame2}", "pair has no match")


def true_pixels(frame1: Frame, frame2: Frame) -> Tensor:
    """The pixel of frame 2 that sees what each pixel of frame 1 sees: int64 [H * W], flat, -1 where none does."""
    columns = [[f.depth, f.intrinsics.astype(np.float32), f.cam_to_world] for f in (frame1, frame2)]
    cameras = [torch.from_numpy(np.ascontiguousarray(columns[k][c]))[None] for c in range(3) for k in range(2)]
    return match_pixels(*cameras)[0]


def _uv(pixel: Tensor, width: int) -> np.ndarray:
    """Flat pixel indices [N] as (u, v): float64 [N, 2]."""
    return torch.stack([pixel % width, pixel // width], -1).double().numpy()
