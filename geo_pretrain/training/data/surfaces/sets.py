"""Geometric sets: the pixels of all images whose surface lies in the same segment of the scene.

Geometric Set Consistency (Chen et al., CVPR 2022) learns from segments of the mesh or, as an upper bound, from ground
truth labels. The paper does not say how pixels are assigned to segments; here: by the nearest vertex within 5 cm.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from geo_pretrain.errors import DataError, RecipeError, nearest, require
from geo_pretrain.hub.cache import default_cache
from geo_pretrain.training.data.cache import cached_arrays
from geo_pretrain.training.data.frame import Frame, NoSurface, SceneMesh, SceneSegments, Source, capability
from geo_pretrain.training.data.surfaces.fusing import FusedPoints, frame_cloud, fuse_points, readable_frames
from geo_pretrain.training.data.surfaces.oversegmentation import (
    K_THRESH,
    MIN_VERTICES,
    check_segmentation,
    plane_normals,
    segment_mesh,
    segment_points,
    vertex_normals,
)

Kind = Literal["segments", "semantic", "instance"]
KINDS: tuple[Kind, ...] = ("segments", "semantic", "instance")

LABEL_SOURCES = (
    "sources that have them, such as rooms, or scannet with their images unpacked and "
    "--set data.options='{labels: label-filt, instances: instance-filt}' (either alone is enough for its kind)"
)

RADIUS = 0.05  # m; pixels farther than this from the surface are in no set
_SCENES = 8  # kept in memory per worker
_MAPS = 128 << 20  # bytes of compressed pixel maps kept in memory per worker: some 20 000 frames


@dataclass(frozen=True)
class SceneSets:
    """Points on the surface of a scene, each with the id of its set."""

    points: np.ndarray  # float32 [N, 3], world frame, meters
    ids: np.ndarray  # int64 [N]
    normals: np.ndarray | None = None  # float32 [N, 3], towards the viewer, where known

    def __len__(self) -> int:
        return len(self.points)

    @cached_property
    def tree(self) -> Any:
        """The k-d tree of the points."""
        return require("scipy.spatial", "training").cKDTree(self.points)


def pixel_sets(frame: Frame, sets: SceneSets, *, radius: float = RADIUS, stride: int = 1) -> np.ndarray:
    """Assign every pixel the set of the nearest surface point: int64 [H, W].

    -1 where a pixel has no depth or no surface point is closer than `radius` (m). With `stride` s only every s-th row
    and column is looked up and repeated over its block of s x s pixels: every s-th pixel of the map is exact.
    """
    return _repeat_blocks(_sampled_sets(frame, sets, radius, stride), frame.depth, stride)


def label_sets(frame: Frame, kind: Kind) -> np.ndarray:
    """Use the labels of the pixels as their sets: int64 [H, W], -1 for labels <= 0. `kind` is not "segments".

    Raises:
        DataError: the frame has no such labels.
    """
    labels = frame_labels(frame, kind)
    if labels is None:
        raise DataError(
            f"Frame {frame.id!r} of scene {frame.scene!r} has no {kind} labels, from which sets of kind {kind!r} are "
            f"made. Accepted: {LABEL_SOURCES}. Without labels: kind 'segments'."
        )
    return np.where(labels > 0, labels, -1).astype(np.int64)


def frame_labels(frame: Frame, kind: Kind) -> np.ndarray | None:
    """The semantic or instance labels of a frame; None without them."""
    return frame.semantic if kind == "semantic" else frame.instance


class Sets:
    """The sets of a source's scenes and frames for repeated use: keeps the latest ones in memory.

    kind "segments": the segments released with a scan if the parameters equal theirs; else `segment_mesh` of the
    source's mesh; else `segment_points` of its depth frames, fused to a point per 2 cm (`fuse_points`) with normals of
    locally fitted planes. A `FrameRange` fuses its own frames only.
    kind "semantic" or "instance": points fused from the frames, each with the label of its pixels.

    Args:
        k_thresh, min_vertices: see `segment_mesh`; unused for labels.
        cache_dir: folder of computed segments (default: the package's cache).

    Raises:
        RecipeError: a parameter is out of range.
    """

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
        check_segmentation(k_thresh, min_vertices)
        self.source, self.kind, self.cache_dir = source, kind, cache_dir
        self.k_thresh, self.min_vertices = k_thresh, min_vertices
        self._fingerprint: str | None = None
        self._scenes: OrderedDict[str, SceneSets] = OrderedDict()
        self._maps: OrderedDict[tuple[str, str, tuple[int, ...]], bytes] = OrderedDict()
        self._bytes = 0

    def scene(self, scene: str) -> SceneSets:
        """Load or compute the sets of a scene.

        Raises:
            DataError: the source's mesh or segments are broken, no frame can be read, or frames have no such labels.
        """
        if scene not in self._scenes:
            self._scenes[scene] = self._find(scene)
            if len(self._scenes) > _SCENES:
                self._scenes.popitem(last=False)
        self._scenes.move_to_end(scene)
        return self._scenes[scene]

    def pixels(self, frame: Frame) -> np.ndarray:
        """Assign every pixel its set, int64 [H, W], -1 for none: `pixel_sets` with stride 2, or `label_sets`.

        Each frame is looked up once (tens of milliseconds) and then kept in memory, compressed to a few kilobytes.
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
        return _repeat_blocks(ids.astype(np.int64), frame.depth, 2)

    def _find(self, scene: str) -> SceneSets:
        if self.kind != "segments":
            fused = self._fuse(scene)
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

        arrays = cached_arrays(path, make, "sets")
        return SceneSets(arrays["points"], arrays["ids"].astype(np.int64), arrays["normals"])

    def _segment(self, scene: str) -> SceneSets:
        options: dict[str, Any] = {"k_thresh": self.k_thresh, "min_vertices": self.min_vertices}
        meshed = capability(self.source, SceneMesh)
        if meshed is not None:
            with contextlib.suppress(NoSurface):
                points, faces = meshed.triangles(scene)
                return SceneSets(points, segment_mesh(points, faces, **options), vertex_normals(points, faces))
        fused = self._fuse(scene)
        normals = plane_normals(fused.points, fused.towards, fused.weights)
        return SceneSets(fused.points, segment_points(fused.points, normals, **options), normals)

    def _fuse(self, scene: str) -> FusedPoints:
        frames = readable_frames(self.source, scene, "take sets from")
        return fuse_points(frames, None if self.kind == "segments" else partial(label_sets, kind=self.kind))


def _sampled_sets(frame: Frame, sets: SceneSets, radius: float, stride: int) -> np.ndarray:
    """Look up the sets of every `stride`-th row and column."""
    ids = np.full(frame.depth[::stride, ::stride].shape, -1, np.int64)
    use = frame.depth[::stride, ::stride] > 0
    if len(sets) and use.any():
        _, near = sets.tree.query(frame_cloud(frame, stride).points, distance_upper_bound=radius)
        ids[use] = np.append(sets.ids, -1)[near]
    return ids


def _repeat_blocks(ids: np.ndarray, depth: np.ndarray, stride: int) -> np.ndarray:
    blocks = ids.repeat(stride, axis=0).repeat(stride, axis=1)[: depth.shape[0], : depth.shape[1]]
    return np.where(depth > 0, blocks, -1)
