"""Labelled clouds as samples: points drawn and augmented, voxels with features, labels and instances, and batches.

Every draw of a training sample comes from its generator; an evaluation sample is a function of the cloud and its id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from geo_pretrain.contract import COLORS, VoxelContract
from geo_pretrain.errors import BadFrame, require
from geo_pretrain.sparse.coordinates import Voxels
from geo_pretrain.training.cloud_recipe import CloudSpec, VoxelLabels
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.voxels import majority_label
from geo_pretrain.training.data.samples import cloud_augment as steps

RGB = ("R", "G", "B")
WIDE = 100.0  # m; rooms in centimeters are wider
# How to name fields, and how to do without them; predicting cannot: the network is trained by then.
WAYS_OUT = (
    "fields of other names are the options color and intensity (finetune: --set data.options.color=NAME, predict: "
    "--option color=NAME; Python: {'points': ..., 'colors': ...}). Without any: fine-tune with "
    "--set data.cloud.features=ones"
)


@dataclass(frozen=True)
class CloudSample:
    """A cloud as input of a network, with its labels and the way back to the cloud's own points."""

    id: str
    coords: Tensor  # int32 [M, 4], rows (0, x, y, z), unique
    feats: Tensor  # float32 [M, C], as the contract says
    labels: Tensor | None  # int64 [M], 0 = ignored, 1..C; None: the cloud's points are not labelled
    instances: Tensor | None  # int64 [M], 0 = of no object
    points: Tensor  # float32 [P, 3] m: the points drawn or cropped, augmented
    chosen: Tensor  # int64 [P]: which of the cloud's points these are
    inverse: Tensor  # int64 [P]: the voxel of each; -1 where dropout removed it
    index: Tensor  # int64 [M]: row in `points` of the point that a voxel has its features from
    motion: Tensor  # float64 [4, 4], from the cloud's frame to that of `points` (elastic distortion apart)

    def __len__(self) -> int:
        return len(self.coords)


def training_sample(
    cloud: LabelledCloud, spec: CloudSpec, contract: VoxelContract, generator: torch.Generator
) -> CloudSample:
    """Draw, augment and voxelize a cloud. Raises `BadFrame` when no point is left."""
    augment = spec.augment
    points, chosen, motion = _drawn(cloud, spec, generator)
    points = steps.distorted(points, augment, generator)
    if augment.crop is not None:
        inside = steps.crop_rows(points, augment.crop, generator)
        points, chosen = points[inside], chosen[inside]
        if not len(points):
            raise BadFrame(cloud.id, f"no point in a random cube of {2 * augment.crop.half:g} m{_unit_hint(cloud)}")
    change = steps.random_motion(points, augment, generator)
    points = steps.jittered(steps.moved(points, change), augment, generator)
    return _voxelized(cloud, points, chosen, change @ motion, spec, contract, generator)


def evaluation_sample(cloud: LabelledCloud, spec: CloudSpec, contract: VoxelContract) -> CloudSample:
    """Voxelize a cloud without augmentation; where `spec` draws points or bounds the cloud, by the cloud's id alone."""
    seed = int.from_bytes(hashlib.sha256(cloud.id.encode()).digest()[:8], "big") >> 1
    points, chosen, motion = _drawn(cloud, spec, torch.Generator().manual_seed(seed))
    if spec.bounds is not None:
        inside = steps.cube_rows(points, steps.box_center(points), spec.bounds)
        points, chosen = points[inside], chosen[inside]
        if not len(points):
            raise BadFrame(cloud.id, f"no point in a cube of {2 * spec.bounds:g} m")
    return _voxelized(cloud, points, chosen, motion, spec, contract, None)


