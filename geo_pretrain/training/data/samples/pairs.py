"""Samples of frame pairs: two augmented images with depth and cameras, and optionally the set of every pixel."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.frame import Frame, Pair, Source, resize_frame
from geo_pretrain.training.data.samples.augment import Normalize, augment_colors
from geo_pretrain.training.data.samples.sampler import (
    ATTEMPTS,
    Key,
    Samples,
    Skipped,
    device_seed,
    read_or_replace,
    sample_generator,
)
from geo_pretrain.training.data.surfaces.oversegmentation import K_THRESH, MIN_VERTICES
from geo_pretrain.training.data.surfaces.sets import LABEL_SOURCES, Kind, Sets, frame_labels
from geo_pretrain.training.recipe import DataSpec


@dataclass(frozen=True)
class ReadPair:
    """The two frames of a pair, and how they were read."""

    index: int  # the position of the pair that could be read
    frames: tuple[Frame, Frame]
    skipped: Skipped
    generator: torch.Generator  # of the sample, for all further draws


def read_pair(source: Source, pairs: Sequence[Pair], size: tuple[int, int], seed: int, key: Key) -> ReadPair:
    """Read the two frames of a pair at `size` (height, width).

    A pair that cannot be read is replaced by one drawn from the sample's generator. Raises `DataError` after
    `ATTEMPTS` pairs in a row.
    """

    def load(index: int) -> tuple[Frame, Frame]:
        pair = pairs[index]
        first = _read_frame(source, pair.scene, pair.frame1, size)
        alone = pair.frame2 == pair.frame1  # `DataSpec.units` "frames": read once
        return first, first if alone else _read_frame(source, pair.scene, pair.frame2, size)

    skipped: Skipped = []
    generator = sample_generator(seed, key)
    index, frames = read_or_replace(load, len(pairs), key[1], generator, skipped, what="pairs")
    return ReadPair(index, frames, skipped, generator)


def _read_frame(source: Source, scene: str, frame_id: str, size: tuple[int, int]) -> Frame:
    frame = resize_frame(source.load(scene, frame_id), size)
    if not frame.depth.any():
        raise BadFrame(f"{scene}/{frame_id}", f"no pixel has a valid depth at {size[0]}x{size[1]}")
    return frame


class PairSamples(Samples):
    """Two augmented images of a pair with depth and cameras. Indexed by (epoch, pair)."""

    def __init__(self, source: Source, pairs: list[Pair], spec: DataSpec, contract: ImageContract, seed: int) -> None:
        self.source, self.pairs, self.spec, self.seed = source, pairs, spec, seed
        self.normalize = Normalize(contract)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Load one sample, by (epoch, pair).

        image1, image2 [3, H, W] normalized; depth1, depth2 [H, W] m; intrinsics1, 2 [3, 3]; cam_to_world1, 2 [4, 4];
        seed, skipped: see `Samples`.
        """
        pair = read_pair(self.source, self.pairs, self.spec.size, self.seed, key)
        sample: dict[str, Any] = {"skipped": pair.skipped}
        for number, frame in enumerate(pair.frames, start=1):
            sample |= {f"{name}{number}": value for name, value in self._tensors(frame, pair.generator).items()}
        sample["seed"] = device_seed(pair.generator)
        return sample

    def _tensors(self, frame: Frame, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "image": self.normalize(augment_colors(frame.color, self.spec.augment, generator)),
            "depth": torch.from_numpy(np.ascontiguousarray(frame.depth)),
            "intrinsics": torch.from_numpy(frame.intrinsics).float(),
            "cam_to_world": torch.from_numpy(frame.cam_to_world),
        }


class SetPairSamples(PairSamples):
    """`PairSamples` with the geometric set of every pixel."""

    def __init__(
        self,
        source: Source,
        pairs: list[Pair],
        spec: DataSpec,
        contract: ImageContract,
        seed: int,
        *,
        k_thresh: float = K_THRESH,
        min_vertices: int = MIN_VERTICES,
        kind: Kind = "segments",
        cache_dir: Path | None = None,
    ) -> None:
        """`k_thresh`, `min_vertices`, `kind` and `cache_dir` as for `scene_sets`."""
        super().__init__(source, pairs, spec, contract, seed)
        self.sets = Sets(source, k_thresh=k_thresh, min_vertices=min_vertices, kind=kind, cache_dir=cache_dir)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Load one sample as `PairSamples`, and sets1, sets2: int64 [H, W], -1 for none.

        Both images of a pair number their sets alike. Segments are looked up at every second row and column, see
        `pixel_sets`: `sets[::2, ::2]` is the exact map at half resolution.
        """
        return super().__getitem__(key)

    def _tensors(self, frame: Frame, generator: torch.Generator) -> dict[str, Tensor]:
        return super()._tensors(frame, generator) | {"sets": torch.from_numpy(self.sets.pixels(frame))}


def check_labels(source: Source, pairs: Sequence[Pair], kind: Kind) -> None:
    """Read one frame of the pairs. Raises `DataError` when it has no labels of this `kind`."""
    for pair in pairs[:ATTEMPTS]:
        with contextlib.suppress(BadFrame):
            if frame_labels(source.load(pair.scene, pair.frame1), kind) is None:
                raise DataError(
                    f"'task.sets' is {kind!r}, but source {source.name!r} has no {kind} labels as it was opened. "
                    f"Accepted: {LABEL_SOURCES}. Without labels: --set task.sets=segments."
                )
            return
