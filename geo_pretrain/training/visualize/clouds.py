"""Figures of what a network found in clouds, beside the truth: classes of points, objects, boxes, classes of clouds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import singledispatch
from pathlib import Path

import numpy as np

from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D, LabelledCloud
from geo_pretrain.training.evaluation.predictions import (
    CloudClass,
    CloudPrediction,
    Detections3D,
    PointInstances,
    PointLabels,
)
from geo_pretrain.training.visualize.cloud_layers import CloudLayer, CloudPicture, save_cloud_figure, write_cloud_page
from geo_pretrain.training.visualize.colors import class_colors, depth_colors, set_colors
from geo_pretrain.training.visualize.results import DRAWN_SCORE

NONE = (203, 207, 212)  # points without a label, and points of no object
PALE = 0.55  # how far a cloud's colors fade behind boxes
FEW = 25  # classes that a legend has room for
MATCHED = 0.25  # IoU from which a found object has the color of the true one


def draw_clouds(
    rows: Sequence[tuple[LabelledCloud, CloudPrediction]], classes: Sequence[str], path: Path, *, page: bool = True
) -> None:
    """Write a PNG with a row per cloud: the cloud, its truth where it has one, and what was found in it.

    `classes` names the ids from 1. `page`: also `path` with the suffix .html, the first cloud, which can be turned.
    Without rows nothing is written.
    """
    if not rows:
        return
    pictures = [cloud_picture(cloud, found, classes) for cloud, found in rows]
    width = max(len(picture.layers) for picture in pictures)
    pictures = [_padded(picture, width) for picture in pictures]
    save_cloud_figure(pictures, class_legend(rows, classes), path)
    if page:
        write_cloud_page(cloud_picture(*rows[0], classes), path.with_suffix(".html"))


def class_legend(
    rows: Iterable[tuple[LabelledCloud, CloudPrediction]], classes: Sequence[str]
) -> list[tuple[str, tuple[int, ...]]]:
    """Names and colors of the classes that clouds and what was found in them show; of few classes of points all.

    A class that is nowhere found, although there, is seen that way.
    """
    rows = list(rows)
    present: set[int] = set().union(*(_present(cloud, found) for cloud, found in rows))
    if len(classes) <= FEW and any(isinstance(found, PointLabels) for _, found in rows):
        present = set(range(1, len(classes) + 1))
    shown = sorted(present)
    colors = class_colors(np.arange(len(classes) + 1))
    return [(classes[c - 1], tuple(int(v) for v in colors[c])) for c in shown]


def cloud_picture(cloud: LabelledCloud, found: CloudPrediction, classes: Sequence[str]) -> CloudPicture:
    """The layers of one cloud: its colors, the truth where it has one, and the prediction."""
    return CloudPicture(cloud.id, cloud.points, (_plain(cloud), *prediction_layers(found, cloud, classes)))


def cloud_colors(cloud: LabelledCloud) -> np.ndarray:
    """The colors of a cloud uint8 [N, 3]: its own, else its intensity in gray, else its height."""
    if cloud.colors is not None:
        return cloud.colors
    if cloud.intensity is not None:
        top = max(float(np.percentile(cloud.intensity, 99)), 1e-6)
        gray = 60 + 195 * np.clip(cloud.intensity / top, 0, 1)
        return np.repeat(gray.astype(np.uint8)[:, None], 3, 1)
    height = cloud.points[:, 2] - cloud.points[:, 2].min()
    return depth_colors(height[None] + 1e-3)[0]


def label_colors(labels: np.ndarray) -> np.ndarray:
    """Colors uint8 [N, 3] of class ids [N]; those without a class are pale gray."""
    return np.where(labels[:, None] > 0, class_colors(labels), np.array(NONE)).astype(np.uint8)


def object_colors(numbers: np.ndarray) -> np.ndarray:
    """Colors uint8 [N, 3] of objects' numbers [N], far apart for near numbers; 0, of no object, is pale gray."""
    return np.where(numbers[:, None] > 0, set_colors(numbers), np.array(NONE)).astype(np.uint8)


@singledispatch
def prediction_layers(found: object, cloud: LabelledCloud, classes: Sequence[str]) -> list[CloudLayer]:
    """The layers of the truth, where the cloud has one, and of the prediction."""
    raise TypeError(f"{type(found).__name__} cannot be drawn on a cloud.")


@prediction_layers.register
def _(found: PointLabels, cloud: LabelledCloud, classes: Sequence[str]) -> list[CloudLayer]:
    layers, caption = [], ""
    if cloud.labels is not None:
        known = cloud.labels > 0
        layers.append(CloudLayer("truth", label_colors(cloud.labels), f"{known.mean():.0%} of points labelled"))
        right = (found.labels == cloud.labels)[known]
        caption = f"{right.mean():.0%} of labelled points right" if len(right) else ""
    return [*layers, CloudLayer("found", label_colors(found.labels), caption)]


