"""Samples of frame pairs: two augmented images with depth and cameras, and optionally the set of every pixel."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.frame import Frame, Pair, Source, resize_frame
from geo_pretrain.training.data.samples.augment import augment_colors
from geo_pretrain.training.data.samples.crops import crop_centers, crop_pair, refuse_pair_settings
from geo_pretrain.training.data.samples.sampler import ATTEMPTS, ImageSamples, Key, Samples, Skipped, read_or_replace
from geo_pretrain.training.data.surfaces.sets import LABEL_SOURCES, Kind, Sets, frame_labels


def read_pair(
    samples: Samples, key: Key, generator: torch.Generator, skipped: Skipped
) -> tuple[int, tuple[Frame, Frame]]:
    """Read the two frames of a pair at the size of the recipe, resized or cropped; returns the pair's position, too.

    With `spec.draws_per_scene` the pair is drawn from those of a scene, of which an epoch takes as many as that. A pair
    that cannot be read is replaced by one drawn from `generator` and added to `skipped`. Raises `DataError` after
    `ATTEMPTS` pairs in a row.
    """
    source, size = samples.source, samples.spec.size

    def load(index: int) -> tuple[Frame, Frame]:
        pair = samples.pairs[index]
        first = source.load(pair.scene, pair.frame1)
        alone = pair.frame2 == pair.frame1  # `DataSpec.units` "frames": read once
        second = first if alone else source.load(pair.scene, pair.frame2)
        if samples.spec.crop == "match":
            first, second = crop_pair(first, second, size, crop_centers(source, pair, first, second, size), generator)
        else:
            small = resize_frame(first, size)
            first, second = small, small if alone else resize_frame(second, size)
        for id, frame in ((pair.frame1, first), (pair.frame2, second)):
            if not frame.depth.any():
                raise BadFrame(f"{pair.scene}/{id}", f"no pixel has a valid depth at {size[0]}x{size[1]}")
        return first, second

    index = key[1]
    if samples.spec.draws_per_scene is not None:
        rows = samples.rows_by_scene[index // samples.spec.draws_per_scene]
        index = rows[int(torch.randint(len(rows), (), generator=generator))]
    return read_or_replace(load, len(samples.pairs), index, generator, skipped, what="pairs")


class PairSamples(ImageSamples):
    """Two augmented images of a pair with depth and cameras.

    image1, image2 [3, H, W] normalized; depth1, depth2 [H, W] m; intrinsics1, 2 [3, 3]; cam_to_world1, 2 [4, 4].
    """

    def _draw(self, key: Key, generator: torch.Generator, skipped: Skipped) -> dict[str, Any]:
        _, frames = read_pair(self, key, generator, skipped)
        return {
            f"{name}{number}": value
            for number, frame in enumerate(frames, start=1)
            for name, value in self._tensors(frame, generator).items()
        }

    def _tensors(self, frame: Frame, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "image": self.normalize(augment_colors(frame.color, self.spec.augment, generator)),
            "depth": torch.from_numpy(np.ascontiguousarray(frame.depth)),
            "intrinsics": torch.from_numpy(frame.intrinsics).float(),
            "cam_to_world": torch.from_numpy(frame.cam_to_world),
        }


@dataclass(eq=False, repr=False)
class SetPairSamples(PairSamples):
    """`PairSamples` with the geometric set of every pixel, alike in both images: sets1, 2 int64 [H, W], -1 for none.

    Segments are looked up at every second row and column, see `pixel_sets`: `sets[::2, ::2]` is the exact map at half
    resolution.
    """

    sets: Sets

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_pair_settings(self.spec, ["crop"], "geometric sets, which are looked up in whole frames,")

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
