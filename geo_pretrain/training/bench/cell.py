"""Run one cell of a benchmark in its own process: train a recipe, measure the checkpoint, write a JSON file.

Run as `python -m geo_pretrain.training.bench.cell JOB.json`. Training goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.errors import GeoPretrainError
from geo_pretrain.files import write_sealed
from geo_pretrain.progress import Lines
from geo_pretrain.training.bench.measure import measure
from geo_pretrain.training.bench.plan import BenchSpec, base_data
from geo_pretrain.training.distributed import join
from geo_pretrain.training.pretrain import is_trained, run_recipe
from geo_pretrain.training.recipe import STAGE1, Recipe, load_recipe
from geo_pretrain.training.runs import Interrupted
from geo_pretrain.training.tasks import build_task


@dataclass(frozen=True)
class Job:
    """The job of one process: what to train and what to measure."""

    folder: str  # of the checkpoint
    seed: int
    spec: BenchSpec
    recipe: str | None = None  # a YAML file to train into `folder`; None: the checkpoint exists
    stage1: str | None = None  # the trained first stage that the recipe starts from
    result: str | None = None  # the JSON file for the measurements; None: measure nothing
    pretrained: bool = True  # False: measure the architecture with random weights
    device: str = "cpu"

    def starts(self) -> dict[str, Path]:
        """The trained first stage in the form that `build_task` takes."""
        return {} if self.stage1 is None else {STAGE1: Path(self.stage1)}

    def to_json(self) -> str:
        """Convert to the JSON that `main` reads."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Parse the JSON that `to_json` writes."""
        tree = json.loads(text)
        spec = tree.pop("spec")
        return cls(spec=BenchSpec(**{**spec, "overrides": tuple(spec["overrides"])}), **tree)


def run_job(job: Job) -> None:
    """Train and measure as the job says, skipping finished parts."""
    folder = Path(job.folder)
    if job.recipe is not None and not is_trained(folder):
        _train(load_recipe(job.recipe), folder, job)
    if job.result is None:
        return
    found = measure(
        folder,
        base_data(job.spec),
        job.spec,
        seed=job.seed,
        pretrained=job.pretrained,
        device=job.device,
        report=_say,
    )
    facts: dict[str, Any] = {"seed": job.seed, "twin": twin_key(folder), "arch": str(read_checkpoint(folder).arch)}
    if job.recipe is not None:
        facts["training"] = _training_facts(load_recipe(job.recipe), folder, job)
    facts["processor seconds"] = round(time.process_time(), 1)  # of this process only; the other times are wall-clock
    write_sealed(Path(job.result), {**facts, **found}, indent=1)


def twin_key(folder: Path) -> str:
    """Key of a checkpoint's architecture and input; equal keys share one random-initialization baseline."""
    found = read_checkpoint(folder)
    text = json.dumps([found.arch.name, found.arch.args, found.contract.to_dict()], sort_keys=True)
    return f"{found.arch.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _train(recipe: Recipe, folder: Path, job: Job) -> None:
    run_recipe(recipe, folder, join(job.device), starts=job.starts(), report=Lines(_say))


def _training_facts(recipe: Recipe, folder: Path, job: Job) -> dict[str, Any]:
    provenance = read_checkpoint(folder).provenance
    views = build_task(recipe, job.starts()).views
    facts = {"recipe": recipe.name, "steps": provenance["steps"], "batch": recipe.optim.batch, "views": views}
    return facts | {"seconds": round(float(provenance["seconds"]), 1)}


def _say(text: str) -> None:
    """Print a line to the cell's log."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run the job in the file given on the command line; after a failure the last line states the reason."""
    try:
        run_job(Job.from_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except (GeoPretrainError, OSError) as error:
        _say(f"Error: {error}")
        sys.exit(130 if isinstance(error, Interrupted) else 1)


if __name__ == "__main__":
    main()
