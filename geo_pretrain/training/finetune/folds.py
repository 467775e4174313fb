"""Cross-validation: runs that measured different parts of a data set, such as S3DIS' six areas, as one number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.errors import DataError
from geo_pretrain.training.evaluation.metrics import class_accuracy, class_iou, mean_iou, pixel_accuracy
from geo_pretrain.training.finetune.folder import FinetuneResult, read_result
from geo_pretrain.training.finetune_recipe import changes, load_finetune_recipe


@dataclass(frozen=True)
class Folds:
    """The scores of several folds: of each, and of their counts added up."""

    results: tuple[FinetuneResult, ...]
    level: str  # what is counted: "voxels", "points", or for images "pixels"
    each: tuple[dict[str, float], ...]  # scores of each fold: miou, macc, accuracy
    pooled: dict[str, float]  # of the sum of all confusion matrices, which is what papers call "6-fold"
    iou: dict[str, float | None]  # of each class, of that sum

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON types."""
        folds = [
            {"folder": str(result.folder), **scores} for result, scores in zip(self.results, self.each, strict=True)
        ]
        return {"level": self.level, "folds": folds, "pooled": self.pooled, "iou": self.iou}


def pool_folds(folders: Sequence[Path]) -> Folds:
    """Add the confusion matrices of finished runs whose validation data differ, and measure the sum.

    The sum counts each voxel (or point) once, whichever fold it is in; the mean of the folds' scores would let a class
    that is rare in one of them weigh as much as in all. Raises `CheckpointError` for a folder without a result,
    `DataError` for runs that do not belong together.
    """
    results = tuple(read_result(Path(folder)) for folder in folders)
    _check_together(results)
    matrices = [np.array(result.data[result.uses]["details"]["confusion"], np.int64) for result in results]
    total = np.sum(matrices, axis=0)
    iou = zip(results[0].data["data"]["classes"], class_iou(total), strict=True)
    level = results[0].data[results[0].uses]["details"].get("level", "pixels")
    return Folds(
        results,
        level,
        tuple(map(_scores, matrices)),
        _scores(total),
        {name: None if np.isnan(value) else float(value) for name, value in iou},
    )


def _scores(confusion: np.ndarray) -> dict[str, float]:
    return {
        "miou": mean_iou(confusion),
        "macc": float(np.nanmean(class_accuracy(confusion))),
        "accuracy": pixel_accuracy(confusion),
    }


def _check_together(results: Sequence[FinetuneResult]) -> None:
    """Raise `DataError` unless the runs differ in their options of the data only, and measured different data."""
    first, *others = results
    recipe = (first.folder / "recipe.yaml").read_text(encoding="utf-8")
    measured = dict.fromkeys(_measured(first), first)
    for result in results:
        if "confusion" not in result.data[result.uses]["details"]:
            raise DataError(f"{str(result.folder)!r} is a run for {result.task}; accepted: semantic segmentation.")
    for result in others:
        differ = changes(recipe, (result.folder / "recipe.yaml").read_text(encoding="utf-8"))
        differ = [change for change in differ if not change.startswith("data.options.")]
        if first.backbone != result.backbone:
            differ.append(f"backbone: {first.backbone} -> {result.backbone}")
        if first.data["data"]["classes"] != result.data["data"]["classes"]:
            differ.append("classes")
        if differ:
            raise DataError(
                f"{str(first.folder)!r} and {str(result.folder)!r} are no folds of one experiment: {'; '.join(differ)}."
            )
        for key in _measured(result):
            same = measured.setdefault(key, result)
            if same is not result:
                raise DataError(f"{str(same.folder)!r} and {str(result.folder)!r} were measured on the same data.")


def _measured(result: FinetuneResult) -> list[str]:
    """What tells the validation data of a run from others': all of them, and of files the ids, whatever the options."""
    data, path = result.data["data"], load_finetune_recipe(str(result.folder / "recipe.yaml")).data.path
    return [data["val_fingerprint"], *([data["val_ids"]] if path is not None and "val_ids" in data else [])]
