"""A short fine-tuning of each kind of network by the command line: its log and its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.front_door import geo_pretrain
from tests.pins.compare import without
from tests.pins.training_runs import DATA

KINDS = ("unet", "deeplabv3", "pspnet", "mask_rcnn")
VOLATILE = frozenset({"seconds", "code", "libraries", "digest", "confusion", "quirks", "terms", "released"})


def finetune(kind: str, folder: Path) -> Path:
    """Fine-tune by the stored recipe for a few steps, from random weights; the run's folder."""
    recipe = DATA / "recipes" / f"finetune_{kind}.yaml"
    geo_pretrain("finetune", recipe, "--backbone", "scratch", "--out", folder, "--device", "cpu")
    return folder


def describe(folder: Path) -> dict[str, Any]:
    """Everything of a fine-tuning run that is the same wherever it is repeated; keys of results in one spelling."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    return {
        "files": sorted(path.name for path in folder.iterdir() if path.is_file()),
        "log": [line for line in lines if "evaluation" not in line],
        "evaluations": [line for line in lines if "evaluation" in line],
        "results": without(results, VOLATILE),
    }
