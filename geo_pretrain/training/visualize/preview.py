"""Previews of a data source as a PNG: a contact sheet of color, depth and classes, or geometric sets of scenes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.frame import Frame, SceneMesh, Source, capability, resize_frame
from geo_pretrain.training.data.mining import spread_evenly
from geo_pretrain.training.data.surfaces.oversegmentation import K_THRESH, MIN_VERTICES, vertex_normals
from geo_pretrain.training.data.surfaces.sets import Kind, SceneSets, Sets, label_sets, pixel_sets
from geo_pretrain.training.visualize.colors import class_colors, depth_colors, set_colors
from geo_pretrain.training.visualize.grids import save_sheet, stack, tile

_WIDTH = 320  # px of a frame beside its sets, at most
_TILT = np.deg2rad(55)  # from the horizon: how steeply a scene is looked down upon


def contact_sheet(source: Source, path: Path, *, scenes: int = 4, frames: int = 4) -> None:
    """Write a grid: one row a scene, `frames` frames evenly spaced in time, each as color | depth | classes.

    Depth runs from near (bright yellow) to far (dark blue) between the frame's own limits, black where invalid.
    Frames that cannot be read are left out; raises `DataError` when none can.
    """
    shown = _spread_frames(source, scenes, frames)
    rows = [[frame_strip(frame) for frame in row] for row in shown.values()]
    save_sheet(tile(rows), path)


def sets_sheet(
    source: Source,
    path: Path,
    *,
    scenes: int = 1,
    frames: int = 3,
    k_thresh: float = K_THRESH,
    min_vertices: int = MIN_VERTICES,
    kind: Kind = "segments",
    cache_dir: Path | None = None,
) -> None:
    """Write the geometric sets of a few scenes: a block each, with `frames` rows and the whole surface beside them.

    A row is a frame's colors and the same under the colors of its sets, with dark borders; pixels in no set are gray.
    The surface is seen from above, what faces away (near walls, the ceiling) left out. A set has one color throughout.
    Options and errors as for `Sets`; frames that cannot be read are left out, `DataError` when none can.
    """
    blocks = []
    all_sets = Sets(source, k_thresh=k_thresh, min_vertices=min_vertices, kind=kind, cache_dir=cache_dir)
    for scene, row in _spread_frames(source, scenes, frames).items():
        sets = all_sets.scene(scene)
        meshed = capability(source, SceneMesh)
        if sets.normals is None and meshed is not None:  # segments as released: the mesh has the normals
            sets = SceneSets(sets.points, sets.ids, vertex_normals(*meshed.triangles(scene)))
        small = [_at_most(frame, _WIDTH) for frame in row]
        maps = [pixel_sets(frame, sets) if kind == "segments" else label_sets(frame, kind) for frame in small]
        shown = zip(small, maps, strict=True)
        pictures = tile([[frame.color, sets_overlay(frame.color, ids)] for frame, ids in shown])
        size = pictures.shape[0], round(1.4 * pictures.shape[0])
        view = surface_view(sets, size, [frame.cam_to_world for frame in row])
        blocks.append(stack([pictures, view], axis=1))
    save_sheet(stack(blocks), path)


def frame_strip(frame: Frame) -> np.ndarray:
    """Lay color, colored depth and, where known, colored classes side by side: uint8 [H, k W, 3]."""
    panels = [frame.color, depth_colors(frame.depth)]
    if frame.semantic is not None:
        panels.append(class_colors(frame.semantic))
    return np.concatenate(panels, axis=1)


def sets_overlay(color: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Tint an image uint8 [H, W, 3] with the colors of its sets [H, W] and darken their borders."""
    gray = np.repeat(color.mean(axis=2, keepdims=True), 3, axis=2)
    mixed = np.where(ids[..., None] < 0, 0.5 * gray, 0.35 * gray + 0.65 * set_colors(ids))
    border = np.zeros(ids.shape, bool)
    border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    border[1:] |= ids[1:] != ids[:-1]
    mixed[border] *= 0.4
    return np.round(mixed).astype(np.uint8)


