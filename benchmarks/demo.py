"""The demo's claims over seeds: matching over pre-training seeds, mIoU over learning rates, starts and seeds.

    python -m benchmarks.demo            (about a quarter of an hour on two cores)

Writes benchmarks/results/demo.json. Every start gets every learning rate, so none is favored.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, get_args

from benchmarks.common import machine, write_results
from geo_pretrain.contract import ImageContract
from geo_pretrain.loading import load_backbone
from geo_pretrain.rooms import CLASSES
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.demo.pretraining import RECIPE, THRESHOLD, labelled_frames, untrained, validation_spec
from geo_pretrain.training.distributed import join
from geo_pretrain.training.evaluation.features import ImageExtractor
from geo_pretrain.training.evaluation.matching import evaluate_matching
from geo_pretrain.training.finetune.in_memory import FinetuneSpec, finetune_frames
from geo_pretrain.training.networks import Transfer, segmentation_unet
from geo_pretrain.training.pretrain import train
from geo_pretrain.training.recipe import load_recipe

LEARNING_RATES = (0.02, 0.05, 0.1)
SEEDS = (0, 1, 2)


def main() -> None:
    """Pre-train with each seed, then fine-tune from the first."""
    folder = Path(tempfile.mkdtemp(prefix="geo_pretrain_demo_"))
    recipe = load_recipe(RECIPE)
    source, val_spec = open_source(recipe.data), validation_spec(recipe.data)
    val = open_source(val_spec, split="val")
    pairs, val_pairs = (find_pairs(s, d, skips=SkippedFrames()) for s, d in ((source, recipe.data), (val, val_spec)))
    recall: dict[str, list[float]] = {"random": [], "pre-trained": []}
    for seed in SEEDS:
        run = load_recipe(RECIPE, [f"seed={seed}"])
        train(run, folder / str(seed), source, pairs, join("cpu"))
        networks = {"random": untrained(run), "pre-trained": load_backbone(folder / str(seed), decoder=True)}
        for name, network in networks.items():
            extractor = ImageExtractor(network, ImageContract())
            measured = evaluate_matching(extractor, val, val_pairs, size=run.data.size, threshold=THRESHOLD)
            recall[name].append(round(measured.recall, 4))
        print(seed, recall, flush=True)
    few, held_out = labelled_frames(source, val, recipe.data.size)
    pretrained = load_backbone(folder / str(SEEDS[0]), decoder=True)
    miou: dict[str, dict[str, list[float]]] = {}
    for lr in LEARNING_RATES:
        for transfer in get_args(Transfer):
            scores = []
            for seed in SEEDS:
                segmenter = segmentation_unet(pretrained, len(CLASSES), seed=seed, transfer=transfer)
                measured_on = finetune_frames(segmenter, ImageContract(), few, held_out, FinetuneSpec(lr=lr), seed=seed)
                scores.append(round(measured_on.miou, 4))
            miou.setdefault(transfer, {})[f"lr {lr:g}"] = scores
            print(lr, transfer, scores, flush=True)
    results: dict[str, Any] = {
        "recipe": RECIPE,
        f"matching recall at {THRESHOLD:g} px, by pre-training seed": recall,
        "mIoU by transferred part and learning rate, by fine-tuning seed": miou,
        "labelled images": len(few),
        "held-out images": len(held_out),
        "machine": machine(),
    }
    write_results("demo", "python -m benchmarks.demo", results)


if __name__ == "__main__":
    main()
