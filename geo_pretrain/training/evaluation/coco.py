"""COCO average precision for boxes and masks by pycocotools, without its output and its traps.

Traps: an annotation whose id is 0 never counts as found, an empty list of detections is a crash, detections of an
unknown class vanish, and the lists given are written to. All areas, at most 100 detections an image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from geo_pretrain.errors import DataError, require, unknown

Kind = Literal["box", "mask"]
IOU_TYPES = {"box": "bbox", "mask": "segm"}
SHAPES = {"box": "bbox", "mask": "segmentation"}
MAX_DETECTIONS = 100  # an image; the best by score


@dataclass(frozen=True)
class Detections:
    """The detections of a network in one image, sorted by descending score."""

    boxes: np.ndarray  # float32 [N, 4]: x0, y0, x1, y1 in pixels of the image given
    classes: np.ndarray  # int64 [N], 1..C
    scores: np.ndarray  # float32 [N], from 0 to 1
    masks: np.ndarray | None  # bool [N, H, W]; None: the network gives boxes only

    def __len__(self) -> int:
        return len(self.classes)


def coco_report(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], kind: Kind = "box"
) -> dict[str, Any]:
    """Compute AP (mean over IoU 0.5, 0.55, ..., 0.95), AP50 and AP75, in [0, 1], as means over classes with objects.

    Under "classes" the same of each class by name, without classes that the truth lacks.

    `truth` is COCO's tree (images, annotations, categories) as `labelled.export.coco_json` makes it; each detection
    is {image_id, category_id, score} with a bbox [x, y, width, height] or a segmentation (run lengths or polygons), the
    one that `kind` needs. Crowds are neither found nor missed; detections inside them count for nothing.
    Raises `DataError` when there is no object to find, and for detections that are not of this truth.
    """
    precision = _precision(truth, detections, kind)
    ordered = sorted(truth["categories"], key=lambda category: category["id"])
    classes = {
        str(category["name"]): _means(precision[:, :, [k]])
        for k, category in enumerate(ordered)
        if (precision[:, :, k] > -1).any()
    }
    return {**_means(precision), "classes": classes}


def _precision(truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], kind: Kind) -> np.ndarray:
    """Precision [10 thresholds, 101 recalls, classes in order of id]; -1 throughout a class without objects."""
    if kind not in IOU_TYPES:
        raise unknown("kind of average precision", kind, IOU_TYPES)
    _check_truth(truth, kind)
    _check_detections(truth, detections, kind)
    coco = require("pycocotools.coco", "training").COCO
    evaluator = require("pycocotools.cocoeval", "training").COCOeval
    # ids from 1: 0 would mean "not matched". Copies: the evaluation writes into them. Area: for size classes, unused.
    wanted = [
        {**a, "id": number, "iscrowd": int(a.get("iscrowd", 0)), "area": a.get("area", 0.0)}
        for number, a in enumerate(truth["annotations"], 1)
    ]
    detected = [{**d, "id": number, "iscrowd": 0, "area": 0.0} for number, d in enumerate(detections, 1)]
    with redirect_stdout(io.StringIO()):
        sides = []
        for annotations in (wanted, detected):
            side = coco()
            side.dataset = {"images": truth["images"], "categories": truth["categories"], "annotations": annotations}
            side.createIndex()
            sides.append(side)
        evaluation = evaluator(*sides, IOU_TYPES[kind])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0.0, math.inf]], ["all"]
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"])[..., 0, 0]


def _means(precision: np.ndarray) -> dict[str, float]:
    """Average precision over all thresholds, at 0.5 and at 0.75, over classes with objects."""
    values = {"AP": precision, "AP50": precision[:1], "AP75": precision[5:6]}
    return {name: float(value[value > -1].mean()) for name, value in values.items()}


def _check_truth(truth: Mapping[str, Any], kind: Kind) -> None:
    for part in ("images", "annotations", "categories"):
        if part not in truth:
            raise DataError(f"The truth has no {part!r}; expected images, annotations and categories.")
    if all(annotation.get("iscrowd", 0) for annotation in truth["annotations"]):
        raise DataError(f"No object to find in {len(truth['images'])} images: average precision is not defined.")
    for annotation in truth["annotations"]:
        if SHAPES[kind] not in annotation:
            raise DataError(f"Annotation {annotation.get('id')} has no {SHAPES[kind]!r}; AP by {kind} needs it.")


def _check_detections(truth: Mapping[str, Any], detections: Iterable[Mapping[str, Any]], kind: Kind) -> None:
    images = {image["id"] for image in truth["images"]}
    classes = {category["id"] for category in truth["categories"]}
    for number, detection in enumerate(detections):
        for key, known in (("image_id", images), ("category_id", classes)):
            if detection.get(key) not in known:
                raise DataError(f"Detection {number} has {key} {detection.get(key)!r}, which the truth does not have.")
        if SHAPES[kind] not in detection:
            raise DataError(f"Detection {number} has no {SHAPES[kind]!r}, which AP by {kind} needs.")
        if not math.isfinite(detection.get("score", math.nan)):
            raise DataError(f"Detection {number} has score {detection.get('score')!r}; expected a finite number.")
