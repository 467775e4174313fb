"""Reports of a sweep: Markdown, JSON, a curve of score against share of data, and predictions side by side.

Colors are Okabe and Ito's, which color-blind readers tell apart; markers differ as well. What was measured is solid,
what a paper reports is dashed, hollow and italic.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.torch import load_file

from geo_pretrain.errors import DataError, RecipeError, require
from geo_pretrain.training.data.labelled.image import LabelledImage, LabelledSource
from geo_pretrain.training.data.labelled.registry import data_terms, open_labelled
from geo_pretrain.training.evaluation.matching import spread_evenly
from geo_pretrain.training.finetune.folder import MODEL, PICTURE, RESULTS
from geo_pretrain.training.finetune.published import PaperRow
from geo_pretrain.training.finetune.registry import backbone_init, build_finetune_task
from geo_pretrain.training.finetune.segmentation import Segmentation
from geo_pretrain.training.finetune.sweep import SweepResult, read_plan, run_recipe
from geo_pretrain.training.networks import IMAGENET, SCRATCH
from geo_pretrain.training.visualize import results

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5B5B5B")  # without the yellow: too light
MARKERS = "osD^vPX"
FIXED = {SCRATCH: 6, IMAGENET: 5}  # indices into COLORS of these starts, in every figure
TEXTS = {"miou": "mIoU"} | {
    f"{shape}_ap{threshold}": f"{shape} AP{threshold}" for shape in ("box", "mask") for threshold in ("", 50, 75)
}
NAMES = {SCRATCH: "from scratch", IMAGENET: "ImageNet"}
INCHES, DPI = (8.0, 4.2), 130  # about 1040 pixels wide: read at the width of a README
LEGEND_ROW = 0.23  # inches


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
    lines += table(result)
    license, terms = data_terms(result.recipe.data.source)
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
    if result.missing:
        lines += ["", f"Not run yet: {'; '.join(result.missing)}."]
    if result.protocol_deviations:
        lines += ["", "| protocol | this run |", "|---|---|"]
        lines += [f"| {name} | {what} |" for name, what in result.protocol_deviations.items()]
    return "\n".join(lines) + "\n"


def table(result: SweepResult) -> list[str]:
    """Lines of a Markdown table: one row per start, the paper's row below it, one column per share of data."""
    shares = sorted({p.fraction for p in result.points} | {row.fraction for row in result.paper})
    lines = [f"| start | {' | '.join(map(percent, shares))} |", "|---|" + "---:|" * len(shares)]
    for name in starts(result):
        points = {p.fraction: p for p in result.points if p.backbone == name}
        rows = {row.fraction: row for row in result.paper if row.backbone == name}
        if points:
            cells = [str(points[f].spread) if f in points else "" for f in shares]
            lines.append(f"| {shown(name)} | {' | '.join(cells)} |")
        if rows:
            tables = ", ".join(dict.fromkeys(rows[f].table for f in shares if f in rows))
            cells = [f"*{100 * rows[f].value:.1f}*" if f in rows else "" for f in shares]
            lines.append(f"| *{shown(name)}: {tables}* | {' | '.join(cells)} |")
    return lines


def table_rows(result: SweepResult) -> list[tuple[str, ...]]:
    """The table for a terminal: a heading, then one row per start; the paper's score in brackets after ours."""
    shares = sorted({p.fraction for p in result.points})
    points = {(p.backbone, p.fraction): p for p in result.points}
    papers = {(row.backbone, row.fraction): row for row in result.paper}
    rows: list[tuple[str, ...]] = [("start", *map(percent, shares))]
    for name in dict.fromkeys(p.backbone for p in result.points):
        cells = []
        for share in shares:
            point, paper = points.get((name, share)), papers.get((name, share))
            said = f" [{paper.table}: {100 * paper.value:.1f}]" if paper is not None else ""
            cells.append((str(point.spread) if point is not None else "") + said)
        rows.append((shown(name), *cells))
    return rows


