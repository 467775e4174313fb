"""The frames that a check looks at: a few places in a few scenes, and at each the frames that follow in time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from geo_pretrain.errors import BadFrame
from geo_pretrain.training.data.frame import Frame, SkippedFrames, Source, resize_frame
from geo_pretrain.training.data.mining import spread_evenly

GAPS = (0, 1, 2, 4, 8, 16, 32)  # frames after a place
FEW = 12  # frames of a scene that are all taken, every one with every other
TURNED = 60.0  # degrees; frames turned more see little in common
HEIGHT = 120  # px of the depth that is projected


@dataclass(frozen=True)
class Extent:
    """How much a check looks at."""

    scenes: int = 3
    places: int = 4  # in each scene
    gaps: tuple[int, ...] = GAPS


FULL = Extent()
QUICK = Extent(scenes=2, places=2, gaps=(0, 1, 4, 16))


@dataclass
class Sample:
    """Loaded frames and what was learned by loading them."""

    scenes: int  # of the source
    total: int  # frames of the source
    frames: list[Frame] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # of each frame in its scene's order
    pairs: list[tuple[int, int]] = field(default_factory=list)  # indices of frames to be compared
    skips: SkippedFrames = field(default_factory=SkippedFrames)
    tried: int = 0  # frames that were asked for
    seconds: float = 0.0  # to load one

    @property
    def posed(self) -> list[int]:
        """Indices of frames that have poses."""
        return [i for i, frame in enumerate(self.frames) if getattr(frame, "posed", True)]

    def small(self) -> list[Frame]:
        """The frames at one size, `HEIGHT` high or as high as the first one."""
        height, width = self.frames[0].depth.shape
        size = (min(HEIGHT, height), round(width * min(HEIGHT, height) / height))
        return [resize_frame(frame, size) for frame in self.frames]


def load_sample(source: Source, extent: Extent = FULL) -> Sample:
    """Load some frames of a source. Those that cannot be read are in `skips`, with path and reason."""
    names = source.scenes()
    sample = Sample(len(names), sum(len(source.frame_ids(scene)) for scene in names))
    start = time.perf_counter()
    for scene in spread_evenly(names, extent.scenes):
        known: dict[int, int | None] = {}
        for group in _groups(len(source.frame_ids(scene)), extent):
            _load_group(source, scene, group, sample, known)
    sample.seconds = (time.perf_counter() - start) / max(sample.tried, 1)
    return sample


def turn(pose1: np.ndarray, pose2: np.ndarray) -> float:
    """Degrees between two camera directions and rolls; the same for inverse poses and for other camera axes."""
    cosine = (np.trace(pose1[:3, :3].T @ pose2[:3, :3]) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def _groups(count: int, extent: Extent) -> list[list[int]]:
    """Positions of frames to load, in groups: every two frames of a group may see the same surfaces."""
    if count <= FEW:
        return [list(range(count))] if count else []
    last = max(count - 1 - extent.gaps[-1], count // 2)
    starts = spread_evenly(range(last + 1), extent.places)
    return [[start + gap for gap in extent.gaps if start + gap < count] for start in starts]


def _load_group(
    source: Source, scene: str, positions: Sequence[int], sample: Sample, known: dict[int, int | None]
) -> None:
    """Load a group of frames; `known`: those of groups before, position -> index in the sample, None for bad ones."""
    ids = source.frame_ids(scene)
    for position in positions:
        if position in known:
            continue
        sample.tried += 1
        known[position] = None
        try:
            frame = source.load(scene, ids[position])
        except BadFrame as bad:
            sample.skips.add(bad)
            continue
        known[position] = len(sample.frames)
        sample.frames.append(frame)
        sample.positions.append(position)
    loaded = [index for position in positions if (index := known[position]) is not None]
    every = len(ids) <= FEW
    pairs = combinations(loaded, 2) if every else ((loaded[0], other) for other in loaded[1:])
    poses = [frame.cam_to_world for frame in sample.frames]
    sample.pairs += [(i, j) for i, j in pairs if {i, j} <= set(sample.posed) and turn(poses[i], poses[j]) <= TURNED]
