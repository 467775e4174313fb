"""`eval awareness` beside the plain way: features computed anew wherever one is needed.

    python -m benchmarks.awareness [FRAMES [PAIRS]]

The plain way runs the network on both frames of every pair, and on every frame of every probe, for each seed; all
layers come from one run of it. Both ways give the same scores, but for float16.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import machine, write_results
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.evaluation.awareness.images import ImageMeasures, InputMaps
from geo_pretrain.training.evaluation.awareness.linear import (
    depth_scores,
    fit_linear,
    gram,
    mean_scores,
    normal_scores,
)
from geo_pretrain.training.evaluation.awareness.memory import remember
from geo_pretrain.training.evaluation.awareness.networks import LayeredNetwork, find_subject
from geo_pretrain.training.evaluation.awareness.spec import ANGLES, DISTANCES, AwarenessSpec
from geo_pretrain.training.evaluation.awareness.views import ViewPair, Views, draw_pairs, read_views
from geo_pretrain.training.evaluation.probe_data import read_at
from geo_pretrain.training.recipe import DataSpec

NAME = "resnet18=scratch"
OPTIONS = {"scenes": 8, "frames": 12, "width": 160, "height": 120}
Scores = dict[str, float]


class PlainWay:
    """The measures without a memory: `matching`, `depth` and `normals` for all layers."""

    def __init__(self, network: LayeredNetwork, views: Views) -> None:
        self.network, self.views = network, views
        self.drawn = ImageMeasures(InputMaps(views), views).drawn  # the same places of each frame
        self.runs = 0

    def maps(self, number: int) -> list[Tensor]:
        """Run the network on a frame."""
        self.runs += 1
        with torch.no_grad():
            return self.network.maps(self.views.frames[number].color)

    def read(self, one: Tensor, pixels: Tensor) -> Tensor:
        """Features at flat pixels."""
        width = self.views.spec.size[1]
        return read_at([one], torch.stack([pixels // width, pixels % width], 1).float(), self.views.spec.size)

    def matching(self, pairs: Sequence[ViewPair]) -> list[Scores]:
        """Scores of each layer."""
        errors: list[list[Tensor]] = [[] for _ in self.network.names]
        width = self.views.spec.size[1]
        for pair in pairs:
            truth = torch.stack([pair.pixel2 // width, pair.pixel2 % width], 1)
            for layer, (one, other) in enumerate(zip(self.maps(pair.first), self.maps(pair.second), strict=True)):
                query = F.normalize(self.read(one, pair.pixel1), dim=1)
                candidates = F.normalize(self.read(other, self.views.flat), dim=1)
                best = (query @ candidates.T).argmax(1)
                errors[layer].append((self.views.places[best] - truth).double().norm(dim=1))
        return [self._recall(found, pairs) for found in errors]

    def _recall(self, errors: list[Tensor], pairs: Sequence[ViewPair]) -> Scores:
        right = [float((error <= self.views.spec.within("px")).double().mean()) for error in errors]
        scores = {}
        for bin, (low, high) in enumerate(ANGLES):
            own = [value for value, pair in zip(right, pairs, strict=True) if pair.bin == bin]
            if own:
                scores[f"{low}-{high} deg"] = sum(own) / len(own)
        for limit in DISTANCES:
            scores[f"{limit} px"] = sum(float((e <= limit).double().mean()) for e in errors) / len(errors)
        return scores | {"recall": sum(right) / len(right)}

    def probe(self, seed: int, kind: int) -> list[Scores]:
        """Scores of each layer for one kind of target, 0 depth or 1 normals."""
        split, layers = self.views.split(seed), len(self.network.names)
        columns = [slice(0, 1), slice(1, 4)][kind]
        sums: list[list[Any]] = [[0.0] * layers for _ in split.fitted]
        for group, numbers in zip(sums, split.fitted.values(), strict=True):
            for number in numbers:
                depth, normals = self.views.depth[number], self.views.normals[number]
                chosen = self.drawn(number, (depth > 0) & normals.any(1), self.views.spec.places, 0)
                targets = torch.cat([depth[chosen].log()[:, None], normals[chosen]], 1)[:, columns]
                for layer, one in enumerate(self.maps(number)):
                    group[layer] = group[layer] + gram(self.read(one, self.views.flat[chosen]), targets)
        fits = [
            fit_linear([group[layer] for group in sums], ImageMeasures.kinds[kind : kind + 1])
            for layer in range(layers)
        ]
        seen = torch.cat([self.views.depth[n] for numbers in split.fitted.values() for n in numbers])
        low, high = (float(edge) for edge in seen[seen > 0].aminmax())
        scores: list[list[Scores]] = [[] for _ in range(layers)]
        for number in split.judged:
            depth, normals = self.views.depth[number], self.views.normals[number]
            for layer, one in enumerate(self.maps(number)):
                predicted = self.read(one, self.views.flat) @ fits[layer].weight + fits[layer].bias
                if kind == 0:
                    known = depth > 0
                    clamped = predicted[known, 0].exp().clamp(low, high)
                    scores[layer].append(depth_scores(clamped, depth[known]))
                elif (known := normals.any(1)).any():
                    scores[layer].append(normal_scores(predicted[known], normals[known]))
        return [mean_scores(found) for found in scores]

    def measure(self, pairs: Sequence[ViewPair], seed: int) -> Iterator[tuple[str, str, Scores]]:
        """What `ImageMeasures.measure` yields, one measure after another."""
        names = self.network.names
        yield from (("matching", name, one) for name, one in zip(names, self.matching(pairs), strict=True))
        for kind, measure in enumerate(("depth", "normals")):
            yield from ((measure, name, one) for name, one in zip(names, self.probe(seed, kind), strict=True))


def clocks() -> list[float]:
    """Seconds of the wall and of this process' processor time, which other programs do not add to."""
    return [time.perf_counter(), time.process_time()]


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]


