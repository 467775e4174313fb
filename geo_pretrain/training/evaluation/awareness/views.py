"""Frames to measure with, their labels made of depth, what is held out, and pairs of them by viewpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.geometry import match_pixels
from geo_pretrain.training.data.frame import Frame, SkippedFrames, Source, resize_frame, unposed_scenes
from geo_pretrain.training.data.mining import spread_evenly
from geo_pretrain.training.evaluation.awareness.spec import ANGLES, HELD_OUT, AwarenessSpec
from geo_pretrain.training.evaluation.progress import Progress
from geo_pretrain.training.geometry3d.normals import depth_normals
from geo_pretrain.training.tasks.matching import sample_matches

LEAST_MATCHES = 0.02  # of an image's pixels must have a counterpart in the other one
TRIES = 20  # pairs that are looked at for each one wanted
MARGIN = 0.1  # of a block of frames in time, left out at each border with another block


@dataclass(frozen=True)
class Split:
    """Frames to fit probes to, by group, and frames to judge them by."""

    fitted: dict[int, list[int]]
    judged: list[int]


class Views:
    """Frames at the working size, with groups of which some are held out: scenes, or blocks in time of one scene.

    `groups`: of each frame, -1 for one in the margin between blocks, which no probe sees.
    """

    def __init__(self, frames: Sequence[Frame], spec: AwarenessSpec) -> None:
        """Group the frames, which lie scene by scene in order of time. Raises `DataError` for too few."""
        self.frames, self.spec = list(frames), spec
        scenes = list(dict.fromkeys(frame.scene for frame in frames))
        self.by_scene = len(scenes) > 1
        if self.by_scene:
            self.groups = [scenes.index(frame.scene) for frame in frames]
        else:
            self.groups = time_blocks(len(self.frames), min(spec.blocks, len(self.frames)))
        self.count = len(set(self.groups) - {-1})
        if self.count < 2:
            raise DataError(
                f"{len(self.frames)} frames of one scene make {self.count} blocks in time; probes need 2: give "
                "more frames, scenes or blocks."
            )

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def rule(self) -> str:
        """What is held out, in words."""
        held, kind = len(self.held_out(0)), "scenes" if self.by_scene else "blocks in time of the one scene"
        return f"{held} of {self.count} {kind} held out, others with each seed"

    def held_out(self, seed: int) -> list[int]:
        """The groups that a seed holds out: others with each seed, as long as there are others."""
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(0)).tolist()
        size = max(1, round(self.count * HELD_OUT))
        return sorted({order[(seed * size + k) % self.count] for k in range(size)})

    def split(self, seed: int) -> Split:
        """The frames of a seed's probes."""
        out = self.held_out(seed)
        fitted: dict[int, list[int]] = {group: [] for group in range(self.count) if group not in out}
        for number, group in enumerate(self.groups):
            if group in fitted:
                fitted[group].append(number)
        return Split(fitted, [number for number, group in enumerate(self.groups) if group in out])

    @cached_property
    def places(self) -> Tensor:
        """The places of all frames, every `stride` pixels: int64 [S, 2], (row, column)."""
        rows, columns = self.axes
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)

    @property
    def axes(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the places."""
        height, width = self.spec.size
        step = self.spec.stride
        return torch.arange(step // 2, height, step), torch.arange(step // 2, width, step)

    @cached_property
    def flat(self) -> Tensor:
        """The flat pixel of each place: int64 [S]."""
        return self.places[:, 0] * self.spec.size[1] + self.places[:, 1]

    @cached_property
    def depth(self) -> list[Tensor]:
        """Of each frame the depth at the places: float32 [S] m, 0 = invalid."""
        return [torch.from_numpy(frame.depth).flatten()[self.flat] for frame in self.frames]

    @cached_property
    def normals(self) -> list[Tensor]:
        """Of each frame the normals at the places: float32 [S, 3], camera frame, 0 = unknown."""
        return [
            depth_normals(torch.from_numpy(frame.depth), torch.from_numpy(frame.intrinsics), self.flat)
            for frame in self.frames
        ]

    @cached_property
    def labels(self) -> list[Tensor] | None:
        """Of each frame the classes at the places: int64 [S], 0 = none; None where a frame has no labels."""
        found = [frame.semantic for frame in self.frames]
        if any(labels is None for labels in found):
            return None
        return [torch.from_numpy(np.asarray(one, np.int64)).flatten()[self.flat] for one in found]


def time_blocks(count: int, blocks: int) -> list[int]:
    """Cut a sequence in time into equal blocks; frames at a border between two are in none (-1).

    >>> time_blocks(20, 2)
    [0, 0, 0, 0, 0, 0, 0, 0, 0, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    """
    edges = [round(count * k / blocks) for k in range(blocks + 1)]
    groups = [k for k, (low, high) in enumerate(pairwise(edges)) for _ in range(low, high)]
    margin = math.ceil(MARGIN * count / blocks) if count >= 4 * blocks else 0
    for edge in edges[1:-1]:
        groups[edge - margin : edge + margin] = [-1] * (2 * margin)
    return groups


def read_views(source: Source, spec: AwarenessSpec, skips: SkippedFrames, progress: Progress | None = None) -> Views:
    """Read `spec.frames` frames, spread evenly over the posed scenes of a source; broken ones are skipped.

    Raises `DataError` when fewer than 4 can be read.
    """
    for scene, reason in (without := unposed_scenes(source)).items():
        skips.add(BadFrame(scene, reason.reason))
    scenes = [scene for scene in source.scenes() if scene not in without]
    chosen = [(scene, id) for scene, ids in _shared(source, scenes, spec.frames) for id in ids]
    frames = []
    for number, (scene, id) in enumerate(chosen):
        try:
            frame = resize_frame(source.load(scene, id), spec.size)
            if not frame.depth.any():
                raise BadFrame(f"{scene}/{id}", "no pixel has a valid depth")
            frames.append(frame)
        except BadFrame as bad:
            skips.add(bad)
        if progress is not None:
            progress(number + 1, len(chosen))
    if len(frames) < 4:
        found = f"Source {source.name!r} has {len(frames)} frames to measure with, at least 4 are needed."
        raise DataError(f"{found}\n{skips.summary()}".rstrip())
    return Views(frames, spec)


def _shared(source: Source, scenes: Sequence[str], count: int) -> Iterator[tuple[str, list[str]]]:
    """Scenes, with equally many frames of each in order of time."""
    scenes = spread_evenly(list(scenes), count)
    for number, scene in enumerate(scenes):
        share = count * (number + 1) // len(scenes) - count * number // len(scenes)
        yield scene, spread_evenly(source.frame_ids(scene), share)


@dataclass(frozen=True)
class ViewPair:
    """Two frames and pixels of the same surface points."""

    first: int
    second: int
    angle: float  # degrees between the cameras' orientations
    bin: int  # of ANGLES
    pixel1: Tensor  # int64 [Q], flat
    pixel2: Tensor  # int64 [Q]


def view_angles(poses: Tensor) -> Tensor:
    """Angles of the rotations between cameras [N, 4, 4]: float64 [N, N], degrees from 0 to 180.

    From the chord of unit rotations, |R1 - R2| = 2 sqrt(2) sin(angle / 2), which is exact near 0 as well.
    """
    flat = poses[:, :3, :3].double().reshape(len(poses), 9)
    chord = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.rad2deg(2 * torch.asin((chord / math.sqrt(8)).clamp(max=1)))


def bin_of(angle: float) -> int:
    """The bin of `ANGLES`, [low, high) each, the last one closed."""
    return next((k for k, (_, high) in enumerate(ANGLES) if angle < high), len(ANGLES) - 1)


def draw_pairs(views: Views, seed: int) -> list[ViewPair]:
    """Draw `spec.pairs` pairs of frames of a scene for each bin of angles, with at least 2 % of the pixels in common.

    In random order, at most 20 candidates are looked at for each pair wanted. Queries have a counterpart, by projection
    and depth within 5 cm. Raises `DataError` when there is no pair at all.
    """
    generator = torch.Generator().manual_seed(seed)
    poses = torch.stack([torch.from_numpy(np.asarray(frame.cam_to_world)) for frame in views.frames])
    angles = view_angles(poses)
    first, second = same_scene(views)
    bins = torch.bucketize(angles[first, second], torch.tensor([high for _, high in ANGLES[:-1]]).double(), right=True)
    found: list[ViewPair] = []
    for bin in range(len(ANGLES)):
        rows = (bins == bin).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)][: TRIES * views.spec.pairs]
        wanted = views.spec.pairs
        for i, j in zip(first[rows].tolist(), second[rows].tolist(), strict=True):
            if not wanted:
                break
            pixels = _common(views, i, j, seed)
            if pixels is not None:
                found.append(ViewPair(i, j, float(angles[i, j]), bin, *pixels))
                wanted -= 1
    if not found:
        raise DataError("No two frames of a scene see the same surface; matching needs frames that overlap.")
    return found


def same_scene(views: Views) -> tuple[Tensor, Tensor]:
    """All pairs of different frames of one scene: int64 [P] each."""
    scenes = {scene: number for number, scene in enumerate(dict.fromkeys(frame.scene for frame in views.frames))}
    scene = torch.tensor([scenes[frame.scene] for frame in views.frames])
    first, second = torch.triu_indices(len(views), len(views), 1)
    together = scene[first] == scene[second]
    return first[together], second[together]


def common_pixels(views: Views, i: int, j: int) -> Tensor:
    """For every pixel of frame i the one of frame j that sees the same point, -1 for none: int64 [1, H * W]."""
    frames = (views.frames[i], views.frames[j])
    columns: Any = [[f.depth, f.intrinsics.astype(np.float32), f.cam_to_world] for f in frames]
    return match_pixels(
        *(torch.from_numpy(np.ascontiguousarray(columns[k][c]))[None] for c in range(3) for k in range(2))
    )


def _common(views: Views, i: int, j: int, seed: int) -> tuple[Tensor, Tensor] | None:
    """Draw pixels of frame i that frame j sees, and those there; None for too few."""
    target = common_pixels(views, i, j)
    if int((target >= 0).sum()) < LEAST_MATCHES * target.shape[-1]:
        return None
    number = (seed * len(views) + i) * len(views) + j
    pixel1, pixel2, _ = sample_matches(target, [number], views.spec.queries)
    return pixel1[0], pixel2[0]
