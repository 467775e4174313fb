"""Reports of a sweep: Markdown, JSON, and a curve of score against share of data."""

from __future__ import annotations

import json
from pathlib import Path

from geo_pretrain.errors import require
from geo_pretrain.training.data.labelled.registry import data_terms
from geo_pretrain.training.evaluation.verdict import of_starts
from geo_pretrain.training.finetune.sweep import SweepResult
from geo_pretrain.training.networks import SCRATCH
from geo_pretrain.training.visualize.curves import draw_curves, percent, shown

TEXTS = {
    "miou": "mIoU",
    "ap": "AP",
    "ap50": "AP50",
    "ap25": "AP25",
    "instance_miou": "instance mIoU",
    "accuracy": "accuracy",
} | {f"{shape}_ap{threshold}": f"{shape} AP{threshold}" for shape in ("box", "mask") for threshold in ("", 50, 75)}


def write_report(result: SweepResult, out: Path) -> dict[str, Path]:
    """Write summary.json, summary.md and curve.png into `out`; returns their paths by these names.

    Raises `MissingDependency` without matplotlib, before anything is written.
    """
    require("matplotlib", "training")
    out.mkdir(parents=True, exist_ok=True)
    paths = {name: out / name for name in ("summary.json", "summary.md", "curve.png")}
    paths["summary.json"].write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    draw_curve(result, paths["curve.png"])
    paths["summary.md"].write_text(markdown(result, figure="curve.png"), encoding="utf-8")
    return paths


def markdown(result: SweepResult, *, figure: str | None = None) -> str:
    """Render the sweep as Markdown: its runs, the table with the papers' scores, deviations from the protocol."""
    text, seeds = metric_text(result.metric), sorted({seed for point in result.points for seed in point.values})
    lines = [f"# {result.recipe.name}: {text} against share of data", ""]
    if figure is not None:
        lines += [f"![{text} against share of the training images]({figure})", ""]
    lines += [*table(result), "", *verdicts(result)]
    license, terms = data_terms(result.recipe.data.source, result.recipe.data.license)
    counts = ", ".join(f"{percent(f)}: {count}" for f, count in sorted(result.images.items()))
    lines += [
        "",
        f"{text} (%) on {result.recipe.data.source}, {result.which} state of each run: mean ± sample standard "
        f"deviation over seeds {', '.join(map(str, seeds))}; without ± there is one seed. "
        f"Training images: {counts}.",
        "",
        f"Data: {result.recipe.data.source}, {license} ({terms}).",
    ]
    if result.paper:
        lines += [
            "",
            "*Italic* rows are what papers report, one run each, as far as known chosen on the validation images; they "
            "were not measured here.",
        ]
    if result.changed:
        lines += ["", f"The recipe differs from `{result.recipe.name}` as shipped: {'; '.join(result.changed)}."]
    if result.left_out:
        lines += ["", "Not all clouds could be used:", "", *(f"- {line}" for line in result.left_out)]
    if result.missing:
        lines += ["", f"Not run yet: {'; '.join(result.missing)}."]
    if result.protocol_deviations:
        lines += ["", "| protocol | this run |", "|---|---|"]
        lines += [f"| {name} | {what} |" for name, what in result.protocol_deviations.items()]
    return "\n".join(lines) + "\n"


def table(result: SweepResult) -> list[str]:
    """Lines of a Markdown table: one row per start, each paper's row below it, one column per share of data."""
    measured, reported = result.by_start()
    shares = sorted({p.fraction for p in result.points} | {row.fraction for row in result.paper})
    lines = [f"| start | {' | '.join(map(percent, shares))} |", "|---|" + "---:|" * len(shares)]
    for name in {**measured, **reported}:
        if name in measured:
            cells = [str(measured[name].get(share, "")) for share in shares]
            lines.append(f"| {shown(name)} | {' | '.join(cells)} |")
        for paper in dict.fromkeys(row.paper for row in reported.get(name, ())):
            rows = {row.fraction: row for row in reported[name] if row.paper == paper}
            tables = ", ".join(dict.fromkeys(rows[f].table for f in shares if f in rows))
            cells = [f"*{100 * rows[f].value:.1f}*" if f in rows else "" for f in shares]
            lines.append(f"| *{shown(name)}: {tables}* | {' | '.join(cells)} |")
    return lines


def verdicts(result: SweepResult) -> list[str]:
    """A sentence for each share of data: the best start beside random weights."""
    lines = []
    for share in sorted({point.fraction for point in result.points}):
        scores = {shown(point.backbone): point.values for point in result.points if point.fraction == share}
        lines.append(of_starts(scores, shown(SCRATCH), f"{percent(share)} of the data: "))
    given = {point.backbone for point in result.points}
    missing = "another start, such as -b pri3d_view_r18.rooms" if given == {SCRATCH} else "-b scratch"
    return [line for line in lines if line] or [f"Add {missing}: without it nobody knows what pre-training brought."]


def table_rows(result: SweepResult) -> list[tuple[str, ...]]:
    """The table for a terminal: a heading, then one row per start; the papers' scores in brackets after ours."""
    measured, _ = result.by_start()
    shares = sorted({p.fraction for p in result.points})
    papers: dict[tuple[str, float], str] = {}
    for row in result.paper:
        key = row.backbone, row.fraction
        papers[key] = papers.get(key, "") + f" [{row.table}: {100 * row.value:.1f}]"
    rows = [
        (shown(name), *(f"{scores.get(share, '')}{papers.get((name, share), '')}" for share in shares))
        for name, scores in measured.items()
    ]
    return [("start", *map(percent, shares)), *rows]


def draw_curve(result: SweepResult, path: Path) -> None:
    """Plot score against share of the training images, one line per start; see `visualize.curves`."""
    measured, reported = result.by_start()
    rows = {  # of several papers, the first: their protocols differ
        name: [(row.fraction, row.value, row.table) for row in rows if row.paper == rows[0].paper]
        for name, rows in reported.items()
    }
    draw_curves(measured, rows, path, title=result.recipe.name, metric=metric_text(result.metric))


def metric_text(metric: str) -> str:
    """The name of a metric as papers write it."""
    return TEXTS.get(metric, metric)
