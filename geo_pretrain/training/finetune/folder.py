"""The folders of a fine-tuning run: state and log while it goes on, results.json and its kin when it has ended.

`<out>.run/` holds what a run needs to continue as if it had never stopped, `<out>` what it measured. One process at a
time works on either. Every file is written beside its place and moved there at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from geo_pretrain.errors import CheckpointError, RecipeError
from geo_pretrain.training.config import plain_types
from geo_pretrain.training.data.labelled.image import LabelledSource
from geo_pretrain.training.data.labelled.registry import data_terms
from geo_pretrain.training.export import LIBRARIES, code_version
from geo_pretrain.training.finetune.task import FinetuneTask
from geo_pretrain.training.finetune_recipe import FinetuneRecipe, changes
from geo_pretrain.training.loop import STATE
from geo_pretrain.training.networks import PretrainedInit

RESULTS, LOG, MODEL, BEST, PICTURE = (
    "results.json",
    "log.jsonl",
    "model.safetensors",
    "best.safetensors",
    "predictions.png",
)
FORMAT = 1
DRAWN = 4  # validation images in the figure


@dataclass(frozen=True)
class FinetuneResult:
    """What a run measured; `score` is what its table shows."""

    recipe: str
    task: str
    metric: str
    backbone: str
    seed: int
    fraction: float  # of the training images, as it came out
    score: float  # a share of 1
    uses: Literal["last", "best"]  # which evaluation `score` is from
    last: float | None  # None: the end of the run was not measured, as in the released protocol
    best: float
    best_step: int
    steps: int
    folder: Path
    data: dict[str, Any]  # the whole of results.json

    def per_class(self, what: str = "iou") -> dict[str, float | None]:
        """Values by class of the evaluation that `score` is from; None for a class without pixels."""
        values: dict[str, float | None] = self.data[self.uses]["per_class"][what]
        return values


@dataclass
class Run:
    """A run in progress."""

    recipe: FinetuneRecipe
    start: PretrainedInit
    out: Path
    device: torch.device
    train: LabelledSource
    val: LabelledSource
    fraction: float
    task: FinetuneTask
    optimizer: torch.optim.SGD
    digest: str  # of the backbone's weights at the start
    steps: int
    train_ids: list[str]
    val_ids: list[str]
    due: list[int]  # steps after which is measured
    step: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def folder(self) -> Path:
        return run_folder(self.out)

    def precision(self) -> torch.autocast:
        """The number type of forward passes, as a context."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")

    def best(self) -> dict[str, Any]:
        """The first of the highest evaluations."""
        return max(self.evaluations, key=lambda found: found["scores"][self.task.metric])

    def identity(self) -> dict[str, str]:
        """What must not change between two sittings."""
        return {
            "recipe": self.recipe.to_yaml(),
            "backbone": self.digest,
            "data": f"{self.train.fingerprint()} {self.val.fingerprint()}",
        }


def read_result(folder: Path) -> FinetuneResult:
    """The result in a finished run's folder. Raises `CheckpointError` when there is none."""
    path = folder / RESULTS
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return _result(folder, data)
    except FileNotFoundError:
        raise CheckpointError(f"No {RESULTS} in {str(folder)!r}: the run there has not ended.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a result of fine-tuning ({error!r}).") from None


def result_rows(results: Iterable[FinetuneResult]) -> list[dict[str, str]]:
    """A table for people, a row a result; its column "table" says whether last or best is the number to be compared."""
    rows = []
    for result in results:
        rows.append(
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
        )
    return rows


def run_folder(out: Path) -> Path:
    """Where state and log live until `out` is written."""
    return out.with_name(out.name + ".run")


def check_out(out: Path, overwrite: bool) -> None:
    """Raise `CheckpointError` when `out` holds something else, or a result that must not be replaced."""
    if run_folder(out).exists():
        return  # it is gone on with, even when it was killed while it wrote `out`
    if (out / RESULTS).exists() and not overwrite:
        raise CheckpointError(f"{str(out)!r} already holds a result. Choose another --out, or pass --overwrite.")
    if out.exists() and not (out / RESULTS).exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{str(out)!r} exists and holds no result of fine-tuning; choose another --out.")


