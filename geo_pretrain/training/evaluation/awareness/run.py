"""Measure what frozen backbones know of 3D: features once for each network, every measure from them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import DataError, RecipeError
from geo_pretrain.progress import Report, stage_of
from geo_pretrain.training.config import plain_types
from geo_pretrain.training.data.frame import SkippedFrames, Source
from geo_pretrain.training.evaluation.awareness.clouds import (
    CloudMeasures,
    Clouds,
    InputRows,
    draw_cloud_pairs,
)
from geo_pretrain.training.evaluation.awareness.images import ImageMeasures, InputMaps
from geo_pretrain.training.evaluation.awareness.memory import FeatureMemory, feature_folder, network_digest, remember
from geo_pretrain.training.evaluation.awareness.networks import LayeredNetwork, Subject
from geo_pretrain.training.evaluation.awareness.spec import ANGLES, MEASURES, OVERLAPS, TURNS, AwarenessSpec
from geo_pretrain.training.evaluation.awareness.views import Views, draw_pairs, read_views
from geo_pretrain.training.evaluation.metrics import Spread

Layers = dict[str, dict[str, list[float]]]  # layer -> metric -> a value for each seed
INPUT_2D, INPUT_3D = "position+color", "without a network"  # names of the controls
LEADS = {"matching": "recall", "depth": "d1", "normals": "11.25 deg", "semantic": "miou"}  # by which layers are ranked


@dataclass
class Awareness:
    """Results of all backbones: scores of every layer and seed."""

    spec: AwarenessSpec
    data: dict[str, Any]  # what was looked at: modality, source, frames, split, pairs in each bin
    scores: dict[str, dict[str, Layers]] = field(default_factory=dict)  # backbone -> measure -> layers
    random: dict[str, str] = field(default_factory=dict)  # backbone -> the same network with random weights

    def add(self, name: str, measure: str, layer: str, values: Mapping[str, float]) -> None:
        """Add the scores of one seed; none where nothing could be judged."""
        if not values:
            return
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
        return {
            "settings": plain_types(self.spec),
            "data": self.data,
            "random weights": self.random,
            "networks": networks,
        }

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
    """Measure networks on frames of a source, every layer, with each seed; the input alone stands beside them.

    A seed decides which groups of frames are held out, which pairs and pixels are matched, and random weights. Point
    networks have no probe of depth.

    Args:
        features: folder that keeps feature maps for the next call; None: they are kept while this one runs.
        report: called with stage, done, total and a detail.

    Raises:
        RecipeError: image and point networks together, or depth asked of point networks.
        InputError: a network that cannot take images of this size.
        DataError: too few frames, or no two that overlap.
    """
    modalities = {subject.is_3d for subject in subjects}
    if len(modalities) > 1:
        raise RecipeError("Image and point networks are not measured by the same things; measure them in two calls.")
    in_3d = modalities == {True}
    if in_3d and "depth" in spec.measures and set(spec.measures) != set(MEASURES):
        accepted = ", ".join(measure for measure in MEASURES if measure != "depth")
        raise RecipeError(f"Point networks have no probe of depth; accepted measures: {accepted}.")
    skips = SkippedFrames() if skips is None else skips
    for subject in subjects:  # what cannot be loaded, or not see such images, is told before anything is measured
        subject.load().check(spec.size)
    views = read_views(source, spec, skips, stage_of(report, "reading frames"))
    if views.labels is None and set(spec.measures) == {"semantic"}:
        raise _no_labels(source)
    draw: Callable[[Views, int], Sequence[Any]] = draw_cloud_pairs if in_3d else draw_pairs
    pairs = [draw(views, seed) if "matching" in spec.measures else [] for seed in range(spec.seeds)]
    drawn = {subject.kind: subject.name for subject in subjects if subject.random}
    twins = {one.name: drawn[one.kind] for one in subjects if not one.random and one.kind in drawn}
    results = Awareness(spec, describe(source, views, pairs, in_3d), random=twins)
    run = _Run(results, views, pairs, source.fingerprint(), device, report)
    if not in_3d:
        run.measure(INPUT_2D, ImageMeasures(InputMaps(views), views))
    with feature_folder(features) as folder:
        for subject in subjects:
            run.subject(subject, folder)
    if not results.scores:
        raise _no_labels(source)
    return results


def _no_labels(source: Source) -> DataError:
    return DataError(f"Source {source.name!r} has no labels of classes; accepted: other measures than semantic.")


def describe(source: Source, views: Views, pairs: Sequence[Sequence[Any]], in_3d: bool = False) -> dict[str, Any]:
    """What was looked at: source, frames, scenes, split, pairs of each bin and seed, labels."""
    scenes = len({frame.scene for frame in views.frames})
    names = [f"{low:g}-{high:g}" for low, high in OVERLAPS] if in_3d else [f"{low}-{high} deg" for low, high in ANGLES]
    counts = {name: [sum(pair.bin == bin for pair in drawn) for drawn in pairs] for bin, name in enumerate(names)}
    facts = {"modality": "3d" if in_3d else "2d", "source": source.name, "frames": len(views), "scenes": scenes}
    return facts | {"split": views.rule, "pairs": counts, "labels": views.labels is not None}


@dataclass
class _Run:
    """What all subjects share."""

    results: Awareness
    views: Views
    pairs: Sequence[Sequence[Any]]
    fingerprint: str
    device: str | torch.device
    report: Report
    clouds: dict[VoxelContract, Clouds] = field(default_factory=dict)

    def subject(self, subject: Subject, folder: Path) -> None:
        """Measure a network, one with random weights anew for each seed."""
        measures: ImageMeasures | CloudMeasures | None = None
        for seed in range(self.results.spec.seeds):
            if measures is None or subject.random:
                network = subject.load(seed).to(self.device)
                measures = self.remembered(subject.name, network, folder)
            self.one_seed(subject.name, measures, seed)

    def remembered(self, name: str, network: LayeredNetwork, folder: Path) -> ImageMeasures | CloudMeasures:
        """The measures of a network; controls are measured with the first one of a voxel size."""
        if isinstance(network.contract, ImageContract):
            maps = lambda number: network.maps(self.views.frames[number].color)  # noqa: E731
            return ImageMeasures(self._memory(name, network, folder, maps, len(self.views)), self.views)
        contract = network.contract
        if contract not in self.clouds:
            clouds = self.clouds[contract] = Clouds(self.views, contract)
            control = f"{INPUT_3D}, {100 * clouds.voxel_size:g} cm"
            if control not in self.results.scores:
                self.measure(control, CloudMeasures(InputRows(clouds), clouds))
        clouds = self.clouds[contract]
        rows = lambda index: clouds.layers(network, index)  # noqa: E731
        return CloudMeasures(self._memory(name, network, folder, rows, len(self.views) * len(TURNS)), clouds)

    def _memory(
        self, name: str, network: LayeredNetwork, folder: Path, maps: Callable[[int], Any], count: int
    ) -> FeatureMemory:
        steps = _steps(self.report, f"features of {name}", count)
        place = folder / (re.sub(r"[^\w.-]+", "_", name)[-80:].rstrip(".") or "_")
        facts = features_facts(network, self.views, self.fingerprint)
        return remember(place, network.names, maps, count, facts, lambda: next(steps))

    def measure(self, name: str, measures: ImageMeasures | CloudMeasures) -> None:
        """Add the results of all seeds."""
        for seed in range(self.results.spec.seeds):
            self.one_seed(name, measures, seed)

    def one_seed(self, name: str, measures: ImageMeasures | CloudMeasures, seed: int) -> None:
        """Add the results of one seed."""
        stage, seeds = f"measuring {name}", self.results.spec.seeds
        self.report(stage, seed, seeds, "")
        for measure, layer, values in measures.measure(self.results.spec.measures, self.pairs[seed], seed):
            self.results.add(name, measure, layer, values)
            self.report(stage, seed, seeds, f"{measure}, {layer}")
        self.report(stage, seed + 1, seeds, "")


def features_facts(network: LayeredNetwork, views: Views, fingerprint: str) -> dict[str, Any]:
    """What feature maps depend on."""
    names = [f"{frame.scene}/{frame.id}" for frame in views.frames]
    return {
        "network": network_digest(network),
        "contract": str(network.contract),
        "source": fingerprint,
        "size": list(views.spec.size),
        "frames": hashlib.sha256("\n".join(names).encode()).hexdigest(),
    }


def _steps(report: Report, stage: str, total: int) -> Iterator[None]:
    done = 0
    while True:
        done += 1
        report(stage, done, total, "")
        yield
