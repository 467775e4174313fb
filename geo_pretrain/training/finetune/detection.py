"""Detection and instance segmentation with torchvision's Faster and Mask R-CNN: batches, losses, COCO AP, pictures.

The network and the protocol are `detector.DetectorSetup`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from geo_pretrain.adapters.common import encoder_of
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, DataError
from geo_pretrain.training.data.labelled.export import coco_json, encode_mask
from geo_pretrain.training.data.labelled.image import Instances, LabelledImage, LabelledSource, need_masks
from geo_pretrain.training.distributed import ALONE, World
from geo_pretrain.training.evaluation.coco import Detections, Kind, coco_report
from geo_pretrain.training.finetune.detector import DetectorSetup, check_one_size, detection_options
from geo_pretrain.training.finetune.task import Evaluation, FinetuneTask, share_of
from geo_pretrain.training.finetune_recipe import FinetuneRecipe
from geo_pretrain.training.networks import PretrainedInit
from geo_pretrain.training.visualize.results import draw_detections


class Detection(FinetuneTask):
    """The task "detection" or "instances" of a fine-tuning run; see `FinetuneTask`.

    Scores are box_ap, box_ap50 and box_ap75, for Mask R-CNN mask_ap, mask_ap50 and mask_ap75 as well, from 0 to 1.
    """

    contract: ImageContract
    needs = (("pycocotools", "training"),)  # reads masks and computes the scores

    def __init__(
        self, recipe: FinetuneRecipe, start: PretrainedInit, classes: Sequence[str], contract: ImageContract
    ) -> None:
        self.recipe, self.classes, self.contract = recipe, tuple(classes), contract
        self.setup = DetectorSetup(recipe, start, len(classes), contract)
        self.metric = "mask_ap" if recipe.task == "instances" else "box_ap"
        self.module: nn.Module = start.host(self.setup.build, recipe.seed)
        self._truth: tuple[str, dict[str, Any]] | None = None

    @classmethod
    def check(cls, recipe: FinetuneRecipe) -> None:
        """Raise `RecipeError` for settings that torchvision's detectors do not take, or that contradict each other."""
        detection_options(recipe)
        check_one_size(recipe)

    def sample(self, image: LabelledImage, generator: torch.Generator) -> dict[str, Any]:
        """{"image": uint8 [3, H, W], "boxes", "labels", "masks"}, flipped at random, without crowds."""
        objects = _instances(image)
        _check_objects(image, objects, len(self.classes))
        if self.setup.with_masks:
            need_masks(objects, image.id)
        kept = ~objects.crowd
        pixels, boxes, masks = image.image, objects.boxes[kept].copy(), objects.masks[kept]
        if torch.rand((), generator=generator) < self.recipe.data.augment.flip:
            pixels, masks = pixels[:, ::-1], masks[:, :, ::-1]
            boxes[:, [0, 2]] = pixels.shape[1] - boxes[:, [2, 0]]
        sample = {
            "image": self._pixels(pixels),
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(objects.classes[kept]),
        }
        if self.setup.with_masks:
            sample["masks"] = torch.from_numpy(np.ascontiguousarray(masks, np.uint8))
        return sample

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        """Collate a batch; images of different sizes stay a list.

        With `match_released_code` those without an object are left out of a batch, unless all are so; a source's own
        option `drop_empty` takes the next images in their stead, as the released conversion does.
        """
        keys = ("boxes", "labels", "masks") if self.setup.with_masks else ("boxes", "labels")
        if self.recipe.match_released_code:
            samples = [sample for sample in samples if len(sample["labels"])] or samples
        return {
            "images": [sample["image"] for sample in samples],
            "targets": [{key: sample[key] for key in keys} for sample in samples],
        }

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The detector's own losses: objectness and boxes of the RPN; classes, boxes and masks of the heads.

        The host draws scales and samples boxes from the global generator, which the loop seeds for each step.
        """
        losses: dict[str, Tensor] = self.module([image.float() / 255 for image in batch["images"]], batch["targets"])
        return losses

    def backbone(self) -> nn.Module:
        return encoder_of(self.module)

    @torch.no_grad()
    def predict(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detect objects in images uint8 [H, W, 3], in evaluation mode; masks are binarized.

        Raises `BadFrame` for an image so thin that nothing is left of a side once the other fits.
        """
        for image in images:
            self._check_thin(*image.shape[:2])
        self.module.eval()
        device = next(self.module.parameters()).device
        found = self.module([self._pixels(image).to(device).float() / 255 for image in images])
        return [
            Detections(
                one["boxes"].float().cpu().numpy(),
                one["labels"].cpu().numpy(),
                one["scores"].float().cpu().numpy(),
                (one["masks"][:, 0] > 0.5).cpu().numpy() if self.setup.with_masks else None,
            )
            for one in found
        ]

    def _check_thin(self, height: int, width: int) -> None:
        transform: Any = self.module.transform
        scale = min(transform.min_size[-1] / min(height, width), transform.max_size / max(height, width))
        if int(min(height, width) * scale) < 1:
            raise BadFrame(f"{width}x{height} image", f"nothing is left of it {transform.max_size} pixels long")

    def evaluate(self, source: LabelledSource, ids: Sequence[str], world: World = ALONE) -> Evaluation:
        """Compute COCO's AP over these images. Raises `BadFrame` for an unreadable image instead of skipping it.

        Images without an object are kept, where every detection is wrong; with `match_released_code` they are left out.
        """
        key = "\n".join([source.name, source.split, source.fingerprint(), *ids])
        if self._truth is None or self._truth[0] != key:  # a run always measures the same images
            masks, drop_empty = self.setup.with_masks, self.recipe.match_released_code
            self._truth = key, coco_truth(source, ids, masks=masks, drop_empty=drop_empty)
        truth = self._truth[1]
        own: list[dict[str, Any]] = []
        for entries in share_of(truth["images"], self.recipe.evaluate.batch, world):
            loaded = [source.load(entry["source_id"]).image for entry in entries]
            for entry, found in zip(entries, self.predict(loaded), strict=True):
                own += coco_detections(found, entry["id"])
        parts = cast(list[list[dict[str, Any]]], world.all_gather_object(own))
        evaluation = None
        if world.is_main:
            detections = [one for part in parts for one in part]
            evaluation = average_precision(truth, detections, self.classes, masks=self.setup.with_masks)
            evaluation.details["score_threshold"] = self.setup.score_threshold
        return cast(Evaluation, world.all_gather_object(evaluation)[0])

    def draw(self, source: LabelledSource, ids: Sequence[str], path: Path) -> None:
        """Write a PNG with one row per image: image, ground truth, and detections with score 0.5 or more."""
        images = (source.load(id) for id in ids)
        rows = [(image.image, _instances(image), self.predict([image.image])[0]) for image in images]
        draw_detections(rows, self.classes, path)

    def protocol_deviations(self) -> dict[str, str]:
        return self.setup.deviations()

    def _pixels(self, image: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] RGB -> uint8 [3, H, W] in the network's channel order."""
        ordered = image[:, :, ::-1] if self.setup.msra else image
        return torch.from_numpy(np.ascontiguousarray(ordered.transpose(2, 0, 1)))


