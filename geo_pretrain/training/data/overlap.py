"""Overlap of two frames: by projecting depth, as the released script does it, and quickly, calibrated to that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from geo_pretrain import geometry
from geo_pretrain.errors import DataError
from geo_pretrain.sparse.coordinates import unique_rows, voxelize
from geo_pretrain.training.data.frame import Frame, resize_image

BATCH = 256  # pairs projected at once
CLOUD_VOXEL = 0.05  # m; voxel size to which the released overlap script thins clouds
CLOUD_RADIUS = 0.075  # m; it counts points with a neighbor closer than this
# The quick measure: cells of this edge, each reaching its six neighbors, at depth maps of this height. Calibrated on
# real frames, see `cell_overlap_matrix`.
CELL, CELL_HEIGHT = 0.06, 120
REACH = ((0, 0, 0), (1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
SPARSE_TOLERANCE = 0.5  # m along the optical axis: of laser depth outdoors, as in Pri3D's preparation of KITTI
CELLS_AT_ONCE = 1 << 23  # entries of the tables that are multiplied at once, cells x frames


def overlap_matrix(frames: list[Frame], device: str | torch.device = "cpu") -> np.ndarray:
    """Compute the overlap ratio of all pairs of equally sized frames: float [N, N], symmetric, diagonal 1."""
    depth = torch.stack([torch.from_numpy(f.depth) for f in frames]).to(device)
    intrinsics = torch.stack([torch.from_numpy(f.intrinsics) for f in frames]).float().to(device)
    poses = torch.stack([torch.from_numpy(f.cam_to_world) for f in frames]).to(device)
    ratios = np.eye(len(frames))
    for chunk in torch.combinations(torch.arange(len(frames), device=device)).split(BATCH):
        i, j = chunk.T
        forward = geometry.match_pixels(depth[i], depth[j], intrinsics[i], intrinsics[j], poses[i], poses[j])
        backward = geometry.match_pixels(depth[j], depth[i], intrinsics[j], intrinsics[i], poses[j], poses[i])
        ratio = geometry.overlap_ratio(forward, backward, depth[i], depth[j]).cpu().numpy()
        rows, columns = i.cpu().numpy(), j.cpu().numpy()  # a tensor of one element would index as a number
        ratios[rows, columns] = ratios[columns, rows] = ratio
    return ratios


def thin_cloud(frame: Frame) -> Tensor:
    """Back-project a frame to world points and average them in voxels of 5 cm: float64 [N, 3] m.

    As the released overlap script: at the frame's own resolution; voxels start half a voxel below the lowest point.
    """
    depth, intrinsics = torch.from_numpy(frame.depth).double(), torch.from_numpy(frame.intrinsics)
    points = geometry.backproject(depth, intrinsics)[depth.flatten() > 0]
    points = geometry.transform(points, torch.from_numpy(frame.cam_to_world).double())
    low = points.amin(dim=0) - CLOUD_VOXEL / 2
    return voxelize(points - low, points, CLOUD_VOXEL, reduce="mean").feats


@dataclass(frozen=True)
class SparseFrame:
    """The pixels of a frame that have depth, back-projected once for many comparisons."""

    points: np.ndarray  # float32 [N, 3] m, camera frame
    depth: np.ndarray  # float32 [H, W] m
    intrinsics: np.ndarray
    cam_to_world: np.ndarray

    @classmethod
    def of(cls, frame: Frame) -> SparseFrame:
        """Back-project a frame's valid pixels."""
        points = geometry.backproject(torch.from_numpy(frame.depth), torch.from_numpy(frame.intrinsics).float())
        valid = points.numpy()[frame.depth.reshape(-1) > 0]
        return cls(valid, frame.depth, frame.intrinsics, frame.cam_to_world)


def sparse_overlap(frame1: SparseFrame, frame2: SparseFrame, tolerance: float = SPARSE_TOLERANCE) -> float:
    """Compute matches / (valid pixels of both - matches), from frame 1 to frame 2: Pri3D's overlap on KITTI.

    A match is a pixel of frame 1 whose point falls on a pixel of frame 2 with a depth that differs by less than
    `tolerance` m. `geometry.match_pixels` counts the same; here only pixels with depth are projected.
    """
    motion = (np.linalg.inv(frame2.cam_to_world) @ frame1.cam_to_world).astype(np.float32)
    x, y, z = (frame1.points @ motion[:3, :3].T + motion[:3, 3]).T
    front = z > 0
    x, y, z = x[front], y[front], z[front]
    (fx, _, cx), (_, fy, cy), _ = frame2.intrinsics.astype(np.float32)
    column, row = np.floor(x / z * fx + cx), np.floor(y / z * fy + cy)
    height, width = frame2.depth.shape
    inside = (column >= 0) & (row >= 0) & (column < width) & (row < height)
    seen = frame2.depth[row[inside].astype(np.intp), column[inside].astype(np.intp)]
    matches = int(((seen > 0) & (np.abs(seen - z[inside]) < tolerance)).sum())
    return matches / max(len(frame1.points) + len(frame2.points) - matches, 1)


