"""Detection and instance segmentation with torchvision's Faster and Mask R-CNN: batches, losses, COCO AP, pictures.

The protocol is that of Pri3D's and GSC's Detectron2 runs: stages frozen, flips, the shorter side drawn anew for each
image, a step schedule with warmup. What the released configuration does by accident is reproduced with
`match_released_code` and mended otherwise; `Detection.protocol_deviations` says which. torchvision's host differs from
Detectron2's in details that are listed there, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import Bottleneck
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from geo_pretrain.adapters import torchvision as adapter
from geo_pretrain.adapters.common import encoder_of, parameter_groups
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import BadFrame, DataError, RecipeError
from geo_pretrain.training.config import check_key, parse
from geo_pretrain.training.data.labelled.export import coco_json, encode_mask
from geo_pretrain.training.data.labelled.image import Instances, LabelledImage, LabelledSource
from geo_pretrain.training.distributed import ALONE, World
from geo_pretrain.training.evaluation.coco import MAX_DETECTIONS, Kind, coco_report
from geo_pretrain.training.finetune.task import Evaluation, FinetuneTask, share_of
from geo_pretrain.training.finetune_recipe import FinetuneRecipe, LabelledAugment
from geo_pretrain.training.networks import IMAGENET, SCRATCH, PretrainedInit
from geo_pretrain.training.visualize.results import draw_detections

MSRA_MEAN, MSRA_STD = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)  # BGR, 0-255: Detectron2's defaults
SCALE_STEP = 32  # pixels between the lengths the shorter side is drawn from: 640, 672, ..., 800
HEAD_WIDTH = 256  # channels of torchvision's own mask head
BASIC_BLOCKS = ("resnet18", "resnet34")  # have no 1x1 convolutions but on shortcuts
BUILDERS = {"faster_rcnn": adapter.faster_rcnn, "mask_rcnn": adapter.mask_rcnn}


@dataclass(frozen=True)
class DetectionOptions:
    """`network.options` of a recipe for detection or instances."""

    # frozen: the encoder's BatchNorms keep statistics and weights; encoder: they are trained; everywhere: pyramid,
    # box head and mask head have BatchNorms, too
    norm: Literal["frozen", "encoder", "everywhere"] = "frozen"
    width: int = 256  # channels of the pyramid, of the box head's convolutions and of the mask head
    box_head: Literal["2fc", "4conv1fc"] = "2fc"
    anchors: tuple[int, int, int, int, int] = (32, 64, 128, 256, 512)  # pixels: edge on each level of the pyramid
    roi_batch: int = 512  # boxes an image that the heads are trained on
    proposals: int = 1000  # boxes an image that the heads see
    score_threshold: float = 0.05  # detections with lower scores are dropped
    authors_score_threshold: float | None = None  # the same, with match_released_code; None: `score_threshold`
    authors_input: Literal["rgb", "msra"] = "rgb"  # with match_released_code; msra: BGR minus mean, stride in the 1x1

    def __post_init__(self) -> None:
        """Check the ranges of the options."""
        for key in ("width", "roi_batch", "proposals"):
            check_key(getattr(self, key) >= 1, f"network.options.{key}", getattr(self, key), "a whole number from 1 up")
        for key in ("score_threshold", "authors_score_threshold"):
            value = getattr(self, key)
            check_key(value is None or 0 <= value < 1, f"network.options.{key}", value, "from 0 to below 1")
        check_key(min(self.anchors) >= 1, "network.options.anchors", self.anchors, "five edges in pixels")


@dataclass(frozen=True)
class Detections:
    """The detections of a network in one image, sorted by descending score."""

    boxes: np.ndarray  # float32 [N, 4]: x0, y0, x1, y1 in pixels of the image given
    classes: np.ndarray  # int64 [N], 1..C
    scores: np.ndarray  # float32 [N], from 0 to 1
    masks: np.ndarray | None  # bool [N, H, W]; None: the network gives boxes only

    def __len__(self) -> int:
        return len(self.classes)


class Detection(FinetuneTask):
    """The task "detection" or "instances" of a fine-tuning run; see `FinetuneTask`.

    Scores are box_ap, box_ap50 and box_ap75, for Mask R-CNN mask_ap, mask_ap50 and mask_ap75 as well, from 0 to 1.
    """

    contract: ImageContract

    def __init__(
        self, recipe: FinetuneRecipe, start: PretrainedInit, classes: Sequence[str], contract: ImageContract
    ) -> None:
        _check_recipe(recipe, contract)
        self.recipe, self.start, self.classes, self.contract = recipe, start, tuple(classes), contract
        self.options = parse(DetectionOptions, recipe.network.options, where=recipe.name, prefix="network.options.")
        self.msra = recipe.match_released_code and self.options.authors_input == "msra"
        self.with_masks = recipe.network.kind == "mask_rcnn"
        self.metric = "mask_ap" if recipe.task == "instances" else "box_ap"
        self.module: nn.Module = start.host(self._build, recipe.seed)
        self._truth: tuple[str, dict[str, Any]] | None = None

    @property
    def score_threshold(self) -> float:
        """The score below which detections are dropped."""
        exact = self.options.authors_score_threshold if self.recipe.match_released_code else None
        return self.options.score_threshold if exact is None else exact

    @property
    def thawed(self) -> bool:
        """Whether training from scratch unfreezes the stages and norms that the recipe freezes."""
        frozen = self.recipe.network.freeze > 0 or self.options.norm == "frozen"
        return frozen and self.start.backbone == SCRATCH and not self.recipe.match_released_code

    def sample(self, image: LabelledImage, generator: torch.Generator) -> dict[str, Any]:
        """{"image": uint8 [3, H, W], "boxes", "labels", "masks"}, flipped at random, without crowds."""
        objects = _instances(image)
        _check_objects(image, objects, len(self.classes))
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
        if self.with_masks:
            sample["masks"] = torch.from_numpy(np.ascontiguousarray(masks, np.uint8))
        return sample

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        """Collate a batch; images of different sizes stay a list.

        With `match_released_code` those without an object are left out of a batch, unless all are so; a source's own
        option `drop_empty` takes the next images in their stead, as the released conversion does.
        """
        keys = ("boxes", "labels", "masks") if self.with_masks else ("boxes", "labels")
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

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Two parameter groups, the encoder and the rest, without frozen parameters."""
        optim = self.recipe.optim
        factors = {"backbone": optim.backbone_factor, "new": optim.head_factor}
        groups = parameter_groups(self.module, 1.0, backbone_factor=1.0)
        return [{"params": group["params"], "factor": factors[group["name"]]} for group in groups]

    def backbone(self) -> nn.Module:
        """The ResNet encoder."""
        return encoder_of(self.module)

    @torch.no_grad()
    def predict(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detect objects in images uint8 [H, W, 3], in evaluation mode; masks are binarized."""
        self.module.eval()
        device = next(self.module.parameters()).device
        found = self.module([self._pixels(image).to(device).float() / 255 for image in images])
        return [
            Detections(
                one["boxes"].float().cpu().numpy(),
                one["labels"].cpu().numpy(),
                one["scores"].float().cpu().numpy(),
                (one["masks"][:, 0] > 0.5).cpu().numpy() if self.with_masks else None,
            )
            for one in found
        ]

    def evaluate(self, source: LabelledSource, ids: Sequence[str], world: World = ALONE) -> Evaluation:
        """Compute COCO's AP over these images. Raises `BadFrame` for an unreadable image instead of skipping it.

        Images without an object are kept, where every detection is wrong; with `match_released_code` they are left out.
        """
        truth = self._truth_of(source, ids)
        own: list[dict[str, Any]] = []
        for entries in share_of(truth["images"], self.recipe.evaluate.batch, world):
            loaded = [source.load(entry["source_id"]).image for entry in entries]
            for entry, found in zip(entries, self.predict(loaded), strict=True):
                own += coco_detections(found, entry["id"])
        parts = cast(list[list[dict[str, Any]]], world.all_gather_object(own))
        evaluation = self._measure(truth, [one for part in parts for one in part]) if world.is_main else None
        return cast(Evaluation, world.all_gather_object(evaluation)[0])

    def _measure(self, truth: dict[str, Any], detections: list[dict[str, Any]]) -> Evaluation:
        kinds: tuple[Kind, ...] = ("box", "mask") if self.with_masks else ("box",)
        reports = {kind: coco_report(truth, detections, kind) for kind in kinds}
        scores, per_class = {}, {}
        for kind, report in reports.items():
            for measure in ("AP", "AP50", "AP75"):
                key = f"{kind}_{measure.lower()}"
                scores[key] = report[measure]
                per_class[key] = {name: report["classes"].get(name, {}).get(measure) for name in self.classes}
        details = {
            "images": len(truth["images"]),
            "without_objects_left_out": truth["left_out"],
            "detections": len(detections),
            "score_threshold": self.score_threshold,
        }
        return Evaluation(scores, per_class, details)

    def draw(self, source: LabelledSource, ids: Sequence[str], path: Path) -> None:
        """Write a PNG with one row per image: image, ground truth, and detections with score 0.5 or more."""
        images = (source.load(id) for id in ids)
        rows = [(image.image, _instances(image), self.predict([image.image])[0]) for image in images]
        draw_detections(rows, self.classes, path)

    def protocol_deviations(self) -> dict[str, str]:
        """Map each accident of the released configuration to what this run does about it."""
        exact, options = self.recipe.match_released_code, self.options
        said = {
            "images without objects": "are left out of batches and of evaluation, as released"
            if exact
            else "are trained on and measured (released: left out of both)",
            "host": "torchvision's network, not Detectron2's: RoIAlign samples 2 x 2 points without the half-pixel "
            "shift, and box losses are smooth under 1/9",
        }
        released = options.authors_score_threshold
        if released is not None and released != options.score_threshold:
            said["score threshold"] = (
                f"detections under {released:g} do not count, as released, which costs recall and so AP"
                if exact
                else f"detections from {options.score_threshold:g} on count (released: from {released:g})"
            )
        if options.authors_input == "msra":
            said["input"] = (
                "BGR in 0-255 minus the mean, not divided by std, as released for weights of another kind"
                if self.msra
                else "RGB in [0, 1], mean and std of the weights (released: BGR minus the mean, for other weights)"
            )
            if self.recipe.network.encoder in BASIC_BLOCKS:
                said["place of the stride"] = (
                    "this ResNet has no 1x1 convolutions to put the stride into (released: in the 1x1)"
                )
            else:
                said["place of the stride"] = (
                    "in the 1x1 convolutions, as released, though the weights were trained with it in the 3x3"
                    if self.msra
                    else "in the 3x3 convolutions, as the weights were trained (released: in the 1x1)"
                )
        if self.start.backbone == SCRATCH and (self.recipe.network.freeze or options.norm == "frozen"):
            said["frozen random layers"] = (
                "everything is trained with BatchNorm from scratch (the configuration freezes random layers)"
                if self.thawed
                else "random layers and BatchNorms stay frozen, as the configuration has it"
            )
        if self.start.backbone == IMAGENET:
            said["ImageNet weights"] = "torchvision's ImageNet weights (released: the MSRA file of Detectron2)"
        if options.norm == "everywhere":
            said["BatchNorm"] = (
                "statistics of one process's images, not recomputed before measuring (released: SyncBN, precise BN)"
            )
        return said

    def _build(self, name: str, **load: Any) -> nn.Module:
        """Build the detector around a backbone; new weights are drawn in the same order for every initialization."""
        network, options, data = self.recipe.network, self.options, self.recipe.data
        shorter, longer = _sides(data.size, data.augment)
        host: Any = BUILDERS[network.kind](
            name,
            num_classes=len(self.classes) + 1,  # and the background
            freeze=0 if self.thawed else network.freeze,
            norm="frozen" if options.norm == "frozen" and not self.thawed else "batch",
            pyramid=options.width,
            min_size=shorter,
            max_size=longer,
            box_score_thresh=self.score_threshold,
            box_batch_size_per_image=options.roi_batch,
            box_detections_per_img=MAX_DETECTIONS,
            rpn_post_nms_top_n_train=options.proposals,
            rpn_post_nms_top_n_test=options.proposals,
            rpn_anchor_generator=AnchorGenerator(
                tuple((edge,) for edge in options.anchors), ((0.5, 1.0, 2.0),) * len(options.anchors)
            ),
            **load,
        )
        _dress(host, options)
        mean, std = self.contract.mean, self.contract.std
        if self.msra:
            mean, std = (tuple(value / 255 for value in values) for values in (MSRA_MEAN, MSRA_STD))
            stride_in_1x1(encoder_of(host))
        host.transform.image_mean, host.transform.image_std = list(mean), list(std)
        return cast(nn.Module, host)

    def _pixels(self, image: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] RGB -> uint8 [3, H, W] in the network's channel order."""
        ordered = image[:, :, ::-1] if self.msra else image
        return torch.from_numpy(np.ascontiguousarray(ordered.transpose(2, 0, 1)))

    def _truth_of(self, source: LabelledSource, ids: Sequence[str]) -> dict[str, Any]:
        """Build COCO's annotation dict of these images, cached because a run always uses the same validation images."""
        key = "\n".join([source.name, source.split, source.fingerprint(), *ids])
        if self._truth is None or self._truth[0] != key:
            tree = coco_json(_Chosen(source, ids), rle=self.with_masks)
            given = len(tree["images"])
            if self.recipe.match_released_code:
                full = {a["image_id"] for a in tree["annotations"] if not a["iscrowd"]}
                tree["images"] = [image for image in tree["images"] if image["id"] in full]
                tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] in full]
            tree["left_out"] = given - len(tree["images"])
            self._truth = (key, tree)
        return self._truth[1]


