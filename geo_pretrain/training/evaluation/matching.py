"""Dense matching between two views: does the nearest feature lie where the same surface point is seen?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame
from geo_pretrain.geometry import match_pixels
from geo_pretrain.training.data.frame import Frame, Skips, Source
from geo_pretrain.training.data.mining import Pair, resize_frame
from geo_pretrain.training.evaluation.recall import MatchingResult, average_recall, nearest_row
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


class EncoderMaps(nn.Module):
    """An encoder's maps as one at half resolution: each of unit length, enlarged (bilinear), side by side.

    What is matched where there is no decoder.
    """

    def __init__(self, encoder: nn.Module) -> None:
        """`encoder` gives a list of maps [B, C_i, H_i, W_i], those that are to be matched."""
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> [B, sum of channels, H / 2, W / 2]."""
        size = (x.shape[2] // 2, x.shape[3] // 2)
        maps = [F.normalize(m) for m in self.encoder(x)]
        return torch.cat([F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in maps], dim=1)


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
        network: dense features [B, C, H/2, W/2] or [B, C, H, W] from images [B, 3, H, W], in eval mode.
        queries: pixels of frame 1 drawn for each pair among those that frame 2 sees (projection, depth within 5 cm).

    Raises:
        DataError: no pair could be read.
    """

    def measure(number: int, pair: Pair) -> tuple[np.ndarray, float]:
        matches = match_pair(network, contract, source, pair, size=size, queries=queries, seed=seed + number)
        return matches.error, chance

    chance = min(1.0, float(np.pi * threshold**2 / (size[0] * size[1])))
    return average_recall(
        pairs, measure, source=source.name, threshold=threshold, unit="px", skips=skips, progress=progress
    )


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

    A cell of a map at half resolution stands for its center, between four pixels; of a map as large as the image for
    its pixel. Raises `BadFrame`.
    """
    frame1, frame2 = (resize_frame(source.load(pair.scene, f), size) for f in (pair.frame1, pair.frame2))
    device = next(network.parameters()).device
    target = match_pixels(*_cameras(frame1, frame2))
    pixel1, pixel2, found = sample_matches(target, [seed], queries)
    if not found.item():
        raise BadFrame(f"{pair.scene}/{pair.frame1}-{pair.frame2}", "pair has no match")
    transform = contract.transforms(resize=False)
    features1, features2 = (network(transform(f.color)[None].to(device)).float() for f in (frame1, frame2))
    stride = round(size[0] / features1.shape[-2])  # 2 of Pri3D's U-Net, 1 of a network at the image's resolution
    pixel = pixel1.to(device)
    cell = half_resolution_cell(pixel, size[1], features1.shape) if stride == 2 else pixel
    best = nearest_row(gather_cells(features1, cell)[0], features2[0].flatten(1).T).cpu()
    width = features2.shape[-1]
    predicted = torch.stack([best % width, best // width], -1) * stride + (stride - 1) / 2
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
