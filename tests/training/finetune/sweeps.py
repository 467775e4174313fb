"""What the tests of sweeps share: a labelled source, a tiny recipe, and runs that are written down, not trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from geo_pretrain.training.data.labelled.image import LabelledImage
from geo_pretrain.training.finetune_recipe import load_finetune_recipe

COLORS = np.array([[0, 0, 0], [210, 60, 50], [60, 200, 80], [70, 80, 220]])  # of classes 1 to 3
TINY = {
    "name": "squares_unet_r18",
    "task": "segmentation",
    "network": {"kind": "unet", "encoder": "resnet18", "width": 8},
    "data": {"source": "rooms", "size": [64, 96]},
    "optim": {"lr": 0.05, "batch": 2, "steps": 2},
    "evaluate": {"batch": 4},
    "workers": 0,
}


class Squares:
    """Images of three colors, some noise, and their classes; a strip has no label. Two images a scene."""

    name, classes = "squares", ("red", "green", "blue")

    def __init__(self, split, count=4, *, size=(64, 96), noise=8.0, only=(1, 2, 3)):
        self.split, self.count, self.size, self.noise, self.only = split, count, size, noise, only

    def ids(self):
        return [f"{self.split}_{k}" for k in range(self.count)]

    def scene_of(self, id):
        return str(int(id.rpartition("_")[2]) // 2)

    def fingerprint(self):
        return f"{self.split} {self.count} {self.noise}"

    def load(self, id):
        rng = np.random.default_rng(sum(map(ord, id)))
        height, width = self.size
        blocks = rng.choice(self.only, (height // 16, width // 16)).astype(np.uint8)
        labels = blocks.repeat(16, 0).repeat(16, 1)
        image = COLORS[labels] + rng.normal(0, self.noise, (height, width, 3))
        labels[:3] = 0
        return LabelledImage(id, image.clip(0, 255).astype(np.uint8), labels, None)


def tiny_recipe(folder, *overrides):
    path = folder / "squares.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return load_finetune_recipe(str(path), overrides)


class Written:
    """Stands in for `finetune`: writes what a run writes, without training. Calls are kept."""

    def __init__(
        self, score=lambda backbone, fraction, seed: 0.5, *, images=400, train="t", val="v", uses="last", metric="miou"
    ):
        self.score, self.images, self.train, self.val, self.uses = score, images, train, val, uses
        self.metric, self.calls, self.fail_at = metric, [], None

    def __call__(self, recipe, backbone, out, **options):
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((backbone, recipe.data.fraction, recipe.seed))
        self.options = options
        write_run(recipe, backbone, out, self.score(backbone, recipe.data.fraction, recipe.seed), self)


def write_run(recipe, backbone, out: Path, score, how) -> None:
    """The parts of a finished run's folder that a sweep reads, see `finetune.folder`."""
    scores = {how.metric: score, "accuracy": 0.9}
    measured = {"step": 2, "scores": scores, "per_class": {"iou": {}}, "details": {}}
    fraction = recipe.data.fraction
    out.mkdir(parents=True)
    (out / "recipe.yaml").write_text(recipe.to_yaml())
    data = {
        "format": 1,
        "recipe": recipe.name,
        "task": recipe.task,
        "metric": how.metric,
        "uses": how.uses,
        "score": score,
        "seed": recipe.seed,
        "backbone": {"name": backbone, "digest": "0"},
        "data": {
            "source": "squares",
            "fraction": fraction,
            "train_images": round(how.images * fraction),
            "train_fingerprint": f"{how.train} {fraction}",
            "val_fingerprint": how.val,
            "classes": ["red", "green", "blue"],
        },
        "steps": 2,
        "last": measured,
        "best": measured,
        "quirks": {"absent classes": "are left out of the mean (mended)"},
    }
    (out / "results.json").write_text(json.dumps(data))
