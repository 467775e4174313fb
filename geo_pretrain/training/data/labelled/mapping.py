"""Label maps from the ids in a data set's files to classes: one YAML file each in labels/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import yaml

from geo_pretrain.errors import BadFrame, unknown

LABELS = Path(__file__).parent / "labels"
LARGEST = 2**16  # ids are read from 8- and 16-bit images


@dataclass(frozen=True)
class LabelMap:
    """Maps ids in files to classes 1..C; 0 is ignored, ids that are not listed are errors."""

    name: str
    about: str
    classes: tuple[str, ...]
    ids: Mapping[int, int]

    @cached_property
    def table(self) -> np.ndarray:
        """The class of every id, int16 [65536]; -1 for unlisted ids."""
        table = np.full(LARGEST, -1, np.int16)
        for given, label in self.ids.items():
            table[given] = label
        return table

    def apply(self, ids: np.ndarray, path: object, unit: str = "pixels") -> np.ndarray:
        """Map ids to classes, uint8 of the same shape. Raises `BadFrame` naming `path`, the id and its pixels."""
        mapped = self.table[ids]
        wrong = mapped < 0
        if wrong.any():
            value = int(ids[wrong].min())
            raise BadFrame(path, f"label id {value} in {int((ids == value).sum())} {unit}; {self.accepted()}")
        return mapped.astype(np.uint8)

    def accepted(self) -> str:
        """Describe the ids a file may hold, such as "label map scannet20 accepts 0 to 40"."""
        runs: list[list[int]] = []
        for given in sorted(self.ids):
            if runs and given == runs[-1][1] + 1:
                runs[-1][1] = given
            else:
                runs.append([given, given])
        shown = ", ".join(f"{first} to {last}" if first < last else str(first) for first, last in runs)
        return f"label map {self.name} accepts {shown}"


def list_label_maps() -> list[str]:
    """Names that `label_map` knows."""
    return sorted(path.stem for path in LABELS.glob("*.yaml"))


@cache
def label_map(name: str) -> LabelMap:
    """Load a label map by name."""
    path = LABELS / f"{name}.yaml"
    if not path.is_file():
        raise unknown("label map", name, list_label_maps())
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    first, last = tree["ids"]
    ids = dict.fromkeys([*range(first, last + 1), *tree.get("ignore", [])], 0)
    for label, given in enumerate(tree["classes"].values(), 1):
        ids |= dict.fromkeys(given if isinstance(given, list) else [given], label)  # several ids may be one class
    return LabelMap(name, tree["about"], tuple(tree["classes"]), ids)