def draw_curve(result: SweepResult, path: Path) -> None:
    """Plot score against share of the training images, one line per start, with error bars over seeds.

    With one share only, the starts stand side by side.
    """
    figure_class = require("matplotlib.figure", "training").Figure  # never pyplot: no window, no global state
    require("matplotlib.backends.backend_agg", "training")
    if not result.points:
        raise DataError("The sweep has no finished run; a figure needs one.")
    with require("matplotlib", "training").rc_context({"font.size": 13, "axes.spines.top": False}):
        figure = figure_class(figsize=INCHES, dpi=DPI, layout="constrained")
        axes = figure.subplots()
        axes.spines["right"].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_ylabel(f"{metric_text(result.metric)} (%)")
        axes.set_title(result.recipe.name, loc="left", fontsize=14)
        shares = sorted({p.fraction for p in result.points})
        (_curves if len(shares) > 1 else _side_by_side)(axes, result, shares)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")


def draw_predictions(
    images: Sequence[LabelledImage],
    predictions: Mapping[str, Sequence[np.ndarray]],
    classes: Sequence[str],
    path: Path,
) -> None:
    """Write a grid with one row per image: the image, its labels, and the prediction of each start.

    `predictions`: start -> class ids [H, W] of each image, 1.. (0: none), of any size; `classes` names 1...
    """
    for name, given in predictions.items():
        if len(given) != len(images):
            raise DataError(f"{name}: {len(given)} predictions for {len(images)} images.")
    rows = []
    for number, labelled in enumerate(images):
        if labelled.semantic is None:
            raise DataError(f"Image {labelled.id} has no labels of pixels; the picture shows them.")
        rows.append((labelled.image, labelled.semantic, [guesses[number] for guesses in predictions.values()]))
    results.draw_predictions(rows, [shown(name) for name in predictions], classes, path)