def cloud_overlap(cloud1: Tensor, cloud2: Tensor) -> tuple[float, float]:
    """Compute the share of points [N, 3] in each cloud with a point of the other closer than 7.5 cm: (of 1, of 2).

    The overlap of a pair in PointContrast, CSC and Pri3D is the larger of the two.
    """
    matches = geometry.radius_matches(cloud1, cloud2, CLOUD_RADIUS)
    return len(matches[:, 0].unique()) / len(cloud1), len(matches[:, 1].unique()) / len(cloud2)


def cloud_overlap_matrix(clouds: list[Tensor], device: str | torch.device = "cpu") -> np.ndarray:
    """Compute the larger `cloud_overlap` of all pairs of clouds: float [N, N], symmetric, diagonal 1."""
    clouds = [cloud.to(device) for cloud in clouds]
    boxes = [(cloud.amin(dim=0), cloud.amax(dim=0)) for cloud in clouds]
    ratios = np.eye(len(clouds))
    for i, j in combinations(range(len(clouds)), 2):
        (low1, high1), (low2, high2) = boxes[i], boxes[j]
        if ((low1 - high2 < CLOUD_RADIUS) & (low2 - high1 < CLOUD_RADIUS)).all():
            ratios[i, j] = ratios[j, i] = max(cloud_overlap(clouds[i], clouds[j]))
    return ratios


def occupied_cells(frame: Frame) -> Tensor:
    """Back-project a frame, reduced to a height of 120 pixels, to the world's cells of 6 cm: int64 [M, 3], unique."""
    height, width = frame.depth.shape
    if height > CELL_HEIGHT:
        size = (CELL_HEIGHT, max(1, round(width * CELL_HEIGHT / height)))
        intrinsics = geometry.resize_intrinsics(torch.from_numpy(frame.intrinsics), (height, width), size).numpy()
        frame = replace(frame, depth=resize_image(frame.depth, size), intrinsics=intrinsics)
    depth = torch.from_numpy(frame.depth).double()
    points = geometry.backproject(depth, torch.from_numpy(frame.intrinsics))[depth.flatten() > 0]
    points = geometry.transform(points, torch.from_numpy(frame.cam_to_world).double())
    cells = torch.floor(points / CELL).long()
    return cells[unique_rows(cells)[0]]


def cell_overlap_matrix(frames: list[Tensor], device: str | torch.device = "cpu") -> np.ndarray:
    """Compute the overlap ratio of all pairs of frames, given as cells [M, 3]: float [N, N], symmetric, diagonal 1.

    The larger share of a frame's cells that are, or touch by a face, a cell of the other frame: `cloud_overlap_matrix`
    on a grid that all frames share, so that all pairs of a scene are a product of two tables. Calibrated to it on
    7-Scenes' kitchen: of 300 random pairs it keeps and drops the same ones at 30 %; the mean difference is -0.002, the
    root mean square 0.010 (benchmarks/mining.py).
    """
    count = len(frames)
    rows = torch.cat([torch.zeros(0, 3, dtype=torch.int64), *frames]).to(device)
    if not len(rows):
        return np.eye(count)
    owner = torch.repeat_interleave(torch.tensor([len(cells) for cells in frames])).to(device)
    rows = rows - rows.amin(dim=0) + 1
    extent = (rows.amax(dim=0) + 2).tolist()
    if extent[0] * extent[1] * extent[2] >= 1 << 62:
        raise DataError(f"Frames span {[n * CELL for n in extent]} m, too far to compare; poses are in meters?")
    step = torch.tensor([extent[1] * extent[2], extent[2], 1], device=device)
    keys, cell = torch.unique((rows * step).sum(dim=1), return_inverse=True)
    occupied = torch.zeros(len(keys) + 1, count, dtype=torch.uint8, device=device)  # the last row: no frame is there
    occupied[cell, owner] = 1
    wanted = keys[:, None] + (torch.tensor(REACH, device=device) * step).sum(dim=1)
    near = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    near = torch.where(keys[near] == wanted, near, len(keys))
    shared = torch.zeros(count, count, device=device, dtype=torch.float64)  # [i, j]: cells of j that i reaches
    for part in torch.arange(len(keys), device=device).split(max(1, CELLS_AT_ONCE // max(count, 1))):
        reached = occupied[near[part, 0]]
        for neighbor in near[part, 1:].T:
            reached |= occupied[neighbor]
        shared += reached.float().T @ occupied[part].float()
    sizes = torch.tensor([len(cells) for cells in frames], device=device).clamp(min=1)
    share = (shared / sizes).cpu().numpy()
    ratios: np.ndarray = np.maximum(share, share.T)
    np.fill_diagonal(ratios, 1)
    return ratios
