"""Pictures of any source in one PNG: a contact sheet of color, depth and classes, or a scene's geometric sets."""

from __future__ import annotations

import colorsys
import contextlib
from pathlib import Path

import numpy as np
from PIL import Image

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.frame import Frame, SceneMesh, Source, capability, resize_frame
from geo_pretrain.training.data.surfaces.oversegmentation import K_THRESH, MIN_VERTICES, vertex_normals
from geo_pretrain.training.data.surfaces.sets import Kind, SceneSets, label_sets, pixel_sets, scene_sets

_GAP = 4  # px between cells
_WIDTH = 320  # px of a frame beside its sets, at most
_TILT = np.deg2rad(55)  # from the horizon: how steeply a scene is looked down upon


def contact_sheet(source: Source, path: Path, *, scenes: int = 4, frames: int = 4) -> None:
    """Write a grid: one row a scene, `frames` frames evenly spaced in time, each as color | depth | classes.

    Depth runs from near (bright yellow) to far (dark blue) between the frame's own limits, black where invalid.
    Frames that cannot be read are left out; raises `DataError` when none can.
    """
    shown = _spread_frames(source, scenes, frames)
    rows = [[frame_strip(frame) for frame in row] for row in shown.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_grid(rows)).save(path, format="PNG")


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
    """Write the geometric sets of a few scenes: a block each, of `frames` rows and the whole surface beside them.

    A row is a frame's colors and the same under the colors of its sets, with dark borders; pixels in no set are gray.
    The surface is seen from above, what faces away (near walls, the ceiling) left out. A set has one color throughout.
    Options and errors as for `scene_sets`; frames that cannot be read are left out, `DataError` when none can.
    """
    blocks = []
    for scene, row in _spread_frames(source, scenes, frames).items():
        sets = scene_sets(source, scene, k_thresh=k_thresh, min_vertices=min_vertices, kind=kind, cache_dir=cache_dir)
        meshed = capability(source, SceneMesh)
        if sets.normals is None and meshed is not None:  # segments as released: the mesh has the normals
            sets = SceneSets(sets.points, sets.ids, vertex_normals(*meshed.triangles(scene)))
        small = [_at_most(frame, _WIDTH) for frame in row]
        maps = [pixel_sets(frame, sets) if kind == "segments" else label_sets(frame, kind) for frame in small]
        shown = zip(small, maps, strict=True)
        pictures = _grid([[frame.color, sets_overlay(frame.color, ids)] for frame, ids in shown])
        size = pictures.shape[0], round(1.4 * pictures.shape[0])
        view = surface_view(sets, size, [frame.cam_to_world for frame in row])
        blocks.append(np.concatenate([pictures, np.full((size[0], _GAP, 3), 255, np.uint8), view], axis=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_stacked(blocks)).save(path, format="PNG")


def frame_strip(frame: Frame) -> np.ndarray:
    """Color, colored depth and, where known, colored classes beside each other: uint8 [H, k W, 3]."""
    panels = [frame.color, depth_colors(frame.depth)]
    if frame.semantic is not None:
        panels.append(class_colors(frame.semantic))
    return np.concatenate(panels, axis=1)


def depth_colors(depth: np.ndarray) -> np.ndarray:
    """Depth [H, W] meters to uint8 [H, W, 3]; invalid (0) is black."""
    valid = depth > 0
    if not valid.any():
        return np.zeros((*depth.shape, 3), np.uint8)
    low, high = np.percentile(depth[valid], [1, 99])
    x = np.clip((depth - low) / max(high - low, 1e-6), 0, 1)[..., None]
    stops = np.array([[253, 231, 110], [110, 205, 90], [35, 140, 140], [55, 90, 140], [50, 15, 75]], np.float64)
    position = x * (len(stops) - 1)
    index = np.minimum(position.astype(np.int64), len(stops) - 2)[..., 0]
    mixed = stops[index] + (stops[index + 1] - stops[index]) * (position - index[..., None])
    return np.where(valid[..., None], mixed, 0).astype(np.uint8)


def class_colors(semantic: np.ndarray) -> np.ndarray:
    """Class ids [H, W] to uint8 [H, W, 3]; a fixed color per id, black for 0 and below."""
    count = max(int(semantic.max()) + 1, 1)
    table = np.zeros((count, 3), np.uint8)
    for index in range(1, count):
        hue = (index * 0.61803398875) % 1.0  # golden ratio: neighbors in id differ in hue
        light, strong = (0.95, 0.75, 0.55)[index % 3], (0.45, 0.75)[index % 2]
        table[index] = [round(255 * c) for c in colorsys.hsv_to_rgb(hue, strong, light)]
    return table[np.maximum(semantic, 0)]


def set_colors(ids: np.ndarray) -> np.ndarray:
    """Set ids [...] to uint8 [..., 3]: a fixed color an id, bright and unlike that of ids near by; -1 is black."""
    hue, strong, light = ids * 0.61803398875 % 1, np.take([0.5, 0.8, 0.65], ids % 3), np.take([0.95, 0.75], ids % 2)
    sector = (np.array([5, 3, 1]) + 6 * hue[..., None]) % 6
    fall = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    colors = 255 * light[..., None] * (1 - strong[..., None] * fall)
    return np.where(ids[..., None] < 0, 0, np.round(colors)).astype(np.uint8)


def sets_overlay(color: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """An image uint8 [H, W, 3] under the colors of its sets [H, W], borders between sets darkened."""
    gray = np.repeat(color.mean(axis=2, keepdims=True), 3, axis=2)
    mixed = np.where(ids[..., None] < 0, 0.5 * gray, 0.35 * gray + 0.65 * set_colors(ids))
    border = np.zeros(ids.shape, bool)
    border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    border[1:] |= ids[1:] != ids[:-1]
    mixed[border] *= 0.4
    return np.round(mixed).astype(np.uint8)


def surface_view(sets: SceneSets, size: tuple[int, int], poses: list[np.ndarray]) -> np.ndarray:
    """The points of a scene in the colors of their sets, from above and without perspective: uint8 [*size, 3].

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
    """The readable ones of `frames` frames evenly spaced in time of each of the first `scenes` scenes that has any."""
    shown: dict[str, list[Frame]] = {}
    for scene in source.scenes()[:scenes]:
        ids = source.frame_ids(scene)
        for pick in sorted({round(x) for x in np.linspace(0, len(ids) - 1, min(frames, len(ids)))}):
            with contextlib.suppress(BadFrame):
                frame = source.load(scene, ids[pick])
                shown.setdefault(scene, []).append(frame)
    if not shown:
        raise DataError(
            f"Source {source.name!r} has no frame that can be shown; accepted: at least one readable frame."
        )
    return shown


def _at_most(frame: Frame, width: int) -> Frame:
    """The frame, made smaller where it is wider."""
    height, old = frame.depth.shape
    return frame if old <= width else resize_frame(frame, (round(height * width / old), width))


def _normalized(vector: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vector / np.linalg.norm(vector)
    return unit


def _stacked(blocks: list[np.ndarray]) -> np.ndarray:
    """Pictures one below another, white where they are narrower."""
    width = max(block.shape[1] for block in blocks)
    sheet = np.full((sum(block.shape[0] + _GAP for block in blocks) - _GAP, width, 3), 255, np.uint8)
    top = 0
    for block in blocks:
        sheet[top : top + block.shape[0], : block.shape[1]] = block
        top += block.shape[0] + _GAP
    return sheet


def _grid(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Cells of one size (the first's; others are scaled) in rows, white between."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            if cell.shape[:2] != (height, width):
                cell = np.asarray(Image.fromarray(cell).resize((width, height), Image.Resampling.BILINEAR))
            top, left = r * (height + _GAP), c * (width + _GAP)
            sheet[top : top + height, left : left + width] = cell
    return sheet
