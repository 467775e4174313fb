"""Rendering of points: a z-buffer of squares, cameras around a scene, and which way is up in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.geometry import project, transform
from geo_pretrain.training.data.frame import Frame

MAX_REACH = 6  # px: a point very near the camera would cover the picture
DISTANCE = 3.0  # of turntable cameras, in half diagonals of the cloud
BACK, RISE = 0.35, 0.3  # of a camera behind a frame's, as shares of its median depth
MARGIN = 1.05  # room around what is seen
SNAP = math.cos(math.radians(30))  # cameras look a little up or down; the world's axis is meant


@dataclass(frozen=True)
class Camera:
    """A pinhole camera and the size of its picture (integer pixel centers, x right, y down, z forward)."""

    intrinsics: Tensor  # float64 [3, 3]
    cam_to_world: Tensor  # float64 [4, 4]
    size: tuple[int, int]  # height, width

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """World points [N, 3] m -> pixels [N, 2] (u, v) and z-depth [N] m, float64."""
        in_camera = transform(points.double(), torch.linalg.inv(self.cam_to_world))
        return project(in_camera, self.intrinsics)


def frame_camera(frame: Frame) -> Camera:
    """Make the camera of a frame."""
    height, width = frame.depth.shape
    intrinsics, pose = torch.from_numpy(frame.intrinsics).double(), torch.from_numpy(frame.cam_to_world).double()
    return Camera(intrinsics, pose, (height, width))


def behind_camera(points: Tensor, frame: Frame, size: tuple[int, int]) -> Camera:
    """Place a camera behind and above a frame's, looking the same way, that sees all of the frame's points [N, 3]."""
    points, pose = points.double(), torch.from_numpy(frame.cam_to_world).double()
    eye, up, forward = pose[:3, 3], -pose[:3, 1], pose[:3, 2]
    depth = ((points - eye) @ forward).median()
    moved = eye + depth * (BACK * -forward + RISE * up)
    return fit_cameras(points, [look_at(moved, eye + depth * forward, up)], size)[0]


def splat(points: Tensor, camera: Camera, radius: float) -> np.ndarray:
    """Render points with a z-buffer: the row of the point seen at each pixel, int64 [H, W], -1 where there is none.

    A point [N, 3] (m, world) covers the square of half the edge `radius` (m) around it that faces the camera: at least
    the pixel it falls on, at most `MAX_REACH` pixels each way. The nearest wins; of equally near ones the first.
    """
    height, width = camera.size
    uv, z = camera.project(points)
    use = (z > 0).nonzero()[:, 0]
    use = use[z[use].argsort(stable=True)]  # from here on a smaller row is nearer
    column, row = (uv[use] + 0.5).floor().unbind(-1)
    reach = (radius * float(camera.intrinsics[0, 0]) / z[use]).round().clamp(0, MAX_REACH)
    nearest = torch.full((height * width,), len(use), dtype=torch.int64)
    number = torch.arange(len(use))
    for step in range(int(reach.max()) + 1 if len(use) else 0):
        wide = (reach >= step).nonzero()[:, 0]
        for dx, dy in _ring(step):
            x, y = column[wide] + dx, row[wide] + dy
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            target = (y[inside] * width + x[inside]).long()
            nearest.scatter_reduce_(0, target, number[wide[inside]], reduce="amin")
    seen = nearest < len(use)
    nearest[seen] = use[nearest[seen]]
    return torch.where(seen, nearest, -1).reshape(height, width).numpy()


def up_direction(poses: Sequence[np.ndarray]) -> np.ndarray:
    """Estimate which way is up from camera-to-world poses [4, 4]: float64 [3], unit length.

    People hold cameras upright: the mean of the cameras' own up, or the axis of the world within 30 degrees of it.
    """
    mean = -np.mean([pose[:3, 1] for pose in poses], axis=0)
    mean = mean / max(float(np.linalg.norm(mean)), 1e-12)
    axis = int(np.abs(mean).argmax())
    if abs(mean[axis]) >= SNAP:
        return np.eye(3)[axis] * np.sign(mean[axis])
    return mean


def rotation_to_z(up: np.ndarray) -> np.ndarray:
    """Return a rotation float64 [3, 3] that takes the unit vector `up` [3] to z."""
    farthest_axis = np.eye(3)[np.abs(up).argmin()]
    x = np.cross(farthest_axis, up)
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(up, x), up])


def look_at(eye: Tensor, target: Tensor, up: Tensor) -> Tensor:
    """Pose (camera-to-world float64 [4, 4]) of a camera at `eye` [3] that looks at `target` [3]; not along `up`."""
    forward = (target - eye) / (target - eye).norm()
    right = torch.linalg.cross(forward, up)
    right = right / right.norm()
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=1)
    pose[:3, 3] = eye
    return pose


def turntable(points: Tensor, count: int, size: tuple[int, int], elevation: float) -> list[Camera]:
    """Place `count` cameras around points [N, 3] (z is up), `elevation` radians above them, that see all of them."""
    points, up = points.double(), torch.tensor([0.0, 0, 1], dtype=torch.float64)
    center = (points.amin(dim=0) + points.amax(dim=0)) / 2
    distance = DISTANCE * max(float((points - center).norm(dim=1).max()), 1e-3)
    poses = []
    for number in range(count):
        turn = 2 * math.pi * (number + 0.5) / count - math.pi / 2
        flat, high = distance * math.cos(elevation), distance * math.sin(elevation)
        eye = center + torch.tensor([flat * math.cos(turn), flat * math.sin(turn), high], dtype=torch.float64)
        poses.append(look_at(eye, center, up))
    return fit_cameras(points, poses, size)


def fit_cameras(points: Tensor, poses: Sequence[Tensor], size: tuple[int, int]) -> list[Camera]:
    """Make cameras at camera-to-world `poses` that see all points [N, 3] before them, centered in the picture.

    They share one focal length: the longest with which every point falls inside every picture.
    """
    plain = torch.eye(3, dtype=torch.float64)
    seen = [Camera(plain, pose, size).project(points)[0] for pose in poses]
    boxes = [(uv.amin(dim=0), uv.amax(dim=0)) for uv in seen]
    room = torch.tensor([size[1] - 1, size[0] - 1], dtype=torch.float64)
    focal = min(float((room / (high - low).clamp(min=1e-9)).min()) for low, high in boxes) / MARGIN
    cameras = []
    for pose, (low, high) in zip(poses, boxes, strict=True):
        cx, cy = (room / 2 - focal * (low + high) / 2).tolist()
        intrinsics = torch.tensor([[focal, 0, cx], [0, focal, cy], [0, 0, 1]], dtype=torch.float64)
        cameras.append(Camera(intrinsics, pose, size))
    return cameras


def _ring(step: int) -> list[tuple[int, int]]:
    """Offsets (x, y) whose larger magnitude is `step`."""
    span = range(-step, step + 1)
    return [(x, y) for y in span for x in span if max(abs(x), abs(y)) == step]
