"""A hand-held camera's way through a room: smooth, free of furniture, with overlap and varied angles.

The camera walks between free points at 1.2-1.8 m while it looks at things, or pans. A view is kept only when a
small depth image (32x24 rays) shows that nothing is too close and that the view is not one blank surface.
"""

from __future__ import annotations

import math

import numpy as np

from geo_pretrain.rooms.render import SceneRenderer
from geo_pretrain.rooms.scene import CLASS_ID, Scene

CLEARANCE = 0.38  # m between the camera and any part
_NEAR = 0.5  # m; a pixel nearer than this is too close
_PITCH = (math.radians(-35), math.radians(10))
_PROBE = (32, 24)


def intrinsics(width: int, height: int) -> np.ndarray:
    """Intrinsics [3, 3] of a Kinect-like pinhole camera: 58 degrees across, integer pixel centers."""
    focal = 577.87 / 640 * width
    return np.array([[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]])


def look(position: np.ndarray, yaw: float, pitch: float, roll: float = 0.0) -> np.ndarray:
    """Camera-to-world [4, 4] of a camera at `position` looking along yaw (from +x towards +y) and pitch (up)."""
    forward = np.array([math.cos(yaw) * math.cos(pitch), math.sin(yaw) * math.cos(pitch), math.sin(pitch)])
    right = np.array([math.sin(yaw), -math.cos(yaw), 0.0])
    down = np.cross(forward, right)
    c, s = math.cos(roll), math.sin(roll)
    pose = np.eye(4)
    pose[:3, 0], pose[:3, 1], pose[:3, 2] = c * right + s * down, c * down - s * right, forward
    pose[:3, 3] = position
    return pose


def clearance(scene: Scene, points: np.ndarray) -> np.ndarray:
    """Compute the distance (m) of points [N, 3] to the nearest part's oriented box or wall: [N]."""
    parts = len(scene.kind) - 6
    offset = points[:, None] - scene.center[None, :parts]
    local = np.einsum("npi,pij->npj", offset, scene.rotation[:parts])
    outside = np.linalg.norm(np.maximum(np.abs(local) - scene.bound[None, :parts], 0.0), axis=-1)
    walls = (scene.size[:2] / 2 - np.abs(points[:, :2])).min(1)
    return np.minimum(outside.min(1, initial=np.inf), walls)


class _Walk:
    """The camera's state and the rules of its next step."""

    def __init__(self, renderer: SceneRenderer, rng: np.random.Generator) -> None:
        self.renderer, self.scene, self.rng = renderer, renderer.scene, rng
        self.free = self._free_points()
        self.position = self.free[0]
        self.yaw, self.pitch = float(rng.uniform(-math.pi, math.pi)), -0.2
        self.goal, self.target, self.spin, self.left = self.position, np.zeros(3), 0.0, 0
        dull = {CLASS_ID[label] for label in ("wall", "curtain", "door", "window")}
        self.sights = np.array(
            [box.center for box in self.scene.boxes if box.semantic not in dull and box.center[2] < 1.7]
        ).reshape(-1, 3)

    def _free_points(self) -> np.ndarray:
        """Sample up to 64 points with clearance; the best ones in a crammed room."""
        half = self.scene.size / 2 - 0.3
        points = self.rng.uniform(
            [-half[0], -half[1], 1.2], [half[0], half[1], min(1.8, self.scene.size[2] - 0.6)], (512, 3)
        )
        room = clearance(self.scene, points)
        good = points[room > CLEARANCE]
        return good[:64] if len(good) >= 4 else points[np.argsort(-room)[:4]]

    def _new_leg(self) -> None:
        """Choose where to walk, what to look at (or how to pan), and for how many frames."""
        rng = self.rng
        self.left = int(rng.integers(4, 9))
        away = np.linalg.norm(self.free - self.position, axis=1)
        options = self.free[(away > 0.7) & (away < 2.8)]
        self.goal = self.position
        for goal in options[rng.permutation(len(options))[:8]]:
            line = self.position + np.linspace(0, 1, 9)[1:, None] * (goal - self.position)
            if clearance(self.scene, line).min() > CLEARANCE * 0.9:
                self.goal = goal
                break
        pans = rng.random() < 0.35 or not len(self.sights)
        self.spin = float(rng.choice([-1, 1]) * rng.uniform(0.2, 0.34)) if pans else 0.0
        if len(self.sights):
            distance = np.linalg.norm(self.sights - self.goal, axis=1)
            far = self.sights[distance > min(1.6, distance.max() * 0.99)]
            self.target = far[rng.integers(len(far))]

    def step(self) -> np.ndarray:
        """Advance to the next camera-to-world pose."""
        if self.left == 0:
            self._new_leg()
        self.left -= 1
        rng = self.rng
        ahead = self.goal - self.position
        distance = float(np.linalg.norm(ahead))
        if distance > 1e-6:
            self.position = self.position + ahead * min(1.0, rng.uniform(0.14, 0.34) / distance)
        towards = self.target - self.position
        flat = math.hypot(towards[0], towards[1])
        turn = self.spin or _wrap(math.atan2(towards[1], towards[0]) - self.yaw)
        aim = rng.uniform(-0.6, -0.1) if self.spin else math.atan2(towards[2] - 0.1, max(flat, 0.5))
        self.yaw = _wrap(self.yaw + float(np.clip(turn, -0.36, 0.36)) + rng.normal(0, 0.04))
        rise = float(np.clip(aim - self.pitch, -0.16, 0.16))
        self.pitch = float(np.clip(self.pitch + rise + rng.normal(0, 0.03), *_PITCH))
        roll = rng.normal(0, 0.025)
        self._avoid_bad_view()
        return look(self.position, self.yaw, self.pitch, roll)

    def _avoid_bad_view(self) -> None:
        """Turn away, by as little as possible, from views that are too close or empty."""
        best: tuple[float, float] | None = None
        for swing in (0.0, 0.2, -0.2, 0.45, -0.45, 0.8, -0.8, 1.3, -1.3, 2.0, -2.0, math.pi):
            fault = self._fault(look(self.position, self.yaw + swing, self.pitch))
            if best is None or fault < best[0] - 1e-9:
                best = (fault, swing)
            if fault == 0:
                break
        if best is not None and best[1] != 0.0:
            self.yaw = _wrap(self.yaw + best[1])
            self.left = 0  # choose a new target: the view of this one is bad

    def _fault(self, pose: np.ndarray) -> float:
        """Score a view: 0 when nothing is near and no single part fills the image, larger is worse."""
        width, height = _PROBE
        depth, part = self.renderer.depth(pose, intrinsics(width, height), width, height)
        near = float((depth < _NEAR).float().mean())
        share = float(part.flatten().bincount().max()) / (width * height)
        close = max(0.0, 1.4 - float(depth.median()))
        bare = float((part >= self.renderer.parts).float().mean())
        return max(0.0, near - 0.02) * 4 + max(0.0, share - 0.5) + close + max(0.0, bare - 0.62)


def _wrap(angle: float) -> float:
    return (angle + math.pi) % (2 * math.pi) - math.pi


def camera_path(renderer: SceneRenderer, rng: np.random.Generator, frames: int) -> np.ndarray:
    """Draw a camera path: camera-to-world poses [frames, 4, 4], the same on every machine if `renderer` is on CPU."""
    walk = _Walk(renderer, rng)
    return np.stack([walk.step() for _ in range(frames)])
