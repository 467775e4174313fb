"""Curves of 3D awareness: recall by viewpoint and by distance, probes by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geo_pretrain.errors import DataError, require
from geo_pretrain.training.evaluation.awareness.report import TITLES, measures_of
from geo_pretrain.training.evaluation.awareness.run import INPUT_2D, INPUT_3D, LEADS, Awareness
from geo_pretrain.training.evaluation.awareness.spec import TURNS
from geo_pretrain.training.evaluation.metrics import Spread
from geo_pretrain.training.visualize.curves import DPI, styles

INCHES = (6.4, 4.0)  # of a panel
LEGEND_ROW = 0.26  # inches
UNITS = {"depth": "depth within 1.25 x (%)", "normals": "normals within 11.25° (%)", "semantic": "classes, mIoU (%)"}
CONTROL = "#777777"  # of what is measured without a network: it has no layers, and is a line across
DASHES = ("--", ":", "-.")
HELD = {"camera": "held by the camera", "upright": "turned upright", "full": "turned at random"}  # of clouds

Style = Mapping[str, Any]


def draw_awareness(results: Awareness, path: Path) -> None:
    """Plot recall of the best layer by viewpoint and by distance, and the score of each layer in each probe (PNG).

    Error bars are standard deviations over seeds. Raises `MissingDependency` without matplotlib.
    """
    figure_class = require("matplotlib.figure", "training").Figure  # never pyplot: no window, no global state
    require("matplotlib.backends.backend_agg", "training")
    measured = measures_of(results)
    if not measured:
        raise DataError("Nothing was measured; a picture needs a result.")
    recalls = TURNS if results.data["modality"] == "3d" else ("deg", "px")
    panels = [kind for measure in measured for kind in (recalls if measure == "matching" else (measure,))]
    networks = [name for name in results.scores if name != INPUT_2D and not name.startswith(INPUT_3D)]
    looks = styles(networks)
    down = -(-len(panels) // 2)
    legend = LEGEND_ROW * (1 + len(networks))
    with require("matplotlib", "training").rc_context({"font.size": 11, "axes.spines.top": False}):
        size = (INCHES[0] * min(2, len(panels)), INCHES[1] * down + legend)
        figure = figure_class(figsize=size, dpi=DPI, layout="constrained")
        grid = figure.subplots(down, min(2, len(panels)), squeeze=False).flatten()
        for axes, kind in zip(grid, panels, strict=False):
            axes.spines["right"].set_visible(False)
            axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
            (_recall if kind in recalls else _layers)(axes, results, kind, looks)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        handles = {label: h for axes in grid for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")


def _recall(axes: Any, results: Awareness, kind: str, looks: Mapping[str, Style]) -> None:
    """Recall of each backbone's best layer in bins of angles ("deg"), of overlaps for a turn, or by distance ("px")."""
    metrics: list[str] = []
    for name in looks:
        for metric in results.scores[name]["matching"][results.best(name, "matching")]:
            metrics += [metric] if kind in metric.split() and metric not in metrics else []
    for name, style in looks.items():
        layer = results.best(name, "matching")
        own = [m for m in metrics if m in results.scores[name]["matching"][layer]]
        spreads = [results.spread(name, "matching", layer, metric) for metric in own]
        _line(axes, [metrics.index(metric) for metric in own], spreads, name, style)
    axes.set_xticks(range(len(metrics)), [metric.replace(kind, "").strip() for metric in metrics])
    axes.set_ylim(bottom=0)
    within = f"within {results.spec.within('px'):g} px"
    if kind not in ("deg", "px"):
        within = f"within {results.spec.within('voxels'):g} voxels"
    title, axis = {
        "deg": (f"{within}, by viewpoint", "angle between the cameras (degrees)"),
        "px": ("by distance", "right within (px)"),
    }.get(kind, (f"{within}, {HELD.get(kind, '')}", "overlap of the clouds"))
    axes.set_title(f"{TITLES['matching']}, {title}", loc="left", fontsize=12)
    axes.set_xlabel(axis)
    axes.set_ylabel("recall (%), best layer")


def _layers(axes: Any, results: Awareness, measure: str, looks: Mapping[str, Style]) -> None:
    """The metric that ranks layers, from the first layer to the last; the control is a line across."""
    for name, found in results.scores.items():
        layers = list(found.get(measure, {}))
        spreads = [results.spread(name, measure, layer, LEADS[measure]) for layer in layers]
        if name in looks:
            _line(axes, _even(len(layers)), spreads, name, looks[name])
        else:
            for layer, spread, dashes in zip(layers, spreads, DASHES, strict=False):
                label = f"{name}, no network" if layer == "input" else f"{name}: {layer}"
                axes.axhline(100 * spread.mean, color=CONTROL, linestyle=dashes, linewidth=1.5, label=label)
    axes.set_xticks([0, 1], ["first", "last"])
    axes.set_xlabel("layer")
    axes.set_ylabel(UNITS[measure])
    axes.set_title(f"{TITLES[measure]}, by layer", loc="left", fontsize=12)


def _line(axes: Any, x: Sequence[float], spreads: Sequence[Spread], name: str, style: Style) -> None:
    values, errors = [100 * spread.mean for spread in spreads], [100 * spread.std for spread in spreads]
    axes.errorbar(x, values, errors, label=name, linewidth=2, markersize=6, capsize=3, **style)


def _even(count: int) -> list[float]:
    """`count` places from 0 to 1."""
    return [k / max(count - 1, 1) for k in range(count)]
