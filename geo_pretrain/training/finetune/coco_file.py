"""Detections of several images as one JSON file in COCO's format: annotations with scores, as evaluation takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from geo_pretrain.training.evaluation.coco import Detections
from geo_pretrain.training.finetune.detection import coco_detections


class CocoFile:
    """Images with what was found in them. Categories have the ids of the training data, or 1..C where there are none.

    `annotations` hold image_id, category_id, bbox [x, y, width, height], score, area and, of networks with masks,
    compressed run lengths; without score and area they are what pycocotools' `loadRes` takes.
    """

    def __init__(self, classes: Sequence[str], ids: Sequence[int] | None = None) -> None:
        self.classes = tuple(classes)
        self.ids = tuple(ids) if ids is not None and len(ids) == len(self.classes) else None
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, file: str, shape: Sequence[int], found: Detections, *, id: int | None = None) -> None:
        """Add an image of `shape` (H, W) and the detections in it; image ids count from 1, unless one is given."""
        image = len(self.images) + 1 if id is None else id
        self.images.append({"id": image, "file_name": file, "height": int(shape[0]), "width": int(shape[1])})
        for k, entry in enumerate(coco_detections(found, image)):
            width, height = entry["bbox"][2:]
            area = width * height if found.masks is None else int(np.count_nonzero(found.masks[k]))
            number = {"id": len(self.annotations) + 1, "area": area, "iscrowd": 0}
            self.annotations.append(number | entry | {"category_id": self._id(entry["category_id"])})

    def tree(self) -> dict[str, Any]:
        """All of it, in plain JSON types."""
        categories = [{"id": self._id(k), "name": name} for k, name in enumerate(self.classes, 1)]
        return {"images": self.images, "annotations": self.annotations, "categories": categories}

    def _id(self, label: int) -> int:
        return label if self.ids is None else int(self.ids[label - 1])
