"""Settings of a measurement of 3D awareness; the same for every backbone of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from geo_pretrain.training.checks import Accepts, Count, ImageSize, Positive, Ranged
from geo_pretrain.training.evaluation.matching import THRESHOLDS, Turn, Unit

MEASURES = ("matching", "depth", "normals", "semantic")
ANGLES = ((0, 15), (15, 30), (30, 60), (60, 180))  # degrees between two cameras, as in probe3d
OVERLAPS = ((0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 1.0))  # of two clouds, by projection
TURNS: tuple[Turn, ...] = ("camera", "upright", "full")  # how clouds are held, see `matching.Turn`
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
    threshold: Positive | None = None  # within which a match is right in a bin; None: 4 px, 2 voxels
    stride: Count = 4  # px between places: candidates of matching, and where probes are judged
    places: Count = 500  # of each frame that regressions are fitted to
    labels: Count = 4_000  # labelled places that the semantic probe is fitted to
    iterations: Count = 60  # of the semantic probe's fit, at most
    blocks: Count = 4  # of frames in time, of a source with one scene
    seeds: Count = 3
    measures: Measures = MEASURES

    def within(self, unit: Unit) -> float:
        """The threshold in its unit."""
        return THRESHOLDS[unit] if self.threshold is None else self.threshold
