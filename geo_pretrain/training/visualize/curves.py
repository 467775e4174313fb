"""Curves of score against share of data, one a start; with one share only, the starts stand side by side.

Colors are Okabe and Ito's, which color-blind readers tell apart; markers differ as well. What was measured is solid,
what a paper reports is dashed, hollow and italic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geo_pretrain.errors import DataError, require
from geo_pretrain.training.evaluation.metrics import Spread
from geo_pretrain.training.networks import IMAGENET, SCRATCH

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5B5B5B")  # without the yellow: too light
MARKERS = "osD^vPX"
FIXED = {SCRATCH: 6, IMAGENET: 5}  # indices into COLORS of these starts, in every figure
NAMES = {SCRATCH: "from scratch", IMAGENET: "ImageNet"}
INCHES, DPI = (8.0, 4.2), 130  # about 1040 pixels wide: read at the width of a README
LEGEND_ROW = 0.23  # inches

Measured = Mapping[str, Mapping[float, Spread]]  # start -> share of the data -> scores over seeds
Reported = Mapping[str, Sequence[tuple[float, float, str]]]  # start -> (share, score, the paper's table), shares rising


def draw_curves(measured: Measured, reported: Reported, path: Path, *, title: str, metric: str) -> None:
    """Plot the measured starts with error bars over seeds, and beside each what papers report of it.

    Scores and shares are from 0 to 1. Raises `MissingDependency` without matplotlib.
    """
    figure_class = require("matplotlib.figure", "training").Figure  # never pyplot: no window, no global state
    require("matplotlib.backends.backend_agg", "training")
    if not measured:
        raise DataError("The sweep has no finished run; a figure needs one.")
    with require("matplotlib", "training").rc_context({"font.size": 13, "axes.spines.top": False}):
        figure = figure_class(figsize=INCHES, dpi=DPI, layout="constrained")
        axes = figure.subplots()
        axes.spines["right"].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_ylabel(f"{metric} (%)")
        axes.set_title(title, loc="left", fontsize=14)
        shares = sorted({share for scores in measured.values() for share in scores})
        (_curves if len(shares) > 1 else _side_by_side)(axes, measured, reported, shares)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")


def shown(start: str) -> str:
    """The display name of a start."""
    return NAMES.get(start, start)


def percent(share: float) -> str:
    """A share as text: "20 %"."""
    return f"{100 * share:g} %"


def styles(starts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Color and marker of each start: the same for scratch and ImageNet in every figure."""
    others = [place for place in range(len(COLORS)) if place not in FIXED.values()]
    found = {name: {"color": COLORS[place], "marker": MARKERS[place]} for name, place in FIXED.items()}
    for number, name in enumerate(name for name in starts if name not in FIXED):
        turn, place = divmod(number, len(others))  # a repeated color gets another marker
        found[name] = {"color": COLORS[others[place]], "marker": MARKERS[(others[place] + turn) % len(MARKERS)]}
    return {name: found[name] for name in starts}


def _curves(axes: Any, measured: Measured, reported: Reported, shares: Sequence[float]) -> None:
    ticks = set(shares)
    for name, style in styles(list(measured)).items():
        x, spreads = zip(*sorted(measured[name].items()), strict=True)
        y, errors = [100 * spread.mean for spread in spreads], [100 * spread.std for spread in spreads]
        label = shown(name)
        axes.errorbar(_percents(x), y, errors, label=label, linewidth=2, markersize=7, capsize=4, **style)
        if reported.get(name):
            x, values, tables = zip(*reported[name], strict=True)
            label = f"{label} ({', '.join(dict.fromkeys(tables))})"
            axes.plot(_percents(x), _percents(values), "--", label=label, linewidth=1.3, **_hollow(style))
            ticks |= set(x)
    if shares[0] < 0.1:
        axes.set_xscale("log")
    places = _percents(sorted(ticks))
    axes.set_xticks(places, [f"{place:g}" for place in places])
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


def _side_by_side(axes: Any, measured: Measured, reported: Reported, shares: Sequence[float]) -> None:
    (share,) = shares
    cited = []
    for place, (name, style) in enumerate(styles(list(measured)).items()):
        spread = measured[name][share]
        error = 100 * spread.std if len(spread.values) > 1 else None
        axes.errorbar([place], [100 * spread.mean], error, markersize=9, capsize=6, linestyle="none", **style)
        _beside(axes, place, spread.mean, str(spread), right=True)
        for other, value, table in reported.get(name, ()):
            if other == share:
                axes.plot([place], [100 * value], linestyle="none", **_hollow(style))
                _beside(axes, place, value, f"{100 * value:.1f}", right=False)
                cited.append(table)
    axes.set_xlim(-0.5, len(measured) - 0.3)
    axes.set_xticks(range(len(measured)), [_wrapped(shown(name)) for name in measured], fontsize=12)
    note = f"\nhollow: as {', '.join(dict.fromkeys(cited))} report" if cited else ""
    axes.set_xlabel(f"{percent(share)} of the training images{note}")


def _percents(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


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


def _wrapped(name: str) -> str:
    """Wrap a long name into two lines."""
    cut = name.find("_", len(name) // 2)
    return name if len(name) < 16 or cut < 0 else f"{name[:cut]}\n{name[cut:]}"
