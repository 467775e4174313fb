"""Files of points to predict on: read with the run's own fields, and the results brought back into the file's frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.training.config import parse
from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D, LabelledCloud
from geo_pretrain.training.data.labelled.clouds.files import POINTS, CloudFields, file_columns, read_cloud
from geo_pretrain.training.evaluation.predictions import Detections3D
from geo_pretrain.training.finetune.written import Item, file_stem
from geo_pretrain.training.finetune_recipe import FinetuneRecipe

OWN_CLOUDS = "clouds"  # the labelled data set of one's own files
ARRAYS = {"points": ("x", "y", "z"), "colors": ("red", "green", "blue")}
COLOR_ARRAYS = ("colors", "color", "rgb")
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class CloudFile:
    """One file of points."""

    path: Path
    fields: CloudFields

    def item(self) -> Item:
        """The file as something to predict on."""
        return Item(file_stem(self.path.stem), self.load, self.columns, self.back)

    def load(self) -> LabelledCloud:
        """Read the points, without labels. Raises `BadFrame`."""
        return read_cloud(self.path, self.fields, need=())

    def columns(self, cloud: LabelledCloud) -> Columns:
        """All columns of the file as they are, each [N]; arrays [N, K] are taken apart."""
        flat: Columns = {}
        for name, column in file_columns(self.path, self.fields).items():
            if column.ndim == 1 and column.dtype.kind in "biuf":
                flat[name] = column
            elif column.ndim == 2 and column.dtype.kind in "biuf":
                parts = _names(name, column.shape[1])
                flat |= {part: column[:, k] for k, part in enumerate(parts)}
        return flat

    def back(self, cloud: LabelledCloud, found: Any) -> Any:
        """Boxes in the file's own units and place, which reading left; anything else is by points."""
        if not isinstance(found, Detections3D):
            return found
        columns, scale = self.columns(cloud), self.fields.scale
        own = np.stack([columns[name].astype(np.float64) for name in ARRAYS["points"]], axis=1)
        moved = np.round((own * scale - cloud.points).mean(axis=0))  # reading moves by whole units
        centers = (found.boxes.centers + moved) / scale
        boxes = Boxes3D(centers, found.boxes.sizes / scale, found.boxes.headings, found.boxes.classes)
        return replace(found, boxes=boxes)


def cloud_fields(recipe: FinetuneRecipe, options: Mapping[str, Any] | None) -> CloudFields:
    """The fields of cloud files: those given, else those of the run's own clouds. Raises `RecipeError`."""
    if options is None:
        own = {field.name for field in fields(CloudFields)} - {"label", "instance"}
        used = recipe.data.options if recipe.data.source == OWN_CLOUDS else {}
        options = {name: value for name, value in used.items() if name in own}
    return parse(CloudFields, options, where="data.options", prefix="data.options.")


def _names(array: str, width: int) -> tuple[str, ...]:
    """The names of the columns of an array [N, K]: x, y, z of points, red, green, blue of colors, else numbered."""
    name = array.lower()
    if width == 3 and name in POINTS:
        return ARRAYS["points"]
    if width == 3 and name in COLOR_ARRAYS:
        return ARRAYS["colors"]
    return tuple(f"{array}_{k}" for k in range(width))
