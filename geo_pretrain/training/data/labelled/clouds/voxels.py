"""The voxels of labelled clouds, with one label each: a voxel is judged once, however many points it has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import DataError
from geo_pretrain.geometry import centered, transform
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.samples.augment import random_rotation
from geo_pretrain.training.data.surfaces.fusing import cubic_voxel_size


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
    if cloud.labels is None:
        raise DataError(f"Cloud {cloud.id!r} has no labels of points.")
    if contract.given_channels and cloud.colors is None:
        raise DataError(f"Cloud {cloud.id!r} has no colors; the network takes {', '.join(contract.given_channels)}.")
    colors = torch.from_numpy(cloud.colors) if contract.given_channels and cloud.colors is not None else None
    voxels = contract.transforms()(points, colors)
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
