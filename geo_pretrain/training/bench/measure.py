"""The three measurements of a checkpoint on rooms: matching, a linear probe, fine-tuning; 2D and 3D."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from geo_pretrain.backbones.resnet_unet import UNet, unet_like
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.contract import VoxelContract
from geo_pretrain.seeding import seeded
from geo_pretrain.training.bench.plan import BenchSpec
from geo_pretrain.training.data.frame import Frame, Pair, SkippedFrames, Source
from geo_pretrain.training.data.labelled.clouds.frames import labelled_clouds, labelled_frame
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.data.mining import find_pairs, spread_evenly
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.evaluation.features import deep_maps, load_extractor, load_network
from geo_pretrain.training.evaluation.matching import evaluate_matching
from geo_pretrain.training.evaluation.probes import ProbeSpec, probe_backbone
from geo_pretrain.training.finetune.in_memory import FinetuneSpec, PointsSpec, finetune_clouds, finetune_frames
from geo_pretrain.training.networks3d import segmentation_srunet
from geo_pretrain.training.recipe import DataSpec


class Rooms:
    """The rooms for a benchmark's measurements: held-out pairs, and labelled frames of both splits."""

    def __init__(self, data: DataSpec, spec: BenchSpec) -> None:
        options = {key: value for key, value in data.options.items() if key != "split"}  # the split is chosen here
        self.size = data.size
        self.val_spec = replace(
            data, units="pairs", options=options | {"scenes": spec.val_scenes}, max_pairs_per_scene=None
        )
        labelled = {key: value for key, value in options.items() if key not in ("depth_noise", "cache")}
        labelled |= {"val_scenes": spec.val_scenes, "labelled": spec.labelled}
        self.train, self.val = (
            open_labelled("rooms", None, split, task="segmentation", options=labelled) for split in ("train", "val")
        )
        self.classes = len(self.train.classes)
        self.pairs_wanted = spec.pairs

    def held_out(self) -> tuple[Source, list[Pair]]:
        """Evenly spaced pairs of held-out rooms."""
        source = open_source(self.val_spec, split="val")
        return source, spread_evenly(find_pairs(source, self.val_spec, skips=SkippedFrames()), self.pairs_wanted)

    def frames(self) -> tuple[list[Frame], list[Frame]]:
        """The labelled frames of training and validation rooms at the working size."""
        sources = (self.train, self.val)
        train, val = ([labelled_frame(source, id, self.size) for id in source.ids()] for source in sources)
        return train, val


def measure(
    folder: Path,
    data: DataSpec,
    spec: BenchSpec,
    *,
    seed: int,
    pretrained: bool = True,
    device: str = "cpu",
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a checkpoint folder, or with `pretrained=False` its architecture with random weights.

    Returns plain JSON types: "kind", "matching" {"recall", "threshold", "unit", "chance", "of"}, "probe" and
    "finetuned" (mIoU, shares of 1) and "seconds" by measurement. `seed` draws queries, pixels, new layers, order and,
    without `pretrained`, the weights.
    """
    checkpoint, rooms = read_checkpoint(folder), Rooms(data, spec)
    contract: Any = checkpoint.contract
    points = isinstance(contract, VoxelContract)
    start: dict[str, Any] = {"random_init": not pretrained, "seed": seed, "device": device}

    def matching() -> dict[str, Any]:
        source, pairs = rooms.held_out()
        turn: dict[str, Any] = {"turn": "upright"} if points else {}
        result = evaluate_matching(load_extractor(folder, **start), source, pairs, size=rooms.size, **turn, seed=seed)
        dense = "dense output" if checkpoint.arch.has_decoder else "encoder's maps"
        facts = {key: getattr(result, key) for key in ("recall", "threshold", "unit", "chance")}
        return facts | {"of": "output" if points else dense}

    def probe() -> float:
        network = load_network(folder, **start, out_indices=None if points else deep_maps(checkpoint.arch))
        probe_spec = ProbeSpec(size=rooms.size, pixels=spec.pixels, seed=seed)
        return probe_backbone(network, rooms.train, rooms.val, probe_spec, device=device).miou

    def finetuned() -> float:
        network = load_network(folder, **start)
        if points:
            host = segmentation_srunet(network, rooms.classes + 1, seed=seed).to(device)
            train, val = (labelled_clouds(source, rooms.size) for source in (rooms.train, rooms.val))
            points_budget = PointsSpec(spec.finetune_steps, spec.finetune_batch, spec.finetune_lr_points)
            return finetune_clouds(host, contract, train, val, points_budget, seed=seed).miou
        unet = encoder_segmenter(network, rooms.classes + 1, seed=seed).to(device)
        budget = FinetuneSpec(spec.finetune_steps, spec.finetune_batch, spec.finetune_lr)
        return finetune_frames(unet, contract, *rooms.frames(), budget, seed=seed).miou

    found: dict[str, Any] = {"kind": "3D" if points else "2D", "seconds": {}}
    for part in (matching, probe, finetuned):
        name = part.__name__
        report(name)
        begin = time.monotonic()
        found[name] = part()
        found["seconds"][name] = round(time.monotonic() - begin, 1)
    return found


def encoder_segmenter(encoder: Any, classes: int, *, seed: int) -> UNet:
    """Build a segmentation U-Net around an encoder; its decoder's random weights depend on `seed` only."""
    with seeded(seed):
        network = unet_like(encoder, classes)
    network.encoder.load_state_dict(encoder.state_dict())
    return network