def _drawn(cloud: LabelledCloud, spec: CloudSpec, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Points of a cloud, normalized, and where `spec` says so drawn: [P, 3], their rows [P], and the motion [4, 4]."""
    if not len(cloud):
        raise BadFrame(cloud.id, "the cloud has no point")
    points = torch.from_numpy(cloud.points)
    motion = torch.eye(4, dtype=torch.float64)
    if spec.normalize == "unit_sphere":
        motion = steps.unit_sphere(points)
        points = steps.moved(points, motion)
    chosen = torch.arange(len(points))
    if spec.points is not None:
        chosen = steps.draw_rows(len(points), spec.points, generator)
    return points[chosen], chosen, motion


def _voxelized(
    cloud: LabelledCloud,
    points: Tensor,
    chosen: Tensor,
    motion: Tensor,
    spec: CloudSpec,
    contract: VoxelContract,
    generator: torch.Generator | None,
) -> CloudSample:
    """Voxelize points [P, 3] of a cloud, with augmentation of voxels and colors where there is a generator."""
    try:
        voxels = replace(contract, channels=("one",)).transforms()(points)
    except ValueError as error:  # not finite, not in meters
        raise BadFrame(cloud.id, f"{str(error).rstrip('.')}{_unit_hint(cloud)}") from None
    labels, instances = voxel_targets(cloud, chosen, voxels, spec.labels)
    raw = raw_features(cloud, contract)[chosen]
    raw = raw[voxels.index] if contract.reduce == "first" else _mean(raw, voxels)
    cells, index, inverse = voxels.coords[:, 1:], voxels.index, voxels.inverse
    if spec.align:
        cells = cells - cells.amin(dim=0)
    if generator is not None:
        kept = steps.kept_voxels(len(cells), spec.augment, generator)
        if kept is not None:
            cells, index, raw = cells[kept], index[kept], raw[kept]
            labels = None if labels is None else labels[kept]
            instances = None if instances is None else instances[kept]
            place = torch.full((len(voxels.coords),), -1, dtype=torch.int64)
            place[kept] = torch.arange(len(kept))
            inverse = place[inverse]
        cells = steps.flipped(cells, spec.augment, generator)
        if contract.given_channels[:3] == RGB:
            raw = torch.cat([steps.augmented_colors(raw[:, :3], spec.augment, generator), raw[:, 3:]], dim=1)
        cells = steps.shifted(cells, spec.augment, generator)
    in_color = torch.tensor([255.0 if name in COLORS else 1.0 for name in contract.given_channels])
    feats = contract.scaled(raw / in_color)
    coords = F.pad(cells, (1, 0))
    return CloudSample(cloud.id, coords, feats, labels, instances, points, chosen, inverse, index, motion)


def _unit_hint(cloud: LabelledCloud) -> str:
    """What to say of a cloud that is wider than scans are; "" of others."""
    extent = float(np.ptp(cloud.points, axis=0).max())
    if not extent > WIDE:
        return ""
    return (
        f"; the cloud is {extent:.4g} m wide. If its coordinates are no meters, give the option scale: 0.01 of "
        "centimeters, 0.001 of millimeters (finetune: --set data.options.scale=..., predict: --option scale=...)"
    )


def raw_features(cloud: LabelledCloud, contract: VoxelContract) -> Tensor:
    """The channels that `contract` wants of each point: float32 [N, given], colors from 0 to 255, remission to 1.

    Raises `BadFrame`, which names the ways out, for a channel that the cloud does not have: of clouds in a mixture
    those without it are left out.
    """
    columns = []
    for name in contract.given_channels:
        if name in RGB and cloud.colors is not None:
            columns.append(torch.from_numpy(cloud.colors[:, RGB.index(name)]).float())
        elif name == "intensity" and cloud.intensity is not None:
            columns.append(torch.from_numpy(cloud.intensity).float().clamp(0, 1))
        else:
            raise BadFrame(cloud.id, f"has {_has(cloud)}; the network takes {name!r}: {_ways_out(cloud)}")
    return torch.stack(columns, dim=1) if columns else torch.zeros(len(cloud), 0)


def _has(cloud: LabelledCloud) -> str:
    has = [name for name, value in (("colors", cloud.colors), ("remission", cloud.intensity)) if value is not None]
    return " and ".join(has) or "neither colors nor remission"


def _ways_out(cloud: LabelledCloud) -> str:
    if cloud.intensity is None:
        return WAYS_OUT
    return WAYS_OUT.replace("=ones", "=gray (remission in all channels), =mean, =intensity or =ones")


def voxel_targets(
    cloud: LabelledCloud, chosen: Tensor, voxels: Voxels, rule: VoxelLabels
) -> tuple[Tensor | None, Tensor | None]:
    """Label and instance of each voxel, int64 [M] each, None where the cloud has none.

    A voxel's instance is that of its points with the voxel's label; 0 where these are of several, as the released code,
    which ignores such voxels, and where the voxel has no label.
    """
    labels = None if cloud.labels is None else torch.from_numpy(cloud.labels)[chosen]
    instances = None if cloud.instances is None else torch.from_numpy(cloud.instances)[chosen]
    if labels is None:
        return None, None if instances is None else instances[voxels.index]
    by_voxel = voxel_labels(labels, voxels.inverse, voxels.index, rule)
    if instances is None:
        return by_voxel, None
    fits = (labels > 0) & (labels == by_voxel[voxels.inverse])
    low, high = _extremes(instances[fits], voxels.inverse[fits], len(voxels.coords))
    return by_voxel, torch.where(low == high, low, 0)


def voxel_labels(labels: Tensor, inverse: Tensor, index: Tensor, rule: VoxelLabels) -> Tensor:
    """One label for each voxel from those of its points [P]: int64 [M]; the rules are those of `CloudSpec.labels`.

    `inverse` [P]: the voxel of each point; `index` [M]: the first point of each voxel.
    """
    first = labels[index]
    if rule == "majority":
        return majority_label(labels, inverse, len(index))
    if rule == "first":
        return first
    counted = labels > 0 if rule == "agree_known" else torch.ones_like(labels, dtype=torch.bool)
    low, high = _extremes(labels[counted], inverse[counted], len(index))
    return torch.where(low == high, low, 0)


def _extremes(values: Tensor, inverse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The smallest and largest of the values [P] of each voxel, int64 [count] each; voxels without a value differ."""
    low = torch.full((count,), torch.iinfo(torch.int64).max).scatter_reduce(0, inverse, values, reduce="amin")
    return low, torch.full((count,), -1).scatter_reduce(0, inverse, values, reduce="amax")


def voxel_of_points(sample: CloudSample, cloud: LabelledCloud) -> Tensor:
    """The voxel that speaks for each point of a cloud: int64 [N].

    For a point that was not drawn, or lies outside the bounds, it is the voxel of the nearest point that has one.
    """
    voxel = torch.full((len(cloud),), -1)
    voxel[sample.chosen] = sample.inverse
    missing = (voxel < 0).numpy()
    if missing.any():
        tree = require("scipy.spatial", "training").cKDTree(cloud.points[~missing])
        voxel[missing] = voxel[~missing][tree.query(cloud.points[missing])[1]]
    return voxel


def _mean(raw: Tensor, voxels: Voxels) -> Tensor:
    total = raw.new_zeros(len(voxels.coords), raw.shape[1]).index_add(0, voxels.inverse, raw)
    return total / torch.bincount(voxels.inverse, minlength=len(voxels.coords))[:, None]


def within_limit(samples: Sequence[CloudSample], limit: int | None) -> list[CloudSample]:
    """The samples of a micro-batch up to the first that makes it larger than `limit` voxels; at least one."""
    kept: list[CloudSample] = []
    total = 0
    for sample in samples:
        total += len(sample)
        if limit is not None and total > limit and kept:
            break
        kept.append(sample)
    return kept


def collate_voxels(samples: Sequence[CloudSample], limit: int | None = None) -> dict[str, Any]:
    """Join samples to a batch, leaving out surplus ones: coords int32 [N, 4], feats [N, C], labels and instances [N].

    labels and instances are missing where a sample has none; "counts" has the voxels of each sample, "dropped" the
    number of samples that were left out (the loop logs it).
    """
    kept = within_limit(samples, limit)
    coords = [F.pad(sample.coords[:, 1:], (1, 0), value=number) for number, sample in enumerate(kept)]
    batch: dict[str, Any] = {"coords": torch.cat(coords), "feats": torch.cat([sample.feats for sample in kept])}
    for name in ("labels", "instances"):
        values = [getattr(sample, name) for sample in kept]
        if all(value is not None for value in values):
            batch[name] = torch.cat(values)
    return batch | {"counts": [len(sample) for sample in kept], "dropped": len(samples) - len(kept)}
