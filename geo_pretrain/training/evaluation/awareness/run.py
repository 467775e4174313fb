"""Measure what frozen backbones know of 3D: features once for each network, every measure from them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import DataError, RecipeError
from geo_pretrain.training.config import plain_types
from geo_pretrain.training.data.frame import SkippedFrames, Source
from geo_pretrain.training.evaluation.awareness.images import ImageMeasures, InputMaps, measure_images
from geo_pretrain.training.evaluation.awareness.memory import FeatureMemory, feature_folder, network_digest, remember
from geo_pretrain.training.evaluation.awareness.networks import LayeredNetwork, Subject
from geo_pretrain.training.evaluation.awareness.spec import ANGLES, AwarenessSpec
from geo_pretrain.training.evaluation.awareness.views import ViewPair, Views, draw_pairs, read_views
from geo_pretrain.training.evaluation.metrics import Spread

Report = Callable[[str, int, int, str], None]
Layers = dict[str, dict[str, list[float]]]  # layer -> metric -> a value for each seed
INPUT_2D = "position+color"  # name of the control without a network
LEADS = {"matching": "recall", "depth": "d1", "normals": "11.25 deg", "semantic": "miou"}  # by which layers are ranked


@dataclass
class Awareness:
    """Results of all backbones: scores of every layer and seed."""

    spec: AwarenessSpec
    data: dict[str, Any]  # what was looked at: source, frames, split, pairs in each bin
    scores: dict[str, dict[str, Layers]] = field(default_factory=dict)  # backbone -> measure -> layers

    def add(self, name: str, measure: str, layer: str, values: Mapping[str, float]) -> None:
        """Add the scores of one seed."""
        metrics = self.scores.setdefault(name, {}).setdefault(measure, {}).setdefault(layer, {})
        for metric, value in values.items():
            metrics.setdefault(metric, []).append(value)

    def best(self, name: str, measure: str) -> str:
        """The layer with the highest mean over seeds of the metric that ranks layers."""
        layers = self.scores[name][measure]
        return max(layers, key=lambda layer: self.spread(name, measure, layer, LEADS[measure]).mean)

    def spread(self, name: str, measure: str, layer: str, metric: str) -> Spread:
        """A metric over seeds."""
        return Spread(tuple(self.scores[name][measure][layer][metric]))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        networks = {
            name: {
                measure: {"best": self.best(name, measure), "layers": self._layers(name, measure)}
                for measure in measures
            }
            for name, measures in self.scores.items()
        }
        return {"settings": plain_types(self.spec), "data": self.data, "networks": networks}

    def _layers(self, name: str, measure: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for layer, metrics in self.scores[name][measure].items():
            spreads = {metric: Spread(tuple(values)) for metric, values in metrics.items()}
            found[layer] = {m: {"mean": s.mean, "std": s.std, "values": list(s.values)} for m, s in spreads.items()}
        return found


def measure_awareness(
    subjects: Sequence[Subject],
    source: Source,
    spec: AwarenessSpec,
    *,
    features: Path | None = None,
    device: str | torch.device = "cpu",
    skips: SkippedFrames | None = None,
    report: Report = lambda *_: None,
) -> Awareness:
    """Measure image networks on frames of a source, every layer, with each seed; the input alone stands beside them.

    A seed decides which groups of frames are held out, which pairs and pixels are matched, and random weights.

    Args:
        features: folder that keeps feature maps for the next call; None: they are kept while this one runs.
        report: called with stage, done, total and a detail.

    Raises:
        RecipeError: image and point networks together.
        DataError: too few frames, or no two that overlap.
    """
    if len({subject.is_3d for subject in subjects}) > 1:
        raise RecipeError("Image and point networks are not measured by the same things; measure them in two calls.")
    skips = SkippedFrames() if skips is None else skips
    views = read_views(source, spec, skips, lambda done, total: report("reading frames", done, total, ""))
    pairs = [draw_pairs(views, seed) if "matching" in spec.measures else [] for seed in range(spec.seeds)]
    results = Awareness(spec, describe(source, views, pairs))
    if set(spec.measures) - {"matching"}:
        control = ImageMeasures(InputMaps(views), views)
        for seed in range(spec.seeds):
            for measure, layer, values in measure_images(control, spec.measures, [], seed):
                results.add(INPUT_2D, measure, layer, values)
    with feature_folder(features) as folder:
        for subject in subjects:
            memory: FeatureMemory | None = None
            for seed in range(spec.seeds):
                if memory is None or subject.random:
                    memory = image_memory(subject, views, folder, seed, device, report, source.fingerprint())
                    measures = ImageMeasures(memory, views)
                report(f"measuring {subject.name}", seed, spec.seeds, "")
                for measure, layer, values in measure_images(measures, spec.measures, pairs[seed], seed):
                    results.add(subject.name, measure, layer, values)
    if not results.scores:
        raise DataError(f"Source {source.name!r} has no labels of classes; accepted: other measures than semantic.")
    return results


def describe(source: Source, views: Views, pairs: Sequence[Sequence[ViewPair]]) -> dict[str, Any]:
    """What was looked at: source, frames, scenes, split, pairs of each bin and seed, labels."""
    scenes = len({frame.scene for frame in views.frames})
    counts = {
        f"{low}-{high} deg": [sum(pair.bin == bin for pair in drawn) for drawn in pairs]
        for bin, (low, high) in enumerate(ANGLES)
    }
    facts = {"source": source.name, "frames": len(views), "scenes": scenes, "split": views.rule, "pairs": counts}
    return facts | {"labels": views.labels is not None}


def image_memory(
    subject: Subject,
    views: Views,
    folder: Path,
    seed: int,
    device: str | torch.device,
    report: Report,
    fingerprint: str,
) -> FeatureMemory:
    """The feature maps of all frames, computed where they are not yet in `folder`."""
    network = subject.load(seed).to(device)
    if not isinstance(network.contract, ImageContract):
        raise RecipeError(f"{subject.name!r} takes voxels, not images.")
    names = [f"{frame.scene}/{frame.id}" for frame in views.frames]
    facts = {
        "network": network_digest(network),
        "contract": str(network.contract),
        "source": fingerprint,
        "size": list(views.spec.size),
        "frames": hashlib.sha256("\n".join(names).encode()).hexdigest(),
    }
    steps = _steps(report, f"features of {subject.name}", len(views))
    maps = lambda number: network.maps(views.frames[number].color)  # noqa: E731
    place = folder / re.sub(r"[^\w.-]+", "_", subject.name)[-80:]
    return remember(place, network.names, maps, len(views), facts, lambda: next(steps))


def _steps(report: Report, stage: str, total: int) -> Iterator[None]:
    done = 0
    while True:
        done += 1
        report(stage, done, total, "")
        yield


__all__ = ["Awareness", "LayeredNetwork", "measure_awareness"]
