"""The three measurements of a checkpoint on rooms: matching, a linear probe, fine-tuning; 2D and 3D."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from geo_pretrain.backbones.resnet_unet import ResNetEncoder, ResNetUNet, unet_like
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.loading import load_backbone
from geo_pretrain.seeding import seeded
from geo_pretrain.training.bench.plan import BenchSpec
from geo_pretrain.training.data.frame import Frame, Pair, SkippedFrames, Source, resize_frame
from geo_pretrain.training.data.labelled.clouds import labelled_clouds
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.evaluation.features import STAGES, CloudExtractor, load_extractor
from geo_pretrain.training.evaluation.matching import MatchingResult, evaluate_matching, spread_evenly
from geo_pretrain.training.evaluation.probes import ProbeSpec, linear_probe
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
        labelled = {key: value for key, value in options.items() if key != "depth_noise"}
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
        found = []
        for source in (self.train, self.val):
            rooms: Any = source
            parts = (id.partition("/") for id in source.ids())
            found.append([resize_frame(rooms.rooms.load(scene, id), self.size) for scene, _, id in parts])
        return found[0], found[1]


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
    contract = read_checkpoint(folder).contract
    rooms = Rooms(data, spec)
    parts: dict[str, Callable[[], Any]]
    if isinstance(contract, VoxelContract):
        parts = _points(folder, contract, rooms, spec, seed, pretrained, device)
    else:
        parts = _images(folder, contract, rooms, spec, seed, pretrained, device)
    found: dict[str, Any] = {"kind": "3D" if isinstance(contract, VoxelContract) else "2D", "seconds": {}}
    for name, part in parts.items():
        report(name)
        start = time.monotonic()
        found[name] = part()
        found["seconds"][name] = round(time.monotonic() - start, 1)
    return found


def _images(
    folder: Path,
    contract: ImageContract,
    rooms: Rooms,
    spec: BenchSpec,
    seed: int,
    pretrained: bool,
    device: str,
) -> dict[str, Callable[[], Any]]:
    decoder = read_checkpoint(folder).arch.has_decoder

    def load(**options: Any) -> Any:
        return _load(folder, pretrained, seed, device, **options)

    def matching() -> dict[str, Any]:
        extractor = load_extractor(folder, random_init=not pretrained, seed=seed, device=device)
        source, pairs = rooms.held_out()
        result = evaluate_matching(extractor, source, pairs, size=rooms.size, seed=seed)
        return _recall(result, "dense output" if decoder else "encoder's maps")

    def probe() -> float:
        probe_spec = ProbeSpec(size=rooms.size, pixels=spec.pixels, seed=seed)
        return linear_probe(load(out_indices=STAGES), rooms.train, rooms.val, probe_spec, device=device).miou

    def finetuned() -> float:
        network = encoder_segmenter(load(), rooms.classes + 1, seed=seed).to(device)
        budget = FinetuneSpec(spec.finetune_steps, spec.finetune_batch, spec.finetune_lr)
        return finetune_frames(network, contract, *rooms.frames(), budget, seed=seed).miou

    return {"matching": matching, "probe": probe, "finetuned": finetuned}


def _points(
    folder: Path,
    contract: VoxelContract,
    rooms: Rooms,
    spec: BenchSpec,
    seed: int,
    pretrained: bool,
    device: str,
) -> dict[str, Callable[[], Any]]:
    network = cast(SRUNet, _load(folder, pretrained, seed, device))

    def matching() -> dict[str, Any]:
        source, pairs = rooms.held_out()
        extractor = CloudExtractor(network, contract)
        result = evaluate_matching(extractor, source, pairs, size=rooms.size, turn="upright", seed=seed)
        return _recall(result, "output")

    def probe() -> float:
        probe_spec = ProbeSpec(size=rooms.size, pixels=spec.pixels, seed=seed)
        return linear_probe(network, rooms.train, rooms.val, probe_spec, device=device).miou

    def finetuned() -> float:
        host = segmentation_srunet(network, rooms.classes + 1, seed=seed).to(device)
        train, val = (labelled_clouds(source, rooms.size) for source in (rooms.train, rooms.val))
        budget = PointsSpec(spec.finetune_steps, spec.finetune_batch, spec.finetune_lr_points)
        return finetune_clouds(host, contract, train, val, budget, seed=seed).miou

    return {"matching": matching, "probe": probe, "finetuned": finetuned}


def encoder_segmenter(encoder: ResNetEncoder, classes: int, *, seed: int) -> ResNetUNet:
    """Build a segmentation U-Net around an encoder; its decoder's random weights depend on `seed` only."""
    with seeded(seed):
        network = unet_like(encoder, classes)
    network.encoder.load_state_dict(encoder.state_dict())
    return network


def _load(folder: Path, pretrained: bool, seed: int, device: str, **options: Any) -> Any:
    """Load the network of a folder in eval mode; `seed` draws the weights of a random one."""
    with seeded(seed):
        return load_backbone(folder, pretrained=pretrained, device=device, **options)


def _recall(result: MatchingResult, of: str) -> dict[str, Any]:
    facts = {"threshold": result.threshold, "unit": result.unit, "chance": result.chance, "of": of}
    return {"recall": result.recall, **facts}
