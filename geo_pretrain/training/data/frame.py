"""The frame: one registered RGB-D image with its camera, and what a source of frames must offer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from geo_pretrain.errors import BadFrame, DataError

T = TypeVar("T")


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


class NoSurface(DataError):
    """A scene for which its source holds no surface."""


@dataclass(frozen=True)
class Surface:
    """Colored points on the surfaces of a scene or of a part of it."""

    points: np.ndarray  # float32 [N, 3], world frame, meters
    colors: np.ndarray  # uint8 [N, 3], RGB

    def __len__(self) -> int:
        return len(self.points)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return self.points.nbytes + self.colors.nbytes


# What a source may offer beyond frames. Ask with `capability(source, SceneSurface)`.


@runtime_checkable
class SceneSurface(Protocol):
    """A source that holds the surface of its scenes; others have theirs fused from depth."""

    def surface(self, scene: str) -> Surface:
        """The colored surface of a scene. Raises `NoSurface` without one, `DataError` when it is broken."""


@runtime_checkable
class SceneMesh(Protocol):
    """A source that holds triangle meshes of its scenes."""

    def vertices(self, scene: str) -> np.ndarray:
        """Vertices float32 [V, 3] m. Raises as `SceneSurface.surface`."""

    def triangles(self, scene: str) -> tuple[np.ndarray, np.ndarray]:
        """Vertices float32 [V, 3] m and triangles int64 [F, 3]. Raises as `SceneSurface.surface`."""


@runtime_checkable
class SceneSegments(SceneMesh, Protocol):
    """A source whose meshes come with a released over-segmentation."""

    def segments(self, scene: str, vertices: int) -> np.ndarray | None:
        """The segment of each of so many vertices, int64 [V]; None where the scene comes without."""


@runtime_checkable
class Noted(Protocol):
    """A source with something to say about its frames, for the provenance of checkpoints."""

    @property
    def note(self) -> str:
        """One sentence, or ""."""


class SourcePart:
    """A part of another source, such as a range of its frames; capabilities are those of the whole."""

    source: Source


def capability(source: Source, kind: type[T]) -> T | None:
    """`source`, or the source that it is a part of, as one with the capability `kind`; None when it lacks it."""
    while isinstance(source, SourcePart):
        source = source.source
    return source if isinstance(source, kind) else None


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
