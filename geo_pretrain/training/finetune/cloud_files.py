"""Files of points to predict on: read with the run's own fields, and the results brought back into the file's frame."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.training.config import parse
from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D, LabelledCloud
from geo_pretrain.training.data.labelled.clouds.files import CloudFields, placed_columns, read_cloud
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
        return self.loaded_by(self.path.stem, self.load)

    def loaded_by(self, name: str, load: Callable[[], LabelledCloud]) -> Item:
        """The file under another name, read by `load`, as a data set of files does; results are in the file's frame."""
        return Item(file_stem(name), load, self.columns, self.back)

    def load(self) -> LabelledCloud:
        """Read the points, without labels. Raises `BadFrame`."""
        return read_cloud(self.path, self.fields, need=())

    def columns(self, cloud: LabelledCloud) -> Columns:
        """The columns of the file's points as they are, each [N]: x, y, z whatever their names, and all others.

        Arrays [N, K] are taken apart, and what does not belong to points (another length, no numbers) is left out.
        """
        places, others = placed_columns(self.path, self.fields)
        flat = dict(zip(ARRAYS["points"], places, strict=True))
        for name, column in others.items():
            if column.dtype.kind not in "biuf" or column.ndim > 2:
                continue
            column = column.astype(np.float64) if column.dtype.itemsize > 8 else column  # PLY has no longer ones
            parts = [name] if column.ndim == 1 else _names(name, column.shape[1])
            for k, part in enumerate(parts):
                flat[_free(_ply_name(part), flat)] = column if column.ndim == 1 else column[:, k]
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
    """The fields of cloud files: those of the run's own clouds, but for what is given. Raises `RecipeError`."""
    own = {field.name for field in fields(CloudFields)} - {"label", "instance"}
    used = recipe.data.options if recipe.data.source == OWN_CLOUDS else {}
    options = {name: value for name, value in used.items() if name in own} | dict(options or {})
    return parse(CloudFields, options, where="data.options", prefix="data.options.")


def _names(array: str, width: int) -> list[str]:
    """The names of the columns of an array [N, K]: red, green, blue of colors, else numbered."""
    colors = list(ARRAYS["colors"]) if array.lower() in COLOR_ARRAYS and width in (3, 4) else []
    return [*colors, *(f"{array}_{k}" for k in range(len(colors), width))]


def _ply_name(name: str) -> str:
    """The name of a column as a PLY may have it: visible ASCII without blanks."""
    return re.sub(r"[^!-~]+", "_", name) or "_"


def _free(name: str, taken: Collection[str]) -> str:
    """`name`, with a number behind it where it is taken."""
    numbered = (f"{name}_{k}" for k in count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)
