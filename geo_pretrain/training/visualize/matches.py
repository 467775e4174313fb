"""Matches between two views, drawn as lines: pixels of two images, or voxels of the clouds of two frames.

Pri3D (Hou et al., ICCV 2021), fig. 10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import BadFrame, CheckpointError, DataError, RecipeError
from geo_pretrain.files import atomic_write
from geo_pretrain.training.data.frame import Frame, Skips, Source
from geo_pretrain.training.data.mining import Pair, find_pairs, resize_frame
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.data.surfaces.fusing import cubic_voxel_size, frame_cloud
from geo_pretrain.training.evaluation.cloud_matching import CloudMatches, Turn, match_clouds
from geo_pretrain.training.evaluation.comparison import dense_network, random_twin
from geo_pretrain.training.evaluation.matching import PairMatches, match_pair
from geo_pretrain.training.evaluation.recall import spread_evenly
from geo_pretrain.training.recipe import DataSpec
from geo_pretrain.training.visualize.common import (
    Progress,
    check_suffix,
    chosen_scene,
    painted,
    picture_size,
    settled,
    shortened,
)
from geo_pretrain.training.visualize.features import RANDOM, Opened, find_backbone
from geo_pretrain.training.visualize.grids import draw_matches
from geo_pretrain.training.visualize.splat import behind_camera, splat

SCENES = 4  # rooms that are there to choose from
SCRATCH = "scratch"  # what random weights are called on the command line
PANEL = 2 * 256  # px: two images side by side, as `draw_matches` makes them

Match = Callable[[Pair, int], PairMatches]


@dataclass(frozen=True)
class SeenMatches(PairMatches):
    """Matches of two clouds, seen from behind their cameras; right or wrong is decided in the world."""

    distance: np.ndarray  # [N], voxels

    @property
    def error(self) -> np.ndarray:
        """Distance between truth and prediction, voxels: [N]."""
        return self.distance


def visualize_matches(
    backbone: str,
    spec: DataSpec,
    out: Path,
    *,
    against: str | None = SCRATCH,
    scene: str | None = None,
    count: int = 3,
    size: tuple[int, int] | None = None,
    threshold: float | None = None,
    turn: Turn = "camera",
    seed: int = 0,
    device: str = "cpu",
    skips: Skips | None = None,
    progress: Progress | None = None,
) -> list[tuple[str, list[float]]]:
    """Write a PNG: `count` pairs of views, lines from queries to their nearest features, green where right.

    Args:
        backbone: a catalog name or folder; images for 2D ones (of an encoder alone its maps), clouds for 3D ones.
        against: what stands beside it: "scratch" (its own random weights), another backbone of its kind, None: nothing.
        scene: None: pairs are spread over `count` scenes.
        size: of the frames; None: that of pre-training.
        threshold: within which a match is right; None: 4 pixels, 2 voxels.
        turn: of the clouds, see `cloud_matching.Turn`.
        seed: of queries, turns and random weights.

    Returns:
        Each column's title and the share of right matches of each pair shown, in the order of the picture.

    Raises:
        RecipeError: `out` is no .png, or `backbone` is "scratch".
        CheckpointError: voxels that RGB-D cannot give, or a backbone of another kind beside.
        DataError: no pair can be shown; UnknownName: a backbone or scene that there is not.
    """
    check_suffix(out, [".png"])
    skips = skips if skips is not None else Skips()
    if backbone == SCRATCH:
        raise RecipeError(
            f"{SCRATCH!r} is drawn beside a backbone; accepted as the backbone: a catalog name or a folder."
        )
    found = [find_backbone(name) for name in dict.fromkeys([backbone, against]) if name not in (None, SCRATCH)]
    for one in found:
        _check(one, found[0])
    spec = settled(spec, found[0], size, SCENES)
    source = open_source(spec, split="val")
    scenes = [chosen_scene(source, scene)] if scene else spread_evenly(source.scenes(), count)
    shown = spread_evenly(find_pairs(_SomeScenes(source, scenes), spec, skips=skips), count)
    options: dict[str, Any] = {"source": source, "size": spec.size, "turn": turn, "device": device}
    columns = [(one.title, _matcher(one, **options)) for one in found]
    if against == SCRATCH:
        columns.insert(0, (RANDOM, _matcher(found[0], random_twin(found[0].checkpoint.folder, seed), **options)))
    voxels = isinstance(found[0].checkpoint.contract, VoxelContract)
    threshold = (2.0 if voxels else 4.0) if threshold is None else threshold
    rows = []
    for number, pair in enumerate(shown):
        try:
            row = []
            for place, (_, match) in enumerate(columns):
                if progress is not None:
                    progress(number * len(columns) + place, len(shown) * len(columns))
                row.append(match(pair, seed + number))
            rows.append(row)
        except BadFrame as bad:
            skips.add(bad)
    if not rows:
        raise DataError(f"No pair of source {source.name!r} can be shown.\n{skips.summary()}")
    titles = [shortened(title, PANEL) for title, _ in columns]
    with atomic_write(out, suffix=out.suffix) as temporary:
        draw_matches(rows, titles, temporary, threshold=threshold, unit="voxels" if voxels else "px")
    return [
        (title, [float((row[k].error <= threshold).mean()) for row in rows]) for k, (title, _) in enumerate(columns)
    ]


class _SomeScenes:
    """Some scenes of a source: pairs of all of them would take hours to find, for a picture of three."""

    def __init__(self, source: Source, scenes: list[str]) -> None:
        self._scenes, self.name = scenes, source.name
        self.frame_ids, self.load, self.fingerprint = source.frame_ids, source.load, source.fingerprint

    def scenes(self) -> list[str]:
        return self._scenes


def _check(one: Opened, first: Opened) -> None:
    contract = one.checkpoint.contract
    if isinstance(contract, VoxelContract):
        cubic_voxel_size(contract)
    if type(contract) is not type(first.checkpoint.contract):
        raise CheckpointError(
            f"{one.name!r} takes {contract}; beside {first.name!r} are accepted networks that take "
            f"{'images' if isinstance(first.checkpoint.contract, ImageContract) else 'voxels'}, or {SCRATCH!r}."
        )


def _matcher(
    found: Opened, network: Any = None, *, source: Source, size: tuple[int, int], turn: Turn, device: str
) -> Match:
    """What matches a pair with the network of a checkpoint, or with `network` in its place."""
    contract = found.checkpoint.contract
    if network is None:
        network = dense_network(found.checkpoint.folder)
    network = network.to(device)
    if isinstance(contract, VoxelContract):
        return partial(_match_clouds, network, contract, source, size, turn)

    def match(pair: Pair, seed: int) -> PairMatches:
        return match_pair(network, contract, source, pair, size=size, seed=seed)

    return match


def _match_clouds(
    network: Any, contract: VoxelContract, source: Source, size: tuple[int, int], turn: Turn, pair: Pair, seed: int
) -> PairMatches:
    matches = match_clouds(network, contract, source, pair, size=size, turn=turn, seed=seed)
    frames = [resize_frame(source.load(pair.scene, frame), size) for frame in (pair.frame1, pair.frame2)]
    return seen_matches(matches, frames[0], frames[1])


def seen_matches(matches: CloudMatches, frame1: Frame, frame2: Frame) -> SeenMatches:
    """Matches of the clouds of two frames, with pictures of the clouds in place of the images; pixels are theirs."""
    drawn, cameras = [], []
    for frame in (frame1, frame2):
        cloud = frame_cloud(frame)
        points = torch.from_numpy(cloud.points)
        camera = behind_camera(points, frame, picture_size(frame))
        row = splat(points, camera, matches.voxel_size / 2)
        drawn.append(replace(frame, color=painted(cloud.colors, row)))
        cameras.append(camera)
    query, truth, predicted = (
        camera.project(torch.from_numpy(points))[0].numpy()
        for camera, points in (
            (cameras[0], matches.query),
            (cameras[1], matches.query),
            (cameras[1], matches.predicted),
        )
    )
    return SeenMatches(matches.pair, drawn[0], drawn[1], query, truth, predicted, matches.error)
