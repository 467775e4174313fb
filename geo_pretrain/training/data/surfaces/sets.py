"""Geometric sets: the pixels of all images whose surface lies in one segment of the scene.

What Geometric Set Consistency learns from (Chen et al., CVPR 2022): segments of the mesh, or, as its upper bound, the
labels of the ground truth. How a pixel finds its segment the paper does not say; here: the nearest vertex within 5 cm.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, DataError, RecipeError, nearest, require
from geo_pretrain.hub.cache import default_cache
from geo_pretrain.sparse.coordinates import unique_rows
from geo_pretrain.training.data.cache import cached_arrays
from geo_pretrain.training.data.frame import Frame, NoSurface, SceneMesh, SceneSegments, Source, capability
from geo_pretrain.training.data.mining import Pair
from geo_pretrain.training.data.samples.sampler import ATTEMPTS, Key, PairSamples
from geo_pretrain.training.data.surfaces.fusing import frame_cloud
from geo_pretrain.training.data.surfaces.oversegmentation import (
    K_THRESH,
    MIN_VERTICES,
    check_cut,
    plane_normals,
    segment_mesh,
    segment_points,
    vertex_normals,
)
from geo_pretrain.training.recipe import DataSpec

Kind = Literal["segments", "semantic", "instance"]
KINDS: tuple[Kind, ...] = ("segments", "semantic", "instance")

_WITH_LABELS = (
    "sources that have them, such as rooms, or scannet with their images unpacked and "
    "--set data.options='{labels: label-filt, instances: instance-filt}' (either alone is enough for its kind)"
)

RADIUS = 0.05  # m; a pixel farther than this from the surface is in no set
SPACING = 0.02  # m; frames are fused to a point a voxel, about as dense as the vertices of ScanNet's meshes
NEAREST = 0.5  # m; depth below this is trusted no more than here
_FRAME_PIXELS = 320 * 240  # of a frame that is fused
_PENDING = 2_000_000  # cells held unmerged
_SCENES = 8  # kept in memory by a worker
_MAPS = 128 << 20  # bytes of compressed maps of pixels kept in memory by a worker: some 20 000 frames


@dataclass(frozen=True)
class SceneSets:
    """Points on the surface of a scene, each in a set."""

    points: np.ndarray  # float32 [N, 3], world frame, meters
    ids: np.ndarray  # int64 [N]
    normals: np.ndarray | None = None  # float32 [N, 3], to where the surface is seen from, where known

    def __len__(self) -> int:
        return len(self.points)

    @cached_property
    def tree(self) -> Any:
        """A k-d tree of the points."""
        return require("scipy.spatial", "training").cKDTree(self.points)


def scene_sets(
    source: Source,
    scene: str,
    *,
    k_thresh: float = K_THRESH,
    min_vertices: int = MIN_VERTICES,
    kind: Kind = "segments",
    cache_dir: Path | None = None,
) -> SceneSets:
    """The sets of a scene.

    Of "segments": those that come with a scan where the parameters are theirs; else `segment_mesh` of the source's
    mesh; else `segment_points` of its depth frames, fused to a point in every 2 cm (`fuse_points`) with the normals of
    planes fitted there. A `FrameRange` fuses its own frames only.
    Of "semantic" or "instance": points fused from the frames, each with the label of its pixels.

    Args:
        k_thresh, min_vertices: of segments, see `segment_mesh`; for labels they mean nothing.
        cache_dir: holds segments that were computed (default: the package's cache).

    Raises:
        DataError: the source's mesh or segments are broken, no frame can be read, or frames have no such labels.
        RecipeError: a parameter is out of range.
    """
    return Sets(source, k_thresh=k_thresh, min_vertices=min_vertices, kind=kind, cache_dir=cache_dir).scene(scene)


def pixel_sets(frame: Frame, sets: SceneSets, *, radius: float = RADIUS, stride: int = 1) -> np.ndarray:
    """The set of every pixel: that of the surface point nearest to the pixel's own, int64 [H, W].

    -1 where a pixel has no depth or no surface point is closer than `radius` (m). With `stride` s only every s-th row
    and column is looked up and stands for its block of s x s pixels: taking every s-th again gives the exact map.
    """
    return _spread(_sampled_sets(frame, sets, radius, stride), frame.depth, stride)


def label_sets(frame: Frame, kind: Kind) -> np.ndarray:
    """The label of every pixel as its set, int64 [H, W]; -1 for label 0 (none) and below. `kind` is no "segments".

    Raises:
        DataError: the frame has no such labels.
    """
    labels = _labels(frame, kind)
    if labels is None:
        raise DataError(
            f"Frame {frame.id!r} of scene {frame.scene!r} has no {kind} labels, which sets of kind {kind!r} are made "
            f"of. Accepted: {_WITH_LABELS}. Without labels: kind 'segments'."
        )
    return np.where(labels > 0, labels, -1).astype(np.int64)


def check_labels(source: Source, pairs: Sequence[Pair], kind: Kind) -> None:
    """Read one frame of the pairs. Raises `DataError` when it has no labels of this `kind`."""
    for pair in pairs[:ATTEMPTS]:
        with contextlib.suppress(BadFrame):
            if _labels(source.load(pair.scene, pair.frame1), kind) is None:
                raise DataError(
                    f"'task.sets' is {kind!r}, but source {source.name!r} has no {kind} labels as it was opened. "
                    f"Accepted: {_WITH_LABELS}. Without labels: --set task.sets=segments."
                )
            return


def _labels(frame: Frame, kind: Kind) -> np.ndarray | None:
    return frame.semantic if kind == "semantic" else frame.instance


class Sets:
    """The sets of a source's scenes and frames, for repeated use: the last ones are remembered."""

    def __init__(
        self,
        source: Source,
        *,
        k_thresh: float = K_THRESH,
        min_vertices: int = MIN_VERTICES,
        kind: Kind = "segments",
        cache_dir: Path | None = None,
    ) -> None:
        if kind not in KINDS:
            listed = ", ".join(map(repr, KINDS))
            raise RecipeError(f"'kind' is {kind!r}, accepted are {listed}. Nearest: {nearest(kind, KINDS, 1)[0]!r}.")
        check_cut(k_thresh, min_vertices)
        self.source, self.kind, self.cache_dir = source, kind, cache_dir
        self.k_thresh, self.min_vertices = k_thresh, min_vertices
        self._fingerprint: str | None = None
        self._scenes: OrderedDict[str, SceneSets] = OrderedDict()
        self._maps: OrderedDict[tuple[str, str, tuple[int, ...]], bytes] = OrderedDict()
        self._bytes = 0

    def scene(self, scene: str) -> SceneSets:
        """As `scene_sets`."""
        if scene not in self._scenes:
            self._scenes[scene] = self._find(scene)
            if len(self._scenes) > _SCENES:
                self._scenes.popitem(last=False)
        self._scenes.move_to_end(scene)
        return self._scenes[scene]

    def pixels(self, frame: Frame) -> np.ndarray:
        """The set of every pixel, int64 [H, W], -1 for none: `pixel_sets` with stride 2, or `label_sets`.

        Each frame is looked up once (tens of milliseconds) and then remembered in a few kilobytes.
        """
        if self.kind != "segments":
            return label_sets(frame, self.kind)
        key = frame.scene, frame.id, frame.depth.shape
        packed = self._maps.get(key)
        if packed is None:
            ids = _sampled_sets(frame, self.scene(frame.scene), RADIUS, 2)
            packed = self._maps[key] = zlib.compress(ids.astype(np.int32).tobytes(), 1)
            self._bytes += len(packed)
        self._maps.move_to_end(key)
        while self._bytes > _MAPS:
            self._bytes -= len(self._maps.popitem(last=False)[1])
        shape = tuple((size + 1) // 2 for size in frame.depth.shape)
        ids = np.frombuffer(zlib.decompress(packed), np.int32).reshape(shape)
        return _spread(ids.astype(np.int64), frame.depth, 2)

    def _find(self, scene: str) -> SceneSets:
        if self.kind != "segments":
            fused = fuse_points(_readable(self.source, scene), self.kind)
            return SceneSets(fused.points, fused.labels, plane_normals(fused.points, fused.towards, fused.weights))
        segmented = capability(self.source, SceneSegments)
        if (self.k_thresh, self.min_vertices) == (K_THRESH, MIN_VERTICES) and segmented is not None:
            with contextlib.suppress(NoSurface):
                points = segmented.vertices(scene)
                released = segmented.segments(scene, len(points))
                if released is not None:
                    return SceneSets(points, released)
        if self._fingerprint is None:
            self._fingerprint = self.source.fingerprint()
        facts = f"1\0{self._fingerprint}\0{scene}\0{self.k_thresh!r}\0{self.min_vertices}"
        key = hashlib.sha256(facts.encode()).hexdigest()[:16]
        path = (self.cache_dir or default_cache()) / "sets" / f"{self.source.name}-{key}.safetensors"

        def make() -> dict[str, np.ndarray]:
            sets = self._segment(scene)
            normals = np.asarray(sets.normals, np.float32)
            return {"points": sets.points, "ids": sets.ids.astype(np.int32), "normals": normals}

        found = cached_arrays(path, make, "sets")
        return SceneSets(found["points"], found["ids"].astype(np.int64), found["normals"])

    def _segment(self, scene: str) -> SceneSets:
        options: dict[str, Any] = {"k_thresh": self.k_thresh, "min_vertices": self.min_vertices}
        meshed = capability(self.source, SceneMesh)
        if meshed is not None:
            with contextlib.suppress(NoSurface):
                points, faces = meshed.triangles(scene)
                return SceneSets(points, segment_mesh(points, faces, **options), vertex_normals(points, faces))
        fused = fuse_points(_readable(self.source, scene))
        normals = plane_normals(fused.points, fused.towards, fused.weights)
        return SceneSets(fused.points, segment_points(fused.points, normals, **options), normals)


class SetPairSamples(PairSamples):
    """`PairSamples` with the set of every pixel."""

    def __init__(
        self,
        source: Source,
        pairs: list[Pair],
        spec: DataSpec,
        contract: ImageContract,
        seed: int,
        *,
        k_thresh: float = K_THRESH,
        min_vertices: int = MIN_VERTICES,
        kind: Kind = "segments",
        cache_dir: Path | None = None,
    ) -> None:
        """`k_thresh`, `min_vertices`, `kind` and `cache_dir` as for `scene_sets`."""
        super().__init__(source, pairs, spec, contract, seed)
        self.sets = Sets(source, k_thresh=k_thresh, min_vertices=min_vertices, kind=kind, cache_dir=cache_dir)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """As `PairSamples`, and sets1, sets2: int64 [H, W], -1 for none.

        Both images of a pair number their sets alike. Segments are looked up at every second row and column, see
        `pixel_sets`: `sets[::2, ::2]` is the exact map at half resolution.
        """
        return super().__getitem__(key)

    def _tensors(self, frame: Frame, generator: torch.Generator) -> dict[str, Tensor]:
        return super()._tensors(frame, generator) | {"sets": torch.from_numpy(self.sets.pixels(frame))}


@dataclass(frozen=True)
class FusedPoints:
    """The depth frames of a scene as one point in every voxel of 2 cm that some pixel falls into, first seen first."""

    points: np.ndarray  # float32 [N, 3] m, the weighted mean of the voxel's pixels
    towards: np.ndarray  # float32 [N, 3], the weighted mean of the unit directions from them to their cameras
    weights: np.ndarray  # float64 [N], the sum of their weights
    labels: np.ndarray  # int64 [N], the label that most weight speaks for (the lower of equals); -1 for none


def fuse_points(frames: Iterable[Frame], kind: Kind | None = None) -> FusedPoints:
    """Fuse the depth frames of a scene and, with a `kind`, their labels.

    A pixel weighs 1 / z^4, the inverse variance of depth from disparity, whose error grows with z^2: without it the
    noise of far frames outnumbers near ones. Frames are merged as they come: memory is that of the surface. The two
    sides of a sheet thinner than a voxel fall into one point.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    limit = _PENDING
    for frame in frames:
        step = max(1, round((frame.depth.size / _FRAME_PIXELS) ** 0.5))
        points = torch.from_numpy(frame_cloud(frame, step).points).double()
        towards = torch.from_numpy(frame.cam_to_world[:3, 3]) - points
        towards /= towards.norm(dim=1, keepdim=True)
        depth = frame.depth[::step, ::step]
        label = np.full(depth.shape, -1) if kind is None else label_sets(frame, kind)[::step, ::step]
        weight = torch.from_numpy(depth[depth > 0]).double().clamp(min=NEAREST)[:, None] ** -4
        cells = torch.cat([torch.floor(points / SPACING).long(), torch.from_numpy(label[depth > 0])[:, None]], dim=1)
        parts.append(_add_up([(cells, torch.cat([points * weight, towards * weight, weight], dim=1))]))
        if sum(len(each) for each, _ in parts) > limit:
            parts = [_add_up(parts)]
            limit = max(_PENDING, 2 * len(parts[0][0]))
    if not parts:
        raise DataError("No frame to take points from.")
    cells, sums = _add_up(parts)
    index, group = unique_rows(cells[:, :3])
    total = sums.new_zeros(len(index), 7).index_add_(0, group, sums)
    means = (total[:, :6] / total[:, 6:]).float().numpy()
    labels = np.empty(len(index), np.int64)
    winners_last = np.lexsort((-cells[:, 3].numpy(), sums[:, 6].numpy()))
    labels[group.numpy()[winners_last]] = cells[:, 3].numpy()[winners_last]
    return FusedPoints(means[:, :3].copy(), means[:, 3:].copy(), total[:, 6].numpy().copy(), labels)


def _add_up(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sums [N, 7] of equal rows of cell and label [N, 4]."""
    cells, sums = (torch.cat(column) for column in zip(*parts, strict=True))
    index, group = unique_rows(cells)
    return cells[index], sums.new_zeros(len(index), sums.shape[1]).index_add_(0, group, sums)


def _sampled_sets(frame: Frame, sets: SceneSets, radius: float, stride: int) -> np.ndarray:
    """The sets of every `stride`-th row and column."""
    ids = np.full(frame.depth[::stride, ::stride].shape, -1, np.int64)
    use = frame.depth[::stride, ::stride] > 0
    if len(sets) and use.any():
        _, near = sets.tree.query(frame_cloud(frame, stride).points, distance_upper_bound=radius)
        ids[use] = np.append(sets.ids, -1)[near]
    return ids


def _spread(ids: np.ndarray, depth: np.ndarray, stride: int) -> np.ndarray:
    blocks = ids.repeat(stride, axis=0).repeat(stride, axis=1)[: depth.shape[0], : depth.shape[1]]
    return np.where(depth > 0, blocks, -1)


def _readable(source: Source, scene: str) -> Iterator[Frame]:
    found = False
    for frame_id in source.frame_ids(scene):
        try:
            frame = source.load(scene, frame_id)
        except BadFrame:
            continue
        found = True
        yield frame
    if not found:
        raise DataError(f"Scene {scene!r} of source {source.name!r} has no readable frame to take sets from.")
