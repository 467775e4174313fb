"""What networks say about one cloud, in its own order of points and its own frame, or about one image's pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D


@dataclass(frozen=True)
class PixelLabels:
    """The class of each pixel of an image."""

    labels: np.ndarray  # int64 [H, W], 1..C
    scores: np.ndarray  # float32 [H, W]: probability of the label


@dataclass(frozen=True)
class PointLabels:
    """The class of each point of a cloud; of parts3d: its part."""

    labels: np.ndarray  # int64 [N], 1..C
    scores: np.ndarray  # float32 [N]: probability of the label


@dataclass(frozen=True)
class PointInstances:
    """The objects of a cloud as sets of its points, which may share points."""

    masks: np.ndarray  # bool [K, N]
    classes: np.ndarray  # int64 [K], 1..C
    scores: np.ndarray  # float32 [K], falling
    labels: PointLabels | None = None  # the class of each point, where the network gives it as well

    def __len__(self) -> int:
        return len(self.classes)

    def numbers(self) -> np.ndarray:
        """Number the objects from 1 as they stand, each point by the first object that has it: int64 [N], 0 = none."""
        count = self.masks.shape[1]
        found = np.zeros(count, np.int64)
        for number in range(len(self), 0, -1):
            found[self.masks[number - 1]] = number
        return found


@dataclass(frozen=True)
class Detections3D:
    """The objects of a cloud as upright boxes."""

    boxes: Boxes3D
    scores: np.ndarray  # float32 [K], falling

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class CloudClass:
    """The class of a whole cloud."""

    label: int  # 1..C
    scores: np.ndarray  # float32 [C]: probability of each class


CloudPrediction = PointLabels | PointInstances | Detections3D | CloudClass
