"""Recipes of fine-tuning: the schema, and reading one from its YAML file in recipes/finetune.

A recipe says what is fine-tuned on which labels, and how the result is measured; it does not name the backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import yaml

from geo_pretrain.training import config, recipe
from geo_pretrain.training.checks import (
    Accepts,
    Checks,
    Count,
    ImageSize,
    Momentum,
    NaturalNumber,
    NotNegative,
    Odd,
    Positive,
    Probability,
    Ranged,
    Seed,
    Share,
)
from geo_pretrain.training.cloud_recipe import FRAMES, CloudSpec
from geo_pretrain.training.config import Draft, Renamed, merge_tree, plain_types
from geo_pretrain.training.recipe import (
    AUTO,
    RESNETS,
    WITHOUT_EFFECT,
    AnyEncoder,
    OptimSpec,
    RecipeName,
    UNet3DSpec,
    check_data_license,
    retag,
)
from geo_pretrain.training.schedule import learning_rate

RECIPES = recipe.KINDS["finetune"][1]
RENAMED = (  # former keys and values, which are still read
    Renamed("authors_exact", "match_released_code"),
    Renamed("data.options.authors_exact", "data.options.match_released_code"),
    Renamed("network.depth", "network.encoder", RESNETS),
)
# What --toy applies to recipes of a task: toy_TASK.yaml; to those on clouds of frames: toy_TASK_frames.yaml.
OVERLAYS = RECIPES / "overlays"

TaskName = Literal[
    "segmentation", "segmentation3d", "detection", "detection3d", "instances", "instances3d", "parts3d",
    "classification3d",
]  # fmt: skip
LabelName = Literal[
    "segmentation", "detection", "segmentation3d", "detection3d", "instances3d", "parts3d", "classification3d"
]  # fmt: skip
Kind = Literal[
    "unet", "deeplabv3", "deeplabv3plus", "pspnet", "fpn", "upernet", "fcn", "faster_rcnn", "mask_rcnn",
    "srunet", "srunet_instances", "srunet_classifier", "votenet",
]  # fmt: skip
Freeze = Annotated[int, Accepts(lambda n: 0 <= n <= 5, "0 (nothing) to 5 (stem and all stages)")]
Degrees = Annotated[float, Accepts(lambda angle: 0 <= angle <= 180, "degrees from 0 to 180")]
Lengths = Annotated[tuple[int, int], Accepts(lambda r: 32 <= r[0] <= r[1], "[low, high] with 32 <= low <= high")]
Sides = Annotated[tuple[int, ...], Accepts(lambda sides: len(sides) > 0 and min(sides) >= 32, "lengths from 32 up")]
Milestones = Annotated[
    tuple[int, ...],
    Accepts(lambda m: len(m) > 0 and m[0] >= 1 and list(m) == sorted(m), "rising whole numbers from 1 up"),
]
KINDS: dict[str, tuple[str, ...]] = {
    "segmentation": ("unet", "deeplabv3", "deeplabv3plus", "pspnet", "fpn", "upernet", "fcn"),
    "detection": ("faster_rcnn", "mask_rcnn"),
    "instances": ("mask_rcnn",),
    "segmentation3d": ("srunet",),
    "instances3d": ("srunet_instances",),
    "detection3d": ("votenet",),
    "parts3d": ("srunet",),
    "classification3d": ("srunet_classifier",),
}
POINT_KINDS = ("srunet", "srunet_instances", "srunet_classifier", "votenet")  # networks for point clouds
FRAME_SETS = ("rooms",)  # sets of labelled RGB-D frames, whose clouds 3D segmentation takes


@dataclass(frozen=True)
class NetworkSpec:
    """The network around the backbone. The backbone itself is chosen when the run is started."""

    kind: Kind = "unet"
    encoder: AnyEncoder = "resnet50"  # backbones with another encoder are refused; auto: the backbone's own
    width: Count = 64  # channels of the stem, for a random initialization; a checkpoint has its own
    output_stride: Literal[8, 16, 32] = 32  # 16 and 8 dilate the last stages
    transfer: Literal["all", "encoder"] = "encoder"  # all: also the U-Net's decoder, without its last layer
    freeze: Freeze = 0  # number of frozen stages, counted from the stem, as Detectron2's freeze_at
    aux: NotNegative = 0.0  # weight of an auxiliary loss on layer3
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the builder, such as decoder_atrous_rates
    unet3d: UNet3DSpec | None = None  # srunet: the network for a random initialization; a checkpoint has its own


@dataclass(frozen=True)
class LabelledAugment:
    """Augmentation of training images and their labels."""

    flip: Probability = 0.0  # probability of a horizontal flip
    rotate: Degrees = 0.0  # degrees; the angle is drawn from [-rotate, rotate]
    crop: ImageSize | None = None  # height and width of a random crop of the (resized) image
    blur: Probability = 0.0  # probability
    blur_kernel: Odd = 5  # odd number of pixels
    shorter: Lengths | None = None  # detection: range that the length of the shorter side is drawn from
    short_sides: Sides | None = None  # segmentation, in place of data.size: the shorter side gets one of these lengths
    longer: Count = 1333  # with either: the longer side is at most this


@dataclass(frozen=True)
class LabelledSpec:
    """Selection of labelled images: source, number, and input size of the network."""

    source: str = "rooms"  # a name that `open_labelled` accepts
    path: str | None = None  # folder of a data set on disk; rooms renders its own
    size: ImageSize | None = (240, 320)  # height and width that images are resized to; None: not resized
    resize: Literal["nearest", "bilinear"] | None = None  # None: bilinear; nearest with match_released_code
    augment: LabelledAugment = LabelledAugment()
    fraction: Share = 1.0  # share of the training images, in whole scenes (data-efficiency curves)
    fraction_seed: Seed = 0  # chooses the scenes; a smaller share is a subset of a larger one
    scenes: str | None = None  # file of an official scene list, or the folder of such files; replaces `fraction`
    options: dict[str, Any] = field(default_factory=dict)  # options of the source, which checks them
    cloud: CloudSpec | None = None  # tasks in 3D: None: of frames, their upright rotation; of whole clouds, CloudSpec()
    license: str | None = None  # SPDX identifier or LicenseRef-... of the data's license; None: the source's own

    def __post_init__(self) -> None:
        """Check the license."""
        check_data_license(self.license)


@dataclass(frozen=True)
class FinetuneOptim:
    """The optimizer and its schedule."""

    optimizer: Literal["sgd", "adam"] = "sgd"  # adam takes neither momentum nor dampening
    lr: Positive = 0.01
    backbone_factor: Positive = 1.0  # learning rate of the backbone, relative to `lr`
    head_factor: Positive = 1.0  # learning rate of the new layers, relative to `lr`
    momentum: Momentum = 0.9
    dampening: Probability = 0.0
    weight_decay: NotNegative = 0.0
    decay_norms: bool = True  # weight_decay also on biases and on BatchNorm's weights
    batch: Count = 16  # images a step, over all processes and accumulation steps
    accumulate: Count = 1  # micro-batches that each process makes of its share of a batch
    micro_batch: Count | None = None  # images that a process takes at once, in place of `accumulate`; as in OptimSpec
    sync_bn: bool = False  # BatchNorm over all processes, not over each one's micro-batch
    steps: Count | None = None  # either steps or epochs
    epochs: Positive | None = None
    schedule: Literal["poly", "cosine", "multistep", "constant"] = "poly"  # cosine: from lr to 0, by the step
    power: NotNegative = 0.9  # poly: lr (1 - s / (S + 1)) ** power
    floor: NotNegative = 0.0  # poly: lower limit of the learning rate of each group
    milestones: Milestones | None = None  # multistep: at each of these lr is multiplied by gamma
    milestones_in: Literal["steps", "epochs"] = "steps"
    gamma: Share = 0.1
    warmup: NaturalNumber = 0  # steps in which lr rises linearly from warmup_factor times its value; on any schedule
    warmup_factor: Probability = 0.001
    # BatchNorm of the whole network. pri3d: starts at 0.5, halved every 20 steps, at least 0.001; votenet: the same,
    # halved every `bn_epochs` epochs.
    bn_momentum: Literal["pri3d", "votenet", "constant"] = "constant"
    bn_epochs: Count = 20
    backbone_bn_momentum: Probability | None = None  # of the backbone's BatchNorm; None: torch's default
    clip_norm: Positive | None = None  # largest norm of all gradients together; None: not clipped

    def rate(self, step: int, steps: int, *, epoch: int = 0) -> float:
        """Learning rate at step 0 <= `step` < `steps`, before the factor of a parameter group and the floor.

        `epoch`: number of passes through the training data that are complete.
        """
        if self.schedule in ("poly", "cosine"):
            value = learning_rate(OptimSpec(lr=self.lr, power=self.power, schedule=self.schedule), step, steps)
        elif self.schedule == "multistep":
            reached = epoch if self.milestones_in == "epochs" else step
            value = self.lr * self.gamma ** sum(reached >= milestone for milestone in self.milestones or ())
        else:
            value = self.lr
        if step < self.warmup:
            value *= self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup
        return value


@dataclass(frozen=True)
class LossSpec:
    """What a protocol's loss has beside the task's own."""

    lovasz: NotNegative = 0.0  # 3D segmentation: weight of the Lovasz loss beside cross-entropy; SLidR: 1
    # fcn: labels are reduced by this factor (nearest) to the network's coarse logits; 1: logits are upsampled to labels
    label_stride: Count = 1


@dataclass(frozen=True)
class EvaluateSpec:
    """When and how the validation images are measured; at the end of the run too, unless match_released_code is set."""

    every_epochs: Count | None = None  # n: after epochs 0, n, 2n, ... as the released loop counts
    every_steps: Count | None = None
    batch: Count = 1
    short_sides: Sides | None = None  # segmentation: lengths of the shorter side whose predictions are averaged
    images: Count | None = None  # at most this many, chosen at even spacing; None: all
    # With match_released_code: the size of the labels that IoU is computed on; None: data.size.
    size: ImageSize | None = None
    level: Literal["voxels", "points"] = "voxels"  # 3D segmentation: what the reported score counts; both are measured


@dataclass(frozen=True)
class FinetuneRecipe(Ranged):
    """Everything that a downstream result depends on, except the backbone."""

    name: RecipeName
    task: TaskName
    network: NetworkSpec
    data: LabelledSpec
    optim: FinetuneOptim
    loss: LossSpec = LossSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    match_released_code: bool = False  # reproduce the released protocol's accidents; the report lists them
    seed: Seed = 0
    precision: recipe.Precision = "fp32"
    workers: NaturalNumber = 4  # data loading processes; they do not change the result
    save_every: Count = 500  # steps between saved states

    def check_settings(self, check: Checks) -> None:
        """Note settings that do not go together."""
        optim, evaluate = self.optim, self.evaluate
        recipe.check_length(check, optim)
        both = evaluate.every_epochs is not None and evaluate.every_steps is not None
        pair = (evaluate.every_epochs, evaluate.every_steps)
        check(not both, "evaluate.every_epochs / every_steps", pair, "one of the two, or neither")
        matches = (optim.milestones is not None) == (optim.schedule == "multistep")
        which = "a list of steps (or epochs), for the multistep schedule only"
        check(matches, "optim.milestones", optim.milestones, which, given=["optim.schedule"])
        plain = (optim.momentum, optim.dampening) == (FinetuneOptim.momentum, FinetuneOptim.dampening)
        both_given = "optim.momentum / optim.dampening"
        alone = optim.optimizer == "sgd" or plain
        check(alone, both_given, (optim.momentum, optim.dampening), "neither for adam", given=["optim.optimizer"])
        right = self.task == "segmentation3d" or self.loss.lovasz == 0
        check(right, "loss.lovasz", self.loss.lovasz, "0 but for task 'segmentation3d'", given=["task"])
        self._check_sides(check)
        if self.data.cloud is not None:
            self.data.cloud.check_settings(check)
            limited, whole = self.data.cloud.labelled_points, ("detection3d", "classification3d")
            right = limited is None or (self.task not in whole and not self.on_frames())
            none = f"none for {' and '.join(whole)}, and for clouds of frames"
            check(right, "data.cloud.labelled_points", limited, none, given=["task", "data.source"])
        self._check_network(check)

    def _check_sides(self, check: Checks) -> None:
        """Note settings of images whose sizes differ, which go with some networks and tasks only."""
        stride, network = self.loss.label_stride, self.network
        fits = network.kind == "fcn" and stride == network.output_stride
        words = "1, or for fcn its output_stride"
        check(stride == 1 or fits, "loss.label_stride", stride, words, given=["network.kind", "network.output_stride"])
        for key, sides in (
            ("data.augment.short_sides", self.data.augment.short_sides),
            ("evaluate.short_sides", self.evaluate.short_sides),
        ):
            right = sides is None or (self.task == "segmentation" and self.data.size is None)
            words = "none but for task 'segmentation' without data.size"
            check(right, key, sides, words, given=["task", "data.size"])

    def _check_network(self, check: Checks) -> None:
        network, kinds = self.network, KINDS[self.task]
        recipe.check_width(check, "network", network.encoder, network.width)
        if network.kind not in kinds:
            kind = f"'network.kind' is {network.kind!r}, accepted for task {self.task!r} is one of {', '.join(kinds)}."
            check.note(kind, "network.kind", "task")
        right = network.unet3d is None or network.kind in POINT_KINDS
        check(right, "network.unet3d", network.unet3d, f"none but for {', '.join(POINT_KINDS)}")
        right = self.data.cloud is None or network.kind in POINT_KINDS
        check(right, "data.cloud", plain_types(self.data.cloud), f"none but for {', '.join(POINT_KINDS)}")
        if network.kind in POINT_KINDS:
            options = {} if network.kind == "srunet" else network.options
            plain = vars(NetworkSpec(kind=network.kind, unet3d=network.unet3d, options=options))
            given = {key: value for key, value in vars(network).items() if value != plain[key]}
            check(not given, "network", given, f"kind and unet3d for {network.kind}")
            alone = self.data.augment == LabelledAugment()
            check(
                alone,
                "data.augment",
                plain_types(self.data.augment),
                f"none for {network.kind}: that of clouds is data.cloud.augment",
            )
        elif network.kind != "unet":
            alone = network.transfer == "encoder"
            check(alone, "network.transfer", network.transfer, "'encoder' but for unet", given=["network.kind"])
        else:
            given = {"output_stride": network.output_stride, "aux": network.aux, "options": network.options}
            alone = given == {"output_stride": 32, "aux": 0, "options": {}}
            check(alone, "network", given, "output_stride 32, no aux and no options for unet")

    def labels(self) -> LabelName:
        """The kind of labels that the task is trained on: those of a task of `open_labelled`."""
        if self.task == "instances":
            return "detection"
        return "segmentation" if self.on_frames() else self.task

    def on_frames(self) -> bool:
        """Whether the clouds of a 3D task are those of labelled RGB-D frames, not whole ones."""
        return self.task == "segmentation3d" and self.data.source in FRAME_SETS

    def clouds(self) -> CloudSpec:
        """How clouds become voxels: `data.cloud`, or the default for the kind of clouds."""
        return self.data.cloud or (FRAMES if self.on_frames() else CloudSpec())

    def resize(self) -> str:
        """The interpolation that images are resized with: "nearest" or "bilinear"."""
        return self.data.resize or ("nearest" if self.match_released_code else "bilinear")

    def to_yaml(self) -> str:
        """Serialize as YAML, which parses back to an equal recipe."""
        return yaml.safe_dump(plain_types(self), sort_keys=False)


def with_encoder(spec: FinetuneRecipe, encoder: str) -> FinetuneRecipe:
    """The recipe for backbones with this encoder, where it leaves the encoder to the backbone ("auto")."""
    if spec.network.encoder != AUTO:
        return spec
    return replace(spec, network=replace(spec.network, encoder=encoder))


def with_length(spec: FinetuneRecipe, *, steps: int | None = None, epochs: float | None = None) -> FinetuneRecipe:
    """The recipe with another length, in steps or in epochs; milestones and warm-up shrink or grow with it.

    Where the recipe counts the other unit, milestones stay, and warm-up is at most a tenth of the steps.
    """
    optim = spec.optim
    factor = None
    if steps is not None and optim.steps is not None:
        factor = steps / optim.steps
    elif epochs is not None and optim.epochs is not None:
        factor = epochs / optim.epochs
    milestones, warmup = optim.milestones, optim.warmup
    if factor is not None:
        same = optim.milestones_in == ("steps" if steps is not None else "epochs")
        if milestones is not None and same:
            milestones = tuple(max(round(milestone * factor), 1) for milestone in milestones)
        warmup = round(warmup * factor)
    elif steps is not None:
        warmup = min(warmup, steps // 10)
    return replace(spec, optim=replace(optim, steps=steps, epochs=epochs, milestones=milestones, warmup=warmup))


def changes(before: str, now: str) -> list[str]:
    """List the differences of two recipes in YAML as "key.key: old -> new"; keys in `WITHOUT_EFFECT` do not count."""
    found = config.changes(before, now, FinetuneRecipe, renames=RENAMED, ignore=WITHOUT_EFFECT)
    return recipe.without_auto(found)


def list_finetune_recipes(task: str | None = None) -> list[str]:
    """Names of the fine-tuning recipes in the package: all, or those of one task."""
    paths = sorted(RECIPES.glob("*.yaml"))
    return [path.stem for path in paths if task is None or Draft.read(path).tree.get("task") == task]


def load_finetune_recipe(
    name_or_path: str,
    overrides: Iterable[str] = (),
    *,
    toy: bool = False,
    also: Sequence[Callable[[FinetuneRecipe], object]] = (),
) -> FinetuneRecipe:
    """Read a recipe by name or by the path of a YAML file, and apply `key=value` overrides such as `optim.lr=0.05`.

    `toy` lays overlays/toy_TASK.yaml over it: rooms at a scale that a CPU trains in minutes. `also`: see `parse`.
    Raises `UnknownName`, and `RecipeError` that names every mistake in the file and the overrides.
    """
    path = recipe.recipe_path(name_or_path, "finetune")
    draft = Draft.read(path, RENAMED)
    tree = draft.tree
    if isinstance(tree.get("task"), dict) and "network" not in tree:
        raise recipe.other_kind(str(path), "train")
    if toy:
        _lay_toy_over(tree)
    return draft.override(overrides, recipe.OWNERS).parse(FinetuneRecipe, also)


def _lay_toy_over(tree: dict[str, Any]) -> None:
    """Lay the toy of its task over a recipe; options of another source than the toy's go. Nothing for a wrong task."""
    data = tree["data"] if isinstance(tree.get("data"), dict) else {}
    frames = tree.get("task") == "segmentation3d" and data.get("source") in FRAME_SETS
    overlay = OVERLAYS / f"toy_{tree.get('task')}{'_frames' if frames else ''}.yaml"
    if not overlay.is_file():  # the task is wrong, which is named with the other mistakes
        return
    toy = Draft.read(overlay).tree
    if data.get("source") != toy["data"].get("source"):
        data.pop("options", None)
    merge_tree(tree, toy)
    if isinstance(tree.get("name"), str):
        tree["name"] = retag(tree["name"], "toy")
