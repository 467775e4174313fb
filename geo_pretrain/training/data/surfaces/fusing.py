"""Surfaces of scenes: loaded from the source or fused from its depth frames, and cached."""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import BadFrame, CheckpointError, DataError
from geo_pretrain.geometry import backproject, transform
from geo_pretrain.hub.cache import default_cache
from geo_pretrain.progress import shown_items
from geo_pretrain.rooms import SurfacePoints
from geo_pretrain.sparse.coordinates import unique_rows
from geo_pretrain.training.data.cache import cached_arrays
from geo_pretrain.training.data.frame import Frame, NoSurface, SceneSurface, Source, Surface, capability, unposed_scenes

FUSION_VOXEL = 0.01  # m; points of all frames in one voxel become one point
SPACING = 0.02  # m; the voxel of `fuse_points`, about as dense as the vertices of ScanNet's meshes
NEAREST_DEPTH = 0.5  # m; the weight of depth stops growing below this
_FUSION_PIXELS = 320 * 240  # used per frame: 640x480 gains nothing at 1 cm
_PENDING = 2_000_000  # voxels held before they are merged
_REMEMBERED = 128 << 20  # bytes of surfaces that a `Surfaces` keeps: dozens of rooms, a few real scans


class Surfaces:
    """The surfaces of a source for repeated use: keeps the latest ones and the source's fingerprint in memory.

    `cache_dir` holds fused surfaces (default: the package's cache).
    """

    def __init__(self, source: Source, cache_dir: Path | None = None) -> None:
        self.source, self.cache_dir = source, cache_dir
        self._fingerprint: str | None = None
        self._surfaces: OrderedDict[str, Surface] = OrderedDict()  # the latest last

    def load(self, scene: str) -> Surface:
        """Load the surface of a scene from its source, or fuse it from the depth frames of a source without surfaces.

        A `FrameRange` fuses its own frames only; surfaces that a source holds are whole.

        Raises:
            DataError: the source's surface is broken, or no frame can be read.
        """
        if scene not in self._surfaces:
            self._surfaces[scene] = self._find(scene)
            kept = self._surfaces.values()
            while len(kept) > 1 and sum(s.points.nbytes + s.colors.nbytes for s in kept) > _REMEMBERED:
                self._surfaces.popitem(last=False)
        self._surfaces.move_to_end(scene)
        return self._surfaces[scene]

    def _find(self, scene: str) -> Surface:
        whole = capability(self.source, SceneSurface)
        if whole is not None:
            with contextlib.suppress(NoSurface):
                return whole.surface(scene)
        if self._fingerprint is None:
            self._fingerprint = self.source.fingerprint()
        key = hashlib.sha256(f"1\0{self._fingerprint}\0{scene}".encode()).hexdigest()[:16]
        path = (self.cache_dir or default_cache()) / "surfaces" / f"{self.source.name}-{key}.safetensors"
        frames = readable_frames(self.source, scene, "fuse a surface from")
        count = len(self.source.frame_ids(scene))
        return cached_surface(path, lambda: fuse(shown_items(frames, "fusing surfaces", scene, count)))


def cached_surface(path: Path, make: Callable[[], Surface | SurfacePoints]) -> Surface:
    """Read a surface from a file; make and write it when the file is missing or damaged."""

    def arrays() -> dict[str, np.ndarray]:
        surface = make()
        return {"points": surface.points, "colors": surface.colors}

    return Surface(**cached_arrays(path, arrays, "surface"))


def frame_cloud(frame: Frame, step: int = 1) -> Surface:
    """Back-project the pixels with a depth, in every `step`-th row and column, to colored world points."""
    depth, intrinsics = torch.from_numpy(frame.depth).double(), torch.from_numpy(frame.intrinsics)
    use = torch.zeros_like(depth, dtype=torch.bool)
    use[::step, ::step] = depth[::step, ::step] > 0
    points = transform(backproject(depth, intrinsics)[use.flatten()], torch.from_numpy(frame.cam_to_world).double())
    return Surface(points.float().numpy(), frame.color[use.numpy()])


