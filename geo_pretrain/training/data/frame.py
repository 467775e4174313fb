"""The frame: one registered RGB-D image with its camera, and what a source of frames must offer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from geo_pretrain.errors import BadFrame


@dataclass(frozen=True)
class Frame:
    """One RGB-D image whose color and depth share one pinhole camera (integer pixel centers, z forward)."""

    scene: str
    id: str
    color: np.ndarray  # uint8 [H, W, 3], RGB
    depth: np.ndarray  # float32 [H, W], meters along the optical axis, 0 = invalid
    intrinsics: np.ndarray  # float64 [3, 3]
    cam_to_world: np.ndarray  # float64 [4, 4]
    semantic: np.ndarray | None = None  # int16 [H, W], class ids of the source
    instance: np.ndarray | None = None  # int32 [H, W]


class Source(Protocol):
    """A data set of RGB-D sequences. Adding one means writing one file that yields `Frame`s."""

    name: str

    def scenes(self) -> list[str]:
        """Names of all scenes, in a fixed order."""

    def frame_ids(self, scene: str) -> list[str]:
        """Names of the frames of a scene, in order of time."""

    def load(self, scene: str, frame_id: str) -> Frame:
        """Read one frame. Raises `BadFrame` with path and reason when it cannot be used."""

    def fingerprint(self) -> str:
        """A sha256 that changes when the data change."""


@dataclass
class Skips:
    """What was left out and why, counted, to be reported at the end of a run."""

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, bad: BadFrame) -> None:
        """Remember a frame or scene once, however often it is met."""
        self.reasons.setdefault(bad.path, bad.reason)

    def counts(self) -> dict[str, int]:
        """How many paths were skipped for each reason."""
        return dict(Counter(self.reasons.values()).most_common())

    def summary(self, limit: int = 5) -> str:
        """A line a reason with its count and the first paths, or "" when nothing was skipped."""
        lines = []
        for reason, count in self.counts().items():
            paths = [path for path, why in self.reasons.items() if why == reason]
            more = f" and {count - limit} more" if count > limit else ""
            lines.append(f"skipped {count}: {reason} ({', '.join(paths[:limit])}{more})")
        return "\n".join(lines)