class _Chosen:
    """A subset of a labelled source, in the given order of image ids."""

    def __init__(self, source: LabelledSource, ids: Sequence[str]) -> None:
        self.name, self.split, self.classes = source.name, source.split, source.classes
        self.scene_of, self.load, self.fingerprint = source.scene_of, source.load, source.fingerprint
        self._ids = list(ids)

    def ids(self) -> list[str]:
        """The chosen image ids."""
        return self._ids


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


def stride_in_1x1(encoder: nn.Module) -> None:
    """Move the stride of each stage of a bottleneck ResNet from its 3x3 convolution to the 1x1 before it, in place.

    So the MSRA weights were trained; other weights lose by it. ResNet-18 has no such convolution and stays as it is.
    """
    for block in encoder.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


def _dress(host: Any, options: DetectionOptions) -> None:
    """Replace heads and norm layers of the detector for which the adapter has no option."""
    channels, heads = options.width, host.roi_heads
    norm = nn.BatchNorm2d if options.norm == "everywhere" else None
    if norm is not None:
        sizes = [block[0].in_channels for block in host.backbone.fpn.inner_blocks]
        host.backbone.fpn = FeaturePyramidNetwork(sizes, channels, LastLevelMaxPool(), norm_layer=norm)
    if getattr(heads, "mask_head", None) is not None and (norm is not None or channels != HEAD_WIDTH):
        heads.mask_head = MaskRCNNHeads(channels, (channels,) * 4, 1, norm_layer=norm)
    if getattr(heads, "mask_predictor", None) is not None and channels != HEAD_WIDTH:
        heads.mask_predictor = MaskRCNNPredictor(channels, channels, heads.mask_predictor.mask_fcn_logits.out_channels)
    if options.box_head == "4conv1fc":
        heads.box_head = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [1024], norm_layer=norm)


