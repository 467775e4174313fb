"""The colored surface of a scene: the source's own, or fused from its depth frames; kept in a cache."""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import BadFrame, CheckpointError, DataError
from geo_pretrain.geometry import backproject, transform
from geo_pretrain.hub.cache import default_cache
from geo_pretrain.sparse.coordinates import unique_rows
from geo_pretrain.training.data.cache import cached_arrays
from geo_pretrain.training.data.frame import Frame, NoSurface, SceneSurface, Source, Surface, capability

FUSION_VOXEL = 0.01  # m; points of all frames in one voxel become one point
_FUSION_PIXELS = 320 * 240  # of a frame: 640x480 gains nothing at 1 cm
_PENDING = 2_000_000  # voxels held unmerged
_REMEMBERED = 128 << 20  # bytes of surfaces that a `Surfaces` holds: dozens of rooms, a few real scans


def scene_surface(source: Source, scene: str, *, cache_dir: Path | None = None) -> Surface:
    """The surface of a scene: `source.surface(scene)` where the source has one, else fused from its depth frames.

    A `FrameRange` fuses its own frames only; a source's own surface is taken whole. `cache_dir` holds fused surfaces
    (default: the package's cache).

    Raises:
        DataError: the source's own surface is broken, or no frame can be read.
    """
    return Surfaces(source, cache_dir).load(scene)


class Surfaces:
    """The surfaces of a source, for repeated use: the latest ones and the source's fingerprint are remembered."""

    def __init__(self, source: Source, cache_dir: Path | None = None) -> None:
        self.source, self.cache_dir = source, cache_dir
        self._fingerprint: str | None = None
        self._surfaces: OrderedDict[str, Surface] = OrderedDict()  # the latest last

    def load(self, scene: str) -> Surface:
        """As `scene_surface`."""
        if scene not in self._surfaces:
            self._surfaces[scene] = self._find(scene)
            while len(self._surfaces) > 1 and sum(s.nbytes for s in self._surfaces.values()) > _REMEMBERED:
                self._surfaces.popitem(last=False)
        self._surfaces.move_to_end(scene)
        return self._surfaces[scene]

    def _find(self, scene: str) -> Surface:
        own = capability(self.source, SceneSurface)
        if own is not None:
            with contextlib.suppress(NoSurface):
                return own.surface(scene)
        if self._fingerprint is None:
            self._fingerprint = self.source.fingerprint()
        key = hashlib.sha256(f"1\0{self._fingerprint}\0{scene}".encode()).hexdigest()[:16]
        path = (self.cache_dir or default_cache()) / "surfaces" / f"{self.source.name}-{key}.safetensors"
        return cached_surface(path, lambda: fuse(_readable_frames(self.source, scene)))


def cached_surface(path: Path, make: Callable[[], Surface]) -> Surface:
    """The surface in a file; made and written there when the file is missing or damaged."""

    def arrays() -> dict[str, np.ndarray]:
        surface = make()
        return {"points": surface.points, "colors": surface.colors}

    return Surface(**cached_arrays(path, arrays, "surface"))


def frame_cloud(frame: Frame, step: int = 1) -> Surface:
    """The pixels of a frame that have a depth, back-projected to the world; every `step`-th row and column."""
    depth, intrinsics = torch.from_numpy(frame.depth).double(), torch.from_numpy(frame.intrinsics)
    use = torch.zeros_like(depth, dtype=torch.bool)
    use[::step, ::step] = depth[::step, ::step] > 0
    points = transform(backproject(depth, intrinsics)[use.flatten()], torch.from_numpy(frame.cam_to_world).double())
    return Surface(points.float().numpy(), frame.color[use.numpy()])


def cubic_voxel_size(contract: VoxelContract) -> float:
    """The edge of a contract's voxels, m. Raises `CheckpointError` when RGB-D frames cannot be made into them."""
    if isinstance(contract.voxel_size, tuple) or contract.given_channels not in ((), ("R", "G", "B")):
        raise CheckpointError(
            f"The network expects {contract}. RGB-D frames give cubic voxels with features R, G, B or constant 1."
        )
    return contract.voxel_size


def fuse(frames: Iterable[Frame], voxel_size: float = FUSION_VOXEL) -> Surface:
    """The mean point and color in every voxel that the depth of some frame falls into, first seen first.

    Frames are merged as they come: memory is that of the surface, not of the frames.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    limit = _PENDING
    for frame in frames:
        cloud = frame_cloud(frame, max(1, round((frame.depth.size / _FUSION_PIXELS) ** 0.5)))
        points, colors = torch.from_numpy(cloud.points).double(), torch.from_numpy(cloud.colors).double()
        sums = torch.cat([points, colors, torch.ones(len(points), 1, dtype=torch.float64)], dim=1)
        parts.append(_merge([(torch.floor(points / voxel_size).long(), sums)]))
        if sum(len(cells) for cells, _ in parts) > limit:
            parts = [_merge(parts)]
            limit = max(_PENDING, 2 * len(parts[0][0]))
    if not parts:
        raise DataError("No frame to fuse a surface from.")
    _, sums = _merge(parts)
    means = sums[:, :6] / sums[:, 6:]
    return Surface(means[:, :3].float().numpy(), means[:, 3:].round().to(torch.uint8).numpy())


def _merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Add up the sums [N, 7] of equal cells [N, 3]."""
    cells, sums = (torch.cat(column) for column in zip(*parts, strict=True))
    index, inverse = unique_rows(cells)
    return cells[index], sums.new_zeros(len(index), sums.shape[1]).index_add_(0, inverse, sums)


def _readable_frames(source: Source, scene: str) -> Iterator[Frame]:
    found = False
    for frame_id in source.frame_ids(scene):
        with contextlib.suppress(BadFrame):
            yield source.load(scene, frame_id)
            found = True
    if not found:
        raise DataError(f"Scene {scene!r} of source {source.name!r} has no readable frame to fuse a surface from.")
