"""The match viewer: one HTML page on which a pixel of either view shows its heat map in the other one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geo_pretrain.geometry import radius_matches
from geo_pretrain.training.evaluation.features import CloudExtractor, FeatureExtractor, Features
from geo_pretrain.training.evaluation.matching import (
    COUNTERPART,
    Matches,
    Turn,
    extract_turned,
    nearest_row,
    true_pixels,
)
from geo_pretrain.training.visualize.common import paint
from geo_pretrain.training.visualize.embedded import embed, encode, encode_picture, encode_rows, fill_page
from geo_pretrain.training.visualize.grids import magnification
from geo_pretrain.training.visualize.splat import behind_camera, splat

PAGE = Path(__file__).with_name("match_page.html")
CHECKED = 500  # rows whose nearest feature is compared with that of the whole features
NOWHERE = np.nan


@dataclass(frozen=True)
class View:
    """One of two views, as a network sees it: a picture, and the feature of each of its cells."""

    picture: np.ndarray  # uint8 [H, W, 3]
    grid: np.ndarray  # int64 [h, w], the row of each cell of the picture, -1 for none
    features: Features
    places: np.ndarray  # float64 [M, 2], where each row lies in the picture, px
    truths: np.ndarray  # float64 [M, 2], where its counterpart lies in the other picture, px; NaN where nobody knows
    points: np.ndarray | None = None  # float64 [M, 3], of clouds: in the world, in voxels


def image_views(extractor: FeatureExtractor, matches: Matches) -> tuple[View, View]:
    """The views of two images; a cell is one of the network's map."""
    views = []
    for one, other in (matches.frames, matches.frames[::-1]):
        features = extractor.extract_frame(one)
        height, width = one.depth.shape
        grid = np.arange(len(features.rows)).reshape(-1, int(features.index[0, -1]) + 1)
        places = features.positions.numpy()
        at = np.floor(places + 0.5).astype(np.int64)
        at = np.minimum(at[:, 1], height - 1) * width + np.minimum(at[:, 0], width - 1)
        true = true_pixels(one, other).numpy()[at]
        across = other.depth.shape[1]
        truths = np.where(true[:, None] >= 0, np.stack([true % across, true // across], 1), NOWHERE)
        views.append(View(one.color, grid, features, places, truths))
    return views[0], views[1]


def cloud_views(extractor: CloudExtractor, matches: Matches, turn: Turn, seed: int) -> tuple[View, View]:
    """The views of two frames' clouds, from behind the cameras; a cell is a pixel, its row the voxel seen there."""
    generator, size = torch.Generator().manual_seed(seed), extractor.voxel_size
    pictures, grids, features, cameras = [], [], [], []
    for frame in matches.frames:
        cloud, extracted = extract_turned(extractor, frame, turn, generator)
        points = torch.from_numpy(cloud.points)
        height, width = frame.depth.shape
        larger = magnification(width)
        camera = behind_camera(points, frame, (height * larger, width * larger))
        seen = splat(points, camera, size / 2)
        pictures.append(paint(cloud.colors, seen))
        grids.append(np.where(seen >= 0, extracted.index[seen], -1))
        features.append(extracted)
        cameras.append(camera)
    near = radius_matches(features[0].positions, features[1].positions, COUNTERPART * size)
    views = []
    for k, other in ((0, 1), (1, 0)):
        world = features[k].positions
        known = torch.zeros(len(world), dtype=torch.bool)
        known[near[:, k]] = True
        truths = np.where(known[:, None], cameras[other].project(world)[0].numpy(), NOWHERE)
        places = cameras[k].project(world)[0].numpy()
        views.append(View(pictures[k], grids[k], features[k], places, truths, world.numpy() / size))
    return views[0], views[1]


def page_pair(title: str, columns: Sequence[tuple[str, float, tuple[View, View]]]) -> dict[str, Any]:
    """What the page holds of one pair; of each column the title, the share of right matches and the views."""
    first = columns[0][2]
    return {
        "name": title,
        "pictures": [encode_picture(view.picture) for view in first],
        "sizes": [view.picture.shape[1::-1] for view in first],
        "columns": [_page_column(title, share, views) for title, share, views in columns],
    }


def _page_column(title: str, share: float, views: tuple[View, View]) -> dict[str, Any]:
    units = [view.features.unit() for view in views]
    embedded = embed(units)
    asked = np.flatnonzero(~np.isnan(views[0].truths[:, 0]))
    asked = asked[np.linspace(0, len(asked) - 1, min(CHECKED, len(asked))).astype(np.int64)]
    exact = nearest_row(units[0][asked], units[1])
    same = (nearest_row(embedded.rows(0)[asked], embedded.rows(1)) == exact).float().mean() if len(asked) else 1.0
    return {
        "title": title,
        "share": share,
        "same": float(same),
        "channels": [units[0].shape[1], len(embedded.scales)],
        "scales": encode(embedded.scales),
        "views": [
            {
                "grid": list(view.grid.shape[::-1]),
                **encode_rows(view.grid),
                "codes": encode(codes),
                "places": encode(view.places.astype(np.float32)),
                "truths": encode(view.truths.astype(np.float32)),
                "points": None if view.points is None else encode(view.points.astype(np.float32)),
            }
            for view, codes in zip(views, embedded.codes, strict=True)
        ],
    }


def match_page(title: str, note: str, pairs: Sequence[dict[str, Any]], threshold: float, unit: str) -> str:
    """The text of the page; `pairs` as `page_pair` gives them."""
    return fill_page(PAGE, {"title": title, "note": note, "pairs": list(pairs), "threshold": threshold, "unit": unit})
