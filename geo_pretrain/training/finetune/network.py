"""A fine-tuned network as `load_finetuned` gives it: a module that knows its classes, its input and how to predict."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor, nn

from geo_pretrain.contract import ImageContract, ImageTransform, VoxelContract, VoxelTransform, image_pixels
from geo_pretrain.errors import DataError, InputError
from geo_pretrain.inputs import check_images, described, look_at, to_points
from geo_pretrain.training.data.files import points_fault, read_photo
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.files import CLOUD_SUFFIXES, array_columns, cloud_of_columns
from geo_pretrain.training.data.labelled.own_images import IMAGE_SUFFIXES
from geo_pretrain.training.finetune.as_checkpoint import image_contract
from geo_pretrain.training.finetune.cloud_files import CloudFile, cloud_fields
from geo_pretrain.training.finetune.clouds import CloudTask
from geo_pretrain.training.finetune.segmentation import Segmentation
from geo_pretrain.training.finetune.task import FinetuneTask
from geo_pretrain.training.finetune_recipe import FinetuneRecipe

if TYPE_CHECKING:
    from geo_pretrain.training.finetune.detection import Detection

CLOUDS = (
    "the path of a PLY, npy, npz or LAS file, a LabelledCloud, float [N, 3] in meters, z up, [N, 6] with red, green "
    "and blue behind them, or both by name: {'points': points, 'colors': colors}"
)
POINTS = Path("points")  # of arrays, in messages


def _detection(task: FinetuneTask) -> Detection | None:
    """The task where it is one of detection, whose module imports torchvision: point networks do without."""
    module = sys.modules.get("geo_pretrain.training.finetune.detection")
    return task if module is not None and isinstance(task, module.Detection) else None


class FinetunedNetwork(nn.Module):
    """A fine-tuned network in evaluation mode.

    `module` is the network itself, `task` what knows how it is trained and measured (`FinetuneTask`), `stated` what its
    results.json says: scores, data and their license, the start.
    """

    def __init__(self, task: FinetuneTask, stated: Mapping[str, Any], folder: Path) -> None:
        super().__init__()
        self.task, self.stated, self.folder = task, stated, folder
        if isinstance(task, CloudTask):
            task.scaled_by = "points * {}"
        self.module = task.module
        self.training = self.module.training
        self.classes = task.classes  # names of the labels 1..C
        self.name = str(stated["recipe"])

    @property
    def recipe(self) -> FinetuneRecipe:
        """The recipe that it was trained by."""
        return self.task.recipe

    @property
    def contract(self) -> ImageContract | VoxelContract:
        """What the network takes, in words and numbers; of a detector, which normalizes by itself, images in [0, 1]."""
        if isinstance(self.task.contract, VoxelContract):
            return self.task.contract
        return self._host_transform.contract if self._is_detector else image_contract(self.task)

    @property
    def transforms(self) -> ImageTransform | VoxelTransform:
        """Turns an image, or points, into the network's input; a detector takes a list of these, of any sizes."""
        return self._host_transform if self._is_detector else self.contract.transforms()

    @property
    def license(self) -> str:
        """The license of its training data, SPDX or LicenseRef; that of the start weights may add to it."""
        return str(self.stated["data"].get("licence", "LicenseRef-data-owner"))

    def __repr__(self) -> str:
        kind, count = self.recipe.network.kind, len(self.classes)
        takes = str(self.contract).replace("pre-trained at", "trained at")
        if self._is_detector:
            takes = "a list of images [3, H, W], RGB in [0, 1], of any size"
        return f"FinetunedNetwork({self.name}: {self.recipe.task}, {kind}, {count} classes; takes {takes})"

    def forward(self, *inputs: Any) -> Any:
        """Of segmentation: normalized images [B, 3, H, W] -> logits of the classes 1..C, [B, C, H, W]. Else `module`'s.

        torchvision's detectors take a list of images [3, H, W], RGB in [0, 1], and normalize and resize them; 3D
        networks take a `SparseTensor`. Raises `InputError` for what is no such input.
        """
        first: Any = inputs[0] if inputs else None
        self._check_channels(first)
        if isinstance(self.task, Segmentation):
            check_images(first, len(self.contract.channels), next(self.parameters()), 1)
            look_at(self, first)
            return self.task.class_logits(*inputs)
        if (detection := _detection(self.task)) is not None and detection.setup.msra:
            inputs = [image.flip(0) for image in inputs[0]], *inputs[1:]  # the released network takes BGR
        return self.module(*inputs)

    def predict(self, items: Any) -> Any:
        """Predict on an image or a cloud, or on a list of them: a result each, at its own size and in its own order.

        `PixelLabels` (labels 1..C and their probabilities), `Detections`, or of clouds `PointLabels` and others. Raises
        ValueError for what is no image or cloud, `BadFrame` for a file that is none.
        """
        several = isinstance(items, list | tuple)
        if several and not items:
            return []
        given = [self._item(item) for item in (items if several else [items])]
        found = self.task.predict(given)
        return found if several else found[0]

    def evaluate(self, source: Any, ids: Sequence[str], **options: Any) -> Any:
        """Measure on labelled data, see `FinetuneTask.evaluate`."""
        return self.task.evaluate(source, ids, **options)

    def __getattr__(self, name: str) -> Any:
        """Parts of the module by their names, and what is the task's own, such as `predictions`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            task = self.__dict__.get("task")
            if task is None or name.startswith("_") or not hasattr(task, name):
                raise
            return getattr(task, name)

    @property
    def _is_detector(self) -> bool:
        return _detection(self.task) is not None

    @property
    def _host_transform(self) -> ImageTransform:
        """The transform of torchvision's detectors: to floats in [0, 1], at the image's size."""
        return cast(ImageTransform, self.module.transforms)

    def _check_channels(self, given: Any) -> None:
        """Raise `InputError` for another number of channels than that of training, which cannot be changed any more."""
        channels = self.task.contract.channels
        one = given[0] if isinstance(given, list | tuple) and given else given
        if isinstance(one, Tensor):
            shape = tuple(one.shape)
            count = shape[-3] if len(shape) in (3, 4) else None
        else:
            feats = getattr(one, "feats", None)
            shape = () if feats is None else tuple(feats.shape)
            count = shape[-1] if shape else None
        if count in (None, len(channels)):
            return
        fix = f"Fine-tune again for others: load_backbone(folder, in_chans={count}) adapts its backbone."
        if len(shape) in (3, 4) and shape[-1] == len(channels):
            fix = "network.transforms(image) makes an image [H, W, C] the input."
        raise InputError(
            f"Got a tensor of shape {list(shape)}: {count} channels. This network was fine-tuned on {len(channels)} "
            f"({', '.join(channels)}); accepted are these alone. {fix}"
        )

    def _item(self, item: Any) -> Any:
        if isinstance(item, str | os.PathLike) and Path(item).is_dir():
            raise self._folder(Path(item))
        if isinstance(self.task.contract, VoxelContract):
            return self._cloud(item)
        return read_photo(Path(item)) if isinstance(item, str | os.PathLike) else image_pixels(item, "predict")

    def _folder(self, folder: Path) -> InputError:
        """What to say of a folder in place of a file."""
        clouds = isinstance(self.task.contract, VoxelContract)
        accepted = CLOUDS if clouds else "the path of an image, a PIL image, uint8 [H, W, 3]"
        suffixes = CLOUD_SUFFIXES if clouds else IMAGE_SUFFIXES
        there = (path.suffix for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes)
        files = f"pathlib.Path({str(folder)!r}).glob('*{next(there, suffixes[0])}')"
        return InputError(
            f"Got the folder {str(folder)!r}; accepted: {accepted}; or a list of them: predict(sorted({files})). Whole "
            f"folders: geo-pretrain predict {self.folder} {folder} -o DIR."
        )

    def _cloud(self, item: Any) -> LabelledCloud:
        if isinstance(item, LabelledCloud):
            return item
        if isinstance(item, str | os.PathLike):
            return CloudFile(Path(item), cloud_fields(self.recipe, None)).load()
        if isinstance(item, Mapping):
            return cloud_of_columns(POINTS, {str(name): np.asarray(_array(value)) for name, value in item.items()})
        if not isinstance(item, Tensor | np.ndarray):
            raise InputError(f"Got {described(item)}; accepted: {CLOUDS}.")
        array = _array(item)
        colored = array.ndim == 2 and array.shape[1] == 6
        points = to_points(array[:, :3] if colored else item, "predict").detach().cpu().numpy()
        if (fault := points_fault(points)) is not None:
            raise DataError(f"Points to predict on: {fault}.")
        columns = np.column_stack([points, array[:, 3:]]) if colored else points
        return cloud_of_columns(POINTS, array_columns(POINTS, columns))


def _array(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value
