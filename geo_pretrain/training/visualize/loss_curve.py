"""The loss curve of a run, drawn from its log: each loss over steps, pale as logged, dark as a running mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from geo_pretrain.errors import DataError, require
from geo_pretrain.files import parse_json
from geo_pretrain.training.visualize.curves import COLORS, DPI

NO_LOSSES = {"step", "lr", "images_per_second", "clouds_per_second", "seconds"}  # keys of a log's lines
WINDOWS = 50  # the running mean is over one part of so many
INCHES = (7.2, 3.4)


def read_losses(log: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The steps of a log and the losses at each: steps [N], name -> values [N].

    Losses that some lines lack are left out. Raises `DataError` where no line has a loss.
    """
    records = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue  # a line that was broken off
        if isinstance(record, dict) and "lr" in record and "step" in record:
            records.append(record)
    names = [key for key, value in (records[0] if records else {}).items() if _is_loss(key, value)]
    names = [name for name in names if all(_is_loss(name, record.get(name)) for record in records)]
    if not names:
        raise DataError(f"{log}: has no losses; accepted: the log.jsonl of a training run.")
    steps = np.array([record["step"] for record in records])
    return steps, {name: np.array([record[name] for record in records], dtype=float) for name in names}


def _is_loss(key: str, value: object) -> bool:
    return key not in NO_LOSSES and isinstance(value, int | float) and not isinstance(value, bool)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the last `width` values at each place, of fewer at the beginning.

    >>> running_mean(np.array([2.0, 4.0, 6.0]), 2).tolist()
    [2.0, 3.0, 5.0]
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def draw_loss_curve(log: Path, path: Path, *, title: str) -> None:
    """Plot the losses of a run over its steps. Raises `DataError`, and `MissingDependency` without matplotlib."""
    figure_class = require("matplotlib.figure", "training").Figure  # never pyplot: no window, no global state
    require("matplotlib.backends.backend_agg", "training")
    steps, losses = read_losses(log)
    with require("matplotlib", "training").rc_context({"font.size": 11, "axes.spines.top": False}):
        figure = figure_class(figsize=INCHES, dpi=DPI, layout="constrained")
        panels = figure.subplots(1, len(losses), squeeze=False)[0]
        for axes, (name, values), color in zip(panels, losses.items(), COLORS, strict=False):
            axes.spines["right"].set_visible(False)
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            mean = running_mean(values, max(len(values) // WINDOWS, 1))
            axes.plot(steps, mean, color=color, linewidth=1.8)
            low, high = np.percentile(values, [0.5, 99.5])
            axes.set_ylim(low - 0.05 * (high - low) - 1e-6, high + 0.05 * (high - low) + 1e-6)
            axes.set_xlabel("step")
            axes.set_title(f"loss: {name}", loc="left", fontsize=11)
            axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        figure.savefig(path, format="png", metadata={"Software": None})
