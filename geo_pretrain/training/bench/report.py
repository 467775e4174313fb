"""The table of a benchmark: mean and deviation over seeds, with the random-initialization baseline of each group."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geo_pretrain.cards.markdown import around_marks
from geo_pretrain.cards.markdown import table as markdown_table
from geo_pretrain.training.bench.plan import BenchSpec, Row
from geo_pretrain.training.config import plain_types
from geo_pretrain.training.evaluation.metrics import Interval, Spread
from geo_pretrain.training.evaluation.verdict import over_seeds

MEASURES = ("matching", "probe", "finetuned")
HEAD = ("task", "matching recall", "linear-probe mIoU", "fine-tuned mIoU", "training")
BEGIN, END = "<!-- bench pretext: begin -->", "<!-- bench pretext: end -->"
Found = Mapping[tuple[str, int], Mapping[str, Any]]


def summarize(
    rows: Sequence[Row],
    seeds: Sequence[int],
    spec: BenchSpec,
    found: Found,
    failures: Mapping[tuple[str, int], str],
) -> dict[str, Any]:
    """Summarize a benchmark: the budget, one group per architecture and input, and the failures.

    A group: {"kind", "arch", "input", "of" (what was matched), "chance", "threshold", "random": row,
    "tasks": {task: row}}; a row: {"seeds": [...], a list of values a measure, and of tasks "training"}.
    """
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        runs = [found[row.task, seed] for seed in seeds if (row.task, seed) in found]
        if not runs:
            continue
        twin = runs[0]["twin"]
        if twin not in groups:
            groups[twin] = _group(twin, runs[0], [found[twin, seed] for seed in seeds if (twin, seed) in found])
        groups[twin]["tasks"][row.task] = _values(runs) | {"training": _training(runs)}
    ordered = dict(sorted(groups.items(), key=lambda item: item[1]["kind"]))  # stable: the order of tasks otherwise
    missing = {row.task: row.why for row in rows if row.recipe is None}
    failed: dict[str, dict[str, str]] = {}
    for (name, seed), why in failures.items():
        failed.setdefault(name, {})[str(seed)] = why
    return {
        "budget": plain_types(spec),
        "seeds": list(seeds),
        "groups": ordered,
        "failed": failed,
        "not available": missing,
    }


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table for people: per group one row of random weights and one per task; then failures."""
    lines = []
    wanted = len(results["seeds"])
    for group in results["groups"].values():
        network = group["arch"].partition("(")[0]  # a terminal has no room for more
        lines.append([f"{group['kind']}, random weights", *_cells(group["random"], wanted), network])
        lines += [[task, *_cells(row, wanted), _text(row["training"])] for task, row in group["tasks"].items()]
    for task, why in results["failed"].items():
        seeds = ", ".join(why)
        lines.append([task, *[f"failed (seed {seeds})"] * 3, next(iter(why.values()))])
    lines += [[task, *["not available"] * 3, why] for task, why in results["not available"].items()]
    return lines


def gains(group: Mapping[str, Any], measure: str) -> dict[str, Interval]:
    """What each task of a group gains over random weights, over the seeds that both have (one may have failed)."""
    random = dict(zip(group["random"]["seeds"], group["random"][measure], strict=True))
    found: dict[str, Interval] = {}
    for task, row in group["tasks"].items():
        ours = dict(zip(row["seeds"], row[measure], strict=True))
        if both := [seed for seed in ours if seed in random]:
            found[task] = over_seeds([ours[seed] for seed in both], [random[seed] for seed in both])
    return found


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """A sentence for each group and measure: which tasks are above random weights beyond chance."""
    lines = []
    for group in results["groups"].values():
        for measure, title in zip(MEASURES, HEAD[1:4], strict=True):
            found = gains(group, measure)
            sure = [task for task, gain in found.items() if gain.low > 0]
            below = [task for task, gain in found.items() if gain.high < 0]
            alone = [task for task, gain in found.items() if math.isinf(gain.high)]
            text = f"above random weights beyond chance: {', '.join(sure) or 'none'}"
            text += "".join(f"; {what}: {', '.join(of)}" for what, of in (("below", below), ("one seed", alone)) if of)
            if found and len(alone) == len(found):
                text = "one seed, so chance is not judged; give more --seed"
            lines.append(f"{group['kind']}, {title}: {text}.")
    return lines


