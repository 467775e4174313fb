"""The short pre-training of the demo: rooms -> pairs -> Pri3D (view) -> checkpoint -> load_backbone -> matching.

Everything runs through the doors that users take: the recipe `pri3d_view_r18.rooms_toy`, the loop, a hub folder
and `load_backbone` by name.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from torch import nn

from geo_pretrain.backbones.resnet_unet import UNet
from geo_pretrain.contract import ImageContract
from geo_pretrain.loading import load_backbone
from geo_pretrain.progress import Report, stage_of
from geo_pretrain.training.data.frame import Frame, Pair, SkippedFrames, Source, resize_frame
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.distributed import join
from geo_pretrain.training.evaluation.features import ImageExtractor
from geo_pretrain.training.evaluation.matching import MatchingResult, evaluate_matching, match_pair
from geo_pretrain.training.evaluation.metrics import Interval, Spread
from geo_pretrain.training.pretrain import train
from geo_pretrain.training.recipe import DataSpec, Recipe, load_recipe
from geo_pretrain.training.tasks import build_task
from geo_pretrain.training.visualize.results import draw_matches

RECIPE = "pri3d_view_r18.rooms_toy"
VAL_SCENES = 8
VAL_PAIRS_PER_SCENE = 5
VAL_FRAMES_PER_SCENE = 12
LABELLED_PER_SCENE = 2
THRESHOLD = 4.0  # px


@dataclass(frozen=True)
class PretrainingResult:
    """The measurements of the short pre-training, each from 0 to 1."""

    recipe: Recipe
    matching: dict[str, Spread]  # "random", "pre-trained": recall, over held-out scenes
    chance: float
    gain: Interval  # of the recall, on the same pairs
    seconds: dict[str, float]  # by stage
    folder: Path  # the checkpoint


def run_pretraining(out: Path, *, overrides: Iterable[str] = (), report: Report) -> PretrainingResult:
    """Pre-train for some minutes, measure what it brought, and write matches.png into `out`, the checkpoint below it."""
    clock = _Clock()
    recipe = load_recipe(RECIPE, overrides)
    source = open_source(recipe.data, progress=stage_of(report, "rendering rooms", "train"))
    val_spec = validation_spec(recipe.data)
    val = open_source(val_spec, split="val", progress=stage_of(report, "rendering rooms", "held out"))
    clock.lap("render")
    pairs = find_pairs(source, recipe.data, skips=SkippedFrames(), progress=stage_of(report, "finding pairs", ""))
    val_pairs = find_pairs(val, val_spec, skips=SkippedFrames())
    clock.lap("pairs")
    folder = out / "hub" / recipe.name
    train(
        recipe,
        folder,
        source,
        pairs,
        join("cpu"),
        overwrite=True,
        on_step=lambda info: report("pre-training", info.step, info.steps, str(info)),
    )
    clock.lap("pre-train")

    pretrained = load_backbone(recipe.name, decoder=True, hub=str(out / "hub"), local_files_only=True)
    networks = {"random": untrained(recipe), "pre-trained": pretrained}
    matching = {
        name: evaluate_matching(
            ImageExtractor(network, ImageContract()),
            val,
            val_pairs,
            size=recipe.data.size,
            threshold=THRESHOLD,
            progress=stage_of(report, "matching", name),
        )
        for name, network in networks.items()
    }
    clock.lap("matching")

    draw_demo_matches(networks, val, val_pairs, recipe.data.size, out / "matches.png")
    recall = {name: scene_spread(measured, val_pairs) for name, measured in matching.items()}
    gain = matching["pre-trained"].above(matching["random"])
    return PretrainingResult(recipe, recall, matching["random"].chance, gain, clock.laps, folder)


def validation_spec(spec: DataSpec) -> DataSpec:
    """Configure held-out rooms of the same kind: fewer scenes, a few pairs each."""
    return replace(spec, options=spec.options | {"scenes": VAL_SCENES}, max_pairs_per_scene=VAL_PAIRS_PER_SCENE)


def untrained(recipe: Recipe) -> UNet:
    """The network with its initial weights, before pre-training."""
    return cast(UNet, build_task(recipe).backbone).eval()


def scene_spread(result: MatchingResult, pairs: list[Pair]) -> Spread:
    """Compute the matching recall of each scene."""
    by_scene: dict[str, list[float]] = {}
    for pair, recall in zip(pairs, result.per_pair, strict=True):
        by_scene.setdefault(pair.scene, []).append(recall)
    return Spread(tuple(float(np.mean(values)) for values in by_scene.values()))


def labelled_frames(source: Source, val: Source, size: tuple[int, int]) -> tuple[list[Frame], list[Frame]]:
    """A few labelled frames of each training scene, and held-out frames for evaluation."""
    return _spread_frames(source, LABELLED_PER_SCENE, size), _spread_frames(val, VAL_FRAMES_PER_SCENE, size)


def _spread_frames(source: Source, count: int, size: tuple[int, int]) -> list[Frame]:
    """Choose `count` evenly spaced frames of each scene, with a different offset per scene."""
    frames = []
    for number, scene in enumerate(source.scenes()):
        ids = source.frame_ids(scene)
        for k in range(min(count, len(ids))):
            frame_id = ids[(number + k * len(ids) // count) % len(ids)]
            frames.append(resize_frame(source.load(scene, frame_id), size))
    return frames


def draw_demo_matches(
    networks: Mapping[str, nn.Module], source: Source, pairs: list[Pair], size: tuple[int, int], path: Path
) -> None:
    """Draw every network's matches of the median-overlap pair of each of the first four held-out scenes."""
    by_scene: dict[str, list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: pair.overlap):
        by_scene.setdefault(pair.scene, []).append(pair)
    middling = [by_scene[scene][len(by_scene[scene]) // 2] for scene in sorted(by_scene)[:4]]
    rows = [
        [match_pair(ImageExtractor(network, ImageContract()), source, pair, size=size) for network in networks.values()]
        for pair in middling
    ]
    draw_matches(rows, [f"{name} weights" for name in networks], path, threshold=THRESHOLD)


class _Clock:
    """Measures the wall time of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 1)
        self._last = now
