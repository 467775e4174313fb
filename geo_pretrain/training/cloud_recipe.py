"""The schema of `data.cloud` in fine-tuning recipes: how a labelled cloud becomes a network's input, and augmentation.

The defaults change nothing; recipes state what a paper's released code does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from geo_pretrain.training.checks import (
    Accepts,
    Checks,
    Count,
    Meters,
    NaturalNumber,
    NotNegative,
    PositiveRange,
    Probability,
)

Angles = Annotated[
    tuple[float, float, float],
    Accepts(lambda angles: all(0 <= a <= 180 for a in angles), "three numbers of degrees from 0 to 180, for x, y, z"),
]
Chances = Annotated[
    tuple[float, float, float],
    Accepts(lambda chances: all(0 <= p <= 1 for p in chances), "three probabilities from 0 to 1, for x, y, z"),
]
Offsets = Annotated[
    tuple[float, float, float],
    Accepts(lambda offsets: all(o >= 0 for o in offsets), "three numbers from 0 up, for x, y, z"),
]
Elastic = Annotated[
    tuple[tuple[float, float], ...],
    Accepts(
        lambda rounds: all(grid > 0 and magnitude >= 0 for grid, magnitude in rounds),
        "a list of [granularity, magnitude] in meters, such as [[0.2, 0.4], [0.8, 1.6]]",
    ),
]
Axes = Annotated[str, Accepts(lambda axes: set(axes) <= set("xyz") and len(set(axes)) == len(axes), "some of x, y, z")]
Cylinders = Annotated[
    tuple[float, float, float],
    Accepts(lambda edges: min(edges) > 0 and edges[1] <= 180, "three edges: meters, degrees up to 180, meters"),
]
CloudFeatures = Literal["contract", "rgb", "ones", "gray", "mean", "intensity"]
VoxelLabels = Literal["agree", "agree_known", "majority", "first"]


@dataclass(frozen=True)
class CropSpec:
    """A random cube that a training cloud is cropped to; only points inside it are kept."""

    half: Meters = 4.0  # half the length of an edge, m
    shift: Offsets = (0.2, 0.2, 0.05)  # the center moves by up to this share of the cloud's extent along each axis
    center: Literal["box", "origin"] = "box"  # middle of the cloud's bounding box, or the origin (a sensor)
    minimum: NotNegative = 0.0  # a cloud whose longest extent is below this (m) is not cropped


@dataclass(frozen=True)
class CloudAugment:
    """Augmentation of training clouds, in the order in which it is applied."""

    elastic: Elastic = ()  # [granularity, magnitude] (m) of each distortion
    elastic_prob: Probability = 0.95  # of all of them together
    crop: CropSpec | None = None
    mirror: Chances = (0.0, 0.0, 0.0)  # probability of x -> -x, y -> -y, z -> -z about `center`
    rotate: Angles = (0.0, 0.0, 0.0)  # limit of the angle about each axis; the three are joined in random order
    scale: PositiveRange = (1.0, 1.0)
    scale_axes: bool = False  # every axis is scaled by a factor of its own
    center: Literal["origin", "centroid"] = "origin"  # of mirror, rotation and scale; a centroid moves to the origin
    translate: Offsets = (0.0, 0.0, 0.0)  # limits in meters, after rotation
    jitter: NotNegative = 0.0  # standard deviation of noise on the points, m
    jitter_clip: Meters | None = None  # limit of that noise along each axis, m
    dropout: Probability = 0.0  # share of the voxels that is left out ...
    dropout_prob: Probability = 0.2  # ... with this probability
    flip_axes: Axes = ""  # each of these axes of the voxels is turned round with probability 1/2 ...
    flip_prob: Probability = 0.95  # ... if a first draw with this probability says so
    contrast_prob: Probability = 0.0  # of stretching each color channel to its full range, blended at random
    color_translation: Probability = 0.0  # limit of one shift of all colors, as a share of 255
    color_translation_prob: Probability = 0.95
    color_jitter: NotNegative = 0.0  # standard deviation of noise on each voxel's colors, as a share of 255
    color_jitter_prob: Probability = 0.95
    shift: NaturalNumber = 0  # voxels move by a whole number from 0 to below this along each of ...
    shift_axes: Axes = "xyz"  # ... these axes; PointContrast's code moves batch, x, y instead of x, y, z: xy (D30)


# What clouds of RGB-D frames get unless their recipe says otherwise: an upright rotation about the centroid.
TILT = 180 / 64  # degrees, as in CSC


@dataclass(frozen=True)
class CloudSpec:
    """How a labelled cloud becomes the voxels of a network, in training and evaluation."""

    # Edge of a voxel, m; None: that of the backbone's contract, for "scratch" of network.unet3d.
    voxel_size: Meters | None = None
    # Edges of cylindrical voxels about the z axis through a scanner (radius, azimuth, z), in place of voxel_size.
    cylindrical: Cylinders | None = None
    # Input channels. contract: what the backbone was pre-trained on; rgb: color / 255 - 0.5, as the released code for
    # S3DIS and ScanNet; ones; of laser scans: gray: remission in all three channels, minus 0.5; mean: the same in one
    # channel, with the weights of the three added; intensity: remission + 1 in one channel, as SLidR.
    features: CloudFeatures = "contract"
    normalize: Literal["none", "unit_sphere"] = "none"  # unit_sphere: mean to the origin, largest norm 1 (objects)
    points: Count | None = None  # number of points drawn from a cloud (with repetition from a smaller one); None: all
    # Evaluation: half the edge of a cube about the middle of the cloud's box, whose points are measured; None: all.
    bounds: Meters | None = None
    # The label of a voxel. agree: that of all its points, else ignored (released code of PointContrast, CSC);
    # agree_known: the same without regard to unlabelled points; majority of the labelled points; first: of the point
    # whose features the voxel has (SLidR).
    labels: VoxelLabels = "agree"
    align: bool = True  # the lowest voxel coordinates of a cloud become 0, as in the released code
    limit: Count | None = None  # most voxels of a micro-batch: clouds from the first one beyond it on are left out
    # Labelled points of a training cloud; the labels of all others are forgotten. A number: drawn by
    # data.fraction_seed; a text: path of an official list (see labelled.clouds.limited).
    labelled_points: int | str | None = None
    augment: CloudAugment = field(default_factory=CloudAugment)

    def check_settings(self, check: Checks) -> None:
        """Note settings that do not go together or are out of range."""
        points, prefix = self.labelled_points, "data.cloud."
        both = self.voxel_size is not None and self.cylindrical is not None
        sizes = (self.voxel_size, self.cylindrical)
        check(not both, f"{prefix}voxel_size / {prefix}cylindrical", sizes, "one of the two, or neither")
        right = not isinstance(points, int) or points >= 1
        check(right, prefix + "labelled_points", points, "a whole number from 1 up, or the path of a list")
        clip = self.augment.jitter_clip is None or self.augment.jitter > 0
        check(clip, prefix + "augment.jitter_clip", self.augment.jitter_clip, "none without jitter")


FRAMES = CloudSpec(labels="majority", align=False, augment=CloudAugment(rotate=(TILT, TILT, 180.0), center="centroid"))