def draw_starts(
    out: Path,
    path: Path,
    *,
    fraction: float | None = None,
    seed: int | None = None,
    images: int = 4,
    sources: tuple[LabelledSource, LabelledSource] | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Draw predictions of a segmentation sweep's fine-tuned networks on evenly spaced validation images.

    `fraction` and `seed` None: the largest share, and the first seed, that is finished. `sources` and `init_kwargs` are
    those of the sweep. Raises `DataError` when there is no such finished run, `RecipeError` for other tasks.
    """
    recipe, held, runs = read_plan(out)
    if recipe.task != "segmentation":
        raise RecipeError(f"'task' is {recipe.task!r}; accepted is segmentation. Each run has its own {PICTURE}.")
    done = [run for run in runs if (run.folder / RESULTS).exists()]
    done = [run for run in done if fraction in (None, run.fraction) and seed in (None, run.seed)]
    if not done:
        raise DataError(f"{out}: no finished run of the share and seed asked for.")
    largest = max(run.fraction for run in done)
    chosen = largest, min(run.seed for run in done if run.fraction == largest)
    shown_runs = {run.label: run for run in done if (run.fraction, run.seed) == chosen}
    spec, where = recipe.data, dict(init_kwargs or {})
    opened = None if spec.path is None else Path(spec.path)
    if sources is None:
        val = open_labelled(spec.source, opened, "val", task="segmentation", options=spec.options)
    else:
        val = sources[1]
    ids = spread_evenly(val.ids(), images)
    predictions = {}
    for label in (label for label in held if label in shown_runs):
        run = shown_runs[label]
        start = backbone_init(recipe, run.backbone, where)
        task = build_finetune_task(run_recipe(recipe, *chosen), start, val.classes, start.contract())
        task.module.load_state_dict(load_file(run.folder / MODEL))
        predictions[label] = [guess.numpy() for _, _, guess in cast(Segmentation, task).predictions(val, ids)]
    draw_predictions([val.load(id) for id in ids], predictions, val.classes, path)


def starts(result: SweepResult) -> list[str]:
    """Names of all rows: measured starts in the sweep's order, then starts that only papers report."""
    return list(dict.fromkeys([*(p.backbone for p in result.points), *(row.backbone for row in result.paper)]))


def metric_text(metric: str) -> str:
    """The name of a metric as papers write it."""
    return TEXTS.get(metric, metric)


def shown(backbone: str) -> str:
    """The display name of a start."""
    return NAMES.get(backbone, backbone)


def percent(fraction: float) -> str:
    """A share as text: "20 %"."""
    return f"{100 * fraction:g} %"


def _curves(axes: Any, result: SweepResult, shares: Sequence[float]) -> None:
    measured = list(dict.fromkeys(p.backbone for p in result.points))
    for name, style in _styles(measured).items():
        points = sorted((p for p in result.points if p.backbone == name), key=lambda p: p.fraction)
        x, y = [100 * p.fraction for p in points], [100 * p.spread.mean for p in points]
        errors = [100 * p.spread.std for p in points]
        axes.errorbar(x, y, errors, label=shown(name), linewidth=2, markersize=7, capsize=4, **style)
        rows = sorted((row for row in result.paper if row.backbone == name), key=lambda row: row.fraction)
        _paper_line(axes, rows, name, style)
    if shares[0] < 0.1:
        axes.set_xscale("log")
    ticks = [100 * share for share in sorted({*shares, *(r.fraction for r in result.paper if r.backbone in measured)})]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("share of the training images (%)")
    handles, texts = axes.get_legend_handles_labels()
    order = sorted(range(len(texts)), key=lambda k: hasattr(handles[k], "get_linestyle"))  # error bars: measured first
    axes.figure.legend(
        [handles[k] for k in order],
        [texts[k] for k in order],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=11,
    )
    axes.figure.set_size_inches(INCHES[0], INCHES[1] + LEGEND_ROW * -(-len(texts) // 2))


def _paper_line(axes: Any, rows: Sequence[PaperRow], name: str, style: Mapping[str, Any]) -> None:
    if rows:
        tables = ", ".join(dict.fromkeys(row.table for row in rows))
        x, y = [100 * row.fraction for row in rows], [100 * row.value for row in rows]
        axes.plot(x, y, "--", label=f"{shown(name)} ({tables})", linewidth=1.3, **_hollow(style))


def _side_by_side(axes: Any, result: SweepResult, shares: Sequence[float]) -> None:
    points, tables = {p.backbone: p for p in result.points}, []
    for place, (name, style) in enumerate(_styles(list(points)).items()):
        point, spread = points[name], points[name].spread
        error = 100 * spread.std if len(spread.values) > 1 else None
        axes.errorbar([place], [100 * spread.mean], error, markersize=9, capsize=6, linestyle="none", **style)
        _beside(axes, place, spread.mean, str(spread), right=True)
        for row in result.paper:
            if (row.backbone, row.fraction) == (name, point.fraction):
                axes.plot([place], [100 * row.value], linestyle="none", **_hollow(style))
                _beside(axes, place, row.value, f"{100 * row.value:.1f}", right=False)
                tables.append(row.table)
    axes.set_xlim(-0.5, len(points) - 0.3)
    axes.set_xticks(range(len(points)), [_wrapped(shown(name)) for name in points], fontsize=12)
    reported = f"\nhollow: as {', '.join(dict.fromkeys(tables))} report" if tables else ""
    axes.set_xlabel(f"{percent(shares[0])} of the training images{reported}")


def _beside(axes: Any, place: int, value: float, text: str, *, right: bool) -> None:
    """Annotate a point: measured scores to the right, reported scores to the left in italics."""
    style = {"ha": "left", "style": "normal"} if right else {"ha": "right", "style": "italic"}
    offset = (12 if right else -12, 0)
    axes.annotate(
        text, (place, 100 * value), xytext=offset, textcoords="offset points", va="center", fontsize=11, **style
    )


def _hollow(style: Mapping[str, Any]) -> dict[str, Any]:
    """The hollow marker of a start's score in a paper."""
    return {**style, "markerfacecolor": "none", "markersize": 9}


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Color and marker of each start: the same for scratch and ImageNet in every figure."""
    others = [place for place in range(len(COLORS)) if place not in FIXED.values()]
    styles = {}
    for number, name in enumerate(name for name in names if name not in FIXED):
        turn, place = divmod(number, len(others))  # a repeated color gets another marker
        styles[name] = {"color": COLORS[others[place]], "marker": MARKERS[(others[place] + turn) % len(MARKERS)]}
    for name, place in FIXED.items():
        styles[name] = {"color": COLORS[place], "marker": MARKERS[place]}
    return {name: styles[name] for name in names}


def _wrapped(name: str) -> str:
    """Wrap a long name into two lines."""
    cut = name.find("_", len(name) // 2)
    return name if len(name) < 16 or cut < 0 else f"{name[:cut]}\n{name[cut:]}"
