"""COCO's format: annotations/instances_SPLIT.json and a folder of images, masks as polygons or run lengths.

Category ids need not be contiguous: in order of id they become the classes 1..C. Crowds keep their flag.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, require, some, unknown
from geo_pretrain.files import expanded, parse_json
from geo_pretrain.training.data import files
from geo_pretrain.training.data.labelled.folders import need_folders
from geo_pretrain.training.data.labelled.image import Instances, LabelledImage

LAYOUT = "annotations/instances_{train2017,val2017}.json, {train2017,val2017}/*.jpg"


@dataclass(frozen=True)
class CocoOptions:
    """Options of the source."""

    images: str | None = None  # folder of the images; None: SPLIT/, images/SPLIT/, images/ or the data set's folder
    drop_empty: bool = False  # leave out images without an object that is no crowd, as Detectron2 does in training


class Coco:
    """A split of a data set in COCO's format; ids are the image ids, and each image is a scene of its own."""

    name = "coco"
    takes_boxes_alone = False  # objects without a mask

    def __init__(self, root: Path, split: str, config: CocoOptions | None = None, *, file: Path | None = None) -> None:
        """`file`: the annotations, where they are not where COCO has them."""
        config = config or CocoOptions()
        if file is None:
            need_folders(root, ["annotations"], LAYOUT)
        self.root, self.split, self.config = root, split, config
        self.file = file or _annotation_file(root, split)
        tree = _read(self.file)
        self.classes, self._class_of = self._categories(tree["categories"])
        self.file_ids = tuple(self._class_of)  # of the classes 1..C, in files
        self._images = self._entries(tree["images"])
        self._annotations = self._by_image(tree["annotations"])
        self.folder = self._image_folder(root, split, config)

    def ids(self) -> list[str]:
        """Image ids in ascending order, with `drop_empty` only those with an object."""
        if not self.config.drop_empty:
            return list(self._images)
        kept = [id for id, found in self._annotations.items() if any(not a.get("iscrowd", 0) for a in found)]
        if not kept:
            raise DataError(f"{self.file}: no image has an object that is not a crowd.")
        return kept

    def scene_of(self, id: str) -> str:
        """The image itself: which images share a scene is unknown."""
        return id

    def file_name(self, id: str) -> str:
        """The image's path below its folder, as in the annotations."""
        return str(self._entry(id)["file_name"])

    def load(self, id: str) -> LabelledImage:
        """Read one image. Raises `BadFrame`.

        Boxes are the annotated ones, clipped to the image; annotations without any area are left out (a few are).
        """
        entry = self._entry(id)
        path = self.folder / entry["file_name"]
        image = self._read_image(path, entry)
        height, width = image.shape[:2]
        if (entry.get("height", height), entry.get("width", width)) != (height, width):
            given = f"{entry.get('width', width)}x{entry.get('height', height)}"
            raise BadFrame(path, f"image is {width}x{height}, its annotation in {self.file.name} says {given}")
        boxes, classes, masks, crowd, alone = [], [], [], [], 0
        for annotation in self._annotations[id]:
            box = self._box(annotation, width, height)
            if box[2] <= box[0] or box[3] <= box[1]:
                continue
            boxes.append(box)
            classes.append(self._class_of[annotation["category_id"]])
            if self.takes_boxes_alone and annotation.get("segmentation") in (None, []):
                masks.append(_filled(box, width, height))
                alone += 1
            else:
                masks.append(self._mask(annotation, width, height))
            crowd.append(bool(annotation.get("iscrowd", 0)))
        instances = Instances(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(classes, np.int64),
            np.array(masks, bool).reshape(-1, height, width),
            np.array(crowd, bool),
            alone,
        )
        return LabelledImage(id, image, None, instances)

    def _read_image(self, path: Path, entry: Mapping[str, Any]) -> np.ndarray:
        return files.read_color(path)

    def fingerprint(self) -> str:
        """A digest of name, size and time of the annotations and of every image."""
        paths = [self.folder / entry["file_name"] for entry in self._images.values()]
        found = files.files_fingerprint(self.folder, [path for path in paths if path.is_file()])
        own = files.files_fingerprint(self.root, [self.file])
        return hashlib.sha256(f"{found}\n{own}\n{self.config.drop_empty}".encode()).hexdigest()

    def _entry(self, id: str) -> dict[str, Any]:
        if id not in self._images:
            raise unknown("image", id, self._images)
        return self._images[id]

    def _categories(self, categories: list[dict[str, Any]]) -> tuple[tuple[str, ...], dict[int, int]]:
        ordered = sorted(categories, key=lambda category: category["id"])
        numbers = [category["id"] for category in ordered]
        if not numbers or len(set(numbers)) < len(numbers):
            raise DataError(f"{self.file}: category ids are {numbers}; expected some, each once.")
        return tuple(str(c["name"]).strip() for c in ordered), {number: k for k, number in enumerate(numbers, 1)}

    def _entries(self, images: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        entries = {str(image["id"]): image for image in sorted(images, key=lambda image: image["id"])}
        if not entries or len(entries) < len(images):
            raise DataError(f"{self.file}: {len(images)} images with {len(entries)} ids; expected some, each once.")
        return entries

    def _by_image(self, annotations: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {id: [] for id in self._images}
        for annotation in annotations:
            if annotation["category_id"] not in self._class_of:
                raise self._wrong(annotation, "category_id", f"categories have {some(map(str, self._class_of), 5)}")
            if str(annotation["image_id"]) not in found:
                raise self._wrong(annotation, "image_id", "no image of the file has it")
            found[str(annotation["image_id"])].append(annotation)
        return found

    def _wrong(self, annotation: Mapping[str, Any], key: str, why: str) -> DataError:
        return DataError(f"{self.file}: annotation {annotation['id']} has {key} {annotation[key]!r}; {why}.")

    def _image_folder(self, root: Path, split: str, config: CocoOptions) -> Path:
        if config.images is not None:
            candidates = [expanded(config.images)]
        else:
            own = self.file.stem.removeprefix("instances_")  # such as val2017 for the split val
            names = own, f"images/{own}", split, f"images/{split}", "images", ""
            candidates = list(dict.fromkeys(root / name for name in names))
        first = next(iter(self._images.values()))["file_name"]
        for folder in candidates:
            if (folder / first).is_file():
                return folder
        looked = ", ".join(repr(str(folder)) for folder in candidates)
        raise DataError(f"No image {first!r} of {str(self.file)!r} in {looked}. Expected layout: {LAYOUT}")

    def _bad(self, annotation: Mapping[str, Any], reason: str) -> BadFrame:
        return BadFrame(self.file, f"annotation {annotation.get('id')} {reason}")

    def _box(self, annotation: Mapping[str, Any], width: int, height: int) -> tuple[float, float, float, float]:
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
            raise self._bad(annotation, f"has the box {box!r}, expected [x, y, width, height]")
        x, y, w, h = box
        if w < 0 or h < 0:
            raise self._bad(annotation, f"has a box {w} wide and {h} high")
        return max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)

    def _mask(self, annotation: Mapping[str, Any], width: int, height: int) -> np.ndarray:
        """Decode a mask, bool [H, W], from polygons (their union) or from run lengths as numbers or text."""
        mask = require("pycocotools.mask", "training")
        shape = annotation.get("segmentation")
        if isinstance(shape, list):
            # pycocotools takes four numbers for a box, not for a line
            sizes = [len(polygon) if isinstance(polygon, list) else 0 for polygon in shape]
            if not shape or any(size < 6 or size % 2 for size in sizes):
                raise self._bad(annotation, f"has polygons of {sizes} numbers; expected an even count from 6 on")
            far = 2 * max(width, height)  # pycocotools needs memory for every pixel of an outline
            wrong = [value for polygon in shape for value in polygon if not (_is_finite(value) and abs(value) <= far)]
            if wrong:
                raise self._bad(annotation, f"has the polygon coordinate {wrong[0]!r}, the image is {width}x{height}")
            runs = mask.merge(mask.frPyObjects(shape, height, width))
        elif isinstance(shape, dict) and {"size", "counts"} <= set(shape):
            if list(shape["size"]) != [height, width]:
                raise self._bad(annotation, f"has run lengths of size {shape['size']}, the image is {[height, width]}")
            counts = shape["counts"]
            if isinstance(counts, str):
                counts = text_lengths(counts)
            if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
                raise self._bad(annotation, "has run lengths that are neither whole numbers nor COCO's text")
            if sum(counts) != height * width:  # pycocotools would fill the rest with whatever the memory holds
                covered = sum(counts)
                raise self._bad(annotation, f"has run lengths of {covered} pixels, the image has {height * width}")
            runs = mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        else:
            raise self._bad(annotation, "has no segmentation (polygons, or size and counts)")
        return np.asarray(mask.decode(runs), bool)


def _filled(box: tuple[float, float, float, float], width: int, height: int) -> np.ndarray:
    """A mask of the pixels that a box covers, at least in part."""
    x0, y0, x1, y1 = box
    mask = np.zeros((height, width), bool)
    mask[int(y0) : math.ceil(y1), int(x0) : math.ceil(x1)] = True
    return mask


def text_lengths(text: str) -> list[int] | None:
    """Decode run lengths from COCO's compressed text; None when it is something else.

    Each character holds five bits of a number, low ones first, and whether more follow; from the fourth on, a number
    is the difference to the one two places before.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift  # a negative number
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return lengths if shift == 0 else None


def open_coco(path: Path, split: str, task: str, options: CocoOptions) -> Coco:
    """Open the instances of a split; "train" and "val" also match a single file with a year, such as val2017."""
    return Coco(path, split, options)


def _annotation_file(root: Path, split: str) -> Path:
    folder = root / "annotations"
    exact = folder / f"instances_{split}.json"
    if exact.is_file():
        return exact
    named = sorted(file for file in folder.glob("instances_*.json"))
    years = [file for file in named if file.stem.removeprefix(f"instances_{split}").isdecimal()]
    if len(years) == 1:
        return years[0]
    there = ", ".join(file.name for file in named) or "none"
    raise DataError(f"No {exact.name!r} in {str(folder)!r}; there are: {there}. Expected layout: {LAYOUT}")


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the annotation file and check the keys of every entry."""
    try:
        tree = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}).") from None
    needed = {
        "images": ("id", "file_name"),
        "annotations": ("id", "image_id", "category_id"),
        "categories": ("id", "name"),
    }
    for part, keys in needed.items():
        if not isinstance(tree, dict) or not isinstance(tree.get(part), list):
            raise DataError(f"{path}: no list {part!r}; expected images, annotations and categories.")
        for place, entry in enumerate(tree[part]):
            missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if missing:
                raise DataError(f"{path}: {part}[{place}] has no {', '.join(map(repr, missing))}.")
            wrong = [key for key in keys if not isinstance(entry[key], str if key.endswith("name") else int)]
            if wrong:
                raise DataError(f"{path}: {part}[{place}] has {wrong[0]!r} {entry[wrong[0]]!r}, a wrong type.")
            if part == "images" and (fault := files.name_fault(entry["file_name"])) is not None:
                raise DataError(f"{path}: {part}[{place}] has a 'file_name' that {fault}.")
    return tree


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
