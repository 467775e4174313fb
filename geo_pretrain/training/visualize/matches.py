"""Matches between two views, as lines or as a page: pixels of two images, or voxels of the clouds of two frames.

Pri3D (Hou et al., ICCV 2021), fig. 10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import CheckpointError, RecipeError
from geo_pretrain.files import atomic_write
from geo_pretrain.targets import MATCHES
from geo_pretrain.training.data.check.sample import turn as turn_between
from geo_pretrain.training.data.frame import Pair, SkippedFrames, Source
from geo_pretrain.training.data.mining import find_pairs, spread_evenly
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.data.surfaces.fusing import cubic_voxel_size, frame_cloud
from geo_pretrain.training.evaluation.features import CloudExtractor, load_extractor
from geo_pretrain.training.evaluation.matching import THRESHOLDS, Matches, Turn, Unit, match_pair, unit_of
from geo_pretrain.training.evaluation.progress import Progress
from geo_pretrain.training.recipe import DataSpec
from geo_pretrain.training.visualize.columns import RANDOM_TITLE, Column, Opened, find_backbone
from geo_pretrain.training.visualize.common import drawing_spec, fill_rows, paint, pick_scene, prepare
from geo_pretrain.training.visualize.grids import magnification, shorten
from geo_pretrain.training.visualize.match_page import cloud_views, image_views, match_page, page_pair
from geo_pretrain.training.visualize.results import draw_matches
from geo_pretrain.training.visualize.splat import behind_camera, splat

SAMPLED = 100  # pairs of a scene, as many as are measured by default, from which those to draw are taken
SCRATCH = "scratch"  # what random weights are called on the command line
PANEL = 2 * 256  # px: two images side by side, as `draw_matches` makes them


def visualize_matches(
    backbone: str,
    spec: DataSpec,
    out: Path,
    *,
    against: str | None = SCRATCH,
    scene: str | None = None,
    count: int = 3,
    size: tuple[int, int] | None = None,
    threshold: float | None = None,
    turn: Turn = "camera",
    seed: int = 0,
    device: str = "cpu",
    skips: SkippedFrames | None = None,
    progress: Progress | None = None,
    on_pair: Callable[[str], object] = lambda _: None,
) -> list[tuple[str, list[float]]]:
    """Draw matches of `count` pairs of views: lines from queries to their nearest features, green where right (.png).

    As .html a page on which a pixel of either view shows its heat map in the other one.

    Args:
        backbone: a catalog name or folder; images for 2D ones (of an encoder alone its maps), clouds for 3D ones.
        against: what stands beside it: "scratch" (its own random weights), another backbone of its kind, None: nothing.
        scene: None: pairs are spread over `count` scenes.
        size, threshold: of the frames; of a right match. None: pre-training's; 4 pixels, 2 voxels.
        turn, seed: of the clouds, see `evaluation.matching.Turn`; of queries, turns and random weights.
        on_pair: called with a line on each pair that is drawn: its frames, their overlap, the angle between them.

    Returns each column's title and the share of right matches of each pair shown, in the order of the picture.

    Raises:
        RecipeError: `out` is neither .png nor .html, or `backbone` is "scratch".
        CheckpointError: voxels that RGB-D cannot give, or a backbone of another kind beside.
        DataError: no pair can be shown; UnknownName: no such backbone or scene.
    """
    source = prepare(out, MATCHES, spec, device)
    skips = skips if skips is not None else SkippedFrames()
    opened = _open_all(backbone, against)
    spec = drawing_spec(spec, opened[0], size)
    source = source or open_source(spec, split="val")
    pairs = _pairs_to_draw(source, spec, scene, count, skips)
    columns = _load_columns(opened, against == SCRATCH, seed, device)
    unit = unit_of(columns[0].extractor)
    threshold = THRESHOLDS[unit] if threshold is None else threshold

    def match(number: int, pair: Pair, column: Column) -> Matches:
        return match_pair(column.extractor, source, pair, size=spec.size, turn=turn, seed=seed + number)

    found = fill_rows(pairs, columns, match, what=f"pair of source {source.name!r}", skips=skips, progress=progress)
    rows = [row for pair, row in found if on_pair(_described(pair, row[0])) or True]
    with atomic_write(out, suffix=out.suffix) as temporary:
        if out.suffix.lower() == ".html":
            seeds = [seed + pairs.index(pair) for pair, _ in found]
            temporary.write_text(_page(columns, rows, threshold, unit, turn, seeds), encoding="utf-8")
        else:
            _draw(columns, rows, temporary, threshold, unit)
    return [
        (column.title, [float((row[k].error <= threshold).mean()) for row in rows]) for k, column in enumerate(columns)
    ]


def _draw(
    columns: Sequence[Column], rows: Sequence[Sequence[Matches]], path: Path, threshold: float, unit: Unit
) -> None:
    """Draw the lines of matched pairs."""
    drawn = [[_projected(matches, column) for matches, column in zip(row, columns, strict=True)] for row in rows]
    draw_matches(drawn, [shorten(column.title, PANEL) for column in columns], path, threshold=threshold, unit=unit)


def _projected(matches: Matches, column: Column) -> Matches:
    """Matches as they are drawn: those of clouds as seen by cameras."""
    if isinstance(column.extractor, CloudExtractor):
        return project_matches(matches, column.extractor.voxel_size)
    return matches


def _page(
    columns: Sequence[Column],
    rows: Sequence[Sequence[Matches]],
    threshold: float,
    unit: Unit,
    turn: Turn,
    seeds: Sequence[int],
) -> str:
    """The interactive page of matched pairs; the backbone's column comes first."""
    pairs = []
    for row, seed in zip(rows, seeds, strict=True):
        shown = []
        for column, matches in zip(columns, row, strict=True):
            extractor = column.extractor
            if isinstance(extractor, CloudExtractor):
                views = cloud_views(extractor, matches, turn, seed)
            else:
                views = image_views(extractor, matches)
            shown.append((column.title, float((matches.error <= threshold).mean()), views))
        shown.sort(key=lambda item: item[0] == RANDOM_TITLE)
        pair = row[0].pair
        pairs.append(page_pair(f"{pair.scene}: {pair.frame1}, {pair.frame2}", shown))
    title = f"Matches of {next(c.title for c in columns if c.title != RANDOM_TITLE)}"
    note = f"A match is right within {threshold:g} {unit}."
    return match_page(title, note, pairs, threshold, unit)


