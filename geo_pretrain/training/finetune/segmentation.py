"""Semantic segmentation as a task of the fine-tuning loop, measured by mIoU from one confusion matrix.

Labels are 0 (ignore) and 1..C. Pri3D's U-Net has an output for class 0, too, which no label trains and which is never
predicted; other networks have C outputs. Logits are brought to the size of the labels (bilinear, align_corners=True).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from geo_pretrain.adapters.common import encoder_of
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.labelled.image import LabelledImage, LabelledSource
from geo_pretrain.training.data.samples.augment import uniform
from geo_pretrain.training.evaluation.metrics import confusion_matrix
from geo_pretrain.training.evaluation.predictions import PixelLabels
from geo_pretrain.training.finetune.task import SegmentationTask
from geo_pretrain.training.finetune_recipe import FinetuneRecipe
from geo_pretrain.training.networks import PretrainedInit, Segmenter, build_segmenter, check_options
from geo_pretrain.training.visualize.results import draw_predictions

CROP_CENTERS = (240, 320)  # the released KITTI loader draws the center of its crop below these, whatever the image


class Segmentation(SegmentationTask):
    """The task "segmentation" of a fine-tuning run; see `FinetuneTask`."""

    module: Segmenter
    contract: ImageContract

    def __init__(
        self, recipe: FinetuneRecipe, start: PretrainedInit, classes: Sequence[str], contract: ImageContract
    ) -> None:
        self.recipe, self.classes, self.contract = recipe, tuple(classes), contract
        self.module, self.transferred = build_segmenter(recipe.network, start, len(classes), seed=recipe.seed)
        self.first = 0 if recipe.network.kind == "unet" else 1  # class of the first output
        self.exact = recipe.match_released_code
        self._normalize = contract.transforms(resize=False)

    @classmethod
    def check(cls, recipe: FinetuneRecipe) -> None:
        """Raise `RecipeError` for options that the network does not take."""
        check_options(recipe.network)

    def sample(self, image: LabelledImage, generator: torch.Generator) -> dict[str, Tensor]:
        """Augment by resize, rotation, crop, flip and blur: image [3, H, W] normalized and labels int64 [H, W]."""
        pixels, labels = self._sized(image)
        augment = self.recipe.data.augment
        if augment.rotate:
            angle = uniform(-augment.rotate, augment.rotate, generator)
            pixels, labels = pixels.rotate(angle, self._resampling()), labels.rotate(angle, Image.Resampling.NEAREST)
        if augment.crop is not None:
            box = crop_box(labels.size[::-1], augment.crop, generator, image.id, self.exact)
            pixels, labels = pixels.crop(box), labels.crop(box)
        if uniform(0, 1, generator) < augment.flip:
            mirror = Image.Transpose.FLIP_LEFT_RIGHT
            pixels, labels = pixels.transpose(mirror), labels.transpose(mirror)
        tensor = _tensor(pixels)
        if uniform(0, 1, generator) < augment.blur:
            from torchvision.transforms.v2 import functional as tvf

            tensor = tvf.gaussian_blur(tensor, [augment.blur_kernel] * 2)
        return {"image": self._normalize(tensor), "labels": torch.from_numpy(np.array(labels)).long()}

    def collate(self, samples: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Images [B, 3, H, W] and labels [B, H, W]."""
        shapes = {tuple(sample["labels"].shape) for sample in samples}
        if len(shapes) > 1:
            raise DataError(f"Images of sizes {sorted(shapes)} in one batch; set data.size or data.augment.crop.")
        return {key: torch.stack([sample[key] for sample in samples]) for key in ("image", "labels")}

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        logits, aux = self.module(batch["image"])
        parts = {"segmentation": segmentation_loss(logits, batch["labels"], self.first)}
        if aux is not None:
            parts["aux"] = self.recipe.network.aux * segmentation_loss(aux, batch["labels"], self.first)
        return parts

    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        return encoder_of(self.module.network).parameters()

    def backbone(self) -> nn.Module:
        """The encoder, or the whole U-Net if its decoder is transferred too."""
        return self.module.network if self.transferred == "all" else encoder_of(self.module.network)

    def confusion(self, source: LabelledSource, ids: Sequence[str]) -> np.ndarray:
        """Count labelled pixels by true and predicted class."""
        outputs = 1 + len(self.classes)
        found = [confusion_matrix(truth, guess, outputs) for _, truth, guess in self.predictions(source, ids)]
        return np.sum(found, axis=0)

    def draw(self, source: LabelledSource, ids: Sequence[str], path: Path) -> None:
        """Draw one row per image: image, ground truth and prediction, all resized to the first image's size."""
        rows = [(i.image, truth.numpy(), [guess.numpy()]) for i, truth, guess in self.predictions(source, ids)]
        draw_predictions(rows, [self.recipe.network.kind], self.classes, path)

    def protocol_deviations(self) -> dict[str, str]:
        exact, data, size = self.exact, self.recipe.data, self.truth_size()
        found = {
            "image resize": f"{self.recipe.resize()}{_published(self.recipe.resize() == 'nearest')}",
            "size IoU is measured at": (
                ("the full size of the labels" if size is None else _by(size)) + _published(exact)
            ),
            "absent classes": ("count as 0" if exact else "are left out of the mean") + _published(exact),
            "pixels predicted as unlabeled": (
                "are left out" if exact and self.first == 0 else "do not exist: class 0 is never predicted"
            )
            + _published(exact or self.first == 1),
        }
        if data.augment.crop is not None:
            found["center of crops"] = (
                f"drawn in [0, {CROP_CENTERS[0]}) x [0, {CROP_CENTERS[1]})" if exact else "uniform over the image"
            ) + _published(exact)
        return found

    def truth_size(self) -> tuple[int, int] | None:
        """The size to which labels are resized before the comparison; None: no resizing."""
        return (self.recipe.evaluate.size or self.recipe.data.size) if self.exact else None

    @torch.no_grad()
    def predict(self, items: Sequence[np.ndarray]) -> list[PixelLabels]:
        """Predict the class of each pixel of images uint8 [H, W, 3], at their own size; class 0 is never predicted."""
        self.module.eval()
        device, found = next(self.module.parameters()).device, []
        for image in items:
            pixels = Image.fromarray(image)
            if self.recipe.data.size is not None:
                pixels = pixels.resize(self.recipe.data.size[::-1], self._resampling())
            logits, _ = self.module(self._normalize(_tensor(pixels))[None].to(device))
            chances = upsample(logits, image.shape[:2])[0, 1 - self.first :].softmax(0)
            scores, labels = chances.max(0)
            found.append(PixelLabels((labels + 1).cpu().numpy(), scores.cpu().numpy()))
        return found

    @torch.no_grad()
    def predictions(self, source: LabelledSource, ids: Sequence[str]) -> Iterator[tuple[LabelledImage, Tensor, Tensor]]:
        """Yield each image with its labels and predicted classes, int64 [H, W] on the CPU."""
        self.module.eval()
        device = next(self.module.parameters()).device
        lowest = 0 if self.exact and self.first == 0 else 1  # class that may be predicted
        loaded = ((image, self._normalize(_tensor(self._sized(image)[0]))) for image in map(source.load, ids))
        for _, same_size in groupby(loaded, key=lambda one: one[1].shape):
            while batch := list(islice(same_size, self.recipe.evaluate.batch)):
                logits, _ = self.module(torch.stack([tensor for _, tensor in batch]).to(device))
                for (image, _), output in zip(batch, logits, strict=True):
                    truth = self._truth(image)
                    full = upsample(output[None], truth.shape)[0]
                    yield image, truth, (full[lowest - self.first :].argmax(0) + lowest).cpu()

    def _truth(self, image: LabelledImage) -> Tensor:
        labels = self._labels(image)
        size = self.truth_size()
        if size is not None:
            labels = labels.resize(size[::-1], Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(labels)).long()

    def _sized(self, image: LabelledImage) -> tuple[Image.Image, Image.Image]:
        """Resize image and labels to `data.size`."""
        pixels, labels = Image.fromarray(image.image), self._labels(image)
        size = self.recipe.data.size
        if size is not None:
            pixels = pixels.resize(size[::-1], self._resampling())
            labels = labels.resize(size[::-1], Image.Resampling.NEAREST)
        return pixels, labels

    def _labels(self, image: LabelledImage) -> Image.Image:
        labels = image.semantic
        if labels is None:
            raise BadFrame(image.id, "image has no labels of pixels")
        if labels.shape != image.image.shape[:2]:
            raise BadFrame(image.id, f"labels are {_by(labels.shape)}, the image is {_by(image.image.shape[:2])}")
        if labels.max(initial=0) > len(self.classes) or labels.min(initial=0) < 0:
            worst = int(labels.max() if labels.max() > len(self.classes) else labels.min())
            raise BadFrame(image.id, f"label {worst}, accepted are 0 (ignore) to {len(self.classes)}")
        return Image.fromarray(labels.astype(np.uint8))

    def _resampling(self) -> Image.Resampling:
        return {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}[self.recipe.resize()]