def save(run: Run) -> None:
    """Write the state so that a kill at any moment leaves the old or the new one."""
    state = {
        "step": run.step,
        "seconds": run.seconds,
        "evaluations": run.evaluations,
        "identity": run.identity(),
        "module": run.task.module.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    _replace(run.folder / STATE, lambda path: torch.save(state, path))


def restore(run: Run) -> None:
    """Go on from the saved state. Raises `RecipeError` when recipe, backbone or data are not those it is of."""
    state = torch.load(run.folder / STATE, map_location="cpu", weights_only=True)
    given, mine = state["identity"], run.identity()
    changed = changes(given["recipe"], mine["recipe"])
    if changed:
        raise RecipeError(
            f"The run in {run.folder} was started with another recipe; it differs in: {'; '.join(changed[:5])}. "
            "Give the first settings again, choose another --out, or remove that folder."
        )
    for key, what in (("backbone", "from another backbone"), ("data", "on other data")):
        if given[key] != mine[key]:
            raise RecipeError(
                f"The run in {run.folder} was started {what}. Choose another --out, or remove that folder."
            )
    run.task.module.load_state_dict(state["module"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.step, run.seconds, run.evaluations = state["step"], state["seconds"], state["evaluations"]


@contextmanager
def open_log(run: Run) -> Iterator[Callable[[dict[str, Any]], None]]:
    """One JSON line a step and an evaluation; lines after the restored step are dropped first."""
    path = run.folder / LOG
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        if not line.endswith("}") or json.loads(line)["step"] > run.step:
            break
        kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        yield write


def finish(run: Run) -> FinetuneResult:
    """Write the folder `out`; results.json comes last and says that the rest is there."""
    uses: Literal["last", "best"] = "best" if run.recipe.authors_exact else "last"
    if uses == "best":
        run.task.module.load_state_dict(load_file(run.folder / BEST))
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / RESULTS).unlink(missing_ok=True)
    write_weights(run, run.out / MODEL)
    with run.precision():
        run.task.draw(run.val, spread_ids(run.val_ids, DRAWN), run.out / PICTURE)
    (run.out / "recipe.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
    shutil.copyfile(run.folder / LOG, run.out / LOG)
    data = summary(run, uses)
    _replace(run.out / RESULTS, lambda path: path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8"))
    shutil.rmtree(run.folder)
    return _result(run.out, data)


def summary(run: Run, uses: str) -> dict[str, Any]:
    """The content of results.json."""
    recipe, metric = run.recipe, run.task.metric
    last = run.evaluations[-1] if run.evaluations[-1]["step"] == run.steps else None
    quirks = {
        "number reported": "the best on the validation images (as published)"
        if uses == "best"
        else "the last (mended)",
        "end of the run": "is not measured (as published)" if last is None else "is measured",
        **run.task.quirks(),
    }
    license, terms = data_terms(run.train.name)
    return {
        "format": FORMAT,
        "recipe": recipe.name,
        "task": recipe.task,
        "network": recipe.network.kind,
        "metric": metric,
        "uses": uses,
        "score": (run.best() if uses == "best" else run.evaluations[-1])["scores"][metric],
        "seed": recipe.seed,
        "authors_exact": recipe.authors_exact,
        "backbone": {"name": run.start.backbone, "digest": run.digest},
        "contract": plain_types(run.task.contract.to_dict()),
        "data": {
            "source": run.train.name,
            "licence": license,
            "terms": terms,
            "fraction": run.fraction,
            "train_images": len(run.train_ids),
            "val_images": len(run.val_ids),
            "classes": list(run.train.classes),
            "train_fingerprint": run.train.fingerprint(),
            "val_fingerprint": run.val.fingerprint(),
        },
        "steps": run.steps,
        "evaluations": [{"step": found["step"], "scores": found["scores"]} for found in run.evaluations],
        "last": last,
        "best": run.best(),
        "quirks": quirks,
        "seconds": round(run.seconds, 1),
        "device": run.device.type,
        "code": code_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _result(folder: Path, data: dict[str, Any]) -> FinetuneResult:
    metric = data["metric"]
    return FinetuneResult(
        recipe=data["recipe"],
        task=data["task"],
        metric=metric,
        backbone=data["backbone"]["name"],
        seed=data["seed"],
        fraction=data["data"]["fraction"],
        score=data["score"],
        uses=data["uses"],
        last=None if data["last"] is None else data["last"]["scores"][metric],
        best=data["best"]["scores"][metric],
        best_step=data["best"]["step"],
        steps=data["steps"],
        folder=folder,
        data=data,
    )


def write_weights(run: Run, path: Path) -> None:
    """The network's weights as safetensors, whatever device they are on."""
    weights = {key: value.detach().cpu().contiguous() for key, value in run.task.module.state_dict().items()}
    _replace(path, lambda new: save_file(weights, new))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, bring it to disk, and move it there at once."""
    new = path.with_name(path.name + ".new")
    write(new)
    with new.open("rb+") as file:
        os.fsync(file.fileno())
    new.replace(path)


def spread_ids(ids: list[str], count: int | None) -> list[str]:
    """At most `count` of them, evenly spaced."""
    if count is None or count >= len(ids):
        return ids
    return [ids[k * len(ids) // count] for k in range(count)]
