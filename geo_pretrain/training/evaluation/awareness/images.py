"""Measures of image networks, from remembered feature maps: matching, depth, normals, classes; for every layer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from geo_pretrain.training.evaluation.awareness.linear import (
    LinearFit,
    depth_scores,
    fit_linear,
    gram,
    mean_scores,
    normal_scores,
)
from geo_pretrain.training.evaluation.awareness.reading import PlaceReader
from geo_pretrain.training.evaluation.awareness.spec import ANGLES, DISTANCES, MEASURES
from geo_pretrain.training.evaluation.awareness.views import ViewPair, Views
from geo_pretrain.training.evaluation.metrics import confusion_matrix, mean_iou, pixel_accuracy
from geo_pretrain.training.evaluation.probe_data import Samples
from geo_pretrain.training.evaluation.probes import fit_head

Scores = dict[str, float]
TARGETS = (1, 3)  # of the regressions: log depth; the normal


class Maps(Protocol):
    """Feature maps [1, C, h, w] of frames by number and layer: a `FeatureMemory`, or a twin that computes them."""

    layers: list[str]

    def read(self, frame: int, layer: int) -> Tensor:
        """The map of a layer."""


class InputMaps:
    """In place of a network what every pixel tells by itself: place (to the second power) and color, 8 channels."""

    def __init__(self, views: Views) -> None:
        self.views, self.layers = views, ["input"]
        height, width = views.spec.size
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        self.place = torch.stack([x, y, x * x, x * y, y * y])

    def read(self, frame: int, layer: int) -> Tensor:
        color = torch.from_numpy(self.views.frames[frame].color).permute(2, 0, 1).float() / 255
        return torch.cat([self.place, color])[None]


class ImageMeasures:
    """Everything that is measured of one image network, or of the input alone."""

    def __init__(self, maps: Maps, views: Views) -> None:
        self.maps, self.views = maps, views
        self.reader = PlaceReader(*views.axes, views.spec.size)
        self._grams: dict[int, list[Any]] = {}

    def matching(self, layer: int, pairs: Sequence[ViewPair]) -> Scores:
        """Recall of the nearest place by cosine: by viewpoint at `spec.threshold`, by distance over all pairs.

        Each pair counts equally. A bin without a pair has no score.
        """
        spec, width = self.views.spec, self.views.spec.size[1]
        by_angle: dict[int, list[float]] = {bin: [] for bin in range(len(ANGLES))}
        by_distance: list[list[float]] = []
        for pair in pairs:
            query = F.normalize(self.reader.at(self.maps.read(pair.first, layer), pair.pixel1), dim=1)
            best = self.reader.cosines(query, self.maps.read(pair.second, layer)).argmax(1)
            truth = torch.stack([pair.pixel2 // width, pair.pixel2 % width], 1)
            error = (self.views.places[best] - truth).double().norm(dim=1)
            by_angle[pair.bin].append(float((error <= spec.threshold).double().mean()))
            by_distance.append([float((error <= limit).double().mean()) for limit in DISTANCES])
        scores = {f"{ANGLES[k][0]}-{ANGLES[k][1]} deg": _mean(values) for k, values in by_angle.items() if values}
        scores |= {f"{limit} px": _mean([row[k] for row in by_distance]) for k, limit in enumerate(DISTANCES)}
        return scores | {"recall": _mean([value for values in by_angle.values() for value in values])}

    def depth_and_normals(self, layer: int, seed: int) -> tuple[Scores, Scores]:
        """Scores of linear regressions of log depth and of normals on the held-out frames, means over frames.

        Depth is kept within what the frames of the fit have; normals are brought to unit length.
        """
        split = self.views.split(seed)
        grams = self._gram_of_groups(layer)
        fit = fit_linear([grams[group] for group in split.fitted if isinstance(grams[group], Tensor)], TARGETS)
        seen = torch.cat([self.views.depth[n] for numbers in split.fitted.values() for n in numbers])
        low, high = (float(edge) for edge in seen[seen > 0].aminmax())
        depths, normals = [], []
        for number in split.judged:
            predicted = self._predict(fit, self.maps.read(number, layer))
            truth, normal = self.views.depth[number], self.views.normals[number]
            known, oriented = truth > 0, normal.any(1)
            if known.any():
                depths.append(depth_scores(predicted[known, 0].exp().clamp(low, high), truth[known]))
            if oriented.any():
                normals.append(normal_scores(predicted[oriented, 1:], normal[oriented]))
        return mean_scores(depths), mean_scores(normals)

    def semantic(self, layer: int, seed: int) -> Scores:
        """Scores of softmax regression of classes on the labelled places of the held-out frames."""
        views, spec, split = self.views, self.views.spec, self.views.split(seed)
        labels: Any = views.labels
        numbers = [n for group in split.fitted.values() for n in group]
        rows, classes = [], []
        for number in numbers:
            chosen = self._drawn(number, labels[number] > 0, -(-spec.labels // len(numbers)), seed)
            rows.append(self.reader.at(self.maps.read(number, layer), views.flat[chosen]))
            classes.append(labels[number][chosen])
        features = torch.cat(rows)
        head = fit_head(
            Samples(features, torch.cat(classes), (features.shape[1],)), penalty=1e-4, iterations=spec.iterations
        )
        count = 1 + int(max(int(one.max()) for one in labels))
        confusion: Any = 0
        for number in split.judged:
            one = self.maps.read(number, layer)[0]
            logits = self.reader.spread(torch.einsum("kc,chw->khw", head.weight, one)) + head.bias[:, None]
            confusion = confusion + confusion_matrix(labels[number], head.classes[logits.argmax(0)], count)
        return {"miou": mean_iou(confusion), "accuracy": pixel_accuracy(confusion)}

    def _gram_of_groups(self, layer: int) -> list[Any]:
        """The sums of each group for the regressions, read once for all seeds; 0 for a group without a normal."""
        if layer not in self._grams:
            views = self.views
            found: list[Any] = [0.0] * views.count
            for number, group in enumerate(views.groups):
                if group < 0:
                    continue
                known = (views.depth[number] > 0) & views.normals[number].any(1)
                chosen = self._drawn(number, known, views.spec.places, 0)
                features = self.reader.at(self.maps.read(number, layer), views.flat[chosen])
                targets = torch.cat([views.depth[number][chosen].log()[:, None], views.normals[number][chosen]], 1)
                if len(chosen):
                    found[group] = found[group] + gram(features, targets)
            self._grams[layer] = found
        return self._grams[layer]

    def _drawn(self, number: int, known: Tensor, count: int, seed: int) -> Tensor:
        """Draw at most `count` of the known places of a frame, by its name and the seed."""
        frame = self.views.frames[number]
        digest = hashlib.sha256(f"{seed}\n{frame.scene}\n{frame.id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
        places = known.nonzero()[:, 0]
        return places[torch.randperm(len(places), generator=generator)[:count]]

    def _predict(self, fit: LinearFit, one: Tensor) -> Tensor:
        """The regressions at all places: [S, T]."""
        return (self.reader.spread(torch.einsum("ct,chw->thw", fit.weight, one[0])) + fit.bias[:, None]).T


def measure_images(
    measures: ImageMeasures, wanted: Sequence[str], pairs: Sequence[ViewPair], seed: int
) -> Iterator[tuple[str, str, Scores]]:
    """Yield (measure, layer, scores) of one seed for all layers; of the input alone nothing is matched."""
    is_input = isinstance(measures.maps, InputMaps)
    for layer, name in enumerate(measures.maps.layers):
        if "matching" in wanted and not is_input:
            yield "matching", name, measures.matching(layer, pairs)
        if {"depth", "normals"} & set(wanted):
            both = measures.depth_and_normals(layer, seed)
            yield from ((kind, name, one) for kind, one in zip(MEASURES[1:3], both, strict=True) if kind in wanted)
        if "semantic" in wanted and measures.views.labels is not None:
            yield "semantic", name, measures.semantic(layer, seed)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