def markdown(results: Mapping[str, Any]) -> str:
    """Render the budget and the table in Markdown, in %, as mean ± sample standard deviation over seeds."""
    budget, seeds = results["budget"], results["seeds"]
    scale = "toy networks and rooms" if budget["toy"] else "the recipes' own networks and rooms"
    text = (
        f"{budget['steps']} steps of {budget['batch']} samples on {scale}; fine-tuning {budget['finetune_steps']} "
        f"steps of {budget['finetune_batch']}; seeds {', '.join(map(str, seeds))}. In %, mean ± sample standard "
        "deviation over seeds."
    )
    rows: list[Sequence[str]] = []
    for group in results["groups"].values():
        matched = f"matched: {group['of']}, {group['threshold']}, chance {100 * group['chance']:.1f}"
        note = f"{group['arch']}, {group['input']}; {matched}"
        rows.append([f"*{group['kind']}, random weights*", *_cells(group["random"], len(seeds)), note])
        rows += [
            [f"`{task}`", *_cells(row, len(seeds)), _text(row["training"])] for task, row in group["tasks"].items()
        ]
    for what, why in results["failed"].items():
        rows.append([f"`{what}`", *["failed"] * 3, next(iter(why.values())).replace("|", "/")])
    rows += [[f"`{task}`", *["not available"] * 3, why] for task, why in results["not available"].items()]
    return f"{text}\n\n{markdown_table(HEAD, rows)}"


def render(page: Path, results: Mapping[str, Any]) -> None:
    """Insert the table between the marks of a Markdown page. Raises `DataError` if the marks are missing."""
    before, after = around_marks(page, BEGIN, END)
    page.write_text(f"{before}{BEGIN}\n{markdown(results)}\n{END}{after}", encoding="utf-8")


def _group(twin: str, run: Mapping[str, Any], random: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    matching = run["matching"]
    return {
        **{key: run[key] for key in ("kind", "arch", "input")},
        "of": matching["of"],
        "chance": round(matching["chance"], 4),
        "threshold": f"{matching['threshold']:g} {matching['unit']}",
        "random": _values(random),
        "tasks": {},
    }


def _values(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def of(run: Mapping[str, Any], measure: str) -> float:
        return float(run[measure]["recall"] if measure == "matching" else run[measure])

    tree: dict[str, Any] = {"seeds": [run["seed"] for run in runs]}
    return tree | {measure: [round(of(run, measure), 4) for run in runs] for measure in MEASURES}


def _training(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = runs[0]["training"]
    tree = {key: first[key] for key in ("recipe", "steps", "batch", "views")}
    tree["seconds"] = [run["training"]["seconds"] for run in runs]
    if "first stage" not in runs[0]:
        return tree
    return tree | {"first stage": runs[0]["first stage"] | {"seconds": [run["first stage"]["seconds"] for run in runs]}}


def _cells(row: Mapping[str, Any], wanted: int) -> list[str]:
    """Format the three scores of a row."""
    return [_spread(row[measure], wanted) for measure in MEASURES]


def _spread(values: Sequence[float], wanted: int) -> str:
    if not values:
        return "-"
    text = str(Spread(tuple(values)))
    return text if len(values) == wanted else f"{text} ({len(values)} of {wanted} seeds)"


def _text(training: Mapping[str, Any]) -> str:
    """Format steps and time of a task's training."""
    text = f"{training['steps']} steps, {statistics.median(training['seconds']):.0f} s"
    first = training.get("first stage")
    if first is None:
        return text
    before = f"{first['steps']} of {first['recipe']}, {statistics.median(first['seconds']):.0f} s"
    return f"{before} + {text}" if first["continued"] else f"{text}; teacher {before}"
