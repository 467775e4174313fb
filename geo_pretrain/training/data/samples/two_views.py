"""Two augmented views of one image, and which of their pixels come from the same pixel of it.

The augmentation is SimCLR's (Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations",
ICML 2020): random resized crop, flip, colors, gray, blur. Janda et al. contrast pixels instead of images with it,
"roughly"; so every view keeps, through crop, resizing and flip, the pixel of the image that each of its pixels shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.geometry import nearest_indices
from geo_pretrain.training.data.frame import Source
from geo_pretrain.training.data.mining import Pair
from geo_pretrain.training.data.samples.sampler import Key, augment, collate, load_pair
from geo_pretrain.training.recipe import DataSpec

BOX_ATTEMPTS = 10  # boxes tried before the crop falls back to the largest in the middle, as torchvision's
VIEW_ATTEMPTS = 100  # pairs of crops tried until they share a pixel; of SimCLR's own 1 in 400 does not


@dataclass(frozen=True)
class ViewSpec:
    """How a view is cut from its image; each default is SimCLR's, but for crops of a fifth of the image and more."""

    scale: tuple[float, float] = (0.2, 1.0)  # area of the crop as a share of the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # its width over its height, in pixels
    flip_prob: float = 0.5

    def __post_init__(self) -> None:
        """Ranges."""
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise RecipeError(f"'scale' is {self.scale!r}, accepted is (low, high) with 0 < low <= high <= 1.")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise RecipeError(f"'ratio' is {self.ratio!r}, accepted is (low, high) with 0 < low <= high.")


