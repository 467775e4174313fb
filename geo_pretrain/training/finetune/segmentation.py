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
        self.stride = recipe.loss.label_stride
        self.module, self.transferred = build_segmenter(
            recipe.network, start, len(classes), seed=recipe.seed, coarse=self.stride > 1
        )
        self.first = 0 if recipe.network.kind == "unet" else 1  # class of the first output
        self.exact = recipe.match_released_code
        self._normalize = contract.transforms(resize=False)

    @classmethod
    def check(cls, recipe: FinetuneRecipe) -> None:
        """Raise `RecipeError` for options that the network does not take."""
        check_options(recipe.network)

    def sample(self, image: LabelledImage, generator: torch.Generator) -> dict[str, Tensor]:
        """Augment by resize, rotation, crop, flip and blur: image [3, H, W] normalized and labels int64 [H, W]."""
        augment = self.recipe.data.augment
        pixels, labels = self._sized(image)
        if augment.short_sides is not None:
            side = augment.short_sides[int(torch.randint(len(augment.short_sides), (), generator=generator))]
            size = scaled_size(labels.size, side, augment.longer)
            pixels, labels = pixels.resize(size, self._resampling()), labels.resize(size, Image.Resampling.NEAREST)
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
        """Images [B, 3, H, W] and labels [B, H, W]; with `short_sides` those of other sizes are filled up with 0."""
        shapes = {tuple(sample["labels"].shape) for sample in samples}
        if self.recipe.data.augment.short_sides is not None:
            height, width = (-(-max(sizes) // self.stride) * self.stride for sizes in zip(*shapes, strict=True))
            samples = [{key: filled(value, height, width) for key, value in sample.items()} for sample in samples]
        elif len(shapes) > 1:
            raise DataError(f"Images of sizes {sorted(shapes)} in one batch; set data.size or data.augment.crop.")
        return {key: torch.stack([sample[key] for sample in samples]) for key in ("image", "labels")}

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        logits, aux = self.module(batch["image"])
        labels = reduced(batch["labels"], self.stride)
        parts = {"segmentation": segmentation_loss(logits, labels, self.first)}
        if aux is not None:
            parts["aux"] = self.recipe.network.aux * segmentation_loss(aux, labels, self.first)
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

    def class_logits(self, images: Tensor) -> Tensor:
        """Normalized images [B, 3, H, W] -> logits of the classes 1..C at the images' size, [B, C, H, W]."""
        logits, _ = self.module(images)
        return self._at_size(logits, images.shape[-2:])[:, 1 - self.first :]

    @torch.no_grad()
    def predict(self, items: Sequence[np.ndarray]) -> list[PixelLabels]:
        """Predict the class of each pixel of images uint8 [H, W, 3], at their own size; class 0 is never predicted.

        Images that are equally large as the network sees them go through it together.
        """
        self.module.eval()
        found = []
        for sizes, group in groupby(map(Image.fromarray, items), key=self._sizes):
            images = list(group)
            for chances in self._chances(images, sizes, [(image.height, image.width) for image in images]):
                scores, labels = chances.max(0)
                found.append(PixelLabels((labels + 1).cpu().numpy(), scores.cpu().numpy()))
        return found

    def _sizes(self, image: Image.Image) -> tuple[tuple[int, int], ...]:
        """Width and height in which the network sees an image: one, or those of `evaluate.short_sides`."""
        recipe = self.recipe
        if recipe.evaluate.short_sides is None:
            return (image.size if recipe.data.size is None else recipe.data.size[::-1],)
        longest, multiple = recipe.data.augment.longer, self.module.multiple
        sides = (scaled_size(image.size, side, longest) for side in recipe.evaluate.short_sides)
        return tuple((-(-width // multiple) * multiple, -(-height // multiple) * multiple) for width, height in sides)

    def _chances(
        self, images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]], shapes: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Probabilities of classes 1.. of each image, [C, H, W] at its shape: the mean over `sizes`, seen together."""
        device = next(self.module.parameters()).device
        total: list[Tensor | float] = [0.0] * len(images)
        for size in sizes:
            seen = [image if size == image.size else image.resize(size, self._resampling()) for image in images]
            logits, _ = self.module(torch.stack([self._normalize(_tensor(pixels)) for pixels in seen]).to(device))
            for k, shape in enumerate(shapes):
                total[k] = total[k] + self._at_size(logits[k : k + 1], shape)[0, 1 - self.first :].softmax(0)
        return [torch.as_tensor(one) / len(sizes) for one in total]

    def _at_size(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Logits upsampled to a size: coarse ones as torchvision's own networks do it, others as Pri3D does."""
        return upsample(logits, size, align_corners=self.stride == 1)

    @torch.no_grad()
    def predictions(self, source: LabelledSource, ids: Sequence[str]) -> Iterator[tuple[LabelledImage, Tensor, Tensor]]:
        """Yield each image with its labels and predicted classes, int64 [H, W] on the CPU."""
        self.module.eval()
        device = next(self.module.parameters()).device
        lowest = 0 if self.exact and self.first == 0 else 1  # class that may be predicted
        if self.recipe.evaluate.short_sides is not None:
            for image in map(source.load, ids):
                truth = self._truth(image)
                pixels = Image.fromarray(image.image)
                (chances,) = self._chances([pixels], self._sizes(pixels), [truth.shape])
                yield image, truth, (chances.argmax(0) + 1).cpu()
            return
        loaded = ((image, self._normalize(_tensor(self._sized(image)[0]))) for image in map(source.load, ids))
        for _, same_size in groupby(loaded, key=lambda one: one[1].shape):
            while batch := list(islice(same_size, self.recipe.evaluate.batch)):
                logits, _ = self.module(torch.stack([tensor for _, tensor in batch]).to(device))
                for (image, _), output in zip(batch, logits, strict=True):
                    truth = self._truth(image)
                    full = self._at_size(output[None], truth.shape)[0]
                    yield image, truth, (full[lowest - self.first :].argmax(0) + lowest).cpu()

    def _truth(self, image: LabelledImage) -> Tensor:
        labels = self._labels(image)
        size = self.truth_size()
        if size is not None:
            labels = labels.resize(size[::-1], Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(labels)).long()

    def _sized(self, image: LabelledImage) -> tuple[Image.Image, Image.Image]:
        """Resize image and labels to `data.size`."""
        pixels, labels = self._resized(Image.fromarray(image.image)), self._labels(image)
        size = self.recipe.data.size
        if size is not None:
            labels = labels.resize(size[::-1], Image.Resampling.NEAREST)
        return pixels, labels

    def _resized(self, pixels: Image.Image) -> Image.Image:
        size = self.recipe.data.size
        return pixels if size is None else pixels.resize(size[::-1], self._resampling())

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


def scaled_size(size: tuple[int, int], shorter: int, longer: int) -> tuple[int, int]:
    """The size (width, height) of an image whose shorter side gets the length `shorter`, its longer at most `longer`.

    Rounded down, as the released code of ADE20K's authors does.
    """
    scale = min(shorter / min(size), longer / max(size))
    return max(int(size[0] * scale), 1), max(int(size[1] * scale), 1)


def filled(values: Tensor, height: int, width: int) -> Tensor:
    """Fill up [..., h, w] with 0 at the right and the bottom: [..., `height`, `width`]."""
    return F.pad(values, (0, width - values.shape[-1], 0, height - values.shape[-2]))


def reduced(labels: Tensor, stride: int) -> Tensor:
    """Reduce labels [B, H, W] by whole cells of `stride` pixels to the label beside each one's center, as Pillow does.

    Sides are filled up with 0 (ignore) to whole cells first.
    """
    if stride == 1:
        return labels
    height, width = (-(-side // stride) * stride for side in labels.shape[-2:])
    return filled(labels, height, width)[..., stride // 2 :: stride, stride // 2 :: stride]


def upsample(logits: Tensor, size: Sequence[int], *, align_corners: bool = True) -> Tensor:
    """Upsample logits [B, K, h, w] to the size [H, W]."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)


def _tensor(pixels: Image.Image) -> Tensor:
    """uint8 [3, H, W] of an RGB image."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def _published(exact: bool) -> str:
    return " (as published)" if exact else " (mended)"


def _by(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"
