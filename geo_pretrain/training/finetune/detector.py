"""torchvision's Faster and Mask R-CNN as a recipe wants them: options, network, deviations from the released runs.

The protocol is that of Pri3D's and GSC's Detectron2 runs: stages frozen, the shorter side drawn anew for each image.
What the released configuration does by accident is reproduced with `match_released_code` and mended otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import Bottleneck
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from geo_pretrain.adapters import torchvision as adapter
from geo_pretrain.adapters.common import encoder_of
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.checks import Accepts, Checks, Count, Mistakes, Ranged
from geo_pretrain.training.config import parse
from geo_pretrain.training.evaluation.coco import MAX_DETECTIONS
from geo_pretrain.training.finetune_recipe import FinetuneRecipe, LabelledAugment
from geo_pretrain.training.networks import IMAGENET, SCRATCH, PretrainedInit

MSRA_MEAN, MSRA_STD = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)  # BGR, 0-255: Detectron2's defaults
SCALE_STEP = 32  # pixels between the lengths the shorter side is drawn from: 640, 672, ..., 800
HEAD_WIDTH = 256  # channels of torchvision's own mask head
BASIC_BLOCKS = ("resnet18", "resnet34")  # have no 1x1 convolutions but on shortcuts
Threshold = Annotated[float, Accepts(lambda score: 0 <= score < 1, "from 0 to below 1")]
Anchors = Annotated[tuple[int, int, int, int, int], Accepts(lambda edges: min(edges) >= 1, "five edges in pixels")]
BUILDERS = {"faster_rcnn": adapter.faster_rcnn, "mask_rcnn": adapter.mask_rcnn}


@dataclass(frozen=True)
class DetectionOptions(Ranged):
    """`network.options` of a recipe for detection or instances."""

    section = "network.options."
    # frozen: the encoder's BatchNorms keep statistics and weights; encoder: they are trained; everywhere: pyramid,
    # box head and mask head have BatchNorms, too
    norm: Literal["frozen", "encoder", "everywhere"] = "frozen"
    width: Count = 256  # channels of the pyramid, of the box head's convolutions and of the mask head
    box_head: Literal["2fc", "4conv1fc"] = "2fc"
    anchors: Anchors = (32, 64, 128, 256, 512)  # pixels: edge on each level of the pyramid
    roi_batch: Count = 512  # boxes an image that the heads are trained on
    proposals: Count = 1000  # boxes an image that the heads see
    score_threshold: Threshold = 0.05  # detections with lower scores are dropped
    authors_score_threshold: Threshold | None = None  # the same, with match_released_code; None: `score_threshold`
    authors_input: Literal["rgb", "msra"] = "rgb"  # with match_released_code; msra: BGR minus mean, stride in the 1x1


class DetectorSetup:
    """The options, deviations and construction of a detector, from a recipe and its start weights."""

    def __init__(self, recipe: FinetuneRecipe, start: PretrainedInit, classes: int, contract: ImageContract) -> None:
        self.options = detection_options(recipe)
        if contract.channels != ("R", "G", "B"):
            raise RecipeError(f"The backbone takes channels {contract.channels}, accepted for detection are R, G, B.")
        self.recipe, self.start, self.classes, self.contract = recipe, start, classes, contract
        self.msra = recipe.match_released_code and self.options.authors_input == "msra"
        self.with_masks = recipe.network.kind == "mask_rcnn"

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

    def build(self, name: str, **load: Any) -> nn.Module:
        """Build the detector around a backbone; new weights are drawn in the same order for every initialization."""
        network, options, data = self.recipe.network, self.options, self.recipe.data
        shorter, longer = _sides(data.size, data.augment)
        host: Any = BUILDERS[network.kind](
            name,
            num_classes=self.classes + 1,  # and the background
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

    def deviations(self) -> dict[str, str]:
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
            said["place of the stride"] = (
                "this ResNet has no 1x1 convolutions to put the stride into (released: in the 1x1)"
                if self.recipe.network.encoder in BASIC_BLOCKS
                else "in the 1x1 convolutions, as released, though the weights were trained with it in the 3x3"
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


def check_one_size(recipe: FinetuneRecipe) -> None:
    """Raise `RecipeError` where `data.size` and `data.augment.shorter` are both given: the first would be ignored.

    Not asked of the recipe of a finished run, which may have both.
    """
    size, shorter, check = recipe.data.size, recipe.data.augment.shorter, Checks()
    if size is not None and shorter is not None:
        check.note(
            f"'data.size' is {list(size)} and 'data.augment.shorter' is {list(shorter)}, which decides. For images of "
            f"that size leave out data.size: --set data.augment.shorter=[{min(size)},{min(size)}] "
            f"--set data.augment.longer={max(size)}.",
            "data.size",
            "data.augment.shorter",
        )
    check.done()


def detection_options(recipe: FinetuneRecipe) -> DetectionOptions:
    """Parse `network.options`, and reject settings of the recipe that this task would ignore."""
    augment, plain, network, check = recipe.data.augment, LabelledAugment(), recipe.network, Checks()
    for key in ("rotate", "crop", "blur"):
        given, accepted = getattr(augment, key), getattr(plain, key)
        if given != accepted:
            text = f"'data.augment.{key}' is {given!r}, accepted for task {recipe.task!r} is {accepted!r}"
            check.note(f"{text}: there are flip and shorter.", f"data.augment.{key}", "task")
    check(network.output_stride == 32, "network.output_stride", network.output_stride, "32")
    check(network.aux == 0, "network.aux", network.aux, "0: the host has no such loss")
    if augment.shorter is None:
        check(recipe.data.size is not None, "data.size", None, "[height, width], or set data.augment.shorter")
    else:
        fits = augment.shorter[1] <= augment.longer
        check(fits, "data.augment.shorter", list(augment.shorter), "[low, high] with high <= longer")
    try:
        options = parse(DetectionOptions, network.options, where="", prefix="network.options.")
    except Mistakes as error:
        check.problems += error.problems
    check.done()
    return options