def cubic_voxel_size(contract: VoxelContract) -> float:
    """Return the edge length (m) of a contract's voxels. Raises `CheckpointError` if RGB-D frames cannot give them."""
    if isinstance(contract.voxel_size, tuple) or contract.given_channels not in ((), ("R", "G", "B")):
        raise CheckpointError(
            f"The network expects {contract}. RGB-D frames give cubic voxels with features R, G, B or constant 1."
        )
    return contract.voxel_size


def fuse(frames: Iterable[Frame], voxel_size: float = FUSION_VOXEL) -> Surface:
    """Fuse depth frames into one colored point per occupied voxel, the mean of its pixels; first seen first."""
    voxels = _VoxelSums()
    for frame in frames:
        cloud = frame_cloud(frame, _fusion_step(frame))
        points, colors = torch.from_numpy(cloud.points).double(), torch.from_numpy(cloud.colors).double()
        sums = torch.cat([points, colors, torch.ones(len(points), 1, dtype=torch.float64)], dim=1)
        voxels.add(torch.floor(points / voxel_size).long(), sums)
    _, sums = voxels.merged("fuse a surface from")
    means = sums[:, :6] / sums[:, 6:]
    return Surface(means[:, :3].float().numpy(), means[:, 3:].round().to(torch.uint8).numpy())


@dataclass(frozen=True)
class FusedPoints:
    """The depth frames of a scene as one point per occupied voxel of 2 cm, first seen first."""

    points: np.ndarray  # float32 [N, 3] m, the weighted mean of the voxel's pixels
    towards: np.ndarray  # float32 [N, 3], the weighted mean of the unit directions from them to their cameras
    weights: np.ndarray  # float64 [N], the sum of their weights
    labels: np.ndarray  # int64 [N], the label with the largest weight (ties: the lowest); -1 for none


def fuse_points(frames: Iterable[Frame], labels: Callable[[Frame], np.ndarray] | None = None) -> FusedPoints:
    """Fuse depth frames into weighted points with viewing directions, and optionally the labels of their pixels.

    A pixel weighs 1 / z^4, the inverse variance of depth from disparity, whose error grows with z^2: without it the
    noise of far frames outnumbers near ones. Both sides of a sheet thinner than a voxel are merged into one point.

    Args:
        labels: the label of every pixel of a frame, int64 [H, W], -1 for none.
    """
    voxels = _VoxelSums()
    for frame in frames:
        step = _fusion_step(frame)
        points = torch.from_numpy(frame_cloud(frame, step).points).double()
        towards = torch.from_numpy(frame.cam_to_world[:3, 3]) - points
        towards /= towards.norm(dim=1, keepdim=True)
        depth = frame.depth[::step, ::step]
        label = np.full(depth.shape, -1) if labels is None else labels(frame)[::step, ::step]
        weight = torch.from_numpy(depth[depth > 0]).double().clamp(min=NEAREST_DEPTH)[:, None] ** -4
        cells = torch.cat([torch.floor(points / SPACING).long(), torch.from_numpy(label[depth > 0])[:, None]], dim=1)
        voxels.add(cells, torch.cat([points * weight, towards * weight, weight], dim=1))
    cells, sums = voxels.merged("take points from")
    total, majority = _by_voxel(cells, sums)
    means = (total[:, :6] / total[:, 6:]).float().numpy()
    return FusedPoints(means[:, :3].copy(), means[:, 3:].copy(), total[:, 6].numpy().copy(), majority)


@dataclass(frozen=True)
class LabelledSurface:
    """The depth frames of a scene as one colored, labelled point per occupied voxel, first seen first."""

    points: np.ndarray  # float32 [N, 3] m, the mean of the voxel's pixels
    colors: np.ndarray  # uint8 [N, 3], their mean
    labels: np.ndarray  # int64 [N], the label that most of them have (ties: the lowest)


