"""Does each 3D pretext task learn? Toy runs on rooms over seeds, measured on held-out rooms against random weights.

    python -m benchmarks.pretext_3d [--recipes a,b] [--seeds 3] [--out runs/pretext_3d] [--results pretext_3d]

Trains every recipe below with --toy (all at the same number of steps and pairs) and measures, each beside the same
architecture with random weights: the voxel matching recall of 3D networks, on clouds as their camera sees them and
turned as in pre-training; the pixel-to-voxel recall of Pri3D's geometric prior; and the pixel matching recall of Pri3D
with view, geo and both. Finished runs and measurements in --out are not repeated, and an interrupted run goes on.
Writes benchmarks/results/<results>.json and prints its table for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write_results
from geo_pretrain.checkpoint import CONFIG, read_checkpoint
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.demo.pretraining import validation_spec
from geo_pretrain.training.distributed import join
from geo_pretrain.training.evaluation.features import RANDOM
from geo_pretrain.training.evaluation.matching import MatchingResult, compare_matching, compare_pixel_to_voxel
from geo_pretrain.training.pretrain import train
from geo_pretrain.training.recipe import Recipe, load_recipe

RECIPES = (
    "pointcontrast_nce_srunet34.rooms",
    "pointcontrast_hardest_srunet34.rooms",
    "csc_srunet34.rooms",
    "pri3d_geo_r18.rooms",
    "pri3d_view_r18.rooms",
    "pri3d_view_geo_r18.rooms",
)
PAIRS = 40  # and frames, for pixel-to-voxel recall


def trained(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train a recipe into `folder` unless it is there; how long it took."""
    if not (folder / CONFIG).exists() or not read_checkpoint(folder).finished:
        source = open_source(recipe.data)
        train(
            recipe, folder, source, find_pairs(source, recipe.data, skips=SkippedFrames()), join("cpu"), overwrite=True
        )
    elif (folder / "recipe.yaml").read_text() != recipe.to_yaml():
        sys.exit(f"{folder} was trained with other settings. Choose another --out, or remove it.")
    provenance = read_checkpoint(folder).provenance
    return {"steps": provenance["steps"], "pairs": provenance["data"]["pairs"], "seconds": provenance["seconds"]}


def measured(recipe: Recipe, folder: Path) -> dict[str, dict[str, MatchingResult]]:
    """All that can be measured of a checkpoint on held-out rooms: measurement -> weights -> result."""
    spec, task, name = validation_spec(recipe.data), recipe.task["name"], str(folder)
    options: dict[str, Any] = {"count": PAIRS, "seed": recipe.seed}
    results = {}
    if recipe.model is None:
        for turn in ("camera", recipe.task["rotation"]):
            results[f"voxel matching, {turn}"] = compare_matching(name, spec, turn=turn, **options)
    else:
        results["pixel matching"] = compare_matching(name, spec, **options)
    if task in ("pri3d_geo", "pri3d_view_geo"):
        results["pixel to voxel"] = compare_pixel_to_voxel(name, spec, **options)
    return results


def one_run(name: str, seed: int, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Train and measure one recipe with one seed, or read what an earlier call found."""
    recipe = load_recipe(name, [*overrides, f"seed={seed}"], toy=True)
    folder, found = out / name / str(seed), out / name / f"{seed}.json"
    run: dict[str, Any] = trained(recipe, folder)
    if not found.exists():
        results = measured(recipe, folder)
        tree = {
            measure: {"random" if weights == RANDOM else "trained": asdict(r) for weights, r in both.items()}
            for measure, both in results.items()
        }
        found.write_text(json.dumps(tree))
    return run | {"recall": json.loads(found.read_text())}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of one recipe, a number a seed."""
    tree: dict[str, Any] = {key: [run[key] for run in runs] for key in ("steps", "pairs", "seconds")}
    for measure, first in runs[0]["recall"].items():
        values = {weights: [round(run["recall"][measure][weights]["recall"], 4) for run in runs] for weights in first}
        over_pairs = [round(statistics.pstdev(run["recall"][measure]["trained"]["per_pair"]), 4) for run in runs]
        tree[measure] = {
            "threshold": f"{first['trained']['threshold']:g} {first['trained']['unit']}",
            "chance": round(first["trained"]["chance"], 4),
            **values,
            "trained, deviation over pairs": over_pairs,
            "mean gain": round(statistics.mean(values["trained"]) - statistics.mean(values["random"]), 4),
        }
    return tree


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown: mean over seeds (lowest to highest)."""

    def percent(values: list[float]) -> str:
        return f"{statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"

    lines = [
        "| recipe | recall of | chance | random weights | trained | training |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, tree in results.items():
        for measure, found in tree.items():
            if isinstance(found, dict):
                within = f"{measure}, {found['threshold']}"
                seconds = f"{tree['steps'][0]} steps, {statistics.median(tree['seconds']):.0f} s"
                cells = [f"{found['chance']:.1%}", percent(found["random"]), percent(found["trained"]), seconds]
                lines.append(f"| `{name}` | {' | '.join([within, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then write what there is of the recipes asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(RECIPES), help="comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/pretext_3d"), help="checkpoints and measurements")
    parser.add_argument("--results", default="pretext_3d", help="the name of the JSON file")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE in every recipe; may be repeated")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name in options.recipes.split(","):
        runs = []
        for seed in range(options.seeds):
            runs.append(one_run(name, seed, options.out, options.set))
            print(name, seed, json.dumps(summary(runs[-1:])), flush=True)
        results[name] = summary(runs)
    command = shlex.join(["python", "-m", "benchmarks.pretext_3d", *sys.argv[1:]])
    write_results(options.results, command, {"recipes": results, "machine": machine()}, timed=False)
    print(table(results))


if __name__ == "__main__":
    main()
