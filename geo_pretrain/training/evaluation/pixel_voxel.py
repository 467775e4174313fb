"""Pixels to voxels in a common space (Pri3D, PPKT, img2pc): is the nearest voxel on the surface the pixel shows?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from geo_pretrain import hub
from geo_pretrain.backbones.feature_pair import FeaturePair
from geo_pretrain.checkpoint import Checkpoint, read_weights
from geo_pretrain.errors import BadFrame, CheckpointError, WeightsMismatch
from geo_pretrain.geometry import seen_at
from geo_pretrain.loading import load_backbone, load_pair
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.frame import Skips, Source
from geo_pretrain.training.data.mining import Pair, resize_frame
from geo_pretrain.training.data.samples.frame_clouds import FrameCloudSpec, frame_voxels
from geo_pretrain.training.data.surfaces.fusing import cubic_voxel_size
from geo_pretrain.training.evaluation.recall import MatchingResult, average_recall, chance_within, nearest_row
from geo_pretrain.training.recipe import AugmentSpec, Recipe, recipe_of
from geo_pretrain.training.tasks import build_task
from geo_pretrain.training.tasks.clouds import encode, one_match_each
from geo_pretrain.training.tasks.pri3d import Pri3D, gather_cells, half_resolution_cell

PLAIN = AugmentSpec(jitter_prob=0, grayscale_prob=0, blur_prob=0)
ACCEPTED = "accepted: folders that a recipe of task pri3d_geo or pri3d_view_geo wrote"


@dataclass(frozen=True)
class VoxelMatches:
    """The matches of one frame: where the queried pixels' surface is, and what the features chose."""

    truth: np.ndarray  # float64 [N, 3], voxels of the chunk
    predicted: np.ndarray  # [N, 3]
    chance: float  # share of the chunk's voxels that would be right

    @property
    def error(self) -> np.ndarray:
        """Distance between truth and prediction, voxels: [N]; exact, for many lie at the threshold."""
        return np.linalg.norm(self.predicted - self.truth, axis=-1)


def load_pri3d(folder: str, *, pretrained: bool = True, seed: int = 0) -> Pri3D:
    """Both networks and projections of a checkpoint folder, in eval mode, with samples that are not augmented.

    A folder converted from an authors' file takes its catalog entry's recipe.

    `pretrained=False`: the same with random weights, drawn from `seed`. Raises `CheckpointError` for a folder without
    the 3D part.
    """
    opened = hub.open(folder)
    found = opened.fetch(*opened.network_roles(), optional=("heads", "recipe"))
    if "heads" not in found.roles:
        raise CheckpointError(f"{folder!r} has no voxel part (a file with role 'heads'); {ACCEPTED}.")
    recipe = recipe_of(found)
    if recipe is None:
        raise CheckpointError(f"{found.folder}: no recipe tells how its voxel part is built; {ACCEPTED}.")
    task = _untrained(recipe, folder, seed)
    if pretrained:
        _put_weights(task, found)
    return task.eval()


def frames_in_twos(source: Source) -> list[Pair]:
    """The frames of every scene, each once, two at a time: a sample holds two."""
    ids = {scene: source.frame_ids(scene) for scene in source.scenes()}
    return [
        Pair(scene, first, second, float("nan"))
        for scene, own in ids.items()
        for first, second in zip(own[::2], own[1::2], strict=False)
    ]


