"""Fine-tuning from several starts, every learning rate for every start: the jobs of a long run, and its tables.

A `Study` is a recipe, starts, shares of the labels, learning rates and seeds. Each start with each rate is one of the
package's sweeps. A rate is chosen on the recipe's validation images, for each start and share alike; what is reported
is measured on others, the study's `reported`. Weights of a run are deleted when it has been measured.

Only seeds that are finished at every rate count, so a table can be looked at while the run goes on.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine
from benchmarks.jobs import Job
from geo_pretrain import hub
from geo_pretrain.backbones.architectures import HOST_WIDTH
from geo_pretrain.catalog import find
from geo_pretrain.errors import CheckpointError, DataError
from geo_pretrain.files import read_sealed, write_sealed
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.evaluation.metrics import Spread
from geo_pretrain.training.evaluation.verdict import over_seeds, sentence
from geo_pretrain.training.finetune.folder import RESULTS, read_result
from geo_pretrain.training.finetune.load import load_finetuned
from geo_pretrain.training.finetune.registry import load_checked_finetune_recipe
from geo_pretrain.training.finetune.sweep import Run, read_plan, run_sweep
from geo_pretrain.training.finetune_recipe import FinetuneRecipe
from geo_pretrain.training.networks import SCRATCH
from geo_pretrain.training.runs import code_version, library_versions, run_folder
from geo_pretrain.training.visualize.curves import draw_curves, percent

JUDGED = "judged.json"  # beside a run's results.json: its scores on the reported images


@dataclass(frozen=True)
class Start:
    """Weights that fine-tuning begins from."""

    label: str  # in tables and folders
    backbone: str  # as `geo-pretrain finetune -b` takes it
    baseline: str  # label of the random weights that it is compared with
    settings: tuple[str, ...] = ()  # of the recipe: the encoder, what is transferred
    needs: tuple[Path, ...] = ()  # files that another job writes
    rivals: tuple[str, ...] = ()  # labels of other starts that it is compared with

    def others(self) -> tuple[str, ...]:
        """The labels of all that it is compared with."""
        return tuple(label for label in (self.baseline, *self.rivals) if label != self.label)


@dataclass(frozen=True)
class Score:
    """The scores of one run, from 0 to 1."""

    start: str
    share: float
    rate: float
    seed: int
    chosen_by: float  # on the images that rates are chosen on
    reported: float
    seconds: float
    images: int  # that it was trained on

    @property
    def run(self) -> tuple[str, float, float, int]:
        """What tells runs of a study apart."""
        return self.start, self.share, self.rate, self.seed


@dataclass(frozen=True)
class Study:
    """What is run, and what the table is measured on."""

    name: str
    recipe: str
    settings: tuple[str, ...]
    starts: tuple[Start, ...]
    shares: tuple[float, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    # The images that are reported: the recipe's validation split, with other options or of another folder.
    reported: Mapping[str, Any] = field(default_factory=dict)
    reported_path: Path | None = None
    earlier: tuple[Score, ...] = ()  # runs measured before, in another folder: not run again

    def recipe_at(self, start: Start, rate: float) -> FinetuneRecipe:
        """The recipe of one sweep."""
        return load_checked_finetune_recipe(self.recipe, [*self.settings, *start.settings, f"optim.lr={rate}"])

    def sweep(self, out: Path, start: Start, rate: float) -> Path:
        """The folder of one sweep."""
        return out / self.name / start.label.replace(" ", "_").replace("/", "_") / f"lr{rate:g}"

    def runs(self) -> int:
        """How many runs it has."""
        return len(self.starts) * len(self.shares) * len(self.rates) * len(self.seeds)


def fine_tuning_jobs(study: Study, out: Path) -> list[Job]:
    """The sweeps of a study, one seed of each after another, so that a night cut short has whole tables."""
    axes = product(study.seeds, study.starts, study.rates)
    return [_job(study, start, rate, seed, out) for seed, start, rate in axes]


def _job(study: Study, start: Start, rate: float, seed: int, out: Path) -> Job:
    folder = study.sweep(out, start, rate)

    def is_done() -> bool:
        known = {(start.label, run.share, rate, run.seed) for run in _judged(folder)}
        known |= {score.run for score in study.earlier}
        return all((start.label, share, rate, seed) in known for share in study.shares)

    def run() -> None:
        run_sweep(study.recipe_at(start, rate), [start.backbone], study.shares, [seed], folder, device="cpu")
        judge(study, folder)

    name = f"{study.name}: {start.label}, lr {rate:g}, seed {seed}"
    return Job(name, folder.with_name(f"{folder.name}.job"), is_done, run, start.needs)


def judge(study: Study, folder: Path) -> None:
    """Measure the finished runs of a sweep on the reported images, then delete their weights."""
    recipe, _, runs = read_plan(folder)
    waiting = [run for run in runs if (run.folder / RESULTS).exists() and not run_folder(run.folder).exists()]
    source: Any = None
    for run in waiting:
        if not (run.folder / JUDGED).exists():
            if source is None:
                source = reported_images(study, recipe)
            network = load_finetuned(run.folder)
            with torch.autocast("cpu", torch.bfloat16, enabled=network.recipe.precision == "bf16"):
                evaluation = network.evaluate(source, source.ids())
            facts = {"images": len(source.ids()), "fingerprint": source.fingerprint(), **evaluation.to_dict()}
            write_sealed(run.folder / JUDGED, facts)
        for path in run.folder.glob("*.safetensors"):
            path.unlink()


def reported_images(study: Study, recipe: FinetuneRecipe) -> Any:
    """The labelled images that the table is measured on."""
    data = recipe.data
    path = study.reported_path or (None if data.path is None else Path(data.path))
    options = {**data.options, **study.reported}
    return open_labelled(data.source, path, "val", task=recipe.labels(), options=options)


@dataclass(frozen=True)
class _Judged:
    share: float
    seed: int
    folder: Path


def _judged(folder: Path) -> list[_Judged]:
    """The runs of a sweep that are measured; none where the sweep has not begun."""
    try:
        runs: list[Run] = read_plan(folder)[2]
    except DataError:
        return []
    return [_Judged(run.fraction, run.seed, run.folder) for run in runs if (run.folder / JUDGED).exists()]


def scores_of(study: Study, out: Path) -> list[Score]:
    """The scores of all measured runs; those of this folder stand for earlier ones of the same."""
    own = _own_scores(study, out)
    lacking = set(product((start.label for start in study.starts), study.shares, study.rates, study.seeds))
    lacking -= {score.run for score in own}
    return [*own, *(score for score in study.earlier if score.run in lacking)]


def _own_scores(study: Study, out: Path) -> list[Score]:
    found = []
    for start in study.starts:
        for rate in study.rates:
            for run in _judged(study.sweep(out, start, rate)):
                if run.share in study.shares and run.seed in study.seeds:
                    result, judged = read_result(run.folder), read_sealed(run.folder / JUDGED)
                    reported = judged["scores"][result.metric]
                    seconds, images = result.data["seconds"], result.data["data"]["train_images"]
                    found.append(Score(start.label, run.share, rate, run.seed, result.score, reported, seconds, images))
    return found


def with_earlier(study: Study, stored: Mapping[str, Any], digests: Mapping[str, str]) -> Study:
    """The study with the rates and runs of an earlier one, whose folder is no longer needed.

    `stored` is what `results_of` and `provenance` told of it: the seeds that were finished at every rate. `digests`: of
    the weights of each start, as far as known; see `provenance`. Raises `DataError` where the earlier runs had another
    recipe, other settings (those that name a file or folder are not compared) or other weights.
    """
    here = _facts(study)
    try:
        apart = [f"{key} {stored[key]} there, {value} here" for key, value in here.items() if stored[key] != value]
        weights, rates = stored["weights"], stored["learning rates"]
        seconds = 3600 * stored["core hours"] / max(stored["runs"][0], 1)
        scores = [
            Score(
                row["start"], row["share"], float(rate), int(seed), chosen, by["reported"][seed], seconds, row["images"]
            )
            for row in stored["measured"]
            for rate, by in row["every rate"].items()
            for seed, chosen in by["chosen by"].items()
        ]
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise DataError(f"The earlier runs are no table of fine-tuned starts: {error!r}.") from None
    apart += [f"other weights of {label}" for label in weights if digests.get(label, weights[label]) != weights[label]]
    if apart:
        raise DataError(f"The earlier runs are of another study: {'; '.join(apart)}.")
    return replace(study, rates=tuple(sorted({*study.rates, *rates})), earlier=tuple(scores))


@dataclass(frozen=True)
class Point:
    """A start on a share of the labels, at the rate with the highest mean on the images that rates are chosen on."""

    start: str
    share: float
    images: int
    rate: float
    at_edge: bool  # the chosen rate is the lowest or highest of several
    reported: dict[int, float]  # seed -> score
    every_rate: dict[float, dict[str, dict[int, float]]]  # rate -> {"chosen by", "reported"} -> seed -> score

    @property
    def spread(self) -> Spread:
        """Of the reported scores, over seeds."""
        return Spread(tuple(self.reported.values()))


def points_of(study: Study, scores: Sequence[Score]) -> list[Point]:
    """Choose a rate for each start and share; only seeds that are measured at every rate count."""
    points = []
    for start in study.starts:
        for share in study.shares:
            own = [score for score in scores if (score.start, score.share) == (start.label, share)]
            at = {rate: {score.seed: score for score in own if score.rate == rate} for rate in study.rates}
            seeds = [seed for seed in study.seeds if all(seed in by_seed for by_seed in at.values())]
            if not seeds:
                continue
            means = {rate: statistics.mean(at[rate][seed].chosen_by for seed in seeds) for rate in study.rates}
            best = max(means, key=lambda rate: means[rate])
            every = {
                rate: {
                    "chosen by": {seed: by_seed[seed].chosen_by for seed in seeds},
                    "reported": {seed: by_seed[seed].reported for seed in seeds},
                }
                for rate, by_seed in at.items()
            }
            at_edge = len(study.rates) > 1 and best in (min(study.rates), max(study.rates))
            images = own[0].images
            points.append(Point(start.label, share, images, best, at_edge, every[best]["reported"], every))
    return points


@dataclass(frozen=True)
class Gain:
    """The difference between a start and its baseline on a share of the labels, seed by seed."""

    start: str
    baseline: str
    share: float
    by_seed: dict[int, float]
    verdict: str


def gains_of(study: Study, points: Sequence[Point]) -> list[Gain]:
    """Compare every start with the random weights of its encoder and its rivals; a loss is told as a gain is."""
    known = {(point.start, point.share): point for point in points}
    gains = []
    for start in study.starts:
        for other, share in product(start.others(), study.shares):
            ours, theirs = known.get((start.label, share)), known.get((other, share))
            if ours is None or theirs is None:
                continue
            if (gain := compared(start.label, ours.reported, other, theirs.reported)) is not None:
                by_seed, text = gain
                gains.append(Gain(start.label, other, share, by_seed, f"{percent(share)} of the labels: {text}"))
    return gains


def compared(
    name: str, ours: Mapping[int, float], other: str, theirs: Mapping[int, float]
) -> tuple[dict[int, float], str] | None:
    """The difference of each seed that both have, and a sentence; None without such a seed."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    pairs = [[scores[seed] for seed in seeds] for scores in (ours, theirs)]
    by_seed = {seed: one - two for seed, one, two in zip(seeds, *pairs, strict=True)}
    return by_seed, sentence(name, other, over_seeds(*pairs))


