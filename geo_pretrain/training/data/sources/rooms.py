"""Rooms as a source of frames, rendered when they are used, or once and then kept.

The cache survives crashes, corruption and concurrent runs.
A scene is one safetensors file, written to a temporary name and renamed. Its header holds the digest of its bytes: a
file that does not match is rendered again. `manifest.json` beside the scenes says what the folder holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from geo_pretrain.errors import RecipeError, nearest, unknown
from geo_pretrain.files import parse_json
from geo_pretrain.hub.cache import default_cache
from geo_pretrain.progress import already
from geo_pretrain.rooms import CLASSES, FIELDS, GENERATOR, RoomGenerator, RoomsConfig
from geo_pretrain.training.data.cache import writing
from geo_pretrain.training.data.frame import Frame, Surface
from geo_pretrain.training.data.surfaces.fusing import cached_surface

SURFACE_DENSITY = 6000.0  # points per square meter of `Rooms.surface`: 2.4 per face of a 2 cm voxel
CACHES = ("disk", "none")


@dataclass(frozen=True)
class RoomsOptions(RoomsConfig):
    """Options of rooms as a source: what to render, and whether frames are kept."""

    cache: str = "disk"  # "disk": rendered once; "none": whenever one is used, by the loader's workers

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache not in CACHES:
            raise RecipeError(
                f"rooms: cache={self.cache!r}; accepted: {', '.join(map(repr, CACHES))}. "
                f"Nearest: {nearest(self.cache, CACHES, 1)[0]!r}."
            )

    @property
    def config(self) -> RoomsConfig:
        """What to render."""
        return RoomsConfig(**{field.name: getattr(self, field.name) for field in fields(RoomsConfig)})


class Rooms:
    """A `Source` of procedural rooms; frames are rendered when first needed, or all at once by `prepare`.

    With `cache` "none" nothing is stored: a frame is rendered whenever it is loaded, on the CPU, with the same result.
    """

    name = "rooms"

    def __init__(
        self, config: RoomsConfig, *, cache_dir: Path | None = None, device: str = "cpu", cache: str = "disk"
    ) -> None:
        self.config, self.cache = config, cache
        self.generator = RoomGenerator(config, device if cache == "disk" else "cpu")  # workers cannot share a GPU
        self.digest = self.generator.config.digest()
        self.cache_dir = cache_dir or default_cache() / "rooms" / self.digest[:16]
        self._checked: set[str] = set()

    def scenes(self) -> list[str]:
        return self.generator.names()

    def frame_ids(self, scene: str) -> list[str]:
        self.generator.index(scene)  # raises for an unknown scene
        return [f"{index:04d}" for index in range(self.config.frames)]

    def fingerprint(self) -> str:
        """A sha256 (hex) of the config and the generator's version, which together decide every byte."""
        return hashlib.sha256(f"{self.digest}:{self.config.scenes}".encode()).hexdigest()

    @property
    def note(self) -> str:
        """Say when it was not torch, as it is by default, that rendered the frames, for the provenance."""
        renderer = self.generator.config.renderer
        return "" if renderer == "torch" else f"Rooms are rendered by {renderer}."

    def load(self, scene: str, frame_id: str) -> Frame:
        """Render one frame, or read it from the cache, where its scene is stored first when missing or damaged."""
        ids = self.frame_ids(scene)
        if frame_id not in ids:
            raise unknown("frame", frame_id, ids)
        row = ids.index(frame_id)
        arrays = self.generator.frame(scene, row) if self.cache == "none" else self._read(scene, row)
        color, depth, semantic, instance, pose, k = (arrays[field] for field in FIELDS)
        return Frame(scene, frame_id, color, depth, k, pose, semantic.astype(np.int16), instance.astype(np.int32))

    def _read(self, scene: str, row: int) -> dict[str, np.ndarray]:
        """Read the arrays of one frame from the cache."""
        if self._ensure(scene):
            self._write_manifest()
        with safe_open(self._path(scene), framework="np") as file:
            arrays = {f: np.ascontiguousarray(file.get_slice(f)[row : row + 1][0]) for f in FIELDS[:5]}
            return arrays | {"intrinsics": file.get_tensor("intrinsics")}

    def surface(self, scene: str) -> Surface:
        """Points of the visible surfaces, dense enough for 2 cm voxels; sampled once (seconds), then cached."""
        path = self.cache_dir / "surfaces" / f"{scene}.safetensors"
        return cached_surface(path, lambda: self.generator.points(scene, SURFACE_DENSITY))

    def prepare(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Render uncached scenes, with `progress(done, total)` after each one; safe in several processes.

        Scenes that have a file are looked at first: after them it is known how many are to be rendered.
        """
        if self.cache == "none":
            return
        names = self.scenes()
        fresh = not (self.cache_dir / "manifest.json").exists()
        for done, scene in enumerate(sorted(names, key=lambda name: not self._path(name).exists()), start=1):
            made = self._ensure(scene)
            fresh |= made
            if progress is not None:
                (progress if made else partial(already, progress))(done, len(names))
        if fresh:  # a complete cache may be on a read-only disk
            self._write_manifest()

    def _path(self, scene: str) -> Path:
        return self.cache_dir / f"{scene}.safetensors"

    def _ensure(self, scene: str) -> bool:
        """Verify a scene's file once per process, render it when missing or damaged; True when it was rendered."""
        path = self._path(scene)
        if scene in self._checked and path.exists():
            return False
        rendered = not self._is_intact(path)
        if rendered:
            self._store(path, self.generator.render(scene))
        self._checked.add(scene)
        return rendered

    def _is_intact(self, path: Path) -> bool:
        try:
            with safe_open(path, framework="np") as file:
                facts = _facts(file.metadata())
                if facts.get("config") != self.digest or set(file.keys()) != set(FIELDS):
                    return False
                return facts.get("sha256") == _digest({field: file.get_tensor(field) for field in FIELDS})
        except (OSError, SafetensorError, ValueError):
            return False

    def _store(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        facts = {"config": self.digest, "sha256": _digest(arrays), "generator": GENERATOR}
        with writing(path, "rooms") as temporary:
            # One key only: the order of several would differ from run to run, and so would the file's bytes.
            temporary.write_bytes(save(arrays, {"rooms": json.dumps(facts)}))

    def _write_manifest(self) -> None:
        """Describe the folder: config, generator and the digest in each scene file present."""
        scenes = {}
        for path in sorted(self.cache_dir.glob("rooms_*.safetensors")):
            with contextlib.suppress(OSError, SafetensorError, ValueError), safe_open(path, framework="np") as file:
                scenes[path.stem] = {"sha256": _facts(file.metadata()).get("sha256"), "bytes": path.stat().st_size}
        config = {key: value for key, value in asdict(self.generator.config).items() if key != "scenes"}
        content = {"generator": GENERATOR, "config": config, "classes": CLASSES, "scenes": scenes}
        with writing(self.cache_dir / "manifest.json", "rooms") as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _facts(metadata: dict[str, str] | None) -> dict[str, str]:
    """Parse the header of a scene file: config digest, digest of the arrays, generator version."""
    facts = parse_json((metadata or {}).get("rooms", "{}"))
    return facts if isinstance(facts, dict) else {}


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """A sha256 (hex) over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for field in FIELDS:
        array = np.ascontiguousarray(arrays[field])
        digest.update(f"{field}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.data)
    return digest.hexdigest()
