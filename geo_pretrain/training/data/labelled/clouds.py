"""Labelled point clouds from labelled RGB-D frames, and their voxels with one label each.

The papers' protocols (PointContrast, tables 4 and 7) segment whole scans; a frame's cloud is what a labelled RGB-D
source offers. A voxel has the majority label of its points and is judged once, however many they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import DataError, RecipeError
from geo_pretrain.geometry import centered, transform
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.frame import Frame, resize_frame
from geo_pretrain.training.data.labelled.image import LabelledSource
from geo_pretrain.training.data.labelled.registry import Subset
from geo_pretrain.training.data.labelled.rooms import LabelledRooms
from geo_pretrain.training.data.samples.augment import random_rotation
from geo_pretrain.training.data.surfaces.fusing import cubic_voxel_size, frame_cloud


@dataclass(frozen=True)
class LabelledCloud:
    """The back-projected points of one frame, with labels."""

    id: str
    points: np.ndarray  # float32 [N, 3], world, z up, m
    colors: np.ndarray  # uint8 [N, 3]
    labels: np.ndarray  # int64 [N], 0 = unlabelled, 1..C


def labelled_clouds(source: LabelledSource, size: tuple[int, int] | None = None) -> list[LabelledCloud]:
    """Back-project every labelled frame of `source`, its images first resized to `size` (None: their own).

    Raises `RecipeError` for a source whose labelled images have no depth; so far only rooms has it.
    """
    clouds = [cloud_of(labelled_frame(source, id, size), id) for id in source.ids()]
    return [cloud for cloud in clouds if len(cloud.points)]


def labelled_frame(source: LabelledSource, id: str, size: tuple[int, int] | None = None) -> Frame:
    """The RGB-D frame of a labelled image, with the classes of `source`; sampled at `size` (None: its own).

    Raises `RecipeError` for a source whose labelled images have no depth.
    """
    rooms = _rooms_of(source)
    scene, _, frame_id = id.partition("/")
    frame, semantic = rooms.rooms.load(scene, frame_id), source.load(id).semantic
    if semantic is None:
        raise DataError(f"{source.name}: image {id} has no labels of pixels; open the source for segmentation.")
    frame = dataclasses.replace(frame, semantic=semantic.astype(np.int16))
    return frame if size is None else resize_frame(frame, size)


def cloud_of(frame: Frame, id: str) -> LabelledCloud:
    """The cloud of a labelled frame: a point for each pixel with a valid depth, row by row."""
    cloud, labels = frame_cloud(frame), np.asarray(frame.semantic)[frame.depth > 0]
    return LabelledCloud(id, cloud.points, cloud.colors, labels.astype(np.int64))


def voxels_of(
    cloud: LabelledCloud, contract: VoxelContract, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Voxelize a cloud: coords int32 [n, 4], feats [n, C] as `contract` says, labels int64 [n].

    `generator` draws the upright rotation of training; None leaves the cloud in the world's axes.
    """
    cubic_voxel_size(contract)  # refuses what RGB-D frames cannot be made into
    points = torch.from_numpy(cloud.points)
    if generator is not None:
        world = points.double()
        points = transform(world, random_rotation(generator, "upright") @ centered(world)).float()
    voxels = contract.transforms()(points, torch.from_numpy(cloud.colors) if contract.given_channels else None)
    labels = majority_label(torch.from_numpy(cloud.labels), voxels.inverse, len(voxels.coords))
    return voxels.coords, voxels.feats, labels


def majority_label(labels: Tensor, inverse: Tensor, count: int) -> Tensor:
    """Find the most frequent label above 0 among the points [N] of each of `count` voxels: int64 [count].

    Ties go to the smallest label; 0 where no point's label is known. `inverse` [N]: the voxel of each point.
    """
    classes = int(labels.max()) + 1 if len(labels) else 1
    votes = torch.bincount(inverse * classes + labels, minlength=count * classes).reshape(count, classes)
    votes[:, 0] = 0
    return votes.argmax(dim=1)  # the first of equal ones: 0 where there is none


def batch_voxels(
    clouds: Sequence[tuple[Tensor, Tensor, Tensor]], device: torch.device | str
) -> tuple[SparseTensor, Tensor]:
    """Join the voxels of several clouds (from `voxels_of`) into one SparseTensor, with their labels [N]."""
    rows = [F.pad(coords[:, 1:], (1, 0), value=number) for number, (coords, _, _) in enumerate(clouds)]
    feats, labels = (torch.cat([cloud[column] for cloud in clouds]) for column in (1, 2))
    return SparseTensor(torch.cat(rows).to(device), feats.to(device)), labels.to(device)


def _rooms_of(source: LabelledSource) -> LabelledRooms:
    """Return the rooms that a source is, or is a subset of; their frames have depth."""
    inner: Any = source
    while isinstance(inner, Subset):
        inner = inner.source
    if not isinstance(inner, LabelledRooms):
        raise RecipeError(f"Source {source.name!r} has no depth beside its labels; 3D networks accept: rooms.")
    return inner