def table_of(study: Study, points: Sequence[Point]) -> list[str]:
    """Lines of a Markdown table: a row a start, a column a share, score in percent and the chosen rate."""
    images = {point.share: point.images for point in points}
    heads = [percent(share) + (f" ({images[share]} images)" if share in images else "") for share in study.shares]
    lines = [f"| start | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    known = {(point.start, point.share): point for point in points}
    for start in study.starts:
        cells = [_cell(known.get((start.label, share))) for share in study.shares]
        lines.append(f"| {start.label} | {' | '.join(cells)} |")
    return lines


def _cell(point: Point | None) -> str:
    if point is None:
        return ""
    return f"{point.spread} (lr {point.rate:g}{', edge' if point.at_edge else ''})"


def results_of(study: Study, out: Path) -> dict[str, Any]:
    """Everything that is known of a study, in plain JSON types, and its table in Markdown under "table"."""
    scores = scores_of(study, out)
    points = points_of(study, scores)
    return {
        **_facts(study),
        "learning rates": list(study.rates),
        "seeds": list(study.seeds),
        "core hours": round(sum(score.seconds for score in scores) / 3600, 2),
        "runs": [len(scores), study.runs()],
        "measured": [
            {
                "start": point.start,
                "share": point.share,
                "images": point.images,
                "lr": point.rate,
                "at the edge of the rates": point.at_edge,
                "mean": point.spread.mean,
                "std": point.spread.std if len(point.reported) > 1 else None,
                "seeds": point.reported,
                "every rate": point.every_rate,
            }
            for point in points
        ],
        "gains": [
            {"start": g.start, "over": g.baseline, "share": g.share, "by seed": g.by_seed, "verdict": g.verdict}
            for g in gains_of(study, points)
        ],
        "table": table_of(study, points),
    }


def _facts(study: Study) -> dict[str, Any]:
    """What runs must have in common to stand in one table."""
    recipe = study.recipe_at(study.starts[0], study.rates[0])
    return {
        "recipe": study.recipe,
        "changed": _without_paths(study.settings),
        "reported on": dict(study.reported),
        "network": recipe.network.kind,
        "steps": recipe.optim.steps,
        "batch": recipe.optim.batch,
    }


def provenance(study: Study, out: Path) -> dict[str, Any]:
    """Machine, versions, and the digest of each start's weights; none for random ones and for files and packages."""
    digests = {}
    for start, rate in product(study.starts, study.rates):
        if start.backbone != SCRATCH:
            with suppress(DataError):  # not begun
                ((_, digest),) = read_plan(study.sweep(out, start, rate))[1].values()
                digests[start.label] = digest
    return {"machine": machine(), "code": code_version(), "libraries": library_versions(), "weights": digests}


def draw(study: Study, points: Sequence[Point], path: Path, *, title: str, metric: str = "mIoU") -> None:
    """Plot score against share of the labels, one line a start."""
    measured: dict[str, dict[float, Spread]] = {}
    for point in points:
        measured.setdefault(point.start, {})[point.share] = point.spread
    draw_curves(measured, {}, path, title=title, metric=metric)


def markdown(results: Mapping[str, Any]) -> str:
    """Table and verdicts of a study for a page; a nil and a loss stand there as gains do."""
    done, total = results["runs"]
    lines = [*results["table"], "", *(f"- {gain['verdict']}" for gain in results["gains"])]
    lines += ["", f"{done} of {total} runs, {results['core hours']:g} core hours."]
    return "\n".join(lines) + "\n"


def encoder_of(start: str) -> tuple[str, tuple[str, ...]]:
    """The name of a checkpoint's encoder, with its width, and the settings of a recipe for it.

    Raises `CheckpointError` where it has none.
    """
    arch = (find(start) or hub.open(start)).arch
    if arch.encoder_name is None:
        raise CheckpointError(f"{start!r} is {arch}; accepted: a ResNet, a U-Net or a timm encoder for images.")
    name, settings = arch.encoder_name, [f"network.encoder={arch.encoder_name}"]
    if (width := arch.args.get("width", HOST_WIDTH)) != HOST_WIDTH:
        name, settings = f"{name} of width {width}", [*settings, f"network.width={width}"]
    return name, tuple(settings)


def pilot(study: Study) -> Study:
    """The study's first start with all labels and one seed: what the budget reaches, and how long a run takes."""
    first = next(start for start in study.starts if start.label == start.baseline)
    steps = study.recipe_at(first, study.rates[0]).optim.steps
    name = f"{study.name}_pilot_{steps}"
    return replace(study, name=name, starts=(first,), shares=(max(study.shares),), seeds=study.seeds[:1], earlier=())


def estimate(study: Study, pilots: Mapping[str, Any]) -> str:
    """How long a study takes, from the runs of its pilot."""
    seconds = 3600 * pilots["core hours"] / max(pilots["runs"][0], 1)
    hours = study.runs() * seconds / 3600
    return f"{seconds:.0f} s a run: {study.runs()} runs are {hours:.1f} core hours, {hours / 2:.1f} hours of two cores."


def _without_paths(settings: Sequence[str]) -> list[str]:
    """Settings as they can be published: those that name a file or folder of this machine are left out."""
    return [setting for setting in settings if "/" not in setting]
