"""Export any source with objects in COCO's format, for COCO's evaluation or another library's training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from geo_pretrain.errors import BadFrame, DataError, require
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.labelled.image import LabelledSource, need_masks
from geo_pretrain.training.data.labelled.registry import file_name


def coco_json(
    source: LabelledSource, ids: Sequence[str] | None = None, *, rle: bool = True, skips: SkippedFrames | None = None
) -> dict[str, Any]:
    """Convert a source to COCO's tree of images, annotations and categories, ready for JSON.

    Image ids count `ids` (None: the source's) from 1 ("source_id" is the id itself), category ids are the classes
    1..C, areas are those of the masks. `rle=False` leaves the masks out: boxes only. Unusable images are left out and
    added to `skips`; without one they raise `BadFrame`.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, id in enumerate(source.ids() if ids is None else ids, 1):
        try:
            image = source.load(id)
        except BadFrame as bad:
            if skips is None:
                raise
            skips.add(bad)
            continue
        objects = image.instances
        if objects is None:
            raise DataError(f"Image {id!r} of {source.name!r} has no objects; open it with task='detection'.")
        if rle:
            need_masks(objects, f"{source.name}/{id}")
        height, width = image.image.shape[:2]
        images.append(
            {"id": number, "file_name": file_name(source, id), "width": width, "height": height, "source_id": id}
        )
        for box, label, mask, crowd in zip(objects.boxes, objects.classes, objects.masks, objects.crowd, strict=True):
            x0, y0, x1, y1 = map(float, box)
            annotation = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": int(label),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(mask.sum()),
                "iscrowd": int(crowd),
            }
            if rle:
                annotation["segmentation"] = encode_mask(mask)
            annotations.append(annotation)
    categories = [{"id": number, "name": name} for number, name in enumerate(source.classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(
    source: LabelledSource, out: str | Path, *, images: bool = False, skips: SkippedFrames | None = None
) -> Path:
    """Write `out`/annotations/instances_SPLIT.json and return its path.

    File names are those below the source's own folder, which another library gets as the folder of images. With
    `images` they are written as `out`/SPLIT/*.png instead: then `out` stands for itself.
    """
    out, tree = Path(out), coco_json(source, skips=skips)
    if images:
        (out / source.split).mkdir(parents=True, exist_ok=True)
        for entry in tree["images"]:
            entry["file_name"] = f"{entry['id']:06d}.png"
            pixels = source.load(entry["source_id"]).image
            Image.fromarray(pixels).save(out / source.split / entry["file_name"])
    path = out / "annotations" / f"instances_{source.split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree) + "\n", encoding="utf-8")
    return path


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask [H, W] as COCO's compressed run lengths, ready for JSON."""
    runs = require("pycocotools.mask", "training").encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(size) for size in runs["size"]], "counts": runs["counts"].decode("ascii")}
