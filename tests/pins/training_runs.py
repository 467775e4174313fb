"""A short training of a 2D, a 3D and a paired task by the command line, and all that its checkpoint folder says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from tests.front_door import geo_pretrain
from tests.pins.compare import without

DATA = Path(__file__).parents[1] / "data" / "pins"
TASKS = ("pri3d_view", "pointcontrast_nce", "ppkt")
# of the machine, of the moment, of bytes that depend on the order of sums, or written for people
VOLATILE = frozenset({"sha256", "size of text", "fingerprint", "seconds", "code", "python", "libraries", "notes"})


def train(task: str, recording: Path, folder: Path) -> Path:
    """Train the stored recipe for two steps; the checkpoint folder."""
    recipe = DATA / "recipes" / f"{task}.yaml"
    geo_pretrain("train", recipe, "--set", f"data.path={recording}", "--out", folder, "--device", "cpu")
    return folder


def describe(folder: Path) -> dict[str, Any]:
    """Everything of a checkpoint folder that is the same wherever the run is repeated."""
    return {
        "files": sorted(path.name for path in folder.iterdir() if path.is_file()),
        "tensors": {path.name: tensors(path) for path in sorted(folder.glob("*.safetensors"))},
        "config.json": config(folder / "config.json"),
        "recipe.yaml": canonical(yaml.safe_load((folder / "recipe.yaml").read_text())),
        "README.md": card((folder / "README.md").read_text()),
        "log.jsonl": log(folder / "log.jsonl"),
    }


def tensors(path: Path) -> dict[str, list[Any]]:
    """Type, shape, mean and mean size of every tensor of a file."""
    found: dict[str, list[Any]] = {}
    for name, tensor in sorted(load_file(path).items()):
        values = tensor.double()
        kind = str(tensor.dtype).removeprefix("torch.")
        summary = [values.mean().item(), values.abs().mean().item()] if tensor.numel() else [0.0, 0.0]
        found[name] = [kind, list(tensor.shape), *summary]
    return found


def config(path: Path) -> dict[str, Any]:
    """config.json as it is, but for what is volatile; weights have their exact size, text has not."""
    tree: dict[str, Any] = json.loads(path.read_text())
    for name, file in tree["files"].items():
        del file["xxh3"]  # new since these were stored: beside sha256, for loads
        if not name.endswith(".safetensors"):
            file["size of text"] = file.pop("size")
    licence = tree.pop("licence")  # whose "code" is no version
    return {**without(tree, VOLATILE), "licence": without(licence, frozenset({"base_model"}))}


def canonical(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe in the words of the first version, whose keys all later versions still read."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in recipe.items()}
    if isinstance(model := tree.get("model"), dict) and "encoder" in model:
        model["depth"] = int(model.pop("encoder").removeprefix("resnet"))
    if "teacher_encoder" in tree["task"]:
        tree["task"]["teacher_depth"] = int(tree["task"].pop("teacher_encoder").removeprefix("resnet"))
    del tree["data"]["path"]
    return renamed(tree)


RENAMED = {"match_released_code": "authors_exact", "license": "licence", "grayscale_prob": "grey_prob"}


def renamed(tree: Any) -> Any:
    """A tree whose keys have their first spelling."""
    if isinstance(tree, dict):
        return {RENAMED.get(key, key): renamed(value) for key, value in tree.items()}
    return tree


def card(text: str) -> dict[str, Any]:
    """The front matter of a model card, and its headings in one spelling."""
    _, front, body = text.split("---\n", 2)
    prose = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    headings = [line.replace("Licence", "License") for line in prose.splitlines() if line.startswith("#")]
    return {"front matter": yaml.safe_load(front), "headings": headings}


def log(path: Path) -> dict[str, list[float]]:
    """What every line of a log says, by name, but for speeds."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = [name for name in lines[0] if not name.endswith("_per_second")]
    return {name: [line[name] for line in lines] for name in names}