def _open_all(backbone: str, against: str | None) -> list[Opened]:
    """Open the backbone and the one to compare it with; both must take the same kind of input."""
    if backbone == SCRATCH:
        raise RecipeError(
            f"{SCRATCH!r} is drawn beside a backbone; accepted as the backbone: a catalog name or a folder."
        )
    opened = [find_backbone(name) for name in dict.fromkeys([backbone, against]) if name not in (None, SCRATCH)]
    first = opened[0].checkpoint.contract
    for other in opened:
        contract = other.checkpoint.contract
        if isinstance(contract, VoxelContract):
            cubic_voxel_size(contract)
        if type(contract) is not type(first):
            raise CheckpointError(
                f"{other.name!r} takes {contract}; beside {opened[0].name!r} are accepted networks that take "
                f"{'images' if isinstance(first, ImageContract) else 'voxels'}, or {SCRATCH!r}."
            )
    return opened


def _pairs_to_draw(source: Source, spec: DataSpec, scene: str | None, count: int, skips: SkippedFrames) -> list[Pair]:
    """Pairs as typical as those that are measured: of each scene's, evenly spaced by rank of their overlap.

    Neighbors in time, which overlap nearly wholly, are a few of the pairs that `evaluation.matching` measures.
    """
    scenes = [pick_scene(source, scene)] if scene else spread_evenly(source.scenes(), count)
    found = find_pairs(_SomeScenes(source, scenes), spec, skips=skips)
    by_scene = {name: [pair for pair in found if pair.scene == name] for name in scenes}
    samples = [sorted(spread_evenly(pairs, SAMPLED), key=lambda p: p.overlap) for pairs in by_scene.values() if pairs]
    chosen: list[Pair] = []
    for number in range(min(count, sum(map(len, samples)))):
        sample = max(samples[number % len(samples) :] + samples[: number % len(samples)], key=bool)
        at = min(len(sample) - 1, int((number + 0.5) / count * len(sample)))
        chosen.append(sample.pop(at))
    return sorted(chosen, key=lambda pair: scenes.index(pair.scene))


def _described(pair: Pair, matches: Matches) -> str:
    """A pair in words: its frames, their overlap and, of two frames, the angle between the cameras."""
    text = f"{pair.scene}: {pair.frame1} and {pair.frame2}, overlap {pair.overlap:.0%}"
    if len(matches.frames) < 2:
        return text
    first, second = (frame.cam_to_world for frame in matches.frames)
    return f"{text}, turned by {turn_between(first, second):.0f}\u00b0"


def _load_columns(opened: list[Opened], beside_random: bool, seed: int, device: str) -> list[Column]:
    """Load the extractor of each backbone; with `beside_random` the first one's random-init baseline comes first."""
    columns = [Column(one.title, one.name, load_extractor(one.checkpoint.folder, device=device)) for one in opened]
    if beside_random:
        baseline = load_extractor(opened[0].checkpoint.folder, random_init=True, seed=seed, device=device)
        columns.insert(0, Column(RANDOM_TITLE, RANDOM_TITLE, baseline))
    return columns


class _SomeScenes:
    """A source cut down to some scenes: finding the pairs of all would take hours, for a picture of three."""

    def __init__(self, source: Source, scenes: list[str]) -> None:
        self._scenes, self.name = scenes, source.name
        self.frame_ids, self.load, self.fingerprint = source.frame_ids, source.load, source.fingerprint

    def scenes(self) -> list[str]:
        return self._scenes


def project_matches(matches: Matches, voxel_size: float) -> Matches:
    """Project matches of two clouds into cameras behind the frames'; the frames' colors become pictures of the clouds.

    Errors stay those in the world: there it is decided what is right.
    """
    drawn, cameras = [], []
    for frame in matches.frames:
        cloud = frame_cloud(frame)
        points = torch.from_numpy(cloud.points)
        height, width = frame.depth.shape
        larger = magnification(width)  # as large as images are drawn
        camera = behind_camera(points, frame, (height * larger, width * larger))
        drawn.append(replace(frame, color=paint(cloud.colors, splat(points, camera, voxel_size / 2))))
        cameras.append(camera)

    def seen(camera: int, points: np.ndarray) -> np.ndarray:
        pixels: np.ndarray = cameras[camera].project(torch.from_numpy(points))[0].numpy()
        return pixels

    query, truth, predicted = seen(0, matches.query), seen(1, matches.truth), seen(1, matches.predicted)
    return replace(matches, frames=tuple(drawn), query=query, truth=truth, predicted=predicted)
