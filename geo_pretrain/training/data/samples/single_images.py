"""Samples of single images: random crops of frames, and of a folder of images beside them; colors changed twice."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder
from torchvision.transforms.v2 import functional as tvf

from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.training.data.files import files_fingerprint, read_color
from geo_pretrain.training.data.frame import Frame, Source
from geo_pretrain.training.data.mining import Pair, resize_frame
from geo_pretrain.training.data.samples.sampler import ATTEMPTS, Key, augment, sample_seed
from geo_pretrain.training.recipe import AugmentSpec, DataSpec

Mix = Literal["none", "combine", "batch"]
T = TypeVar("T")


class CropSamples(Dataset[dict[str, Any]]):
    """Two augmented crops of each image, as MoCo v2 draws them. Indexed by (epoch, position).

    Images are the first frames of the pairs, so that a frame counts as often as it is listed. With `mix` "combine" the
    `images` follow them in one list; with "batch" every sample holds a frame and an image, of which the fewer come
    again until the epoch ends.
    """

    def __init__(
        self,
        source: Source,
        pairs: list[Pair],
        spec: DataSpec,
        contract: ImageContract,
        seed: int,
        *,
        scale: tuple[float, float],
        flip_prob: float,
        resize: tuple[int, int] | None = None,
        images: Sequence[Path] = (),
        mix: Mix = "none",
    ) -> None:
        """`spec.size` is the size of a crop, `scale` the share of the image it covers; `resize` comes before it."""
        self.source, self.pairs, self.spec, self.seed = source, pairs, spec, seed
        self.scale, self.flip_prob, self.resize = scale, flip_prob, resize
        self.images, self.mix = images, mix
        self.mean = torch.tensor(contract.mean).view(3, 1, 1)
        self.std = torch.tensor(contract.std).view(3, 1, 1)

    def __len__(self) -> int:
        if self.mix == "combine":
            return len(self.pairs) + len(self.images)
        return max(len(self.pairs), len(self.images)) if self.mix == "batch" else len(self.pairs)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """One sample, by (epoch, position).

        image1, image2 [P, 3, H, W] normalized, P = 2 (frame, image) with `mix` "batch" and else 1; seed: an integer for
        later draws; skipped: (path, reason) of files that failed on the way.
        """
        epoch, index = key
        generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, index))
        skipped: list[tuple[str, str]] = []
        colors = []
        if self.mix != "combine" or index < len(self.pairs):
            colors.append(_read(self._frame, len(self.pairs), self._again(key, len(self.pairs)), generator, skipped))
        if self.mix == "batch" or not colors:
            index = self._again(key, len(self.images)) if self.mix == "batch" else index - len(self.pairs)
            colors.append(_read(self._image, len(self.images), index, generator, skipped))
        views = [[self._view(color, generator) for color in colors] for _ in range(2)]
        sample: dict[str, Any] = {f"image{k}": torch.stack(view) for k, view in enumerate(views, 1)}
        return sample | {"seed": int(torch.randint(2**62, (), generator=generator)), "skipped": skipped}

    def own_data(self) -> dict[str, Any]:
        """What is beside the frames of the source: how many `images` and their fingerprint; {} without."""
        return {"images": len(self.images), "images_fingerprint": self._fingerprint} if self.images else {}

    @cached_property
    def _fingerprint(self) -> str:
        """Names below the folder that holds them all, sizes and times."""
        root = Path(os.path.commonpath([path.parent for path in self.images]))
        return files_fingerprint(root, self.images)

    def _again(self, key: Key, count: int) -> int:
        """The index into a list of `count`; where that is the shorter one, other partners meet in each epoch."""
        epoch, index = key
        return index if count >= len(self) else (index + sample_seed(self.seed, epoch, -2)) % count

    def _frame(self, index: int) -> np.ndarray:
        frame = load_first(self.source, self.pairs[index])
        return frame.color if self.resize is None else resize_frame(frame, self.resize).color

    def _image(self, index: int) -> np.ndarray:
        return read_color(self.images[index])

    def _view(self, color: np.ndarray, generator: torch.Generator) -> Tensor:
        crop = random_resized_crop(Image.fromarray(color), self.spec.size, self.scale, generator)
        view = augment(np.asarray(crop), self.spec.augment, generator)
        if float(torch.rand((), generator=generator)) < self.flip_prob:
            view = view.flip(-1)
        return (view - self.mean) / self.std


class TwiceSamples(Dataset[dict[str, Any]]):
    """One frame with its colors changed in two ways, pixel upon pixel. Indexed by (epoch, pair): its first frame."""

    def __init__(
        self,
        source: Source,
        pairs: list[Pair],
        spec: DataSpec,
        contract: ImageContract,
        seed: int,
        *,
        blur_taps: int | None,
    ) -> None:
        """`blur_taps`: see `augment_colors`."""
        self.source, self.pairs, self.spec, self.seed, self.blur_taps = source, pairs, spec, seed, blur_taps
        self.mean = torch.tensor(contract.mean).view(3, 1, 1)
        self.std = torch.tensor(contract.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """image1, image2 [3, H, W] normalized; depth [H, W] m; seed: an integer for later draws; skipped."""
        epoch, index = key
        generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, index))
        skipped: list[tuple[str, str]] = []
        frame = _read(self._frame, len(self.pairs), index, generator, skipped)
        views = [augment_colors(frame.color, self.spec.augment, generator, self.blur_taps) for _ in range(2)]
        sample: dict[str, Any] = {f"image{k}": (view - self.mean) / self.std for k, view in enumerate(views, 1)}
        sample["depth"] = torch.from_numpy(np.ascontiguousarray(frame.depth))
        return sample | {"seed": int(torch.randint(2**62, (), generator=generator)), "skipped": skipped}

    def _frame(self, index: int) -> Frame:
        return resize_frame(load_first(self.source, self.pairs[index]), self.spec.size)


def load_first(source: Source, pair: Pair) -> Frame:
    """The first frame of a pair. Raises `BadFrame`."""
    return source.load(pair.scene, pair.frame1)


def list_images(folder: str | None) -> list[Path]:
    """The images in a folder of class folders, such as ImageNet's `train`, in a fixed order.

    Raises `RecipeError` when no folder is given, `DataError` when it is not laid out like that.
    """
    if folder is None:
        raise RecipeError(
            "'task.images' is missing, accepted is a folder of class folders with images, such as ImageNet's 'train': "
            "--set task.images=PATH. Without such images: --set task.mix=none."
        )
    path = Path(folder).expanduser()
    try:
        return [Path(file) for file, _ in ImageFolder(str(path)).samples]
    except (OSError, ValueError) as error:
        reason = "there is no such folder" if not path.is_dir() else str(error).splitlines()[0]
        kinds = ", ".join(IMG_EXTENSIONS)
        raise DataError(
            f"{path}: {reason}. Accepted is a folder of class folders, each with images ({kinds}), such as ImageNet's "
            "'train': --set task.images=PATH."
        ) from error


def random_resized_crop(
    image: Image.Image,
    size: tuple[int, int],
    scale: tuple[float, float],
    generator: torch.Generator,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """A random box of the image, `scale` of its area and of an aspect in `ratio`, resized bilinearly to `size`.

    torchvision's `RandomResizedCrop`, draw for draw, with the generator of one's own that it does not take.
    """
    top, left, height, width = _crop_box(image.height, image.width, scale, ratio, generator)
    cropped: Image.Image = tvf.resized_crop(image, top, left, height, width, list(size))
    return cropped


def augment_colors(
    color: np.ndarray, spec: AugmentSpec, generator: torch.Generator, blur_taps: int | None = None
) -> Tensor:
    """`augment`, whose blur is a Gaussian of `blur_taps` x `blur_taps` pixels with sigma drawn from `blur_radius`.

    None: Pillow's blur. The kernel is cut to the largest odd one that the image can mirror at its border.
    """
    if blur_taps is None:
        return augment(color, spec, generator)
    image = augment(color, replace(spec, blur_prob=0.0), generator)
    if float(torch.rand((), generator=generator)) < spec.blur_prob:
        low, high = spec.blur_radius
        sigma = low + (high - low) * float(torch.rand((), generator=generator))
        taps = min(blur_taps, 2 * min(image.shape[1:]) - 1)
        for kernel in ([taps, 1], [1, taps]):  # one axis after the other: the same, in a tenth of the time
            image = tvf.gaussian_blur(image, kernel, [sigma, sigma])
    return image


def _crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width); after ten boxes that do not fit the largest central one of an accepted aspect."""
    log_ratio = torch.log(torch.tensor(ratio))
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*scale, generator=generator).item()
        drawn = torch.empty(1).uniform_(float(log_ratio[0]), float(log_ratio[1]), generator=generator)
        aspect = torch.exp(drawn).item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,), generator=generator))
            return top, int(torch.randint(0, width - w + 1, (1,), generator=generator)), h, w
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _read(
    load: Callable[[int], T], count: int, index: int, generator: torch.Generator, skipped: list[tuple[str, str]]
) -> T:
    """`load(index)`, or, as often as that is a bad file, of another index drawn; failures are added to `skipped`."""
    for _ in range(ATTEMPTS):
        try:
            return load(index)
        except BadFrame as bad:
            skipped.append((bad.path, bad.reason))
            index = int(torch.randint(count, (), generator=generator))
    listed = "; ".join(f"{path}: {reason}" for path, reason in skipped[:3])
    raise DataError(f"{ATTEMPTS} images in a row cannot be read; the data seem to be gone. First: {listed}")
