"""Matching of voxels between two scans: does the nearest feature lie at the same place of the scene?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import BadFrame
from geo_pretrain.geometry import centered, radius_matches, transform
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.frame import Frame, Skips, Source
from geo_pretrain.training.data.mining import Pair, resize_frame
from geo_pretrain.training.data.samples.clouds import random_rotation
from geo_pretrain.training.data.surfaces.fusing import cubic_voxel_size, frame_cloud
from geo_pretrain.training.evaluation.recall import MatchingResult, average_recall, chance_within, nearest_row
from geo_pretrain.training.tasks.clouds import one_match_each

COUNTERPART = 1.5  # voxels: a voxel nearer than this, in the world, is a true counterpart, as in pre-training

# How the cloud of a frame is held before it is cut into voxels. "camera": as its camera sees it. "full": turned about
# its centroid at random, as PointContrast does; "upright": the world turned about its z axis, as CSC does.
Turn = Literal["camera", "full", "upright"]


@dataclass(frozen=True)
class CloudMatches:
    """The matches of one pair, in the world, m: query points, and where the features put them."""

    pair: Pair
    query: np.ndarray  # [N, 3], of cloud 1; where they truly are in cloud 2 as well
    predicted: np.ndarray  # [N, 3], points of cloud 2
    voxel_size: float  # m
    chance: float  # share of the voxels of cloud 2 that would be right

    @property
    def error(self) -> np.ndarray:
        """Distance between truth and prediction, voxels: [N]."""
        return np.linalg.norm(self.predicted - self.query, axis=-1) / self.voxel_size


def evaluate_cloud_matching(
    network: nn.Module,
    contract: VoxelContract,
    source: Source,
    pairs: Sequence[Pair],
    *,
    size: tuple[int, int],
    turn: Turn = "camera",
    threshold: float = 2.0,
    queries: int = 500,
    seed: int = 0,
    skips: Skips | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MatchingResult:
    """Matching recall at `threshold` voxels over held-out pairs, whose frames become clouds at `size`.

    Args:
        network: SparseTensor to SparseTensor, features of every voxel, in eval mode: an `SRUNet`.
        contract: how the network's voxels are made.
        queries: voxels of cloud 1 drawn for each pair among those with a counterpart in cloud 2.

    Raises:
        CheckpointError: RGB-D frames have not what the contract asks for.
        DataError: no pair could be read.
    """

    def measure(number: int, pair: Pair) -> tuple[np.ndarray, float]:
        matches = match_clouds(
            network,
            contract,
            source,
            pair,
            size=size,
            turn=turn,
            threshold=threshold,
            queries=queries,
            seed=seed + number,
        )
        return matches.error, matches.chance

    return average_recall(
        pairs, measure, source=source.name, threshold=threshold, unit="voxels", skips=skips, progress=progress
    )


@torch.no_grad()
def match_clouds(
    network: nn.Module,
    contract: VoxelContract,
    source: Source,
    pair: Pair,
    *,
    size: tuple[int, int],
    turn: Turn = "camera",
    threshold: float = 2.0,
    queries: int = 500,
    seed: int = 0,
) -> CloudMatches:
    """Match voxels of one pair by the nearest feature (cosine) among all voxels of the other cloud.

    Each voxel stands for its first point. `threshold` (voxels) is that of the chance level. Raises `BadFrame`.
    """
    voxel_size = cubic_voxel_size(contract)
    generator = torch.Generator().manual_seed(seed)
    frames = (resize_frame(source.load(pair.scene, frame), size) for frame in (pair.frame1, pair.frame2))
    (features1, world1), (features2, world2) = (describe(network, contract, f, turn, generator) for f in frames)
    matches = radius_matches(world1, world2, COUNTERPART * voxel_size)
    if not len(matches):
        raise BadFrame(f"{pair.scene}/{pair.frame1}-{pair.frame2}", "pair has no match")
    row = one_match_each(matches, queries, generator)[:, 0]
    best = nearest_row(features1[row], features2)
    chance = chance_within(world1[row], world2, threshold * voxel_size)
    return CloudMatches(pair, world1[row].numpy(), world2[best].numpy(), voxel_size, chance)


def describe(
    network: nn.Module, contract: VoxelContract, frame: Frame, turn: Turn, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Features [N, C] of the voxels of a frame's cloud, and the points that stand for them: [N, 3] m, world."""
    cloud = frame_cloud(frame)
    if not len(cloud):
        raise BadFrame(f"{frame.scene}/{frame.id}", "no pixel has a valid depth")
    world, device = torch.from_numpy(cloud.points).double(), next(network.parameters()).device
    if turn == "camera":
        to_own = torch.linalg.inv(torch.from_numpy(frame.cam_to_world).double())
    else:
        to_own = random_rotation(generator, turn) @ centered(world)
    colors = torch.from_numpy(cloud.colors) if contract.given_channels else None
    voxels = contract.transforms()(transform(world, to_own).float(), colors)
    features: Tensor = network(SparseTensor(voxels.coords.to(device), voxels.feats.to(device))).feats
    return features.float().cpu(), world[voxels.index]
