"""Features on points: the surface of a scene, or the cloud of one frame, colored by a backbone's features.

A 3D backbone gives features of the points themselves. Of a 2D one each point has the mean over the frames that see it.
Janda et al. (2022), fig. 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from geo_pretrain.errors import RecipeError, unknown
from geo_pretrain.files import atomic_write
from geo_pretrain.targets import CLOUDS
from geo_pretrain.training.data.frame import Frame, SkippedFrames, Source, Surface, resize_frame
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.data.surfaces.fusing import Surfaces
from geo_pretrain.training.data.surfaces.ply import write_ply
from geo_pretrain.training.evaluation.features import Features, ImageExtractor, cloud_of
from geo_pretrain.training.evaluation.progress import Progress
from geo_pretrain.training.recipe import DataSpec
from geo_pretrain.training.visualize.cloud_layers import spacing
from geo_pretrain.training.visualize.columns import Column, Opened, find_backbone, load_beside_random, shared_colors
from geo_pretrain.training.visualize.common import check_place, drawing_spec, load_frames, paint, pick_scene, prepare
from geo_pretrain.training.visualize.grids import save_grid, shorten
from geo_pretrain.training.visualize.linked import link_frames
from geo_pretrain.training.visualize.own_clouds import OWN_CLOUDS, OwnClouds, open_own_clouds, point_contract
from geo_pretrain.training.visualize.rerun_file import write_rerun
from geo_pretrain.training.visualize.splat import rotation_to_z, splat, turntable, up_direction
from geo_pretrain.training.visualize.viewer import viewer_page

POINTS = 200_000  # drawn: a page of 5 MB with three layers
TOP = 0.8  # share of a scene's height that pictures show at first: ceilings hide what is below them
VIEWS, VIEW_SIZE = 4, (288, 320)  # of the turntable
ELEVATION = math.radians(50)  # over the walls of a room
DRAWN_LARGER = 2  # pictures are reduced by it: soft edges


@dataclass(frozen=True)
class PaintedCloud:
    """Points with the colors of a backbone's features."""

    points: np.ndarray  # float32 [N, 3], m, world
    # title and uint8 [N, 3]: backbone, its baseline, the colors of the surface
    layers: tuple[tuple[str, np.ndarray], ...]
    rotation: np.ndarray  # float64 [3, 3], takes the world's up to z
    title: str
    note: str  # how many of which points these are
    spacing: float  # m, about the distance of neighbors
    top: float  # share of the height to show
    link: Mapping[str, Any] | None = None  # images beside a page's cloud, see `linked.link_frames`
    frames: tuple[Frame, ...] = ()  # that see it


def visualize_points(
    backbone: str,
    spec: DataSpec,
    out: Path,
    *,
    scene: str | None = None,
    frame: str | None = None,
    limit: int = POINTS,
    size: tuple[int, int] | None = None,
    level: int | None = None,
    baseline: bool = True,
    seed: int = 0,
    device: str = "cpu",
    skips: SkippedFrames | None = None,
    progress: Progress | None = None,
) -> PaintedCloud:
    """Draw a scene's points colored by features: .ply (one color a point), .html (rotates), .png (four views).

    A PLY file has the colors of the backbone's first layer, in the world's frame; page and picture also have the
    baseline and the surface's own colors, z is up, and begin with the upper part cut off. The source "clouds" is a file
    of points, or a folder of them (`scene`: one of them), for backbones for points.

    Args:
        scene: None: the source's first. frame: the cloud of this frame instead of the surface of the scene.
        limit: points drawn; more are thinned at random, by `seed`.
        size: of the frames; None: that of pre-training.
        level: a map inside the network instead of its output, see `load_columns`.
        baseline: also the network with random weights, drawn from `seed`.

    Raises:
        RecipeError: `out` has another suffix, or `limit` is below 1.
        UnknownName: no such backbone, scene or frame; DataError: no frame or surface can be read.
    """
    source = _open(out, spec, device, frame)
    if limit < 1:
        raise RecipeError(f"The number of points is {limit}; accepted: 1 and more.")
    suffix = out.suffix.lower()
    opened = find_backbone(backbone)
    name, surfaces, frames, surface = _shown(
        source, spec, opened, scene, frame, size, SkippedFrames() if skips is None else skips
    )
    baseline = baseline and suffix != ".ply"
    columns = load_beside_random([opened], surfaces, baseline=baseline, level=level, seed=seed, device=device)
    columns = [column for column in columns if frames or not isinstance(column.extractor, ImageExtractor)]
    extracted = []
    for number, column in enumerate(columns):
        if progress is not None:
            progress(number, len(columns))
        extracted.append(column.extractor.extract_surface(surface, frames))
    title = f"{opened.title}: {name}" + (f"/{frame}" if frame else "")
    rotation = rotation_to_z(up_direction([f.cam_to_world for f in frames])) if frames else np.eye(3)
    top = TOP if frame is None and frames else 1.0
    drawn, layers, note = _paint(columns, extracted, surface, limit, seed)
    points = surface.points[drawn]
    link = link_frames(columns, frames, extracted, drawn) if frames and suffix == ".html" else None
    cloud = PaintedCloud(points, layers, rotation, title, note, spacing(points), top, link, tuple(frames))
    write = {".ply": _write_ply, ".html": _write_page, ".png": _write_views}[suffix]
    with atomic_write(out, suffix=out.suffix) as temporary:
        write(cloud, temporary)
    return cloud


