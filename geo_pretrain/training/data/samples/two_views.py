"""Samples of two augmented views of one image, with the pixels of either that show the same pixel of the image.

The augmentation is SimCLR's (Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations",
ICML 2020): random resized crop, flip, colors, gray, blur. Janda et al. contrast pixels instead of images with it,
"roughly"; so every view records, through crop, resize and flip, which pixel of the image each of its pixels shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from geo_pretrain.geometry import nearest_indices
from geo_pretrain.training.checks import PositiveRange, Probability, Ranged, Shares
from geo_pretrain.training.data.samples.augment import Crop, augment_colors, crop_resize, random_box, uniform
from geo_pretrain.training.data.samples.pairs import read_pair
from geo_pretrain.training.data.samples.sampler import ImageSamples, Key, Skipped

VIEW_ATTEMPTS = 100  # pairs of crops drawn until they share a pixel; with SimCLR's scale 1 in 400 does not


@dataclass(frozen=True)
class ViewConfig(Ranged):
    """Cropping of views. Defaults are SimCLR's, except that a crop covers at least a fifth of the image."""

    scale: Shares = (0.2, 1.0)  # area of the crop as a share of the image's
    ratio: PositiveRange = (3 / 4, 4 / 3)  # its width over its height, in pixels
    flip_prob: Probability = 0.5


@dataclass(eq=False, repr=False)
class TwoViewSamples(ImageSamples):
    """Two views of each frame with the pixels that they share.

    image1, image2: [3, H, W], normalized, of the size of the frame (`DataSpec.size`); matches: int64 [n, 2], flat
    pixels of view 1 and 2 that show the same pixel of the frame, at most `matches`, without repetition; rows1, 2:
    int64 [H] and columns1, 2: int64 [W], the row and column of the frame that each row and column of a view shows.

    `pairs` are frames paired with themselves; of other pairs the first frame is used.
    Views that have no pixel in common are drawn again, `VIEW_ATTEMPTS` times; after that n is 0.
    """

    ragged = ("matches",)

    _: KW_ONLY
    views: ViewConfig
    matches: int  # the most kept per image

    def _draw(self, key: Key, generator: torch.Generator, skipped: Skipped) -> dict[str, Any]:
        _, (frame, _) = read_pair(self, key, generator, skipped)
        for _ in range(VIEW_ATTEMPTS):
            crops = [random_crop(self.spec.size, self.views, generator) for _ in range(2)]
            maps = [index_map(crop, self.spec.size) for crop in crops]
            matches = common_pixels(maps[0], maps[1], self.matches, generator)
            if len(matches):
                break
        sample: dict[str, Any] = {"matches": matches}
        for number, (crop, (rows, columns)) in enumerate(zip(crops, maps, strict=True), start=1):
            view = crop_resize(frame.color, crop, self.spec.size)
            sample[f"image{number}"] = self.normalize(augment_colors(view, self.spec.augment, generator))
            sample[f"rows{number}"], sample[f"columns{number}"] = rows, columns
        return sample

    @classmethod
    def collate(cls, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join samples; matches are flat pixels of the batch, and matches_per_image is how many each sample has."""
        batch = super().collate(samples)
        batch["matches_per_image"] = [len(sample["matches"]) for sample in samples]
        starts = torch.arange(len(samples)) * batch["image1"][0, 0].numel()
        batch["matches"] += starts.repeat_interleave(torch.tensor(batch["matches_per_image"]))[:, None]
        return batch


def random_crop(size: tuple[int, int], config: ViewConfig, generator: torch.Generator) -> Crop:
    """Draw whether a view of an image of `size` (height, width) is mirrored, then its box (see `random_box`)."""
    flip = uniform(0, 1, generator) < config.flip_prob
    return replace(random_box(size, config.scale, config.ratio, generator, torch.float64), flip=flip)


def index_map(crop: Crop, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The row and column of the image that each row and column of a view of `size` (height, width) shows.

    int64 [H] and [W]. Pixel (i, j) of the view shows pixel (rows[i], columns[j]): the one under its center, as when
    the box is resized by the nearest pixel. A box no larger than the view shows each of its pixels once or more.
    """
    rows = torch.tensor(nearest_indices(crop.height, size[0])) + crop.top
    columns = torch.tensor(nearest_indices(crop.width, size[1])) + crop.left
    return rows, columns.flip(0) if crop.flip else columns


def common_pixels(
    map1: tuple[Tensor, Tensor], map2: tuple[Tensor, Tensor], count: int, generator: torch.Generator
) -> Tensor:
    """Sample pairs of flat pixels, one of each view, that show the same pixel of the image: int64 [n, 2], n <= `count`.

    `map1`, `map2`: from `index_map`. Of the pixels of the image that both views show, at most `count` are drawn,
    uniformly without repetition; for each, a pixel of view 1 and one of view 2 are drawn uniformly among those that
    show it (a small crop shows one pixel several times). Without a common pixel n is 0.
    """
    runs = [_common_runs(map1[axis], map2[axis]) for axis in (0, 1)]
    rows, columns = len(runs[0]), len(runs[1])
    chosen = torch.randperm(rows * columns, generator=generator)[:count]
    position = chosen // max(columns, 1), chosen % max(columns, 1)
    pixels = []
    for view, width in enumerate((len(map1[1]), len(map2[1]))):
        row, column = (_one_of_run(runs[axis][position[axis], view], generator) for axis in (0, 1))
        pixels.append(row * width + column)
    return torch.stack(pixels, dim=1)


def _common_runs(index1: Tensor, index2: Tensor) -> Tensor:
    """For each index in both maps of one axis, (start, length) of its run in either map: int64 [n, 2, 2]."""
    unique = [torch.unique(index, return_counts=True) for index in (index1, index2)]
    common = unique[0][0][torch.isin(unique[0][0], unique[1][0])]
    runs = []
    for index, (values, counts) in zip((index1, index2), unique, strict=True):
        at = torch.searchsorted(values, common)
        starts = counts.cumsum(0) - counts
        if len(index) and index[0] > index[-1]:  # a flipped view: runs come in descending order
            starts = len(index) - starts - counts
        runs.append(torch.stack([starts[at], counts[at]], dim=-1))
    return torch.stack(runs, dim=1)


def _one_of_run(run: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a position in each run [n, 2] (start, length) uniformly: int64 [n]."""
    draw = torch.rand(len(run), generator=generator, dtype=torch.float64)
    return run[:, 0] + (draw * run[:, 1]).long()