def _sides(size: tuple[int, int] | None, augment: LabelledAugment) -> tuple[tuple[int, ...], int]:
    """Return the candidate lengths of the shorter side (evaluation uses the last) and the limit of the longer side."""
    if augment.shorter is not None:
        low, high = augment.shorter
        return (*range(low, high, SCALE_STEP), high), augment.longer
    return (min(cast(tuple[int, int], size)),), max(cast(tuple[int, int], size))


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


def _check_recipe(recipe: FinetuneRecipe, contract: ImageContract) -> None:
    """Reject recipe settings that this task would ignore."""
    augment, plain = recipe.data.augment, LabelledAugment()
    for key in ("rotate", "crop", "blur"):
        if getattr(augment, key) != getattr(plain, key):
            raise RecipeError(
                f"'data.augment.{key}' is {getattr(augment, key)!r}, accepted for task {recipe.task!r} is "
                f"{getattr(plain, key)!r}: there are flip and shorter."
            )
    check_key(recipe.network.output_stride == 32, "network.output_stride", recipe.network.output_stride, "32")
    check_key(recipe.network.aux == 0, "network.aux", recipe.network.aux, "0: the host has no such loss")
    if augment.shorter is None:
        check_key(recipe.data.size is not None, "data.size", None, "[height, width], or set data.augment.shorter")
    else:
        low, high = augment.shorter
        check_key(
            32 <= low <= high <= augment.longer, "data.augment.shorter", [low, high], "32 <= low <= high <= longer"
        )
    if contract.channels != ("R", "G", "B"):
        raise RecipeError(f"The backbone takes channels {contract.channels}, accepted for detection are R, G, B.")
