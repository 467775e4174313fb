"""Samples of single images: two random crops of frames and of other images, or two color versions of a frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from geo_pretrain.errors import DataError, RecipeError
from geo_pretrain.files import expanded
from geo_pretrain.training.data.files import files_fingerprint, read_color
from geo_pretrain.training.data.frame import Frame, Pair, Source, resize_frame
from geo_pretrain.training.data.samples.augment import augment_colors, crop_resize, random_box, uniform
from geo_pretrain.training.data.samples.crops import refuse_pair_settings
from geo_pretrain.training.data.samples.sampler import ImageSamples, Key, Skipped, read_or_replace, sample_seed

Mix = Literal["none", "combine", "batch"]
ASPECTS = (3 / 4, 4 / 3)  # of a crop, as torchvision's `RandomResizedCrop`


@dataclass(eq=False, repr=False)
class CropSamples(ImageSamples):
    """Two augmented crops of each image, as MoCo v2 draws them.

    image1, image2 [P, 3, H, W] normalized, P = 2 (frame, image) with `mix` "batch" and else 1.

    Images are the first frames of the pairs, each as often as it is listed. With `mix` "combine" the `images` follow
    them in one list; with "batch" every sample holds a frame and an image, and the shorter list is repeated until
    the epoch ends.

    `spec.size` is the size of a crop, `scale` the share of the image it covers; `resize` is done first.
    """

    _: KW_ONLY
    scale: tuple[float, float]
    flip_prob: float
    resize: tuple[int, int] | None = None
    images: Sequence[Path] = ()
    mix: Mix = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_pair_settings(self.spec, ("crop", "draws_per_scene"), "samples of single images")

    def __len__(self) -> int:
        if self.mix == "combine":
            return len(self.pairs) + len(self.images)
        return max(len(self.pairs), len(self.images)) if self.mix == "batch" else len(self.pairs)

    def _draw(self, key: Key, generator: torch.Generator, skipped: Skipped) -> dict[str, Any]:
        index = key[1]
        colors = []
        if self.mix != "combine" or index < len(self.pairs):
            number, count = self._repeated(key, len(self.pairs)), len(self.pairs)
            colors.append(read_or_replace(self._frame, count, number, generator, skipped, what="images")[1])
        if self.mix == "batch" or not colors:
            count = len(self.images)
            number = self._repeated(key, count) if self.mix == "batch" else index - len(self.pairs)
            colors.append(read_or_replace(self._image, count, number, generator, skipped, what="images")[1])
        views = [[self._view(color, generator) for color in colors] for _ in range(2)]
        return {f"image{k}": torch.stack(view) for k, view in enumerate(views, 1)}

    def own_data(self) -> dict[str, Any]:
        """Number and fingerprint of the extra `images`; {} if there are none."""
        return {"images": len(self.images), "images_fingerprint": self._fingerprint} if self.images else {}

    @cached_property
    def _fingerprint(self) -> str:
        """A digest of names (below the folder that holds them all), sizes and times."""
        root = Path(os.path.commonpath([path.parent for path in self.images]))
        return files_fingerprint(root, self.images)

    def _repeated(self, key: Key, count: int) -> int:
        """The index into a list of `count`; the shorter list is repeated, shifted so that partners differ by epoch."""
        epoch, index = key
        return index if count >= len(self) else (index + sample_seed(self.seed, epoch, -2)) % count

    def _frame(self, index: int) -> np.ndarray:
        frame = _first_frame(self.source, self.pairs[index])
        return frame.color if self.resize is None else resize_frame(frame, self.resize).color

    def _image(self, index: int) -> np.ndarray:
        return read_color(self.images[index])

    def _view(self, color: np.ndarray, generator: torch.Generator) -> Tensor:
        box = random_box(color.shape[:2], self.scale, ASPECTS, generator)
        view = augment_colors(crop_resize(color, box, self.spec.size), self.spec.augment, generator)
        if uniform(0, 1, generator) < self.flip_prob:
            view = view.flip(-1)
        return self.normalize(view)


@dataclass(eq=False, repr=False)
class TwoColorViews(ImageSamples):
    """The first frame of each pair with its colors augmented twice: image1, 2 [3, H, W] normalized; depth [H, W] m."""

    _: KW_ONLY
    blur_taps: int | None  # see `augment_colors`

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_pair_settings(self.spec, ("crop", "draws_per_scene"), "samples of single images")

    def _draw(self, key: Key, generator: torch.Generator, skipped: Skipped) -> dict[str, Any]:
        _, frame = read_or_replace(self._frame, len(self.pairs), key[1], generator, skipped, what="images")
        views = [augment_colors(frame.color, self.spec.augment, generator, self.blur_taps) for _ in range(2)]
        sample: dict[str, Any] = {f"image{k}": self.normalize(view) for k, view in enumerate(views, 1)}
        sample["depth"] = torch.from_numpy(np.ascontiguousarray(frame.depth))
        return sample

    def _frame(self, index: int) -> Frame:
        return resize_frame(_first_frame(self.source, self.pairs[index]), self.spec.size)


def _first_frame(source: Source, pair: Pair) -> Frame:
    return source.load(pair.scene, pair.frame1)


def list_images(folder: str | None) -> list[Path]:
    """List the images in a folder of class folders, such as ImageNet's `train`, in a fixed order.

    Raises `RecipeError` when no folder is given, `DataError` when it is not laid out like that.
    """
    if folder is None:
        raise RecipeError(
            "'task.images' is missing, accepted is a folder of class folders with images, such as ImageNet's 'train': "
            "--set task.images=PATH. Without such images: --set task.mix=none."
        )
    from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

    path = expanded(folder)
    try:
        return [Path(file) for file, _ in ImageFolder(str(path)).samples]
    except (OSError, ValueError) as error:
        reason = "there is no such folder" if not path.is_dir() else str(error).splitlines()[0]
        kinds = ", ".join(IMG_EXTENSIONS)
        raise DataError(
            f"{path}: {reason}. Accepted is a folder of class folders, each with images ({kinds}), such as ImageNet's "
            "'train': --set task.images=PATH."
        ) from error