def fuse_labelled(
    frames: Iterable[Frame], labels: Callable[[Frame], np.ndarray], voxel_size: float = SPACING
) -> LabelledSurface:
    """Fuse depth frames into one labelled point per voxel; each pixel counts once, in its voxel's mean and its vote.

    Args:
        labels: the label of every pixel of a frame, int64 [H, W].
    """
    voxels = _VoxelSums()
    for frame in frames:
        step = _fusion_step(frame)
        cloud = frame_cloud(frame, step)
        points, colors = torch.from_numpy(cloud.points).double(), torch.from_numpy(cloud.colors).double()
        label = torch.from_numpy(labels(frame)[::step, ::step][frame.depth[::step, ::step] > 0])
        cells = torch.cat([torch.floor(points / voxel_size).long(), label[:, None]], dim=1)
        voxels.add(cells, torch.cat([points, colors, torch.ones(len(points), 1, dtype=torch.float64)], dim=1))
    total, majority = _by_voxel(*voxels.merged("fuse a labelled surface from"))
    means = total[:, :6] / total[:, 6:]
    return LabelledSurface(means[:, :3].float().numpy(), means[:, 3:].round().to(torch.uint8).numpy(), majority)


def _by_voxel(cells: Tensor, sums: Tensor) -> tuple[Tensor, np.ndarray]:
    """Join the cells (x, y, z, label) of a voxel: sums [N, 7] of all, and the label with the largest last sum [N]."""
    index, group = unique_rows(cells[:, :3])
    total = sums.new_zeros(len(index), 7).index_add_(0, group, sums)
    majority = np.empty(len(index), np.int64)
    winners_last = np.lexsort((-cells[:, 3].numpy(), sums[:, 6].numpy()))
    majority[group.numpy()[winners_last]] = cells[:, 3].numpy()[winners_last]
    return total, majority


class _VoxelSums:
    """Sums of values per cell, merged as frames come: memory grows with the surface, not with the frames."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._limit = _PENDING

    def add(self, cells: Tensor, values: Tensor) -> None:
        """Add the values [N, 7] of cells int64 [N, D]."""
        self._parts.append(_merge([(cells, values)]))
        if sum(len(cells) for cells, _ in self._parts) > self._limit:
            self._parts = [_merge(self._parts)]
            self._limit = max(_PENDING, 2 * len(self._parts[0][0]))

    def merged(self, purpose: str) -> tuple[Tensor, Tensor]:
        """Unique cells, first seen first, and the sums of their values. Raises `DataError` when no frame was added."""
        if not self._parts:
            raise DataError(f"No frame to {purpose}.")
        return _merge(self._parts)


def _merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sum the values [N, 7] of equal cells [N, D]."""
    cells, sums = (torch.cat(column) for column in zip(*parts, strict=True))
    index, inverse = unique_rows(cells)
    return cells[index], sums.new_zeros(len(index), sums.shape[1]).index_add_(0, inverse, sums)


def _fusion_step(frame: Frame) -> int:
    """Take every n-th row and column, so that about `_FUSION_PIXELS` pixels remain."""
    return max(1, round((frame.depth.size / _FUSION_PIXELS) ** 0.5))


def readable_frames(source: Source, scene: str, purpose: str) -> Iterator[Frame]:
    """Load the frames of a scene but broken ones. Raises `DataError` naming the `purpose` when none is left.

    So it does for a scene without poses.
    """
    if (reason := unposed_scenes(source).get(scene)) is not None:
        raise DataError(f"{reason}. This was to {purpose}.")
    empty = True
    for frame_id in source.frame_ids(scene):
        with contextlib.suppress(BadFrame):
            frame = source.load(scene, frame_id)
            empty = False
            yield frame
    if empty:
        raise DataError(f"Scene {scene!r} of source {source.name!r} has no readable frame to {purpose}.")
