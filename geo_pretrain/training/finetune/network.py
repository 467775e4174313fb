"""A fine-tuned network as `load_finetuned` gives it: a module that knows its classes, its input and how to predict."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from geo_pretrain.contract import ImageContract, ImageTransform, VoxelContract, VoxelTransform, image_pixels
from geo_pretrain.errors import DataError
from geo_pretrain.training.data.files import points_fault, read_photo
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.finetune.as_checkpoint import image_contract
from geo_pretrain.training.finetune.cloud_files import CloudFile, cloud_fields
from geo_pretrain.training.finetune.clouds import CloudTask
from geo_pretrain.training.finetune.segmentation import Segmentation
from geo_pretrain.training.finetune.task import FinetuneTask
from geo_pretrain.training.finetune_recipe import FinetuneRecipe

CLOUDS = "the path of a PLY, npy, npz or LAS file, a LabelledCloud, or float [N, 3] in meters, z up"


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
        self.classes = task.classes  # names of the labels 1..C
        self.name = str(stated["recipe"])

    @property
    def recipe(self) -> FinetuneRecipe:
        """The recipe that it was trained by."""
        return self.task.recipe

    @property
    def contract(self) -> ImageContract | VoxelContract:
        """What the network takes, in words and numbers."""
        return self.task.contract if isinstance(self.task.contract, VoxelContract) else image_contract(self.task)

    @property
    def transforms(self) -> ImageTransform | VoxelTransform:
        """Turns an image, or points, into the network's input."""
        return self.contract.transforms()

    @property
    def license(self) -> str:
        """The license of its training data, SPDX or LicenseRef; that of the start weights may add to it."""
        return str(self.stated["data"].get("licence", "LicenseRef-data-owner"))

    def __repr__(self) -> str:
        kind, count = self.recipe.network.kind, len(self.classes)
        return f"FinetunedNetwork({self.name}: {self.recipe.task}, {kind}, {count} classes; takes {self.contract})"

    def forward(self, *inputs: Any) -> Any:
        """Of segmentation: normalized images [B, 3, H, W] -> logits of the classes 1..C, [B, C, H, W]. Else `module`'s.

        torchvision's detectors take a list of images [3, H, W] in [0, 1], 3D networks a `SparseTensor`.
        """
        if isinstance(self.task, Segmentation):
            return self.task.class_logits(*inputs)
        return self.module(*inputs)

    def predict(self, items: Any) -> Any:
        """Predict on an image or a cloud, or on a list of them: a result each, at its own size and in its own order.

        `PixelLabels` (labels 1..C and their probabilities), `Detections`, or of clouds `PointLabels` and others. Raises
        ValueError for what is no image or cloud, `BadFrame` for a file that is none.
        """
        several = isinstance(items, list | tuple)
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

    def _item(self, item: Any) -> Any:
        if isinstance(self.task.contract, VoxelContract):
            return self._cloud(item)
        return read_photo(Path(item)) if isinstance(item, str | os.PathLike) else image_pixels(item)

    def _cloud(self, item: Any) -> LabelledCloud:
        if isinstance(item, LabelledCloud):
            return item
        if isinstance(item, str | os.PathLike):
            return CloudFile(Path(item), cloud_fields(self.recipe, None)).load()
        points = item.detach().cpu().numpy() if isinstance(item, Tensor) else item
        if not isinstance(points, np.ndarray) or points.ndim != 2 or points.shape[1] != 3:
            shape = f" of shape {tuple(points.shape)}" if hasattr(points, "shape") else ""
            raise ValueError(f"Got {type(item).__name__}{shape}; accepted: {CLOUDS}.")
        if (fault := points_fault(points)) is not None:
            raise DataError(f"Points to predict on: {fault}.")
        return LabelledCloud("points", points.astype(np.float32), None, None)
