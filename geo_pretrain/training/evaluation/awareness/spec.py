"""Settings of a measurement of 3D awareness; the same for every backbone of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from geo_pretrain.training.checks import Accepts, Count, ImageSize, Positive, Ranged

MEASURES = ("matching", "depth", "normals", "semantic")
ANGLES = ((0, 15), (15, 30), (30, 60), (60, 180))  # degrees between two cameras, as in probe3d
DISTANCES = (2, 4, 8, 16, 32)  # px
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of linear regression, chosen among the training groups
HELD_OUT = 0.25  # of the groups of frames

Measures = Annotated[
    tuple[str, ...],
    Accepts(lambda given: given and set(given) <= set(MEASURES), f"some of {', '.join(MEASURES)}, each once"),
]


@dataclass(frozen=True)
class AwarenessSpec(Ranged):
    """How many frames, pairs and places are looked at."""

    size: ImageSize = (240, 320)  # height, width of the frames
    frames: Count = 120  # of the source, spread evenly over its scenes
    pairs: Count = 25  # of each bin of angles (3D: of overlaps), for each seed
    queries: Count = 300  # of each pair
    threshold: Positive = 4.0  # px, within which a match is right in the bins of angles; 3D: voxels
    stride: Count = 4  # px between places: candidates of matching, and where probes are judged
    places: Count = 500  # of each frame that regressions are fitted to
    labels: Count = 10_000  # labelled places that the semantic probe is fitted to
    iterations: Count = 100  # of the semantic probe's fit, at most
    blocks: Count = 4  # of frames in time, of a source with one scene
    seeds: Count = 3
    measures: Measures = MEASURES