def segmentation_loss(logits: Tensor, labels: Tensor, first: int) -> Tensor:
    """Negative log-likelihood of logits [B, K, h, w], upsampled to the size of labels [B, H, W].

    `first` is the class of output 0. The released loss has weight 0 for class 0 and 1 / (1 + 0.001) for all others; its
    mean is over the weights, so it is the plain mean over labelled pixels. Without any of them the loss is 0.
    """
    if not bool((labels > 0).any()):
        return logits.sum() * 0
    return F.cross_entropy(upsample(logits.float(), labels.shape[-2:]), labels - first, ignore_index=-first)


def crop_box(
    shape: Sequence[int], crop: tuple[int, int], generator: torch.Generator, id: str, match_released_code: bool
) -> tuple[int, int, int, int]:
    """Draw left, top, right and bottom of a crop, uniformly over all positions in the image.

    `match_released_code`: the center is drawn in [0, 240) x [0, 320) whatever the size of the image, and moved inside.
    """
    (height, width), (rows, columns) = shape, crop
    if height < rows or width < columns:
        raise BadFrame(id, f"image is {_by((height, width))}, smaller than the crop of {_by(crop)} (data.augment.crop)")

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    if match_released_code:
        top = min(max(draw(CROP_CENTERS[0]) - rows // 2, 0), height - rows)
        left = min(max(draw(CROP_CENTERS[1]) - columns // 2, 0), width - columns)
    else:
        top, left = draw(height - rows + 1), draw(width - columns + 1)
    return left, top, left + columns, top + rows


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Upsample logits [B, K, h, w] to the size [H, W]."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)


def _tensor(pixels: Image.Image) -> Tensor:
    """uint8 [3, H, W] of an RGB image."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def _published(exact: bool) -> str:
    return " (as published)" if exact else " (mended)"


def _by(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"
