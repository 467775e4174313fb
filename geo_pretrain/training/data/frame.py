"""Registered RGB-D frames, pairs of them, and the protocols of a source of frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch

from geo_pretrain import geometry
from geo_pretrain.errors import BadFrame, DataError, some

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
    posed: bool = True  # False: the recording has no poses; in `cam_to_world` only up is true, as the camera was held


@dataclass(frozen=True)
class Pair:
    """Two overlapping frames of a scene, the earlier one first; by the data set's own rule either may come first."""

    scene: str
    frame1: str
    frame2: str
    overlap: float


def resize_frame(frame: Frame, size: tuple[int, int]) -> Frame:
    """Resize a frame to `size` (height, width): every image at the nearest pixel, intrinsics adapted."""
    height, width = frame.depth.shape
    if (height, width) == size:
        return frame
    intrinsics = geometry.resize_intrinsics(torch.from_numpy(frame.intrinsics), (height, width), size).numpy()
    images = {name: getattr(frame, name) for name in ("color", "depth", "semantic", "instance")}
    resized: Any = {name: resize_image(image, size) for name, image in images.items() if image is not None}
    return replace(frame, intrinsics=intrinsics, **resized)


def resize_image(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize an image [H, W, ...] to `size` (height, width), taking the nearest pixels."""
    rows, columns = (_nearest(old, new) for old, new in zip(image.shape[:2], size, strict=True))
    return image.take(rows, axis=0).take(columns, axis=1)


@lru_cache(maxsize=64)  # frames of a recording and sizes of a recipe are few
def _nearest(old: int, new: int) -> np.ndarray:
    return np.array(geometry.nearest_indices(old, new), dtype=np.intp)


class Source(Protocol):
    """A data set of RGB-D sequences. Adding one takes a file that yields `Frame`s and a row in `registry.SOURCES`."""

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
    """Raised for a scene without a surface in its source."""


@dataclass(frozen=True)
class Surface:
    """A colored point cloud of the surfaces of a scene, or of a part of it."""

    points: np.ndarray  # float32 [N, 3], world frame, meters
    colors: np.ndarray  # uint8 [N, 3], RGB

    def __len__(self) -> int:
        return len(self.points)


# Optional capabilities of a source beyond frames. Ask with `capability(source, SceneSurface)`.


@runtime_checkable
class SceneSurface(Protocol):
    """A source that holds the surfaces of its scenes; those of other sources are fused from depth."""

    def surface(self, scene: str) -> Surface:
        """Load the colored surface of a scene. Raises `NoSurface` without one, `DataError` when it is broken."""


@runtime_checkable
class SceneMesh(Protocol):
    """A source that holds triangle meshes of its scenes."""

    def vertices(self, scene: str) -> np.ndarray:
        """Load vertices float32 [V, 3] m. Raises as `SceneSurface.surface`."""

    def triangles(self, scene: str) -> tuple[np.ndarray, np.ndarray]:
        """Load vertices float32 [V, 3] m and triangles int64 [F, 3]. Raises as `SceneSurface.surface`."""


@runtime_checkable
class SceneSegments(SceneMesh, Protocol):
    """A source whose meshes come with a released over-segmentation."""

    def segments(self, scene: str, vertices: int) -> np.ndarray | None:
        """Load the segment id of every one of `vertices` vertices, int64 [V]; None for a scene without segments."""


@runtime_checkable
class Noted(Protocol):
    """A source with a remark on its frames for the provenance of checkpoints."""

    @property
    def note(self) -> str:
        """The remark: one sentence, or ""."""


@runtime_checkable
class Unposed(Protocol):
    """A source that may hold recordings without poses, which serve tasks on single frames."""

    def unposed(self) -> list[str]:
        """Names of the scenes without poses."""


@runtime_checkable
class SampledContent(Protocol):
    """A source of files, some of whose bytes are compared when a run is resumed, beside the fingerprint."""

    def content(self) -> str:
        """A sha256 over the bytes of some of the files, the same ones each time."""


@runtime_checkable
class RawDepth(Protocol):
    """A source that shows what its depth images store, before units and markers of invalid pixels are interpreted."""

    def raw_depth(self, scene: str, frame_id: str) -> np.ndarray:
        """Read the stored values of a frame's depth, [H, W]. Raises `BadFrame`."""


@runtime_checkable
class OwnPairs(Protocol):
    """A source whose data set has its own rule for pairs, `data.measure: source`."""

    def tests(self, scene: str, ids: Sequence[str]) -> int:
        """How many pairs among some frames of a scene the rule compares."""

    def overlaps(self, scene: str, ids: Sequence[str], skips: SkippedFrames) -> Iterator[tuple[str, str, float]]:
        """Compare pairs of frames `ids`: first frame, second frame, overlap. Bad frames are added to `skips`."""


@runtime_checkable
class CommonPoints(Protocol):
    """A source that knows where two frames of a pair see the same points, on which crops are centered."""

    def common_points(self, scene: str, frame1: str, frame2: str) -> np.ndarray:
        """Load row and column in either frame, float64 [N, 4] pixels. Raises `BadFrame`."""


class SourcePart:
    """Base of sources that are part of another one, such as a range of its frames; they share its capabilities."""

    source: Source


def capability(source: Source, kind: type[T]) -> T | None:
    """Return `source`, or the whole that it is a part of, if it implements the protocol `kind`; else None."""
    while isinstance(source, SourcePart):
        source = source.source
    return source if isinstance(source, kind) else None


def unposed_scenes(source: Source) -> dict[str, BadFrame]:
    """Scenes of a source that have no poses, each with the reason why no pair, surface or set can be made of it."""
    kind = capability(source, Unposed)
    reason = (
        "scene has no poses: its frames serve tasks on single frames (PPKT, image to point cloud, MoCo); pairs, "
        "surfaces and sets need where the camera was"
    )
    return {} if kind is None else {scene: BadFrame(scene, reason) for scene in kind.unposed()}


@dataclass
class SkippedFrames:
    """Files that were left out and why, to be reported at the end of a run."""

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, bad: BadFrame) -> None:
        """Record a frame or scene; repeated calls count once."""
        self.reasons.setdefault(bad.path, bad.reason)

    def counts(self) -> dict[str, int]:
        """Number of skipped paths per reason."""
        return dict(Counter(self.reasons.values()).most_common())

    def summary(self, limit: int = 5) -> str:
        """One line per reason with its count and the first paths; "" when nothing was skipped."""
        lines = []
        for reason, count in self.counts().items():
            paths = [path for path, why in self.reasons.items() if why == reason]
            lines.append(f"skipped {count}: {reason} ({some(paths, limit)})")
        return "\n".join(lines)
