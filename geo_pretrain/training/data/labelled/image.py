"""Labelled images, and the protocols of a source of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from geo_pretrain.errors import BadFrame
from geo_pretrain.training.data.labelled.dataset import LabelledData


@dataclass(frozen=True)
class Instances:
    """The objects of one image."""

    boxes: np.ndarray  # float32 [N, 4]: x0, y0, x1, y1 in pixels, x1 and y1 exclusive
    classes: np.ndarray  # int64 [N], 1..C
    masks: np.ndarray  # bool [N, H, W]
    crowd: np.ndarray  # bool [N]: left out of training, ignored in evaluation
    boxes_alone: int = 0  # objects that are annotated without a mask: theirs is the box

    def __len__(self) -> int:
        return len(self.classes)


def need_masks(objects: Instances, where: str) -> None:
    """Raise `BadFrame` for an image with objects that are annotated by a box alone."""
    if objects.boxes_alone:
        raise BadFrame(
            where,
            f"{objects.boxes_alone} of {len(objects)} objects have a box and no mask; boxes alone are for "
            "--set task=detection --set network.kind=faster_rcnn",
        )


@dataclass(frozen=True)
class LabelledImage:
    """One image with labels of its pixels or of its objects."""

    id: str
    image: np.ndarray  # uint8 [H, W, 3], RGB
    semantic: np.ndarray | None  # uint8 [H, W]: 0 = ignore, 1..C
    instances: Instances | None


class LabelledSource(LabelledData, Protocol):
    """One split of a data set of labelled images, for one task. Adding a set takes a file with such a class and a row.

    A source whose images are files also has `file_name(id)`, the image's path below the folder of images. One that
    knows of scenes without a labelled image has `scenes()`, the names of all scenes of the split.
    """

    def load(self, id: str) -> LabelledImage:
        """Read one image. Raises `BadFrame` with path and reason when one of its files cannot be used."""