@dataclass(frozen=True)
class Crop:
    """A box of an image, in pixels, and whether it is mirrored left to right after it was cut out."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


class TwoViewSamples(Dataset[dict[str, Any]]):
    """Two views of each frame with pixels that match. Indexed by (epoch, frame), as `samples.PairSamples` is."""

    def __init__(
        self,
        source: Source,
        pairs: list[Pair],
        spec: DataSpec,
        contract: ImageContract,
        seed: int,
        *,
        views: ViewSpec,
        matches: int,
    ) -> None:
        """`pairs`: of each frame with itself; the first frame of a pair is used. `matches`: at most, for each image."""
        self.source, self.pairs, self.spec, self.seed = source, pairs, spec, seed
        self.views, self.matches = views, matches
        self.mean = torch.tensor(contract.mean).view(3, 1, 1)
        self.std = torch.tensor(contract.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """One sample, by (epoch, frame).

        image1, image2: [3, H, W], normalized, of the size of the frame (`DataSpec.size`); matches: int64 [n, 2], flat
        pixels of view 1 and 2 that show one pixel of the frame, at most `matches`, none twice; rows1, 2: int64 [H] and
        columns1, 2: int64 [W], the row and column of the frame that each row and column of a view shows; seed: an
        integer for draws made later; skipped: (path, reason) of files that failed on the way.

        Views that have no pixel in common are drawn again, `VIEW_ATTEMPTS` times; after that n is 0.
        """
        (frame, _), skipped, generator = load_pair(self.source, self.pairs, self.spec.size, self.seed, key)
        height, width = self.spec.size
        for _ in range(VIEW_ATTEMPTS):
            crops = [random_crop((height, width), self.views, generator) for _ in range(2)]
            maps = [index_map(crop, (height, width)) for crop in crops]
            matches = common_pixels(maps[0], maps[1], self.matches, generator)
            if len(matches):
                break
        sample: dict[str, Any] = {"skipped": skipped, "matches": matches}
        for number, (crop, (rows, columns)) in enumerate(zip(crops, maps, strict=True), start=1):
            view = augment(cut(frame.color, crop), self.spec.augment, generator)
            sample[f"image{number}"] = (view - self.mean) / self.std
            sample[f"rows{number}"], sample[f"columns{number}"] = rows, columns
        sample["seed"] = int(torch.randint(2**62, (), generator=generator))
        return sample


def random_crop(size: tuple[int, int], spec: ViewSpec, generator: torch.Generator) -> Crop:
    """A box by torchvision's rule for `RandomResizedCrop`: area uniform, aspect ratio log-uniform; and a coin's flip.

    `size` is (height, width) of the image. A box that fits nowhere is drawn again; after `BOX_ATTEMPTS` it is the
    largest in the middle whose aspect ratio is allowed.
    """
    height, width = size
    flip = float(torch.rand((), generator=generator)) < spec.flip_prob
    low, high = (math.log(bound) for bound in spec.ratio)
    for _ in range(BOX_ATTEMPTS):
        draw = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        area = height * width * (spec.scale[0] + (spec.scale[1] - spec.scale[0]) * draw[0])
        aspect = math.exp(low + (high - low) * draw[1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (), generator=generator))
            left = int(torch.randint(width - w + 1, (), generator=generator))
            return Crop(top, left, h, w, flip)
    aspect = min(max(width / height, spec.ratio[0]), spec.ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return Crop((height - h) // 2, (width - w) // 2, h, w, flip)


def cut(color: np.ndarray, crop: Crop) -> np.ndarray:
    """The crop of a uint8 image [H, W, 3] brought to the image's own size, bilinear: uint8 [H, W, 3]."""
    height, width = color.shape[:2]
    box = color[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    view = Image.fromarray(box).resize((width, height), Image.Resampling.BILINEAR)
    return np.array(view)[:, ::-1].copy() if crop.flip else np.array(view)


def index_map(crop: Crop, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where a view of `size` (height, width) comes from: for each row and each column, that of the image.

    int64 [H] and [W]. Pixel (i, j) of the view shows pixel (rows[i], columns[j]): the one under its center, as when
    the box is resized by the nearest pixel. A box no larger than the view shows each of its pixels once or more.
    """
    rows = torch.tensor(nearest_indices(crop.height, size[0])) + crop.top
    columns = torch.tensor(nearest_indices(crop.width, size[1])) + crop.left
    return rows, columns.flip(0) if crop.flip else columns


def common_pixels(
    map1: tuple[Tensor, Tensor], map2: tuple[Tensor, Tensor], count: int, generator: torch.Generator
) -> Tensor:
    """Flat pixels of two views that show one pixel of their image: int64 [n, 2], n <= `count`.

    `map1`, `map2`: from `index_map`. Of the pixels of the image that both views show, at most `count` are drawn,
    uniformly and none twice; each is then a pixel of view 1 and one of view 2, drawn uniformly among those that show
    it (a small crop shows one pixel several times). Without a common pixel n is 0.
    """
    runs = [_common_runs(map1[axis], map2[axis]) for axis in (0, 1)]
    rows, columns = len(runs[0]), len(runs[1])
    chosen = torch.randperm(rows * columns, generator=generator)[:count]
    place = chosen // max(columns, 1), chosen % max(columns, 1)
    pixels = []
    for view, width in enumerate((len(map1[1]), len(map2[1]))):
        row, column = (_one_of_run(runs[axis][place[axis], view], generator) for axis in (0, 1))
        pixels.append(row * width + column)
    return torch.stack(pixels, dim=1)


def collate_views(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch of `TwoViewSamples`.

    As `samples.collate`, but matches: int64 [M, 2], flat pixels of the whole batch (sample, row, column), and
    matches_per_image, how many each sample has.
    """
    batch = collate([{name: value for name, value in sample.items() if name != "matches"} for sample in samples])
    pixels = batch["image1"][0, 0].numel()
    batch["matches"] = torch.cat([sample["matches"] + number * pixels for number, sample in enumerate(samples)])
    batch["matches_per_image"] = [len(sample["matches"]) for sample in samples]
    return batch


def _common_runs(index1: Tensor, index2: Tensor) -> Tensor:
    """Along one axis, of each index in both maps: where its run in either begins, and how long: int64 [n, 2, 2]."""
    found = [torch.unique(index, return_counts=True) for index in (index1, index2)]
    common = found[0][0][torch.isin(found[0][0], found[1][0])]
    runs = []
    for index, (values, counts) in zip((index1, index2), found, strict=True):
        at = torch.searchsorted(values, common)
        begins = counts.cumsum(0) - counts
        if len(index) and index[0] > index[-1]:  # a flipped view: runs come in falling order
            begins = len(index) - begins - counts
        runs.append(torch.stack([begins[at], counts[at]], dim=-1))
    return torch.stack(runs, dim=1)


def _one_of_run(run: Tensor, generator: torch.Generator) -> Tensor:
    """A position in each run [n, 2] (begin, length), drawn uniformly: int64 [n]."""
    draw = torch.rand(len(run), generator=generator, dtype=torch.float64)
    return run[:, 0] + (draw * run[:, 1]).long()
