"""A backbone beside its twin with random weights: the measurements of `geo-pretrain eval`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from geo_pretrain import hub
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.loading import load_backbone, load_pair
from geo_pretrain.training.data.frame import Skips
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.data.surfaces.fusing import cubic_voxel_size
from geo_pretrain.training.evaluation.cloud_matching import Turn, evaluate_cloud_matching
from geo_pretrain.training.evaluation.matching import EncoderMaps, evaluate_matching
from geo_pretrain.training.evaluation.pixel_voxel import (
    evaluate_pair,
    evaluate_pixel_to_voxel,
    frames_in_twos,
    load_pri3d,
    random_pair,
)
from geo_pretrain.training.evaluation.probes import STAGES
from geo_pretrain.training.evaluation.recall import MatchingResult, spread_evenly
from geo_pretrain.training.recipe import DataSpec, recipe_of

Progress = Callable[[int, int], None]
RANDOM = "random"  # what the twin is called in results


def compare_matching(
    backbone: str,
    spec: DataSpec,
    *,
    size: tuple[int, int] | None = None,
    count: int = 100,
    threshold: float | None = None,
    turn: Turn = "camera",
    seed: int = 0,
    skips: Skips | None = None,
    progress: Progress | None = None,
) -> dict[str, MatchingResult]:
    """Matching recall of a backbone (catalog name or folder) and of its architecture with random weights.

    Pixels for a 2D backbone, voxels for a 3D one. An encoder without a decoder matches its maps, see `EncoderMaps`.

    Args:
        size: of the frames; None: that of pre-training.
        count: pairs, spread evenly over all that `spec` allows.
        threshold: None: 4 pixels, or 2 voxels.
        turn: of the clouds of a 3D backbone.
        seed: of queries, turns and random weights.
    """
    opened = hub.open(backbone)
    found = opened.fetch(*opened.network_roles(), optional=("recipe",))
    folder, contract = found.folder, found.contract
    evaluate: Callable[..., MatchingResult] = evaluate_matching
    options: dict[str, Any] = {} if threshold is None else {"threshold": threshold}
    if isinstance(contract, VoxelContract):
        cubic_voxel_size(contract)  # refuse what cannot be measured before anything is rendered
        recipe = recipe_of(found)
        spec = replace(spec, size=size or (spec.size if recipe is None else recipe.data.size))
        evaluate, options["turn"] = evaluate_cloud_matching, turn
    else:
        spec = replace(spec, size=size or contract.size)
    skips = skips if skips is not None else Skips()
    source = open_source(spec, split="val")
    pairs = spread_evenly(find_pairs(source, spec, skips=skips), count)
    results = {}
    networks = {RANDOM: random_twin(folder, seed), backbone: dense_network(folder)}
    for number, (name, network) in enumerate(networks.items()):
        results[name] = evaluate(
            network,
            contract,
            source,
            pairs,
            size=spec.size,
            seed=seed,
            skips=skips,
            progress=_nth(progress, number, 2),
            **options,
        )
    return results


def compare_pixel_to_voxel(
    folder: str,
    spec: DataSpec,
    *,
    count: int = 100,
    threshold: float = 2.0,
    seed: int = 0,
    skips: Skips | None = None,
    progress: Progress | None = None,
) -> dict[str, MatchingResult]:
    """Pixel-to-voxel recall of a folder of pri3d_geo, pri3d_view_geo, ppkt or img2pc, and of the same, random.

    Random are all weights of Pri3D; of a network that another taught, its own and the projections. Frames have the size
    of pre-training; `count` of them are spread evenly over those of `spec`.
    """
    opened = hub.open(folder)
    if opened.arch.modality == "3d" and opened.pairing is not None:
        recipe = recipe_of(opened.fetch(*opened.network_roles(), optional=("recipe",)))
        spec = replace(spec, units="frames", size=spec.size if recipe is None else recipe.data.size)
        source = open_source(spec, split="val")
        frames = spread_evenly(find_pairs(source, spec, skips=skips or Skips()), count)
        couples = {RANDOM: random_pair(folder, seed), folder: load_pair(folder)}
        return {
            name: evaluate_pair(
                couple,
                source,
                frames,
                size=spec.size,
                threshold=threshold,
                seed=seed,
                skips=skips,
                progress=_nth(progress, number, 2),
            )
            for number, (name, couple) in enumerate(couples.items())
        }
    tasks = {RANDOM: load_pri3d(folder, pretrained=False, seed=seed), folder: load_pri3d(folder)}
    source = open_source(spec, split="val")
    pairs = spread_evenly(frames_in_twos(source), max(1, count // 2))
    return {
        name: evaluate_pixel_to_voxel(
            task, source, pairs, threshold=threshold, seed=seed, skips=skips, progress=_nth(progress, number, 2)
        )
        for number, (name, task) in enumerate(tasks.items())
    }


def random_twin(folder: str | Path, seed: int = 0) -> Any:
    """The network of a checkpoint folder with random weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dense_network(folder, pretrained=False)


def dense_network(folder: str | Path, *, pretrained: bool = True) -> Any:
    """The network of a checkpoint folder that gives dense features: with its decoder; else an encoder's maps in one."""
    found = read_checkpoint(folder)
    if not isinstance(found.contract, ImageContract):
        return load_backbone(folder, pretrained=pretrained)
    if found.arch.has_decoder:
        return load_backbone(folder, decoder=True, pretrained=pretrained)
    return EncoderMaps(load_backbone(folder, out_indices=STAGES, pretrained=pretrained)).eval()


def _nth(progress: Progress | None, number: int, count: int) -> Progress:
    """Progress of one of `count` equal parts as progress of the whole."""

    def show(done: int, total: int) -> None:
        if progress is not None:
            progress(number * total + done, count * total)

    return show
