"""ShapeNetPart (Yi et al., 2016): 16,881 objects of 16 categories as points, with 50 parts.

synsetoffset2category.txt                                category, tab, synset
02691156/MODEL.txt                                       a point a line: x y z nx ny nz part (0..49)
train_test_split/shuffled_{train,val,test}_file_list.json   ["shape_data/02691156/MODEL", ...]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, some
from geo_pretrain.files import parse_json
from geo_pretrain.training.data.files import checked_points, name_fault
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.listed import Y_UP_TO_Z_UP, ListedCloud, ListedClouds
from geo_pretrain.training.data.labelled.folders import need_folders

ARCHIVE = "shapenetcore_partanno_segmentation_benchmark_v0_normal"
LAYOUT = f"{ARCHIVE}/02691156/MODEL.txt and {ARCHIVE}/train_test_split/shuffled_train_file_list.json"
CATEGORIES = {  # synset -> category, number of its parts; parts are numbered through in this order
    "02691156": ("Airplane", 4), "02773838": ("Bag", 2), "02954340": ("Cap", 2), "02958343": ("Car", 4),
    "03001627": ("Chair", 4), "03261776": ("Earphone", 3), "03467517": ("Guitar", 3), "03624134": ("Knife", 2),
    "03636649": ("Lamp", 4), "03642806": ("Laptop", 2), "03790512": ("Motorbike", 6), "03797390": ("Mug", 2),
    "03948459": ("Pistol", 3), "04099429": ("Rocket", 3), "04225987": ("Skateboard", 3), "04379243": ("Table", 3),
}  # fmt: skip
SYNSETS = list(CATEGORIES)
FIRST = dict(zip(SYNSETS, np.cumsum([0, *(parts for _, parts in CATEGORIES.values())])[:-1].tolist(), strict=True))
PARTS = tuple(f"{name}/{FIRST[synset] + k}" for synset, (name, count) in CATEGORIES.items() for k in range(count))


@dataclass(frozen=True)
class ShapeNetPartOptions:
    """Options of ShapeNetPart. PointContrast does not say which objects it trains and reports on."""

    train: Literal["trainval", "train"] = "trainval"  # as PointNet++'s part_seg does: 14,007 objects; train: 12,137
    measure: Literal["test", "val"] = "test"  # the objects that validation runs on: 2,874; val: 1,870


class ShapeNetPart(ListedClouds):
    """One split; ids such as "02691156/MODEL", each its own scene.

    Points are in the file's unit, which is none in particular (data.cloud.normalize), and turned: y up becomes z up.
    `labels` are 1 + the file's part number, `category` counts the synsets from 1.
    """

    def category_of(self, id: str) -> int:
        """The object's category 1..16."""
        return 1 + SYNSETS.index(id.partition("/")[0])

    def load(self, id: str) -> LabelledCloud:
        path, synset = self.item(id).points, id.partition("/")[0]
        rows = read_rows(path, 7)
        parts, first = rows[:, 6].astype(np.int64), FIRST[synset]
        name, count = CATEGORIES[synset]
        wrong = (parts != rows[:, 6]) | (parts < first) | (parts >= first + count)
        if wrong.any():
            found = rows[wrong, 6].min()
            raise BadFrame(
                path, f"part {found:g} at {int(wrong.sum())} points; {name} has {first} to {first + count - 1}"
            )
        points = rows[:, :3] @ Y_UP_TO_Z_UP.T
        return LabelledCloud(id, points, None, 1 + parts, category=self.category_of(id))


def open_shapenetpart(path: Path, split: str, task: str, options: ShapeNetPartOptions) -> ShapeNetPart:
    """Open the objects of the split's lists; `path` is the unpacked archive or the folder that holds it."""
    need_folders(path, [], LAYOUT)
    root = path / ARCHIVE if (path / ARCHIVE).is_dir() else path
    lists = (
        {"trainval": ("train", "val"), "train": ("train",)}[options.train] if split == "train" else (options.measure,)
    )
    items: dict[str, ListedCloud] = {}
    for name in lists:
        for entry in _read_list(root / "train_test_split" / f"shuffled_{name}_file_list.json"):
            synset, model = entry.split("/")[-2:]
            id = f"{synset}/{model}"
            items[id] = ListedCloud(id, root / synset / f"{model}.txt")
    foreign = sorted({id for id in items if id.partition("/")[0] not in CATEGORIES})
    if foreign:
        raise DataError(f"The lists in {str(root / 'train_test_split')!r} name other categories: {some(foreign)}.")
    if not items:
        raise DataError(f"The lists {', '.join(lists)} in {str(root / 'train_test_split')!r} are empty.")
    return ShapeNetPart("shapenetpart", split, root, PARTS, items, options)


def read_rows(path: Path, columns: int) -> np.ndarray:
    """Read a text file with a point a line: float32 [N, columns]. Raises `BadFrame` with the first wrong line."""
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        raise BadFrame(path, "file of points is missing") from None
    except (OSError, ValueError) as error:
        raise BadFrame(path, f"file of points cannot be read ({error})") from None
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines:
        raise BadFrame(path, "no points")
    wrong = next((number for number, words in enumerate(lines, 1) if len(words) != columns), None)
    if wrong is not None:
        raise BadFrame(path, f"row {wrong} of {len(lines)} has {len(lines[wrong - 1])} numbers, expected {columns}")
    try:
        rows = np.array(lines, np.float64)
    except ValueError as error:
        raise BadFrame(path, f"a point is not made of numbers ({error})") from None
    checked_points(path, rows[:, :3])
    if not np.isfinite(rows).all():
        raise BadFrame(path, "a normal or a label is not finite")
    return rows.astype(np.float32)


def _read_list(path: Path) -> list[str]:
    """Read the entries of a list, each ending in synset/model."""
    try:
        entries = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"No list {str(path)!r}. Expected layout: {LAYOUT}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}).") from None
    if not isinstance(entries, list) or not all(isinstance(e, str) and e.count("/") >= 1 for e in entries):
        raise DataError(f"{path}: accepted is a JSON list of texts such as 'shape_data/02691156/MODEL'.")
    for entry in entries:
        if (fault := name_fault(entry)) is not None:
            raise DataError(f"{path}: has an entry that {fault}.")
    return entries
