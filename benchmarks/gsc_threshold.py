"""What does Geometric Set Consistency add to its first stage, and what does the segments' threshold change? Toy runs.

On rooms, a CPU:

    python -m benchmarks.gsc_threshold [--seeds 3] [--sweep-seeds 1] [--stage1 RECIPE] [--out runs/gsc]

For each seed: a first stage (--toy), and from it second stages of equal length and settings: the first stage's own loss
continued, the set loss with segments of k_thresh 0.01, and with the sets of ground-truth labels (the paper's upper
bound). The first --sweep-seeds seeds also have k_thresh 0.02 to 0.05 (the paper's ablation). Measured on held-out rooms
beside random weights: pixel matching recall, and the mIoU of a linear probe of the U-Net's features. Finished runs and
measurements in --out are not repeated, and an interrupted run goes on. Writes benchmarks/results/gsc_threshold.json and
prints its table for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.common import machine, write_results
from benchmarks.pretext_3d import trained
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.files import write_text
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.demo.pretraining import validation_spec
from geo_pretrain.training.evaluation.features import ImageExtractor, load_extractor
from geo_pretrain.training.evaluation.matching import evaluate_matching
from geo_pretrain.training.evaluation.probes import ProbeSpec, probe_backbone
from geo_pretrain.training.recipe import Recipe, load_recipe

RECIPE = "gsc_r18.rooms"
THRESHOLDS = (0.01, 0.02, 0.03, 0.04, 0.05)
RANDOM, FIRST, CONTINUED, LABELS = "random weights", "stage 1", "stage 1 continued", "sets of labels"
PAIRS = 40
MEASURES = ("matching recall", "linear probe mIoU")


class Measure:
    """Held-out rooms, opened once."""

    def __init__(self, recipe: Recipe) -> None:
        spec, size = validation_spec(recipe.data), {"height": recipe.data.size[0], "width": recipe.data.size[1]}
        self.source = open_source(spec, split="val")
        self.pairs = find_pairs(self.source, spec, skips=SkippedFrames())[:PAIRS]
        self.train, self.val = (
            open_labelled("rooms", None, split, task="segmentation", options=size) for split in ("train", "val")
        )

    def __call__(self, network: nn.Module, folder: Path, seed: int) -> dict[str, float]:
        """Both measures of a network with the contract of `folder`."""
        contract: Any = read_checkpoint(folder).contract
        extractor = ImageExtractor(network, contract)
        recall = evaluate_matching(extractor, self.source, self.pairs, size=contract.size, seed=seed).recall
        miou = probe_backbone(network, self.train, self.val, ProbeSpec(seed=seed)).miou
        return dict(zip(MEASURES, (round(recall, 4), round(miou, 4)), strict=True))


def second_stages(recipe: str, start: Path, seed: int, sweep: bool, overrides: list[str]) -> dict[str, Recipe]:
    """What is trained from a first stage, by its name in the table; `recipe` is the first stage's."""
    common = [*overrides, f"seed={seed}", f"model.init={start}"]
    set_loss = load_recipe(RECIPE, common, toy=True)
    same = {"steps": set_loss.optim.steps, "lr": set_loss.optim.lr, "bn_momentum": set_loss.optim.bn_momentum}
    equal = [f"optim.{key}={value}" for key, value in same.items()]
    stages = {
        # As in the recipes *.continued: all that the first stage trained goes on, the depth head too.
        CONTINUED: load_recipe(recipe, [*common, *equal, "task.keep_heads=true"], toy=True),
        LABELS: load_recipe(RECIPE, [*common, "task.sets=semantic"], toy=True),
    }
    for k_thresh in THRESHOLDS if sweep else THRESHOLDS[:1]:
        stages[f"k_thresh {k_thresh}"] = load_recipe(RECIPE, [*common, f"task.k_thresh={k_thresh}"], toy=True)
    return stages


def one_seed(options: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Train and measure everything of a seed, or read what earlier calls found: name -> measure -> value."""
    first = load_recipe(options.stage1, [f"seed={seed}"], toy=True)
    out: Path = options.out / str(seed)
    start, found = out / "stage1", out / "measured.json"
    results: dict[str, dict[str, float]] = json.loads(found.read_text()) if found.exists() else {}
    trained(first, start)
    stages = second_stages(options.stage1, start, seed, seed < options.sweep_seeds, options.set)
    measure = None
    for name, recipe in {RANDOM: None, FIRST: None, **stages}.items():
        folder = start if recipe is None else out / name.replace(" ", "_")
        if recipe is not None:
            trained(recipe, folder)
        if name not in results:
            measure = measure or Measure(first)
            extractor = load_extractor(folder, random_init=name == RANDOM, seed=seed)
            results[name] = measure(extractor.network, folder, seed)
            write_text(found, json.dumps(results))
            print(seed, name, results[name], flush=True)
    return results


def summary(seeds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """name -> measure -> a value a seed that has it."""
    names = sorted({name for seed in seeds for name in seed}, key=list(seeds[0]).index)
    return {name: {key: [seed[name][key] for seed in seeds if name in seed] for key in MEASURES} for name in names}


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """The results in Markdown: mean over seeds (lowest to highest)."""

    def percent(values: list[float]) -> str:
        spread = f" ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1%}{spread}"

    lines = [f"| weights | seeds | {' | '.join(MEASURES)} |", "| --- | --- | --- | --- |"]
    for name, found in results.items():
        cells = [percent(found[key]) for key in MEASURES]
        lines.append(f"| {name} | {len(found[MEASURES[0]])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then write what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sweep-seeds", type=int, default=1, help="seeds that have every threshold")
    parser.add_argument("--stage1", default="pri3d_view_r18.rooms", help="the recipe of the first stage")
    parser.add_argument("--out", type=Path, default=Path("runs/gsc"), help="checkpoints and measurements")
    parser.add_argument("--results", default="gsc_threshold", help="the name of the JSON file")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE in every second stage; may be repeated")
    options = parser.parse_args()
    results = summary([one_seed(options, seed) for seed in range(options.seeds)])
    set_loss = load_recipe(RECIPE, options.set, toy=True)
    settings = {
        "stage 1": options.stage1,
        "steps": [load_recipe(options.stage1, toy=True).optim.steps, set_loss.optim.steps],
        "task": set_loss.task,
        "validation pairs": PAIRS,
    }
    command = shlex.join(["python", "-m", "benchmarks.gsc_threshold", *sys.argv[1:]])
    write_results(
        options.results, command, {"settings": settings, "weights": results, "machine": machine()}, timed=False
    )
    print(table(results))


if __name__ == "__main__":
    main()