def coco_truth(source: LabelledSource, ids: Sequence[str], *, masks: bool, drop_empty: bool) -> dict[str, Any]:
    """COCO's annotation dict of these images, and how many without an object were "left_out"."""
    tree = coco_json(source, ids, rle=masks)
    given = len(tree["images"])
    if drop_empty:
        full = {a["image_id"] for a in tree["annotations"] if not a["iscrowd"]}
        tree["images"] = [image for image in tree["images"] if image["id"] in full]
        tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] in full]
    return tree | {"left_out": given - len(tree["images"])}


def average_precision(
    truth: dict[str, Any], detections: list[dict[str, Any]], classes: Sequence[str], *, masks: bool
) -> Evaluation:
    """COCO's AP, AP50 and AP75 of all classes and of each, by boxes and for a network with masks by these as well."""
    kinds: tuple[Kind, ...] = ("box", "mask") if masks else ("box",)
    scores, per_class = {}, {}
    for kind, report in {kind: coco_report(truth, detections, kind) for kind in kinds}.items():
        for measure in ("AP", "AP50", "AP75"):
            key = f"{kind}_{measure.lower()}"
            scores[key] = report[measure]
            per_class[key] = {name: report["classes"].get(name, {}).get(measure) for name in classes}
    details = {"images": len(truth["images"]), "without_objects_left_out": truth["left_out"]}
    return Evaluation(scores, per_class, details | {"detections": len(detections)})


def coco_detections(found: Detections, image_id: int) -> list[dict[str, Any]]:
    """Convert the detections of one image to COCO's result format: boxes, and masks if the network predicts them."""
    entries: list[dict[str, Any]] = []
    for k in range(len(found)):
        x0, y0, x1, y1 = found.boxes[k].tolist()
        entry = {
            "image_id": image_id,
            "category_id": int(found.classes[k]),
            "score": float(found.scores[k]),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        }
        if found.masks is not None:
            entry["segmentation"] = encode_mask(found.masks[k])
        entries.append(entry)
    return entries


def _instances(image: LabelledImage) -> Instances:
    if image.instances is None:
        raise DataError(f"Image {image.id!r} has no objects; open the data set with task='detection'.")
    return image.instances


def _check_objects(image: LabelledImage, objects: Instances, classes: int) -> None:
    """Reject invalid annotations by image id, where torchvision's error would not name the image."""
    height, width = image.image.shape[:2]
    wrong = (objects.classes < 1) | (objects.classes > classes)
    if wrong.any():
        raise BadFrame(image.id, f"object of class {objects.classes[wrong][0]}, accepted are 1 to {classes}")
    if objects.masks.shape != (len(objects), height, width):
        raise BadFrame(image.id, f"masks are {objects.masks.shape}, the image has {len(objects), height, width}")
    low, high = objects.boxes[:, :2], objects.boxes[:, 2:]
    bad = ~((low >= 0) & (low < high) & (high <= [width, height])).all(1)  # so written, NaN is refused too
    if bad.any():
        box = objects.boxes[bad][0].tolist()
        raise BadFrame(image.id, f"object with box {box}, accepted are x0 < x1 <= {width} and y0 < y1 <= {height}")
