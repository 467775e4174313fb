"""Rooms as a source of frames: rendered once, kept in a cache that survives crashes, corruption and company.

A scene is one safetensors file, written to a temporary name and renamed. Its header holds the digest of its bytes: a
file that does not match is rendered again. `manifest.json` beside the scenes says what the folder holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from geo_pretrain.errors import DataError, RecipeError, nearest, unknown
from geo_pretrain.files import atomic_write
from geo_pretrain.rooms.layout import LEVELS, make_scene
from geo_pretrain.rooms.path import camera_path, intrinsics
from geo_pretrain.rooms.render import Renderer
from geo_pretrain.rooms.scene import CLASSES, OrientedBox, Scene
from geo_pretrain.rooms.sensor import SENSORS, develop, disturb_depth
from geo_pretrain.rooms.surface import Mesh, SurfacePoints, scene_mesh, scene_points
from geo_pretrain.training.data.frame import Frame, Surface
from geo_pretrain.training.data.surfaces.fusing import cached_surface

GENERATOR = "1"  # changes whenever the same seed would give other data
SPLITS = ("train", "val")
SURFACE_DENSITY = 6000.0  # points to the square meter of `Rooms.surface`: a 2 cm voxel meets 2.4 of them
_SAMPLES = 4  # color rays per pixel
_FIELDS = ("color", "depth", "semantic", "instance", "poses", "intrinsics")


@dataclass(frozen=True)
class RoomsConfig:
    """What to render. The same config gives the same data; a scene does not depend on how many there are."""

    seed: int = 0
    scenes: int = 64
    frames: int = 24  # per scene
    width: int = 320
    height: int = 240
    split: str = "train"  # "train" | "val": never the same rooms
    difficulty: str = "medium"  # "easy" | "medium" | "hard"
    depth_noise: bool = False  # Kinect-like noise and holes

    def __post_init__(self) -> None:
        for field, low, high in (("seed", 0, 2**63), ("scenes", 1, 9999), ("frames", 1, 10000)):
            value = getattr(self, field)
            if not low <= value <= high:
                raise RecipeError(f"rooms: {field}={value} is out of range; accepted: {low} to {high}.")
        for field in ("width", "height"):
            value = getattr(self, field)
            if value % 8 or not 64 <= value <= 1280:
                near = min(max(64, round(value / 8) * 8), 1280)
                raise RecipeError(f"rooms: {field}={value}; accepted: multiples of 8 from 64 to 1280. Nearest: {near}.")
        for field, options in (("split", SPLITS), ("difficulty", tuple(LEVELS))):
            value = getattr(self, field)
            if value not in options:
                raise RecipeError(
                    f"rooms: {field}={value!r}; accepted: {', '.join(map(repr, options))}. "
                    f"Nearest: {nearest(value, options, 1)[0]!r}."
                )

    def digest(self) -> str:
        """sha256 hex of all that decides the frames of a scene (so not of how many scenes there are)."""
        facts = {**asdict(self), "generator": GENERATOR, "classes": CLASSES}
        del facts["scenes"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Rooms:
    """A `Source` of procedural rooms; frames are rendered when first needed, or all at once by `prepare`."""

    name = "rooms"

    def __init__(
        self,
        config: RoomsConfig,
        *,
        cache_dir: Path | None = None,
        device: str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        root = Path(os.environ.get("GEO_PRETRAIN_CACHE", "~/.cache/geo_pretrain")).expanduser() / "rooms"
        self.config = config
        self.cache_dir = Path(cache_dir) if cache_dir is not None else root / config.digest()[:16]
        self.device = device
        self.progress = progress
        self._checked: set[str] = set()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "progress": None}  # a callback does not travel to worker processes

    def scenes(self) -> list[str]:
        """Names such as "rooms_train_0000"."""
        return [f"rooms_{self.config.split}_{index:04d}" for index in range(self.config.scenes)]

    def frame_ids(self, scene: str) -> list[str]:
        """Names "0000", "0001", ... in order of time."""
        self._index(scene)
        return [f"{index:04d}" for index in range(self.config.frames)]

    def fingerprint(self) -> str:
        """sha256 hex of the config and the generator's version, which together decide every byte."""
        return hashlib.sha256(f"{self.config.digest()}:{self.config.scenes}".encode()).hexdigest()

    def load(self, scene: str, frame_id: str) -> Frame:
        """One frame from the cache; renders and stores its scene first when that is missing or damaged."""
        ids = self.frame_ids(scene)
        if frame_id not in ids:
            raise unknown("frame", frame_id, ids)
        if self._ensure(scene):
            self._write_manifest()
        row = ids.index(frame_id)
        with safe_open(self._path(scene), framework="np") as file:
            color, depth, semantic, instance, pose = (
                np.ascontiguousarray(file.get_slice(field)[row : row + 1][0]) for field in _FIELDS[:5]
            )
            k = file.get_tensor("intrinsics")
        return Frame(scene, frame_id, color, depth, k, pose, semantic.astype(np.int16), instance.astype(np.int32))

    def prepare(self) -> None:
        """Render what the cache lacks, with `progress(done, total)` after each scene; safe in several processes."""
        names = self.scenes()
        fresh = not (self.cache_dir / "manifest.json").exists()
        for done, scene in enumerate(names):
            fresh |= self._ensure(scene)
            if self.progress:
                self.progress(done + 1, len(names))
        if fresh:  # a complete cache may be on a disk that cannot be written
            self._write_manifest()

    def scene(self, scene: str) -> Scene:
        """The geometry and materials of a scene, built anew (some 50 ms)."""
        return make_scene(scene, self._rng(scene, 0), self.config.difficulty)

    def surface(self, scene: str) -> Surface:
        """Points over the visible surfaces, dense enough for 2 cm voxels; made once (seconds), then from the cache."""
        path = self.cache_dir / "surfaces" / f"{scene}.safetensors"

        def make() -> Surface:
            dense = self.points(scene, SURFACE_DENSITY)
            return Surface(dense.points, dense.colors)

        return cached_surface(path, make)

    def points(self, scene: str, density: float = 400.0) -> SurfacePoints:
        """Labelled points over the visible surfaces, about `density` to the square meter; the same at every call."""
        return scene_points(self.scene(scene), self._rng(scene, 3), density)

    def mesh(self, scene: str, edge: float = 0.25) -> Mesh:
        """Triangles of all surfaces; flat faces are cut to sides of at most `edge` meters."""
        return scene_mesh(self.scene(scene), edge)

    def boxes(self, scene: str) -> list[OrientedBox]:
        """Oriented boxes of all things but walls, floor and ceiling."""
        return [box for box in self.scene(scene).boxes if CLASSES[box.semantic] != "wall"]

    def _index(self, scene: str) -> int:
        prefix, digits = f"rooms_{self.config.split}_", scene[-4:]
        if scene != prefix + digits or not digits.isdecimal() or int(digits) >= self.config.scenes:
            raise unknown("scene", scene, self.scenes())
        return int(digits)

    def _rng(self, scene: str, *purpose: int) -> np.random.Generator:
        """Independent streams for layout (0), path (1), each frame's camera (2, frame) and points (3)."""
        return np.random.default_rng([self.config.seed, SPLITS.index(self.config.split), self._index(scene), *purpose])

    def _path(self, scene: str) -> Path:
        return self.cache_dir / f"{scene}.safetensors"

    def _ensure(self, scene: str) -> bool:
        """Verify a scene's file once per process, render it when missing or damaged; True when it was rendered."""
        path = self._path(scene)
        if scene in self._checked and path.exists():
            return False
        rendered = not self._is_intact(path)
        if rendered:
            self._store(path, self.render_scene(scene))
        self._checked.add(scene)
        return rendered

    def _is_intact(self, path: Path) -> bool:
        try:
            with safe_open(path, framework="np") as file:
                facts = _facts(file.metadata())
                if facts.get("config") != self.config.digest() or set(file.keys()) != set(_FIELDS):
                    return False
                return facts.get("sha256") == _digest({field: file.get_tensor(field) for field in _FIELDS})
        except (OSError, SafetensorError, ValueError):
            return False

    def _store(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        facts = {"config": self.config.digest(), "sha256": _digest(arrays), "generator": GENERATOR}
        with self._written(path) as temporary:
            # One key only: the order of several would differ from run to run, and so would the file's bytes.
            save_file(arrays, temporary, metadata={"rooms": json.dumps(facts)})

    @contextlib.contextmanager
    def _written(self, path: Path) -> Iterator[Path]:
        """`atomic_write`, with an error that says what to do."""
        try:
            with atomic_write(path) as temporary:
                yield temporary
        except OSError as error:
            raise DataError(
                f"rooms: cannot write to the cache folder {str(path.parent)!r} ({error.strerror}). "
                "Set GEO_PRETRAIN_CACHE to a folder that can be written."
            ) from error

    def _write_manifest(self) -> None:
        """Say what the folder holds: config, generator and the digest in each scene file present."""
        scenes = {}
        for path in sorted(self.cache_dir.glob("rooms_*.safetensors")):
            with contextlib.suppress(OSError, SafetensorError, ValueError), safe_open(path, framework="np") as file:
                scenes[path.stem] = {"sha256": _facts(file.metadata()).get("sha256"), "bytes": path.stat().st_size}
        config = {key: value for key, value in asdict(self.config).items() if key != "scenes"}
        content = {"generator": GENERATOR, "config": config, "classes": CLASSES, "scenes": scenes}
        with self._written(self.cache_dir / "manifest.json") as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def render_scene(self, scene: str) -> dict[str, np.ndarray]:
        """All frames of a scene as arrays by field (`_FIELDS`), past the cache."""
        config = self.config
        packed = self.scene(scene)
        on_cpu = Renderer(packed)
        renderer = on_cpu if self.device == "cpu" else Renderer(packed, self.device)
        poses = camera_path(on_cpu, self._rng(scene, 1), config.frames)
        k = intrinsics(config.width, config.height)
        shape = (config.frames, config.height, config.width)
        color, depth = np.empty((*shape, 3), np.uint8), np.empty(shape, np.float32)
        semantic, instance = np.empty(shape, np.uint8), np.empty(shape, np.uint16)
        for index, pose in enumerate(poses):
            rng = self._rng(scene, 2, index)
            shot = renderer.render(pose, k, config.width, config.height, _SAMPLES)
            color[index] = develop(shot.radiance.cpu().numpy(), SENSORS[config.difficulty], rng)
            depth[index] = shot.depth.cpu().numpy()
            if config.depth_noise:
                slant, gloss = shot.slant.cpu().numpy(), shot.gloss.cpu().numpy()
                depth[index] = disturb_depth(depth[index], slant, gloss, float(k[0, 0]), rng)
            semantic[index], instance[index] = shot.semantic.cpu().numpy(), shot.instance.cpu().numpy()
        return dict(zip(_FIELDS, (color, depth, semantic, instance, poses, k), strict=True))


def _facts(metadata: dict[str, str] | None) -> dict[str, str]:
    """The header of a scene file: config digest, digest of the arrays, generator version."""
    return dict(json.loads((metadata or {}).get("rooms", "{}")))


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """sha256 hex over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for field in _FIELDS:
        array = np.ascontiguousarray(arrays[field])
        digest.update(f"{field}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.data)
    return digest.hexdigest()