def _open(out: Path, spec: DataSpec, device: str, frame: str | None) -> Source | OwnClouds | None:
    """Check what is asked for and open data on disk, before a backbone is fetched; None: rooms."""
    if spec.source != OWN_CLOUDS:
        return prepare(out, CLOUDS, spec, device)
    check_place(out, CLOUDS, device)
    if frame is not None:
        raise RecipeError(f"--frame {frame!r}: clouds of your own have no frames; --scene names a cloud.")
    return open_own_clouds(spec)


def _shown(
    source: Source | OwnClouds | None,
    spec: DataSpec,
    opened: Opened,
    scene: str | None,
    frame: str | None,
    size: tuple[int, int] | None,
    skips: SkippedFrames,
) -> tuple[str, Surfaces | None, list[Frame], Surface]:
    """The scene's name, the source's surfaces, the frames (of one's own clouds there are none) and the points."""
    if isinstance(source, OwnClouds):
        name = source.pick(scene)
        return name, None, [], source.surface(name, point_contract(opened))
    spec = drawing_spec(spec, opened, size)
    source = source or open_source(spec, split="val")
    name, surfaces = pick_scene(source, scene), Surfaces(source)
    return name, surfaces, *_load_surface(source, name, frame, spec.size, surfaces, skips)


def _load_surface(
    source: Source, scene: str, frame: str | None, size: tuple[int, int], surfaces: Surfaces, skips: SkippedFrames
) -> tuple[list[Frame], Surface]:
    """Load a scene's surface and the frames that see it, or one frame and its own cloud."""
    if frame is None:
        return load_frames(source, scene, None, size, skips), surfaces.load(scene)
    ids = source.frame_ids(scene)
    if frame not in ids:
        raise unknown("frame", frame, ids)
    loaded = resize_frame(source.load(scene, frame), size)
    return [loaded], cloud_of(loaded)


def _paint(
    columns: Sequence[Column], extracted: Sequence[Features], surface: Surface, limit: int, seed: int
) -> tuple[np.ndarray, tuple[tuple[str, np.ndarray], ...], str]:
    """Draw at most `limit` points that have all features: their rows, layers and note of a `PaintedCloud`."""
    known = np.flatnonzero(np.all([features.index >= 0 for features in extracted], axis=0))
    drawn = np.sort(np.random.default_rng(seed).choice(known, min(limit, len(known)), replace=False))
    rows = [features.unit()[torch.from_numpy(features.index[drawn])] for features in extracted]
    (colors,) = shared_colors(columns, [rows])
    layers = [(column.title, painted) for column, painted in zip(columns, colors, strict=True)]
    note = f"{len(drawn):,} of {len(surface):,} points"
    if len(known) < len(surface):
        note += f", of which the frames see {len(known):,}"
    note += ". Colors: three principal components of the features."
    return drawn, (*layers, ("colors", surface.colors[drawn])), note


def write_recording(cloud: PaintedCloud, path: Path) -> None:
    """Write a painted cloud and its frames as .rrd for the Rerun viewer. Raises the errors of `check_rerun`."""
    up = cloud.rotation[2]
    write_rerun(cloud.points, cloud.layers, cloud.frames, path, radius=0.6 * cloud.spacing, up=up)


def _write_ply(cloud: PaintedCloud, path: Path) -> None:
    colors = cloud.layers[0][1]
    position = {axis: cloud.points[:, k].astype(np.float32) for k, axis in enumerate("xyz")}
    color = {name: colors[:, k] for k, name in enumerate(("red", "green", "blue"))}
    write_ply(path, {"vertex": position | color})


def _write_page(cloud: PaintedCloud, path: Path) -> None:
    rotated = cloud.points.astype(np.float64) @ cloud.rotation.T
    size = 2.2 * cloud.spacing
    page = viewer_page(
        rotated, cloud.layers, title=cloud.title, note=cloud.note, size=size, top=cloud.top, link=cloud.link
    )
    path.write_text(page, encoding="utf-8")


def _write_views(cloud: PaintedCloud, path: Path) -> None:
    rotated = cloud.points.astype(np.float64) @ cloud.rotation.T
    low, high = rotated[:, 2].min(), rotated[:, 2].max()
    shown = rotated[:, 2] <= low + cloud.top * (high - low)
    points = torch.from_numpy(rotated[shown])
    large = (VIEW_SIZE[0] * DRAWN_LARGER, VIEW_SIZE[1] * DRAWN_LARGER)
    views = [splat(points, camera, 1.1 * cloud.spacing) for camera in turntable(points, VIEWS, large, ELEVATION)]
    panels, captions = [], []
    for title, colors in cloud.layers:
        pictures = [Image.fromarray(paint(colors[shown], view)) for view in views]
        panels.append([picture.resize(VIEW_SIZE[::-1], Image.Resampling.BOX) for picture in pictures])
        captions.append([shorten(title, VIEW_SIZE[1], 13)] + [""] * (VIEWS - 1))
    save_grid(panels, captions, [shorten(cloud.title, 4 * VIEW_SIZE[1])], cloud.note, path)
