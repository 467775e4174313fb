"""Probes of remembered features, of pixels and of voxels alike: linear regressions, softmax regression of classes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from geo_pretrain.errors import DataError
from geo_pretrain.training.evaluation.awareness.linear import LinearFit, fit_linear, gram
from geo_pretrain.training.evaluation.awareness.views import Views
from geo_pretrain.training.evaluation.metrics import confusion_matrix, mean_iou, pixel_accuracy
from geo_pretrain.training.evaluation.probe_data import Samples
from geo_pretrain.training.evaluation.probes import fit_head

Scores = dict[str, float]
PENALTY = 1e-4  # of softmax regression, as in `probes.ProbeSpec`


class Maps(Protocol):
    """Feature maps by number and layer: a `FeatureMemory`, or a twin that computes them."""

    layers: list[str]

    def read(self, frame: int, layer: int) -> Tensor:
        """The map of a layer."""


class Probing(ABC):
    """Probes of one network, or of the input alone; places of a frame are numbered, whatever they are."""

    kinds: ClassVar[tuple[int, ...]]  # numbers of regressed targets that share one penalty

    def __init__(self, maps: Maps, views: Views) -> None:
        self.maps, self.views = maps, views
        self._grams: dict[int, list[Any]] = {}

    @abstractmethod
    def read(self, number: int, layer: int, places: Tensor) -> Tensor:
        """Features [n, C] at places of a frame."""

    @abstractmethod
    def apply(self, weight: Tensor, bias: Tensor, number: int, layer: int) -> Tensor:
        """A linear layer, weight [C, T], on the features of all places: [S, T]."""

    @abstractmethod
    def targets(self, number: int) -> tuple[Tensor, Tensor]:
        """What is regressed at all places [S, T], and which of it is known: bool [S]."""

    @abstractmethod
    def labels(self, number: int) -> Tensor:
        """Classes of all places: int64 [S], 0 = none."""

    def fit(self, layer: int, seed: int) -> LinearFit:
        """The regressions on the frames that a seed does not hold out. Raises `DataError` where nothing is known."""
        if layer not in self._grams:
            self._grams[layer] = self._sums(layer)
        sums = self._grams[layer]
        return fit_linear([sums[g] for g in self.views.split(seed).fitted if isinstance(sums[g], Tensor)], self.kinds)

    def predict(self, fit: LinearFit, number: int, layer: int) -> Tensor:
        """The regressions at all places: [S, T]."""
        return self.apply(fit.weight, fit.bias, number, layer)

    def semantic(self, layer: int, seed: int) -> Scores:
        """Scores of softmax regression of classes on the labelled places of the held-out frames; none where
        these have no label.

        Raises `DataError` where no place of the other frames has a label.
        """
        spec, split = self.views.spec, self.views.split(seed)
        numbers = [number for group in split.fitted.values() for number in group]
        rows, classes = [], []
        for number in numbers:
            labels = self.labels(number)
            chosen = self.drawn(number, labels > 0, -(-spec.labels // len(numbers)), seed)
            rows.append(self.read(number, layer, chosen))
            classes.append(labels[chosen])
        truth = torch.cat(classes)
        if not len(truth):
            raise DataError("No place that is not held out has a class; a semantic probe needs labels.")
        features = torch.cat(rows)
        head = fit_head(Samples(features, truth, (features.shape[1],)), penalty=PENALTY, iterations=spec.iterations)
        judged = {number: self.labels(number) for number in split.judged}
        if not any(labels.any() for labels in judged.values()):
            return {}
        count = 1 + max(int(one.max()) for one in (truth, *judged.values()) if len(one))
        confusion: Any = 0
        for number, labels in judged.items():
            logits = self.apply(head.weight.T, head.bias, number, layer)
            confusion = confusion + confusion_matrix(labels, head.classes[logits.argmax(1)], count)
        return {"miou": mean_iou(confusion), "accuracy": pixel_accuracy(confusion)}

    def drawn(self, number: int, known: Tensor, count: int, seed: int) -> Tensor:
        """Draw at most `count` of the known places of a frame, by its name and the seed."""
        frame = self.views.frames[number]
        digest = hashlib.sha256(f"{seed}\n{frame.scene}\n{frame.id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
        places = known.nonzero()[:, 0]
        return places[torch.randperm(len(places), generator=generator)[:count]]

    def _sums(self, layer: int) -> list[Any]:
        """The `gram` of each group, read once for all seeds; 0 for a group where nothing is known."""
        found: list[Any] = [0.0] * self.views.count
        for number, group in enumerate(self.views.groups):
            if group < 0:
                continue
            targets, known = self.targets(number)
            chosen = self.drawn(number, known, self.views.spec.places, 0)
            if len(chosen):
                found[group] = found[group] + gram(self.read(number, layer, chosen), targets[chosen])
        return found


def mean(values: list[float]) -> float:
    """The mean."""
    return sum(values) / len(values)
