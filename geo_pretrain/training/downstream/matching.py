"""Dense matching between two views: does the nearest feature lie where the same surface point is seen?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain.backbones.resnet_unet import ResNetUNet
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, CheckpointError, DataError
from geo_pretrain.geometry import match_pixels
from geo_pretrain.loading import load_backbone
from geo_pretrain.training.data.frame import Frame, Skips, Source
from geo_pretrain.training.data.pairs import Pair, find_pairs, resize_frame
from geo_pretrain.training.data.sources import open_source
from geo_pretrain.training.recipe import DataSpec
from geo_pretrain.training.tasks.pri3d import gather_cells, half_resolution_cell, sample_matches


@dataclass(frozen=True)
class PairMatches:
    """The matches of one pair: query pixels, where they truly are, and where the features put them."""

    pair: Pair
    frame1: Frame
    frame2: Frame
    query: np.ndarray  # [N, 2] (u, v) in frame 1, px
    truth: np.ndarray  # [N, 2] in frame 2
    predicted: np.ndarray  # [N, 2] in frame 2

    @property
    def error(self) -> np.ndarray:
        """Distance between truth and prediction, px: [N]."""
        return np.linalg.norm(self.predicted - self.truth, axis=-1)


@dataclass(frozen=True)
class MatchingResult:
    """Recall of a network over pairs; `per_pair` has one value a pair in the order of the pairs."""

    recall: float  # mean over pairs of the share of queries matched within `threshold`
    threshold: float  # px
    per_pair: tuple[float, ...]
    queries: int  # in all
    chance: float  # recall of a uniformly drawn pixel


def evaluate_matching(
    network: nn.Module,
    contract: ImageContract,
    source: Source,
    pairs: Sequence[Pair],
    *,
    size: tuple[int, int],
    threshold: float = 4.0,
    queries: int = 500,
    seed: int = 0,
    skips: Skips | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MatchingResult:
    """Matching recall at `threshold` pixels (of images of `size`, height x width) over held-out pairs.

    Args:
        network: dense features [B, C, H/2, W/2] from images [B, 3, H, W], in eval mode.
        queries: pixels of frame 1 drawn for each pair among those that frame 2 sees (projection, depth within 5 cm).

    Raises:
        DataError: no pair could be read.
    """
    skips = skips if skips is not None else Skips()
    recalls, total = [], 0
    for number, pair in enumerate(pairs):
        if progress is not None:
            progress(number, len(pairs))
        try:
            matches = match_pair(network, contract, source, pair, size=size, queries=queries, seed=seed + number)
        except BadFrame as bad:
            skips.add(bad)
            continue
        recalls.append(float((matches.error <= threshold).mean()))
        total += len(matches.query)
    if not recalls:
        raise DataError(f"No pair of source {source.name!r} could be evaluated.\n{skips.summary()}")
    chance = min(1.0, float(np.pi * threshold**2 / (size[0] * size[1])))
    return MatchingResult(float(np.mean(recalls)), threshold, tuple(recalls), total, chance)


def compare_with_random(
    backbone: str,
    spec: DataSpec,
    *,
    size: tuple[int, int] | None = None,
    count: int = 100,
    threshold: float = 4.0,
    skips: Skips | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, MatchingResult]:
    """Matching recall of a backbone (catalog name or folder) and of its architecture with random weights.

    `size` None is the one it was pre-trained at; `count` pairs are spread evenly over all that `spec` allows.
    """
    trained = load_backbone(backbone, decoder=True)
    contract = trained.contract
    if contract is None:
        raise CheckpointError(f"{backbone!r} carries no image contract, so its input is unknown.")
    random = random_twin(trained)
    spec = replace(spec, size=size or contract.size)
    skips = skips if skips is not None else Skips()
    source = open_source(spec, split="val")
    pairs = find_pairs(source, spec, skips=skips)
    if len(pairs) > count:
        pairs = [pairs[k] for k in np.linspace(0, len(pairs) - 1, count).round().astype(int)]
    results = {}
    for number, (name, network) in enumerate({"random": random, backbone: trained}.items()):
        results[name] = evaluate_matching(
            network,
            contract,
            source,
            pairs,
            size=spec.size,
            threshold=threshold,
            skips=skips,
            progress=_nth(progress, number, 2),
        )
    return results


def _nth(progress: Callable[[int, int], None] | None, number: int, count: int) -> Callable[[int, int], None]:
    """Progress of one of `count` equal parts as progress of the whole."""

    def show(done: int, total: int) -> None:
        if progress is not None:
            progress(number * total + done, count * total)

    return show


def random_twin(network: ResNetUNet, seed: int = 0) -> ResNetUNet:
    """A network of the same shape with random weights, in eval mode."""
    encoder = network.encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out_chans = network.decoder.conv0.out_channels
        twin = ResNetUNet(encoder.depth, width=encoder.width, in_chans=encoder.in_chans, out_chans=out_chans)
    return twin.eval()


@torch.no_grad()
def match_pair(
    network: nn.Module,
    contract: ImageContract,
    source: Source,
    pair: Pair,
    *,
    size: tuple[int, int],
    queries: int = 500,
    seed: int = 0,
) -> PairMatches:
    """Match pixels of one pair by the nearest feature (cosine) among all cells of the other image's map.

    A cell of the half-resolution map stands for its centre, between four pixels. Raises `BadFrame`.
    """
    frame1, frame2 = (resize_frame(source.load(pair.scene, f), size) for f in (pair.frame1, pair.frame2))
    device = next(network.parameters()).device
    target = match_pixels(*_cameras(frame1, frame2))
    pixel1, pixel2, found = sample_matches(target, [seed], queries)
    if not found.item():
        raise BadFrame(f"{pair.scene}/{pair.frame1}-{pair.frame2}", "pair has no match")
    transform = contract.transforms(resize=False)
    features1, features2 = (network(transform(f.color)[None].to(device)).float() for f in (frame1, frame2))
    cell = half_resolution_cell(pixel1.to(device), size[1], features1.shape)
    query = F.normalize(gather_cells(features1, cell)[0], dim=-1)
    candidates = F.normalize(features2[0].flatten(1), dim=0)
    best = (query @ candidates).argmax(-1).cpu()
    width = features2.shape[-1]
    predicted = torch.stack([best % width, best // width], -1) * 2 + 0.5
    return PairMatches(
        pair, frame1, frame2, _uv(pixel1[0], size[1]), _uv(pixel2[0], size[1]), predicted.double().numpy()
    )


def _cameras(frame1: Frame, frame2: Frame) -> list[Tensor]:
    """The arguments of `match_pixels` for one pair."""
    columns = [[f.depth, f.intrinsics.astype(np.float32), f.cam_to_world] for f in (frame1, frame2)]
    return [torch.from_numpy(np.ascontiguousarray(columns[k][c]))[None] for c in range(3) for k in range(2)]


def _uv(pixel: Tensor, width: int) -> np.ndarray:
    """Flat pixel indices [N] as (u, v): float [N, 2]."""
    return torch.stack([pixel % width, pixel // width], -1).double().numpy()
