"""Two frames cut to one size about a point that both see, as Pri3D does on MegaDepth and KITTI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from geo_pretrain.errors import BadFrame, RecipeError
from geo_pretrain.geometry import match_pixels
from geo_pretrain.training.data.frame import CommonPoints, Frame, Pair, Source, capability
from geo_pretrain.training.data.overlap import SPARSE_TOLERANCE
from geo_pretrain.training.recipe import DataSpec

Size = tuple[int, int]  # height, width


def crop_centers(source: Source, pair: Pair, frame1: Frame, frame2: Frame, size: Size) -> np.ndarray:
    """The points about which a pair may be cut to `size`: row and column in either frame, float64 [N, 4] pixels, N > 0.

    Those that the source states (MegaDepth's reconstructions); else matches of depth within 0.5 m, of which those about
    which a whole crop lies in both frames, if there are any (KITTI). Raises `BadFrame` for a pair without any.
    """
    if (stated := capability(source, CommonPoints)) is not None:
        centers = stated.common_points(pair.scene, pair.frame1, pair.frame2)
    else:
        centers = _matches(frame1, frame2)
        starts, limits = _starts(centers, size), _limits(frame1, frame2, size)
        inside = ((starts >= 0) & (starts <= limits)).all(axis=1)
        centers = centers[inside] if inside.any() else centers
    if not len(centers):
        raise BadFrame(f"{pair.scene}/{pair.frame1} and {pair.frame2}", "no point is seen by both")
    return centers


def crop_pair(
    frame1: Frame, frame2: Frame, size: Size, centers: np.ndarray, generator: torch.Generator
) -> tuple[Frame, Frame]:
    """Cut two frames to `size` about a point drawn from `centers` [N, 4]; a crop that would stick out is moved inside.

    Raises `BadFrame` for a frame that is smaller than the crop.
    """
    limits = _limits(frame1, frame2, size)
    for frame, limit in ((frame1, limits[:2]), (frame2, limits[2:])):
        if (limit < 0).any():
            height, width = frame.depth.shape
            raise BadFrame(
                f"{frame.scene}/{frame.id}", f"is {width}x{height}, smaller than crops of {size[1]}x{size[0]}"
            )
    chosen = centers[int(torch.randint(len(centers), (), generator=generator))][None]
    top1, left1, top2, left2 = np.clip(_starts(chosen, size)[0], 0, limits).astype(int).tolist()
    return crop_frame(frame1, top1, left1, size), crop_frame(frame2, top2, left2, size)


def _starts(centers: np.ndarray, size: Size) -> np.ndarray:
    """Top and left of crops in either frame [N, 4]."""
    return np.floor(centers) - np.tile(np.array(size) // 2, 2)


def _limits(frame1: Frame, frame2: Frame, size: Size) -> np.ndarray:
    """The last top and left at which a crop lies in either frame [4]."""
    return np.array([*frame1.depth.shape, *frame2.depth.shape]) - np.tile(size, 2)


def crop_frame(frame: Frame, top: int, left: int, size: Size) -> Frame:
    """Cut a box out of a frame: images and intrinsics."""
    box = slice(top, top + size[0]), slice(left, left + size[1])
    images = {name: getattr(frame, name) for name in ("color", "depth", "semantic", "instance")}
    cut: Any = {name: np.ascontiguousarray(image[box]) for name, image in images.items() if image is not None}
    intrinsics = frame.intrinsics.copy()
    intrinsics[:2, 2] -= left, top
    return replace(frame, intrinsics=intrinsics, **cut)


def refuse_pair_settings(spec: DataSpec, keys: Sequence[str], what: str) -> None:
    """Raise `RecipeError` where settings of pairs are given for samples that do not follow them."""
    defaults = DataSpec()
    for key in keys:
        value, default = getattr(spec, key), getattr(defaults, key)
        if value != default:
            raise RecipeError(f"'data.{key}' is {value!r}, which {what} do not follow; accepted here is {default!r}.")


def _matches(frame1: Frame, frame2: Frame) -> np.ndarray:
    """Row and column of pixels that see the same point by their depth, float64 [N, 4]."""
    depths = [torch.from_numpy(frame.depth)[None] for frame in (frame1, frame2)]
    intrinsics = [torch.from_numpy(frame.intrinsics).float()[None] for frame in (frame1, frame2)]
    poses = [torch.from_numpy(frame.cam_to_world)[None] for frame in (frame1, frame2)]
    target = match_pixels(*depths, *intrinsics, *poses, tolerance=SPARSE_TOLERANCE)[0].numpy()
    pixel = np.flatnonzero(target >= 0)
    width1, width2 = frame1.depth.shape[1], frame2.depth.shape[1]
    other = target[pixel]
    return np.stack([pixel // width1, pixel % width1, other // width2, other % width2], axis=1).astype(np.float64)
