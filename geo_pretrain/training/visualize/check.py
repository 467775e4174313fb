"""The picture of a check: one frame laid over another by their poses, as they are read and as they fit best."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from geo_pretrain import geometry
from geo_pretrain.errors import DataError
from geo_pretrain.training.data.check.conventions import AS_READ, TOLERANCE, Convention
from geo_pretrain.training.data.check.registration import depth_edges
from geo_pretrain.training.data.check.report import Report
from geo_pretrain.training.data.check.sample import turn
from geo_pretrain.training.data.frame import Frame, resize_frame
from geo_pretrain.training.data.mining import spread_evenly
from geo_pretrain.training.visualize.colors import depth_colors
from geo_pretrain.training.visualize.grids import save_grid

_WIDTH = 320  # px of a panel
_ROWS = 3
_MOTION = 12.0  # degrees between the two frames of a row, about
_EDGE, _WRONG = (255, 60, 200), (230, 50, 40)


def draw_check(report: Report, path: Path) -> None:
    """Write a PNG: a row a pair of frames.

    Columns: color with the edges of depth, which must lie on edges of color; depth; and the frame moved over the other
    one (gray) by poses and depth, as they are read and, if that is another, by the best reading. What agrees with the
    other frame's depth has its color there, what lands before or behind it is red. Raises `DataError` without a frame.
    """
    rows = _rows(report)
    if not rows:
        raise DataError("No frame can be shown: none could be read.")
    readings = [("as read", AS_READ, 1.0)]
    if report.fits is not None and not report.fits.fits_as_read:
        readings.append(("best reading", report.fits.best.convention, report.fits.best.scale))
    titles = ["depth edges on color", "depth"]
    if any(other is not None for _, other in rows):
        titles += [f"moved, {name}" for name, *_ in readings]
    panels, captions = [], []
    for frame, other in rows:
        pictures = [_with_edges(frame), depth_colors(frame.depth)]
        texts = [f"{frame.scene} {frame.id}", ""]
        if other is not None:
            for _, convention, factor in readings:
                picture, agree = _moved(frame, other, convention, factor)
                pictures.append(picture)
                texts.append(f"onto {other.id}: {100 * agree:.0f} % agree")
        panels.append([Image.fromarray(picture) for picture in pictures])
        captions.append(texts)
    legend = "Moved: where depths agree in color, where they do not in red. Edges of depth (pink) end where colors do."
    save_grid(panels, captions, titles, legend, path)


def _rows(report: Report) -> list[tuple[Frame, Frame | None]]:
    """Frames of one size, each with one that sees much of the same from elsewhere; alone where no frame has a pose."""
    frames = report.sample.frames
    if not frames:
        return []
    height, width = frames[0].depth.shape
    size = round(height * _WIDTH / width), _WIDTH
    turned = {
        (i, j): abs(turn(frames[i].cam_to_world, frames[j].cam_to_world) - _MOTION) for i, j in report.sample.pairs
    }
    best: dict[int, int] = {}  # the first frame of a pair -> the other
    for (i, j), distance in turned.items():
        if i not in best or distance < turned[i, best[i]]:
            best[i] = j
    if not best:
        return [(resize_frame(frame, size), None) for frame in spread_evenly(frames, _ROWS)]
    chosen = spread_evenly(sorted(best), _ROWS)
    return [(resize_frame(frames[i], size), resize_frame(frames[best[i]], size)) for i in chosen]


def _with_edges(frame: Frame) -> np.ndarray:
    picture = frame.color.copy()
    picture[depth_edges(frame.depth, 1)] = _EDGE
    return picture


def _moved(frame: Frame, other: Frame, convention: Convention, factor: float) -> tuple[np.ndarray, float]:
    """The pixels of a frame where they land in the other one, uint8 [H, W, 3], and the share of them that agrees."""
    poses = convention.apply(np.stack([frame.cam_to_world, other.cam_to_world]))
    motion = np.linalg.solve(poses[1], poses[0])
    motion[:3, 3] /= factor
    points = geometry.backproject(torch.from_numpy(frame.depth).double(), torch.from_numpy(frame.intrinsics))
    uv, z = geometry.project(geometry.transform(points, torch.from_numpy(motion)), torch.from_numpy(other.intrinsics))
    height, width = other.depth.shape
    column, row = (np.floor(uv.numpy() + 0.5)).T
    valid = frame.depth.reshape(-1) > 0
    inside = valid & (z.numpy() > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    order = np.flatnonzero(inside)
    order = order[np.argsort(-z.numpy()[order], kind="stable")]  # the nearest comes last and stays
    at = row[order].astype(np.int64), column[order].astype(np.int64)
    seen = other.depth[at]
    agree = (np.abs(z.numpy()[order] - seen) < TOLERANCE * seen) & (seen > 0)
    gray = np.repeat(other.color.mean(axis=2, keepdims=True) * 0.35, 3, axis=2).astype(np.uint8)
    colors = np.where(agree[:, None], frame.color.reshape(-1, 3)[order], np.array(_WRONG, np.uint8))
    for down, right in ((1, 1), (1, 0), (0, 1), (0, 0)):  # squares, which leave no holes between them
        gray[np.minimum(at[0] + down, height - 1), np.minimum(at[1] + right, width - 1)] = colors
    return gray, float(agree.sum() / max(valid.sum(), 1))
