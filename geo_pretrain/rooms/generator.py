"""A data set of rooms from its config: scenes, rendered frames, points, meshes and boxes as arrays, nothing stored."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np

from geo_pretrain.errors import RecipeError, nearest, unknown
from geo_pretrain.rooms.layout import LEVELS, make_scene
from geo_pretrain.rooms.path import camera_path, intrinsics
from geo_pretrain.rooms.render import Renderer
from geo_pretrain.rooms.scene import CLASSES, OrientedBox, Scene
from geo_pretrain.rooms.sensor import SENSORS, develop, disturb_depth
from geo_pretrain.rooms.surface import Mesh, SurfacePoints, scene_mesh, scene_points

GENERATOR = "1"  # version; changes whenever the same seed would give other data
SPLITS = ("train", "val")
FIELDS = ("color", "depth", "semantic", "instance", "poses", "intrinsics")  # arrays of a rendered scene
_RAYS = 4  # color rays per pixel


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
        """A sha256 (hex) of every setting that affects the frames of a scene; excludes the number of scenes."""
        facts = {**asdict(self), "generator": GENERATOR, "classes": CLASSES}
        del facts["scenes"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class RoomGenerator:
    """Generates the scenes of a config, each from its own random streams."""

    def __init__(self, config: RoomsConfig, device: str = "cpu") -> None:
        self.config, self.device = config, device

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
        config = self.config
        scene = self.scene(name)
        on_cpu = Renderer(scene)  # the path must be the same on every machine
        renderer = on_cpu if self.device == "cpu" else Renderer(scene, self.device)
        poses = camera_path(on_cpu, self._rng(name, 1), config.frames)
        k = intrinsics(config.width, config.height)
        shape = (config.frames, config.height, config.width)
        color, depth = np.empty((*shape, 3), np.uint8), np.empty(shape, np.float32)
        semantic, instance = np.empty(shape, np.uint8), np.empty(shape, np.uint16)
        for index, pose in enumerate(poses):
            rng = self._rng(name, 2, index)
            frame = renderer.render(pose, k, config.width, config.height, _RAYS)
            color[index] = develop(frame.radiance.cpu().numpy(), SENSORS[config.difficulty], rng)
            depth[index] = frame.depth.cpu().numpy()
            if config.depth_noise:
                slant, gloss = frame.slant.cpu().numpy(), frame.gloss.cpu().numpy()
                depth[index] = disturb_depth(depth[index], slant, gloss, float(k[0, 0]), rng)
            semantic[index], instance[index] = frame.semantic.cpu().numpy(), frame.instance.cpu().numpy()
        return dict(zip(FIELDS, (color, depth, semantic, instance, poses, k), strict=True))

    def points(self, name: str, density: float = 400.0) -> SurfacePoints:
        """Sample labelled points of the visible surfaces, about `density` per square meter; the same at every call."""
        return scene_points(self.scene(name), self._rng(name, 3), density)

    def mesh(self, name: str, edge: float = 0.25) -> Mesh:
        """Triangulate all surfaces; flat faces are divided into triangles with sides of at most `edge` meters."""
        return scene_mesh(self.scene(name), edge)

    def boxes(self, name: str) -> list[OrientedBox]:
        """Oriented boxes of all objects but walls, floor and ceiling."""
        return [box for box in self.scene(name).boxes if CLASSES[box.semantic] != "wall"]

    def _rng(self, name: str, *purpose: int) -> np.random.Generator:
        """Independent streams for layout (0), path (1), each frame's camera (2, frame) and points (3)."""
        return np.random.default_rng([self.config.seed, SPLITS.index(self.config.split), self.index(name), *purpose])
