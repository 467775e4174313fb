"""Tables of 3D awareness: the best layer of every backbone, and all layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from geo_pretrain.files import write_text
from geo_pretrain.training.evaluation.awareness.run import LEADS, Awareness
from geo_pretrain.training.evaluation.verdict import of_starts

RESULTS, PAGE = "awareness.json", "awareness.md"
TITLES = {
    "matching": "Matching recall",
    "depth": "Depth, linear probe",
    "normals": "Surface normals, linear probe",
    "semantic": "Classes, linear probe",
}
HEADS = {
    "recall": "all pairs",
    "d1": "< 1.25",
    "d2": "< 1.25^2",
    "d3": "< 1.25^3",
    "miou": "mIoU",
}
Table = tuple[str, list[str], list[list[str]]]  # title, head, rows


def best_tables(results: Awareness) -> list[Table]:
    """A table for each measure: every backbone at its best layer."""
    return [_table(results, measure, every_layer=False) for measure in measures_of(results)]


def verdicts(results: Awareness) -> list[str]:
    """A sentence for each measure: the best backbone beside the same network with random weights."""
    lines = []
    for measure in measures_of(results):
        found = {
            name: results.spread(name, measure, results.best(name, measure), LEADS[measure])
            for name in {*results.random, *results.random.values()}
            if measure in results.scores.get(name, {})
        }
        given = [name for name in results.random if name in found]
        best = max(given, key=lambda name: found[name].mean, default=None)
        if best is not None and (twin := results.random[best]) in found:
            by_seed = {name: dict(enumerate(found[name].values)) for name in (twin, best)}
            lines.append(of_starts(by_seed, twin, f"{TITLES[measure]}: "))
    return lines


def layer_tables(results: Awareness) -> list[Table]:
    """A table for each measure: every layer of every backbone, the best one marked."""
    return [_table(results, measure, every_layer=True) for measure in measures_of(results)]


def measures_of(results: Awareness) -> list[str]:
    """What was measured, in order."""
    return [measure for measure in TITLES if any(measure in found for found in results.scores.values())]


def page(results: Awareness, command: str = "") -> str:
    """The tables in markdown."""
    lines = ["# 3D awareness", ""]
    if command:
        lines += ["```", command, "```", ""]
    lines += [setting(results), ""]
    for heading, tables in (("Best layers", best_tables(results)), ("All layers", layer_tables(results))):
        lines += [f"## {heading}", ""]
        for title, head, rows in tables:
            lines += [f"**{title}**", "", _row(head), _row(["---"] * len(head)), *map(_row, rows), ""]
        if heading == "Best layers":
            lines += [f"{line}\n" for line in verdicts(results)]
    return "\n".join(lines)


def setting(results: Awareness) -> str:
    """What was looked at, and how, in a few sentences."""
    data, spec = results.data, results.spec
    height, width = spec.size
    scenes = "scene" if data["scenes"] == 1 else "scenes"
    pairs = "; ".join(f"{bin}: {', '.join(map(str, counts))}" for bin, counts in data["pairs"].items())
    by = "overlap" if data["modality"] == "3d" else "viewpoint"
    matched = f" Pairs of each seed by {by}: {pairs}." if any(map(any, data["pairs"].values())) else ""
    return (
        f"{data['frames']} frames of {data['scenes']} {scenes} of {data['source']}, {height}x{width}; {data['split']}; "
        f"{spec.seeds} seeds, ± is the sample standard deviation over them.{matched}"
    )


def write_report(results: Awareness, folder: Path, command: str = "") -> None:
    """Write awareness.json and awareness.md."""
    write_text(folder / RESULTS, json.dumps({"command": command} | results.to_dict(), indent=1) + "\n")
    write_text(folder / PAGE, page(results, command))


def _table(results: Awareness, measure: str, *, every_layer: bool) -> Table:
    metrics: list[str] = []
    for found in results.scores.values():
        for scores in found.get(measure, {}).values():
            metrics += [metric for metric in scores if metric not in metrics]
    rows = []
    for name, found in results.scores.items():
        if measure not in found:
            continue
        best = results.best(name, measure)
        for layer in found[measure] if every_layer else [best]:
            mark = "*" if every_layer and layer == best else ""
            rows.append([name, f"{layer}{mark}", *(_cell(results, name, measure, layer, m) for m in metrics)])
    return _title(results, measure), ["backbone", "layer", *(HEADS.get(m, m) for m in metrics)], rows


def _title(results: Awareness, measure: str) -> str:
    spec = results.spec
    if measure == "matching" and results.data["modality"] == "3d":
        return f"{TITLES[measure]} (%) within {spec.within('voxels'):g} voxels, by turn and overlap"
    if measure == "matching":
        return f"{TITLES[measure]} (%) by viewpoint at {spec.within('px'):g} px, and of all pairs by distance"
    units = {"depth": "%, rmse in m", "normals": "% below an error, rmse in degrees"}.get(measure, "%")
    return f"{TITLES[measure]} ({units})"


def _cell(results: Awareness, name: str, measure: str, layer: str, metric: str) -> str:
    if metric not in results.scores[name][measure][layer]:
        return "-"
    spread = results.spread(name, measure, layer, metric)
    if metric != "rmse":
        return str(spread)
    digits = 2 if measure == "depth" else 1
    return f"{spread.mean:.{digits}f}" + (f" ± {spread.std:.{digits}f}" if len(spread.values) > 1 else "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
