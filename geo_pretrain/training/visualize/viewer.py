"""A viewer of point clouds in one HTML file: it rotates in any browser and loads nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PAGE = Path(__file__).with_name("viewer.html")


def viewer_page(
    points: np.ndarray,
    layers: Sequence[tuple[str, np.ndarray]],
    *,
    title: str,
    note: str,
    size: float,
    top: float = 1.0,
    edges: Sequence[tuple[np.ndarray, np.ndarray] | None] = (),
    link: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a page that shows a cloud; it rotates by itself and by hand, buttons choose its colors.

    Args:
        points: float [N, 3], m, z is up.
        layers: names and colors uint8 [N, 3]; the first is shown first.
        size: diameter of a point, m.
        top: share of the height that is shown at first: the slider "cut from above" takes ceilings away.
        edges: of each layer, points [M, 3] and colors [M, 3] that are drawn beside the cloud's: edges of boxes.
        link: images beside the cloud, as `linked.link_frames` gives them.
    """
    center = (points.min(axis=0) + points.max(axis=0)) / 2
    centered = points - center
    layers_of_page = [{"name": name, "colors": _base64(colors.astype(np.uint8))} for name, colors in layers]
    for layer, edge in zip(layers_of_page, edges, strict=False):
        if edge is not None:
            layer["places"], layer["shades"] = _base64((edge[0] - center).astype("<f4")), _base64(edge[1])
    scene: dict[str, Any] = {
        "title": title,
        "note": note,
        "points": _base64(centered.astype("<f4")),
        "layers": layers_of_page,
        "radius": max(float(np.linalg.norm(centered, axis=1).max()), 1e-3),
        "size": size,
        "top": top,
        "azimuth": 0.8,  # radians, where the view begins
        "elevation": 0.6,
    }
    if link is not None:
        scene["link"] = dict(link)
    # "</script>" in a name would end the element that holds it
    return PAGE.read_text(encoding="utf-8").replace("__SCENE__", json.dumps(scene).replace("<", "\\u003c"))


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