def surface_view(sets: SceneSets, size: tuple[int, int], poses: list[np.ndarray]) -> np.ndarray:
    """Render the points of a scene in the colors of their sets, from above, orthographic: uint8 [*size, 3].

    Up is what the cameras at `poses` (camera-to-world [4, 4]) hold upwards, and the far side is where they look on
    average. Points whose normals (which the sets must have) face away from the viewer are left out. The nearest point
    wins a pixel; points are squares large enough to close the surface.
    """
    if sets.normals is None:
        raise DataError("The sets have no normals, which tell what faces the viewer.")
    up = _normalized(-np.mean([pose[:3, 1] for pose in poses], axis=0))
    ahead = np.mean([pose[:3, 2] for pose in poses], axis=0)
    ahead = ahead - (ahead @ up) * up
    level = _normalized(ahead if np.linalg.norm(ahead) > 1e-3 else np.cross(up, poses[0][:3, 0]))
    view = np.cos(_TILT) * level - np.sin(_TILT) * up  # from the viewer into the scene
    right = np.cross(level, up)
    axes = np.stack([right, np.cross(view, right), view])  # x right, y down, z away
    facing = sets.normals @ view < -0.05
    points = sets.points[facing].astype(np.float64) @ axes.T
    shade = 0.6 + 0.4 * np.abs(sets.normals[facing] @ _normalized(up - 0.5 * level + 0.3 * right))
    colors = set_colors(sets.ids[facing]) * shade[:, None]
    height, width = (2 * extent for extent in size)  # drawn at twice the size, then averaged
    image = np.full((height, width, 3), 255.0)
    if len(points):
        low, high = np.percentile(points[:, :2], [0.2, 99.8], axis=0)  # a few stray points shall not decide
        scale = 0.96 * min(width / max(high[0] - low[0], 1e-3), height / max(high[1] - low[1], 1e-3))
        pixel = np.floor((points[:, :2] - (low + high) / 2) * scale + np.array([width, height]) / 2).astype(np.int64)
        order = np.argsort(-points[:, 2], kind="stable")  # far points first: what comes later covers them
        reach = int(np.clip(np.ceil(0.02 * scale), 1, 12))
        # All points of a depth slice at every offset of the square, before the next slice covers them.
        offsets = [(dx, dy) for dx in range(-reach, reach + 1) for dy in range(-reach, reach + 1)]
        for rows in np.array_split(order, 200):
            for dx, dy in offsets:
                x, y = pixel[rows, 0] + dx, pixel[rows, 1] + dy
                inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
                image[y[inside], x[inside]] = colors[rows[inside]]
    mean = image.reshape(size[0], 2, size[1], 2, 3).mean(axis=(1, 3))
    return np.round(mean).astype(np.uint8)


def _spread_frames(source: Source, scenes: int, frames: int) -> dict[str, list[Frame]]:
    """Load `frames` evenly spaced frames of each of the first `scenes` scenes; unreadable ones are left out."""
    shown: dict[str, list[Frame]] = {}
    for scene in source.scenes()[:scenes]:
        for frame_id in spread_evenly(source.frame_ids(scene), frames):
            with contextlib.suppress(BadFrame):
                frame = source.load(scene, frame_id)
                shown.setdefault(scene, []).append(frame)
    if not shown:
        raise DataError(
            f"Source {source.name!r} has no frame that can be shown; accepted: at least one readable frame."
        )
    return shown


def _at_most(frame: Frame, width: int) -> Frame:
    """Shrink a frame that is wider than `width`."""
    height, old = frame.depth.shape
    return frame if old <= width else resize_frame(frame, (round(height * width / old), width))


def _normalized(vector: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vector / np.linalg.norm(vector)
    return unit
