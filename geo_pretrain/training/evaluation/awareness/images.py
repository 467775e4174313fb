"""Measures of image networks, from remembered feature maps: matching, depth, normals, classes; for every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from geo_pretrain.training.evaluation.awareness.linear import depth_scores, mean_scores, normal_scores
from geo_pretrain.training.evaluation.awareness.probing import Maps, Probing, Scores, mean
from geo_pretrain.training.evaluation.awareness.reading import PlaceReader
from geo_pretrain.training.evaluation.awareness.spec import ANGLES, DISTANCES
from geo_pretrain.training.evaluation.awareness.views import ViewPair, Views


class InputMaps:
    """In place of a network what every pixel tells by itself: place (to the second power) and color, 8 channels."""

    def __init__(self, views: Views) -> None:
        self.views, self.layers = views, ["input"]
        height, width = views.spec.size
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        self.place = torch.stack([x, y, x * x, x * y, y * y])

    def read(self, frame: int, layer: int) -> Tensor:
        """The only map, as large as the image."""
        color = torch.tensor(self.views.frames[frame].color).permute(2, 0, 1).float() / 255
        return torch.cat([self.place, color])[None]


class ImageMeasures(Probing):
    """Everything that is measured of one image network, or of the input alone, at a grid of places of the images.

    Maps are [1, C, h, w], read bilinearly, corners aligned.
    """

    kinds: ClassVar[tuple[int, ...]] = (1, 3)  # log depth; the normal

    def __init__(self, maps: Maps, views: Views) -> None:
        super().__init__(maps, views)
        self.reader = PlaceReader(*views.axes, views.spec.size)

    def read(self, number: int, layer: int, places: Tensor) -> Tensor:
        """Features at places of the grid."""
        return self.reader.at(self.maps.read(number, layer), self.views.flat[places])

    def apply(self, weight: Tensor, bias: Tensor, number: int, layer: int) -> Tensor:
        """A linear layer on the map's cells, then read at all places, which is the same."""
        one = self.maps.read(number, layer)[0]
        return self.reader.spread(torch.einsum("ct,chw->thw", weight, one)).T + bias

    def targets(self, number: int) -> tuple[Tensor, Tensor]:
        """Log depth and normal, where both are known."""
        depth, normals = self.views.depth[number], self.views.normals[number]
        return torch.cat([depth.clamp_min(1e-6).log()[:, None], normals], 1), (depth > 0) & normals.any(1)

    def labels(self, number: int) -> Tensor:
        """The frame's classes."""
        labels: Any = self.views.labels
        found: Tensor = labels[number]
        return found

    def matching(self, layer: int, pairs: Sequence[ViewPair]) -> Scores:
        """Recall of the nearest place by cosine: by viewpoint within the threshold, by distance over all pairs.

        Each pair counts equally. A bin without a pair has no score.
        """
        views, width = self.views, self.views.spec.size[1]
        by_angle: dict[int, list[float]] = {bin: [] for bin in range(len(ANGLES))}
        by_distance: dict[int, list[float]] = {limit: [] for limit in DISTANCES}
        for pair in pairs:
            query = F.normalize(self.reader.at(self.maps.read(pair.first, layer), pair.pixel1), dim=1)
            best = self.reader.cosines(query, self.maps.read(pair.second, layer)).argmax(1)
            truth = torch.stack([pair.pixel2 // width, pair.pixel2 % width], 1)
            error = (views.places[best] - truth).double().norm(dim=1)
            by_angle[pair.bin].append(float((error <= views.spec.within("px")).double().mean()))
            for limit, found in by_distance.items():
                found.append(float((error <= limit).double().mean()))
        scores = {f"{ANGLES[k][0]}-{ANGLES[k][1]} deg": mean(values) for k, values in by_angle.items() if values}
        scores |= {f"{limit} px": mean(values) for limit, values in by_distance.items()}
        return scores | {"recall": mean([value for values in by_angle.values() for value in values])}

    def depth_and_normals(self, layer: int, seed: int) -> tuple[Scores, Scores]:
        """Scores of linear regressions of log depth and of normals on the held-out frames, means over frames.

        Depth is kept within what the frames of the fit have; normals are brought to unit length.
        """
        split, fit = self.views.split(seed), self.fit(layer, seed)
        seen = torch.cat([self.views.depth[n] for numbers in split.fitted.values() for n in numbers])
        low, high = (float(edge) for edge in seen[seen > 0].aminmax())
        depths, normals = [], []
        for number in split.judged:
            predicted = self.predict(fit, number, layer)
            truth, normal = self.views.depth[number], self.views.normals[number]
            known, oriented = truth > 0, normal.any(1)
            if known.any():
                depths.append(depth_scores(predicted[known, 0].exp().clamp(low, high), truth[known]))
            if oriented.any():
                normals.append(normal_scores(predicted[oriented, 1:], normal[oriented]))
        return mean_scores(depths), mean_scores(normals)

    def measure(self, wanted: Sequence[str], pairs: Sequence[ViewPair], seed: int) -> Iterator[tuple[str, str, Scores]]:
        """Yield (measure, layer, scores) of one seed for all layers; of the input alone nothing is matched."""
        for layer, name in enumerate(self.maps.layers):
            if "matching" in wanted and not isinstance(self.maps, InputMaps):
                yield "matching", name, self.matching(layer, pairs)
            if {"depth", "normals"} & set(wanted):
                both = zip(("depth", "normals"), self.depth_and_normals(layer, seed), strict=True)
                yield from ((kind, name, scores) for kind, scores in both if kind in wanted)
            if "semantic" in wanted and self.views.labels is not None:
                yield "semantic", name, self.semantic(layer, seed)