@prediction_layers.register
def _(found: PointInstances, cloud: LabelledCloud, classes: Sequence[str]) -> list[CloudLayer]:
    numbers, layers = found.numbers(), []
    caption = f"{len(found)} objects found"
    if cloud.instances is not None:
        truth = cloud.instances
        count = len(np.unique(truth[truth > 0]))
        layers.append(CloudLayer("truth", object_colors(truth), f"{count} objects"))
        numbers, matched = _in_true_colors(numbers, truth)
        caption += f", {matched} over a true one by {MATCHED:.0%} or more"
    return [*layers, CloudLayer("found", object_colors(numbers), caption)]


@prediction_layers.register
def _(found: Detections3D, cloud: LabelledCloud, classes: Sequence[str]) -> list[CloudLayer]:
    pale = (255 - (1 - PALE) * (255 - cloud_colors(cloud).astype(np.float64))).astype(np.uint8)
    shown = found.scores >= DRAWN_SCORE
    boxes = _some(found.boxes, shown)
    layers = []
    if cloud.boxes is not None:
        layers.append(_boxes_layer("truth", pale, cloud.boxes, f"{len(cloud.boxes)} objects"))
    caption = f"{int(shown.sum())} of {len(found)} boxes have score {DRAWN_SCORE:g} and up"
    return [*layers, _boxes_layer("found", pale, boxes, caption)]


@prediction_layers.register
def _(found: CloudClass, cloud: LabelledCloud, classes: Sequence[str]) -> list[CloudLayer]:
    """The class as a color of all points: that of the truth, and that found."""
    count, layers = len(cloud.points), []
    if cloud.category is not None:
        truth = np.full(count, cloud.category)
        layers.append(CloudLayer("truth", _shaded(label_colors(truth), cloud), classes[cloud.category - 1]))
    text = f"{classes[found.label - 1]} ({found.scores[found.label - 1]:.0%})"
    return [*layers, CloudLayer("found", _shaded(label_colors(np.full(count, found.label)), cloud), text)]


def _plain(cloud: LabelledCloud) -> CloudLayer:
    return CloudLayer("cloud", cloud_colors(cloud))


def _boxes_layer(title: str, colors: np.ndarray, boxes: Boxes3D, caption: str) -> CloudLayer:
    return CloudLayer(title, colors, caption, boxes)


def _some(boxes: Boxes3D, chosen: np.ndarray) -> Boxes3D:
    return Boxes3D(boxes.centers[chosen], boxes.sizes[chosen], boxes.headings[chosen], boxes.classes[chosen])


def _shaded(colors: np.ndarray, cloud: LabelledCloud) -> np.ndarray:
    """Darken one color towards the ground, so that an object's shape is seen."""
    height = cloud.points[:, 2] - cloud.points[:, 2].min()
    shade = 0.55 + 0.45 * height / max(float(height.max()), 1e-6)
    return (colors * shade[:, None]).astype(np.uint8)


def _in_true_colors(numbers: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, int]:
    """Renumber found objects: each that is one of the true ones gets its number; the others get numbers of their own.

    Returns the numbers int64 [N], and how many found objects are true ones: pairs by falling IoU, each object once.
    """
    rows, columns = int(numbers.max(initial=0)) + 1, int(truth.max(initial=0)) + 1
    found = np.bincount(numbers, minlength=rows)
    real = np.bincount(np.maximum(truth, 0), minlength=columns)
    pairs, common = np.unique(numbers * columns + np.maximum(truth, 0), return_counts=True)
    first, second = pairs // columns, pairs % columns
    iou = common / (found[first] + real[second] - common)
    new, taken = np.zeros(rows, np.int64), set()
    for k in np.argsort(-iou, kind="stable"):
        one, other = int(first[k]), int(second[k])
        if iou[k] >= MATCHED and one > 0 and other > 0 and not new[one] and other not in taken:
            new[one] = other
            taken.add(other)
    alone = [number for number in range(1, rows) if found[number] and not new[number]]
    new[alone] = columns + np.arange(len(alone))
    return new[numbers], len(taken)


def _present(cloud: LabelledCloud, found: CloudPrediction) -> set[int]:
    """The classes that a cloud's picture shows."""
    if isinstance(found, PointLabels):
        truth: Iterable[int] = [] if cloud.labels is None else np.unique(cloud.labels)
        return {int(c) for c in (*np.unique(found.labels), *truth) if c > 0}
    if isinstance(found, Detections3D):
        truth = [] if cloud.boxes is None else cloud.boxes.classes
        return {int(c) for c in (*found.boxes.classes[found.scores >= DRAWN_SCORE], *truth)}
    if isinstance(found, CloudClass):
        return {found.label} | ({cloud.category} if cloud.category is not None else set())
    return set()  # objects have colors of their own


def _padded(picture: CloudPicture, width: int) -> CloudPicture:
    """Repeat the cloud's colors where the truth would stand, so that all rows have as many panels."""
    if len(picture.layers) == width:
        return picture
    plain = picture.layers[0]
    missing = CloudLayer("truth", np.full_like(plain.colors, 235), "no truth")
    return CloudPicture(
        picture.title, picture.points, (plain, *[missing] * (width - len(picture.layers)), *picture.layers[1:])
    )
