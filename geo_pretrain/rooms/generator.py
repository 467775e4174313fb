"""A data set of rooms from its config: scenes, rendered frames, points, meshes and boxes as arrays, nothing stored."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np

from geo_pretrain.errors import RecipeError, nearest, require, unknown
from geo_pretrain.rooms.layout import LEVELS, make_scene
from geo_pretrain.rooms.path import camera_path, intrinsics
from geo_pretrain.rooms.render import Renderer, SceneRenderer
from geo_pretrain.rooms.scene import CLASSES, OrientedBox, Scene
from geo_pretrain.rooms.sensor import SENSORS, develop, disturb_depth
from geo_pretrain.rooms.surface import Mesh, SurfacePoints, scene_mesh, scene_points

GENERATOR = "1"  # version; changes whenever the same seed would give other data
SPLITS = ("train", "val")
RENDERERS = ("auto", "numba", "torch")
FIELDS = ("color", "depth", "semantic", "instance", "poses", "intrinsics")  # arrays of a rendered scene
_RAYS = 4  # color rays per pixel
_STAGES = 512  # scenes whose geometry and camera path are kept, some 100 kB each


def _has_numba() -> bool:
    compiles = os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")  # numba's own switch, for debugging
    return compiles and importlib.util.find_spec("numba") is not None


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
    # torch: any device; numba: compiled loops (extra `fast`) on a CPU; auto: numba on a CPU where it is installed.
    # Both render the same scenes, with the same ids; some colors differ by one level of 255.
    renderer: str = "torch"

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
        for field, options in (("split", SPLITS), ("difficulty", tuple(LEVELS)), ("renderer", RENDERERS)):
            value = getattr(self, field)
            if value not in options:
                raise RecipeError(
                    f"rooms: {field}={value!r}; accepted: {', '.join(map(repr, options))}. "
                    f"Nearest: {nearest(value, options, 1)[0]!r}."
                )

    def on(self, device: str) -> RoomsConfig:
        """The config with "auto" replaced by the renderer that is used on a device. Raises `MissingDependency`."""
        if self.renderer == "numba" and not _has_numba():
            require("numba", "fast")  # says what to install
        if self.renderer != "auto":
            return self
        return replace(self, renderer="numba" if device == "cpu" and _has_numba() else "torch")

    def digest(self) -> str:
        """A sha256 (hex) of every setting that affects the frames of a scene; excludes the number of scenes."""
        facts = {**asdict(self.on("cpu")), "generator": GENERATOR, "classes": CLASSES}
        del facts["scenes"]
        if facts["renderer"] == "torch":  # the only one there was: old digests stay valid
            del facts["renderer"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Stage(NamedTuple):
    """A scene that is ready to be rendered."""

    renderer: SceneRenderer
    poses: np.ndarray  # float64 [F, 4, 4] camera to world


class RoomGenerator:
    """Generates the scenes of a config, each from its own random streams."""

    def __init__(self, config: RoomsConfig, device: str = "cpu") -> None:
        self.config, self.device = config.on(device), device
        self._stages: dict[str, Stage] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_stages": {}}  # every process makes its own

    def names(self) -> list[str]:
        """Names of all scenes, such as "rooms_train_0000"."""
        return [f"rooms_{self.config.split}_{index:04d}" for index in range(self.config.scenes)]

    def index(self, name: str) -> int:
        """The number of a scene. Raises `UnknownName`."""
        prefix, digits = f"rooms_{self.config.split}_", name[-4:]
        if name != prefix + digits or not digits.isdecimal() or int(digits) >= self.config.scenes:
            raise unknown("scene", name, self.names())
        return int(digits)

    def scene(self, name: str) -> Scene:
        """Build the geometry and materials of a scene (some 50 ms)."""
        return make_scene(name, self._rng(name, 0), self.config.difficulty)

    def render(self, name: str) -> dict[str, np.ndarray]:
        """Render all frames of a scene as arrays by field (`FIELDS`), frames along the first axis.

        color uint8 [F, H, W, 3], depth float32 [F, H, W] m, semantic uint8 and instance uint16 [F, H, W], poses float64
        [F, 4, 4] camera to world, intrinsics float64 [3, 3].
        """
        stage = self._stage(name)
        frames = [self._frame(stage, name, index) for index in range(self.config.frames)]
        arrays = [np.stack(images) for images in zip(*frames, strict=True)]
        return dict(zip(FIELDS, (*arrays, stage.poses, self._intrinsics()), strict=True))

    def frame(self, name: str, index: int) -> dict[str, np.ndarray]:
        """Render one frame of a scene: what `render` returns, without the first axis.

        Scenes used before are kept ready; another one first costs some 100 ms and a few ms for each of its frames.
        """
        if (stage := self._stages.pop(name, None)) is None:
            stage = self._stage(name)
        self._stages[name] = stage  # now the last one of them
        if len(self._stages) > _STAGES:
            del self._stages[next(iter(self._stages))]
        images = self._frame(stage, name, index)
        return dict(zip(FIELDS, (*images, stage.poses[index], self._intrinsics()), strict=True))

    def points(self, name: str, density: float = 400.0) -> SurfacePoints:
        """Sample labelled points of the visible surfaces, about `density` per square meter; the same at every call."""
        return scene_points(self.scene(name), self._rng(name, 3), density)

    def mesh(self, name: str, edge: float = 0.25) -> Mesh:
        """Triangulate all surfaces; flat faces are divided into triangles with sides of at most `edge` meters."""
        return scene_mesh(self.scene(name), edge)

    def boxes(self, name: str) -> list[OrientedBox]:
        """Oriented boxes of all objects but walls, floor and ceiling."""
        return [box for box in self.scene(name).boxes if CLASSES[box.semantic] != "wall"]

    def _stage(self, name: str) -> Stage:
        scene = self.scene(name)
        if self.config.renderer == "numba":
            from geo_pretrain.rooms.compiled.renderer import CompiledRenderer  # imports numba

            on_cpu: SceneRenderer = CompiledRenderer(scene)
        else:
            on_cpu = Renderer(scene)
        # The path must be the same on every machine.
        poses = camera_path(on_cpu, self._rng(name, 1), self.config.frames)
        moves = self.config.renderer == "torch" and self.device != "cpu"
        return Stage(Renderer(scene, self.device) if moves else on_cpu, poses)

    def _frame(self, stage: Stage, name: str, index: int) -> tuple[np.ndarray, ...]:
        """Render a frame as the camera sees it: color, depth, semantic, instance."""
        config, k, rng = self.config, self._intrinsics(), self._rng(name, 2, index)
        shot = stage.renderer.render(stage.poses[index], k, config.width, config.height, _RAYS)
        color = develop(shot.radiance.cpu().numpy(), SENSORS[config.difficulty], rng)
        depth = shot.depth.cpu().numpy()
        if config.depth_noise:
            depth = disturb_depth(depth, shot.slant.cpu().numpy(), shot.gloss.cpu().numpy(), float(k[0, 0]), rng)
        return color, depth, shot.semantic.cpu().numpy().astype(np.uint8), shot.instance.cpu().numpy().astype(np.uint16)

    def _intrinsics(self) -> np.ndarray:
        return intrinsics(self.config.width, self.config.height)

    def _rng(self, name: str, *purpose: int) -> np.random.Generator:
        """Independent streams for layout (0), path (1), each frame's camera (2, frame) and points (3)."""
        return np.random.default_rng([self.config.seed, SPLITS.index(self.config.split), self.index(name), *purpose])