def evaluate_pixel_to_voxel(
    task: Pri3D,
    source: Source,
    pairs: Sequence[Pair],
    *,
    threshold: float = 2.0,
    queries: int = 500,
    seed: int = 0,
    skips: Skips | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MatchingResult:
    """Recall at `threshold` voxels over the frames of `pairs`, each with the chunk of surface around it.

    Args:
        task: from `load_pri3d`.
        pairs: such as `frames_in_twos` gives; their frames are looked at one by one.
        queries: pixels of each frame.
    """
    samples = task.dataset(source, list(pairs))

    @lru_cache(maxsize=1)  # a sample holds two frames
    def batch_of(number: int) -> dict[str, Any]:
        sample = samples[(0, number)]
        if sample["skipped"]:  # another pair was put in its place
            raise BadFrame(*sample["skipped"][0])
        return task.collate([sample])

    def measure(number: int, place: tuple[int, int]) -> tuple[np.ndarray, float]:
        generator = torch.Generator().manual_seed(seed + number)
        batch = batch_of(place[0])
        matches = match_frame(task, batch, place[1], threshold=threshold, queries=queries, generator=generator)
        if matches is None:
            pair = pairs[place[0]]
            raise BadFrame(f"{pair.scene}/{(pair.frame1, pair.frame2)[place[1] - 1]}", "frame sees no voxel")
        return matches.error, matches.chance

    places = [(number, view) for number in range(len(pairs)) for view in (1, 2)]
    return average_recall(
        places, measure, source=source.name, threshold=threshold, unit="voxels", skips=skips, progress=progress
    )


@torch.no_grad()
def match_frame(
    task: Pri3D, batch: Mapping[str, Any], view: int, *, threshold: float, queries: int, generator: torch.Generator
) -> VoxelMatches | None:
    """Match cells of the half-resolution map of frame `view` (1 or 2) of a batch of one with the voxels of its chunk.

    A query is a cell with one of the voxels that are seen there (center in front of the camera, depth within 5 cm);
    all voxels of the chunk are candidates, seen or not, and the nearest feature (cosine) is chosen. None when the frame
    sees no voxel.
    """
    image, coords = batch[f"image{view}"], batch[f"coords{view}"]
    places = coords[:, 1:].double()
    depth, intrinsics, pose = (batch[f"{name}{view}"][0] for name in ("depth", "intrinsics", "cam_to_world"))
    target = seen_at((places + 0.5) * task.voxel_size, depth, intrinsics, pose, rounding=task.config.rounding)
    seen = (target >= 0).nonzero()[:, 0]
    if not len(seen):
        return None
    features = task.backbone(image).float()
    cell = half_resolution_cell(target[seen], depth.shape[-1], features.shape)
    cell, voxel = one_match_each(torch.stack([cell, seen], dim=1), queries, generator).unbind(-1)
    voxels = encode(task.backbone3d, coords, batch[f"feats{view}"], low_precision=False)
    best = nearest_row(task.w2d(gather_cells(features, cell[None])[0]), task.w3d(voxels))
    chance = chance_within(places[voxel], places, threshold)
    return VoxelMatches(places[voxel].numpy(), places[best].numpy(), chance)


def evaluate_pair(
    pair: FeaturePair,
    source: Source,
    frames: Sequence[Pair],
    *,
    size: tuple[int, int],
    threshold: float = 2.0,
    queries: int = 500,
    seed: int = 0,
    skips: Skips | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MatchingResult:
    """Recall at `threshold` voxels from the pixels of a frame to the voxels of its own cloud, over the frames.

    Args:
        pair: from `load_pair`.
        frames: paired with themselves, as `data.units: frames` gives them.
        size: of the frames, (height, width).
        queries: pixels of each frame, at most one in a voxel.
    """

    def measure(number: int, frame: Pair) -> tuple[np.ndarray, float]:
        matches = match_own_voxels(
            pair, source, frame, size=size, threshold=threshold, queries=queries, seed=seed + number
        )
        return matches.error, matches.chance

    return average_recall(
        frames, measure, source=source.name, threshold=threshold, unit="voxels", skips=skips, progress=progress
    )


@torch.no_grad()
def match_own_voxels(
    pair: FeaturePair,
    source: Source,
    place: Pair,
    *,
    size: tuple[int, int],
    threshold: float = 2.0,
    queries: int = 500,
    seed: int = 0,
) -> VoxelMatches:
    """Match pixels of one frame (the first of `place`) with all voxels of its cloud, in the world's axes, by cosine.

    Each voxel stands for its first pixel, and queries are such pixels. Raises `BadFrame`.
    """
    frame = resize_frame(source.load(place.scene, place.frame1), size)
    if not frame.depth.any():
        raise BadFrame(f"{frame.scene}/{frame.id}", "no pixel has a valid depth")
    contract, device = pair.point_contract, next(pair.parameters()).device
    spec = FrameCloudSpec(
        voxel_size=cubic_voxel_size(contract), features="rgb" if contract.given_channels else "ones", rotation="none"
    )
    generator = torch.Generator().manual_seed(seed)
    voxels = frame_voxels(frame, spec, generator)
    feats = voxels["feats"] + 0.5 + contract.offset if contract.given_channels else voxels["feats"]
    coords = torch.cat([torch.zeros_like(voxels["coords"][:, :1]), voxels["coords"]], dim=1)
    chosen = torch.randperm(len(coords), generator=generator)[:queries]
    image = pair.image_contract.transforms(resize=False)(frame.color)[None].to(device)
    pixels = pair.encode_image(image)[0].flatten(1).T[voxels["pixel"][chosen].to(device)]
    best = nearest_row(pixels, pair.encode_voxels(SparseTensor(coords.to(device), feats.to(device)))).cpu()
    places = voxels["coords"].double()
    chance = chance_within(places[chosen], places, threshold)
    return VoxelMatches(places[chosen].numpy(), places[best].numpy(), chance)


def random_pair(folder: str, seed: int = 0) -> FeaturePair:
    """The pair of a checkpoint folder with the folder's own network and all projections drawn from `seed` instead."""
    pair = load_pair(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = load_backbone(folder, pretrained=False)
        pair.get_submodule("point_network").load_state_dict(fresh.state_dict())
        for layer in (pair.image_projection, pair.point_projection):
            if layer is not None:
                layer.reset_parameters()
    return pair


def _untrained(recipe: Recipe, folder: str, seed: int) -> Pri3D:
    if recipe.model is not None:
        recipe = replace(recipe, model=replace(recipe.model, init="scratch"))  # what it started from is not needed
    recipe = replace(recipe, seed=seed, data=replace(recipe.data, augment=PLAIN))
    _, task = build_task(recipe)
    if not isinstance(task, Pri3D) or not task.config.geo:
        raise CheckpointError(f"{folder!r} was trained by task {recipe.task['name']!r}, without voxels; {ACCEPTED}.")
    return task


def _put_weights(task: Pri3D, found: Checkpoint) -> None:
    state = read_weights(found, "heads")
    for role in found.network_roles():
        state |= {f"backbone.{role}.{key}": value for key, value in read_weights(found, role).items()}
    try:
        task.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsMismatch(f"{found.folder}: the weights do not fit the folder's own recipe: {error}") from error
