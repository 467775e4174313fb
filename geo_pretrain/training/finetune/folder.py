"""The result folder of a fine-tuning run: results.json, weights, log, recipe and a figure of predictions."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from geo_pretrain.catalog.license import License
from geo_pretrain.checkpoint import CONFIG, sha256
from geo_pretrain.errors import CheckpointError, some
from geo_pretrain.files import read_sealed, write_sealed
from geo_pretrain.training.config import plain_types
from geo_pretrain.training.data.labelled.registry import data_terms
from geo_pretrain.training.finetune.as_checkpoint import add_backbone
from geo_pretrain.training.finetune.training import Finetuning, spread_ids, write_weights
from geo_pretrain.training.loop import Progress
from geo_pretrain.training.runs import LOG, check_out, code_version, library_versions, run_folder

RESULTS, MODEL, PICTURE = "results.json", "model.safetensors", "predictions.png"
FORMAT = 1
DRAWN = 4  # validation images in the figure
SHOWN = 5  # left-out clouds in a message; results.json has all


@dataclass(frozen=True)
class FinetuneResult:
    """The measurements of a run; tables show `score`."""

    recipe: str
    task: str
    metric: str
    backbone: str
    seed: int
    fraction: float  # actual share of the training images
    score: float  # a share of 1
    uses: Literal["last", "best"]  # which evaluation `score` is from
    last: float | None  # None: the end of the run was not measured, as in the released protocol
    best: float
    best_step: int
    steps: int
    folder: Path
    data: dict[str, Any]  # the whole of results.json

    def per_class(self, what: str = "iou") -> dict[str, float | None]:
        """Per-class values of the evaluation behind `score`; None for a class without pixels."""
        values: dict[str, float | None] = self.data[self.uses]["per_class"][what]
        return values

    def left_out(self) -> list[str]:
        """Say which clouds training or the evaluation behind `score` could not use, and why: a line a split."""
        data, measured = self.data["data"], self.data[self.uses]["details"]
        found = {
            "training": (data.get("skipped"), data.get("train_images")),
            "validation": (measured.get("skipped"), data.get("val_images")),
        }
        lines = []
        for split, (skipped, count) in found.items():
            if skipped:
                reasons = some((f"{one['path']}: {one['reason']}" for one in skipped), SHOWN)
                lines.append(f"{len(skipped)} of {count} {split} clouds left out: {reasons}.")
        return lines


def read_result(folder: Path) -> FinetuneResult:
    """Read the result of a finished run from its folder. Raises `CheckpointError` if there is none."""
    path = folder / RESULTS
    try:
        data = read_sealed(path)
        return _result(folder, data)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} This is not a result of fine-tuning; remove its folder to run it again."
        ) from None
    except FileNotFoundError:
        raise CheckpointError(f"No {RESULTS} in {str(folder)!r}: the run there has not ended.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a result of fine-tuning ({error!r}).") from None


def class_rows(result: FinetuneResult) -> tuple[str, list[tuple[str, str]]]:
    """What is measured of each class, such as "iou", and rows of class and value in percent; no rows: nothing is.

    The measure is that of the score: IoU for mIoU. A class that does not occur has "-".
    """
    measured: dict[str, dict[str, float | None]] = result.data[result.uses]["per_class"]
    what = next((name for name in (result.metric, "iou", *measured) if name in measured), "")
    values = measured.get(what, {})
    return what, [(name, "-" if value is None else f"{100 * value:.1f}") for name, value in values.items()]


def result_rows(results: Iterable[FinetuneResult]) -> list[dict[str, str]]:
    """Rows of a table for people, one per result; column "table" names the evaluation to compare: last or best."""
    return [
        {
            "recipe": result.recipe,
            "backbone": result.backbone,
            "data": f"{100 * result.fraction:.3g} %",
            "seed": str(result.seed),
            "metric": result.metric,
            "last": "-" if result.last is None else f"{100 * result.last:.1f}",
            "best": f"{100 * result.best:.1f} (step {result.best_step})",
            "table": result.uses,
        }
        for result in results
    ]


def check_result_out(out: Path, *, overwrite: bool) -> None:
    """Raise `CheckpointError` if `out` holds anything but a result, or one that must not be overwritten."""
    check_out(out, RESULTS, "a result", overwrite=overwrite)
    if run_folder(out).exists():
        return  # it is gone on with, even when it was killed while it wrote `out`
    if out.exists() and not (out / RESULTS).exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{str(out)!r} exists and holds no result of fine-tuning; choose another --out.")


def finish(task: Finetuning, progress: Progress, license: License) -> FinetuneResult:
    """Write the folder `out`, results.json and then config.json last; the run's folder goes when all of it is there.

    `license`: of the network, `finetuned_license`.
    """
    run, recipe = task.run, task.recipe
    uses: Literal["last", "best"] = "best" if recipe.match_released_code else "last"
    if uses == "best":
        task.load_best()
    run.out.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, RESULTS):
        (run.out / name).unlink(missing_ok=True)
    write_weights(task.task, run.out / MODEL)
    with task.precision():
        task.task.draw(task.data.val, spread_ids(task.val_ids, DRAWN), run.out / PICTURE)
    (run.out / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    shutil.copyfile(run.log_file, run.out / LOG)
    data = summary(task, progress, uses)
    write_sealed(run.out / RESULTS, data, indent=2)
    add_backbone(run.out, task.task, license, data, recipe.name)
    run.remove()
    return _result(run.out, data)


def summary(task: Finetuning, progress: Progress, uses: str) -> dict[str, Any]:
    """Build the content of results.json."""
    recipe, metric, train = task.recipe, task.task.metric, task.data.train
    last = task.evaluations[-1] if task.evaluations[-1]["step"] == progress.steps else None
    deviations = {
        "number reported": "the best on the validation images (as published)"
        if uses == "best"
        else "the last (mended)",
        "end of the run": "is not measured (as published)" if last is None else "is measured",
        **task.task.protocol_deviations(),
    }
    license, terms = data_terms(train.name, recipe.data.license)
    skipped = [{"path": path, "reason": reason} for path, reason in sorted(task.skipped.items())]
    return {
        "format": FORMAT,
        "recipe": recipe.name,
        "task": recipe.task,
        "network": recipe.network.kind,
        "metric": metric,
        "uses": uses,
        "score": (task.best() if uses == "best" else task.evaluations[-1])["scores"][metric],
        "seed": recipe.seed,
        "authors_exact": recipe.match_released_code,  # the name in results.json
        "backbone": {"name": task.backbone, "digest": task.digest, "shape": task.task.start_shape()},
        "model": {"sha256": sha256(task.run.out / MODEL)},
        "contract": plain_types(task.task.contract.to_dict()),
        "data": {
            "source": train.name,
            "licence": license,
            "terms": terms,
            "fraction": task.data.fraction,
            "train_images": len(task.train_ids),
            "val_images": len(task.val_ids),
            "classes": list(train.classes),
            **own_labels(train),
            "train_fingerprint": train.fingerprint(),
            "val_fingerprint": task.data.val.fingerprint(),
            "val_ids": hashlib.sha256("\n".join(task.val_ids).encode(errors="surrogateescape")).hexdigest(),
            **({"skipped": skipped} if task.task.skips_broken else {}),
        },
        **task.task.facts(),
        "steps": progress.steps,
        "evaluations": [{"step": past["step"], "scores": past["scores"]} for past in task.evaluations],
        "last": last,
        "best": task.best(),
        "quirks": deviations,
        "seconds": round(progress.seconds, 1),
        "device": task.world.device.type,
        "code": code_version(),
        "libraries": library_versions(),
    }


def own_labels(source: Any) -> dict[str, Any]:
    """What files of a data set call its classes 1..C, where it says so: ids, or colors."""
    source = getattr(source, "source", source)  # of a subset
    found = {"ids": getattr(source, "file_ids", None), "colors": getattr(source, "colors", None)}
    return {key: [list(v) if isinstance(v, tuple) else v for v in value] for key, value in found.items() if value}


def _result(folder: Path, data: dict[str, Any]) -> FinetuneResult:
    metric = data["metric"]
    return FinetuneResult(
        **{key: data[key] for key in ("recipe", "task", "metric", "seed", "score", "uses", "steps")},
        backbone=data["backbone"]["name"],
        fraction=data["data"]["fraction"],
        last=None if data["last"] is None else data["last"]["scores"][metric],
        best=data["best"]["scores"][metric],
        best_step=data["best"]["step"],
        folder=folder,
        data=data,
    )