def main() -> None:
    """Time both ways on rooms, and compare their scores."""
    given = [int(one) for one in sys.argv[1:]] or [96, 15]
    frames, per_bin = (*given, 15)[:2]
    spec = AwarenessSpec(size=(120, 160), frames=frames, pairs=per_bin, measures=("matching", "depth", "normals"))
    source = open_source(DataSpec(source="rooms", size=spec.size, options=OPTIONS), split="val")
    views = read_views(source, spec, SkippedFrames())
    pairs = [draw_pairs(views, seed) for seed in range(spec.seeds)]
    _ = views.depth, views.normals  # what both ways share is not measured
    network = find_subject(NAME).load()
    plain = PlainWay(network, views)
    with TemporaryDirectory() as folder, torch.no_grad():
        begin = clocks()
        memory = remember(Path(folder) / "maps", network.names, plain.maps, len(views), {})
        measures = ImageMeasures(memory, views)
        quick = [list(measures.measure(spec.measures, pairs[seed], seed)) for seed in range(spec.seeds)]
        quick_s = [now - then for now, then in zip(clocks(), begin, strict=True)]
    begin, plain.runs = clocks(), 0
    slow = [list(plain.measure(pairs[seed], seed)) for seed in range(spec.seeds)]
    plain_s = [now - then for now, then in zip(clocks(), begin, strict=True)]
    results = {
        "machine": machine(),
        "network": NAME,
        "settings": f"{len(views)} frames 120x160 of 8 rooms, {spec.seeds} seeds, {len(pairs[0])} pairs a seed",
        "seconds (wall, processor)": {"features once": _rounded(quick_s), "plain way": _rounded(plain_s)},
        "runs of the network": {"features once": len(views), "plain way": plain.runs},
        "ratio (wall, processor)": _rounded([slow / fast for slow, fast in zip(plain_s, quick_s, strict=True)]),
        "largest difference of a score": _largest(quick, slow),
    }
    write_results("awareness", "python -m benchmarks.awareness", results)


def _largest(quick: list[Any], slow: list[Any]) -> float:
    """The largest difference of a share between the two ways."""
    largest = 0.0
    for one, other in zip(quick, slow, strict=True):
        known = {(measure, layer): scores for measure, layer, scores in other}
        for measure, layer, scores in one:
            differences = [abs(v - known[measure, layer][k]) for k, v in scores.items() if k != "rmse"]
            largest = max(largest, *differences)
    return round(largest, 5)


if __name__ == "__main__":
    main()
