"""Recipes of pre-training: the schema, and reading one from its YAML file. One recipe regenerates one checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from geo_pretrain.backbones.encoder import HOST_WIDTH
from geo_pretrain.backbones.timm_names import is_timm
from geo_pretrain.catalog import find
from geo_pretrain.catalog.license import check_license
from geo_pretrain.checkpoint import CHECKPOINT_NAME, Checkpoint
from geo_pretrain.errors import RecipeError, UnknownName, unknown
from geo_pretrain.files import expanded
from geo_pretrain.training import config
from geo_pretrain.training.checks import (
    Accepts,
    Checks,
    Count,
    ImageSize,
    Interval,
    Meters,
    Momentum,
    NaturalNumber,
    NotNegative,
    Odd,
    Positive,
    Probability,
    Ranged,
    Seed,
    Share,
    check_key,
)
from geo_pretrain.training.config import OTHER_KEYS, Draft, Renamed, lookup, merge_tree, plain_types

RECIPES = Path(__file__).parent / "recipes"
KINDS = {  # the command that runs a recipe -> its kind in words, the folder of those in the package
    "train": ("pre-training recipe", RECIPES),
    "finetune": ("fine-tuning recipe", RECIPES / "finetune"),
}
TOY, SMALL = (RECIPES / "overlays" / f"{name}.yaml" for name in ("toy", "small"))
Precision = Literal["fp32", "bf16", "auto"]  # of networks, by autocast; losses are computed in float32
AUTO: Literal["auto"] = "auto"  # bf16 where the machine computes it faster, see `precision`; a run records which
STAGE1 = "stage1"  # as start weights: the checkpoint that the first stage of the same recipe trains
RESNETS = {depth: f"resnet{depth}" for depth in (18, 34, 50, 101)}  # former values of keys that name an encoder
_RENAMED = (
    Renamed("data.licence", "data.license"),
    Renamed("model.depth", "model.encoder", RESNETS),
    Renamed("task.teacher_depth", "task.teacher_encoder", RESNETS),
    Renamed("data.augment.grey_prob", "data.augment.grayscale_prob"),
    Renamed("data.measure", "data.measure", {"authors_exact": "match_released_code"}),
    Renamed("task.authors_exact", "task.match_released_code"),
)
# Former keys and values, which are still read; they may also stand in the settings of a first stage.
RENAMED = (
    *_RENAMED,
    *(dataclasses.replace(one, old=f"{STAGE1}.{one.old}", new=f"{STAGE1}.{one.new}") for one in _RENAMED),
)
# Keys that do not change the result. Data are compared by their fingerprint, not by their path.
WITHOUT_EFFECT = ("workers", "save_every", "data.path", "data.options.cache", "data.options.renderer")
_SAME_DATA = ("source", "path", "size", "frames", "license", "options")  # data settings that a first stage takes over
_SAME_PAIRS = (
    "overlap",
    "measure",
    "max_pairs_per_scene",
    "draws_per_scene",
    "crop",
)  # the same, where both stages train on pairs

# Options are those of one source, of rooms where none is given.
OWNERS = {"data.source": ("data.options", "rooms")}

AUTO = "auto"  # of fine-tuning: the encoder of whatever backbone the run is given
# names in backbones.architectures.ENCODERS, and those of timm, which is asked for them when they are used
EncoderName = Annotated[
    str,
    Accepts(
        lambda name: name in ("resnet18", "resnet50") or is_timm(name),
        "one of resnet18, resnet50, or timm/NAME: any image encoder of timm",
    ),
]
AnyEncoder = Annotated[
    str,
    Accepts(
        lambda name: name in ("resnet18", "resnet50", AUTO) or is_timm(name),
        "one of resnet18, resnet50, auto (the backbone's own), or timm/NAME: any image encoder of timm",
    ),
]
RecipeName = Annotated[str, Accepts(CHECKPOINT_NAME.fullmatch, "letters, digits, '.', '_' and '-'")]
Jitter = Annotated[
    tuple[float, float, float, float],
    Accepts(lambda jitter: min(jitter) >= 0 and jitter[3] <= 0.5, "four numbers from 0 up, the last one up to 0.5"),
]
Radii = Annotated[tuple[float, float], Accepts(lambda r: 0 <= r[0] <= r[1], "[low, high] with 0 <= low <= high")]

T = TypeVar("T")


def check_data_license(license: str | None) -> None:
    """Raise `RecipeError` for a `data.license` that is none, so that it is found before training."""
    if license is not None:
        try:
            check_license(license)
        except UnknownName as error:
            raise RecipeError(f"data.license: {error}") from error


@dataclass(frozen=True)
class ModelSpec:
    """The 2D U-Net to train."""

    encoder: EncoderName = "resnet18"
    # imagenet | moco_v2 | scratch | stage1 | catalog name | checkpoint folder | file:PATH | package:MODULE[/FILE]
    init: str = "imagenet"
    width: Count = 64  # channels of the stem of a ResNet; everything else scales with it


@dataclass(frozen=True)
class UNet3DSpec:
    """The sparse 3D U-Net to train; it starts from random weights."""

    variant: Literal["34C", "18A", "18B", "18C"] = "34C"  # of backbones.sr_unet
    width: Count = 32  # channels of the stem; everything else scales with it
    in_chans: Literal[3] = 3  # RGB, or three ones
    out_chans: Count = 32
    stem_kernel: Odd = 3
    voxel_size: Meters = 0.025
    bn_momentum: Probability = 0.1  # of BatchNorm layers outside the residual blocks, as in the released code


@dataclass(frozen=True)
class AugmentSpec:
    """Photometric augmentation, drawn independently for each image. Pri3D uses no flips, crops or rotations."""

    jitter: Jitter = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    jitter_prob: Probability = 0.8
    grayscale_prob: Probability = 0.2
    blur_prob: Probability = 0.5
    blur_radius: Radii = (0.1, 2.0)  # pixels, Pillow's Gaussian


@dataclass(frozen=True)
class DataSpec:
    """Where frames come from and which pairs are used."""

    source: str = "rooms"
    path: str | None = None  # folder of a data set on disk; rooms renders its own
    size: ImageSize = (240, 320)  # working height and width
    frames: Interval = (0.0, 1.0)  # the part of each scene's frames to use, in order of time
    units: Literal["pairs", "frames"] = "pairs"  # frames: single frames, each stored as a pair with itself
    overlap: Interval = (0.3, 1.0)  # range of the overlap ratio of pairs
    # How overlap is measured. projective: by projection, as Pri3D's paper says; match_released_code: as the released
    # script does it, by 5 cm voxels within 7.5 cm of each other; voxels: quick, and calibrated to that; source: by the
    # data set's own rule, where its source has one.
    measure: Literal["projective", "match_released_code", "voxels", "source"] = "projective"
    max_pairs_per_scene: Count | None = None  # chosen at even spacing among the scene's pairs
    draws_per_scene: Count | None = None  # pairs drawn from each scene an epoch, with replacement; None: each pair once
    # none: frames are resized to `size`; match: both are cut to it, about a point that both see.
    crop: Literal["none", "match"] = "none"
    license: str | None = None  # SPDX identifier of the data's license; None: the source's own
    options: dict[str, Any] = field(default_factory=dict)  # options of the source, which checks them
    augment: AugmentSpec = AugmentSpec()

    def __post_init__(self) -> None:
        """Check the license."""
        check_data_license(self.license)


@dataclass(frozen=True)
class OptimSpec:
    """The optimizer and its schedule; `batch` counts pairs over all processes and accumulation steps."""

    kind: Literal["sgd", "adam"] = "sgd"
    batch: Count = 64
    lr: Positive = 0.1
    momentum: Momentum = 0.9
    dampening: Probability = 0.0
    weight_decay: NotNegative = 0.0
    # cosine_epoch: constant within an epoch, as in MoCo's released loop
    schedule: Literal["poly", "exponential", "cosine", "cosine_epoch", "constant"] = "poly"
    power: NotNegative = 0.9  # poly: lr (1 - s / (S + 1)) ** power
    gamma: Share = 0.99  # exponential: lr gamma ** floor(s / every)
    every: Count = 1000
    first_decay: bool = False  # exponential: an extra decay after the first step, as in PointContrast's loop
    accumulate: Count = 1  # micro-batches of each step
    # Samples that a process takes at once. The micro-batches of a step follow from it and the number of processes, so
    # that the batch stays what it is on fewer GPUs. None: batch / processes / accumulate.
    micro_batch: Count | None = None
    sync_bn: bool = False  # BatchNorm of images over all processes, not over each one's micro-batch
    epochs: Positive | None = None  # either epochs or steps
    steps: Count | None = None
    # pri3d: starts at 0.5, halved every 20 steps, at least 0.001; floor: 0.001 from the first step on
    bn_momentum: Literal["pri3d", "floor", "constant"] = "pri3d"


@dataclass(frozen=True)
class Stage1Spec:
    """The first of two stages. In YAML: `stage1: {recipe: NAME, ...}` with any settings that replace the recipe's."""

    recipe: str  # name or path of the recipe that trains it
    overrides: dict[str, Any] = field(default_factory=dict, metadata=OTHER_KEYS)


@dataclass(frozen=True)
class Recipe(Ranged):
    """Everything needed to regenerate a checkpoint."""

    name: RecipeName
    task: dict[str, Any]  # {name: ..., and the task's own settings}, which the task checks
    model: ModelSpec | None = None  # the 2D network, if the task trains one
    unet3d: UNet3DSpec | None = None  # the 3D network, if the task trains one
    data: DataSpec = DataSpec()
    optim: OptimSpec = OptimSpec()
    # Trained first, on the same data (see `load_stage1`). Where this recipe says "stage1", such as in model.init or
    # task.teacher, the resulting checkpoint is used.
    stage1: Stage1Spec | None = None
    precision: Precision = "fp32"
    seed: Seed = 0
    workers: NaturalNumber = 4  # data loading processes of each training process; they do not change the result
    save_every: Count = 500  # steps between saved states

    def check_settings(self, check: Checks) -> None:
        """Note settings that do not go together."""
        optim = self.optim
        check("name" in self.task, "task.name", self.task, "the name of a pretext task")
        check_length(check, optim)
        if self.model is not None:
            check_width(check, "model", self.model.encoder, self.model.width)
        stepwise = optim.steps is not None and optim.epochs is None
        epochs = "a number, for the schedule cosine_epoch"
        check(not (stepwise and optim.schedule == "cosine_epoch"), "optim.epochs", None, epochs)

    def network2d(self) -> ModelSpec:
        """The section `model`. Raises `RecipeError` when it is missing, for the task trains a 2D network."""
        return self._needed(self.model, "model")

    def network3d(self) -> UNet3DSpec:
        """The section `unet3d`. Raises `RecipeError` when it is missing, for the task trains a 3D network."""
        return self._needed(self.unet3d, "unet3d")

    def start_of(self, value: str, starts: Mapping[str, Path] = {}) -> str:
        """Start weights that a setting names, with "stage1" replaced by the folder `starts["stage1"]`.

        Raises `RecipeError` when the setting is "stage1" and no first stage has been trained.
        """
        if value != STAGE1:
            return value
        if STAGE1 not in starts:
            raise RecipeError(
                f"recipe {self.name}: 'stage1' is given as start weights, but no first stage was trained. Accepted: "
                "a key 'stage1' naming a recipe, run by `geo-pretrain train`; or a checkpoint's name or folder."
            )
        return str(starts[STAGE1])

    def _needed(self, section: T | None, key: str) -> T:
        if section is None:
            raise RecipeError(f"recipe {self.name}: key '{key}' is missing; task {self.task['name']!r} trains it.")
        return section

    def to_yaml(self) -> str:
        """Serialize as YAML, which parses back to an equal recipe."""
        return yaml.safe_dump(plain_types(self), sort_keys=False)


def check_length(check: Checks, optim: Any) -> None:
    """Note a run's section `optim` that states no length or two, or a batch that is not divided evenly."""
    one = (optim.steps is None) != (optim.epochs is None)
    check(one, "optim.steps / optim.epochs", (optim.steps, optim.epochs), "exactly one of the two (null for the other)")
    whole = optim.batch % max(optim.accumulate, 1) == 0
    check(whole, "optim.batch", optim.batch, "a multiple of accumulate", given=["optim.accumulate"])
    alone = optim.micro_batch is None or optim.accumulate == 1
    check(alone, "optim.accumulate / optim.micro_batch", (optim.accumulate, optim.micro_batch), "one of the two")


def micro_batches(optim: Any, processes: int) -> int:
    """The number of micro-batches that each process makes of its share of a batch; `optim`: a recipe's section.

    Raises `RecipeError` where `optim.micro_batch` does not divide that share.
    """
    if optim.micro_batch is None:
        return int(optim.accumulate)
    share, rest = divmod(optim.batch, processes)
    if rest or share % optim.micro_batch:
        fitting = [str(count) for count in range(1, share + 1) if not rest and share % count == 0]
        accepted = f"one of {', '.join(fitting)}" if fitting else "none: optim.batch cannot be dealt evenly to them"
        raise RecipeError(
            f"'optim.micro_batch' is {optim.micro_batch}, accepted for optim.batch {optim.batch} and {processes} "
            f"process{'es' if processes > 1 else ''} is {accepted}."
        )
    return int(share // optim.micro_batch)


def check_width(check: Checks, section: str, encoder: str, width: int) -> None:
    """Note a width of an encoder of timm, which has its own."""
    right = not is_timm(encoder) or width == HOST_WIDTH
    words = f"{HOST_WIDTH}, the default: an encoder of timm has timm's width"
    check(right, f"{section}.width", width, words, given=[f"{section}.encoder"])


def list_recipes() -> list[str]:
    """Names of the pre-training recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(
    name: str,
    overrides: Iterable[str] = (),
    *,
    toy: bool = False,
    small: bool = False,
    also: Sequence[Callable[[Recipe], object]] = (),
) -> Recipe:
    """Read a recipe by name or by the path of a .yaml file, and apply `key=value` overrides such as `optim.lr=0.05`.

    `toy` lays recipes/overlays/toy.yaml over it: the same task on small rooms, which a CPU trains in minutes. `small`
    lays small.yaml over it: the same task and data in sizes for a CPU. `also`: further checks, such as of the task's
    settings; see `config.parse`. Raises `UnknownName`, and `RecipeError` that names every mistake in the file and the
    overrides.
    """
    overrides = list(overrides)
    draft = _draft(name, toy=toy, small=small)
    keys = {key: value for key, _, value in (text.partition("=") for text in overrides)}
    if (toy or small) and is_timm(keys.get("model.encoder", "")) and isinstance(draft.tree.get("model"), dict):
        draft.tree["model"].pop("width", None)  # the overlay's, which is not timm's
    return draft.override(overrides, OWNERS).parse(Recipe, also)


def load_stage1(
    recipe: Recipe,
    overrides: Iterable[str] = (),
    *,
    toy: bool = False,
    small: bool = False,
    also: Sequence[Callable[[Recipe], object]] = (),
) -> Recipe:
    """Read the recipe that trains the first stage of `recipe`; the arguments are those of `load_recipe`.

    The first stage takes over the seed and the data of `recipe`, also the choice of pairs where both train on pairs,
    and the 2D network where `recipe` continues training it. Settings in the section `stage1` win over these.
    """
    if recipe.stage1 is None:
        raise RecipeError(f"recipe {recipe.name}: key 'stage1' is missing.")
    draft = _draft(recipe.stage1.recipe, toy=toy, small=small)
    draft.where += f", changed by stage1 of recipe {recipe.name}"
    draft.tree |= {"seed": recipe.seed, "workers": recipe.workers}
    both_pairs = recipe.data.units == "pairs" == (lookup(draft.tree, "data.units") or "pairs")
    _take_over(draft.tree, "data", recipe.data, (*_SAME_DATA, *(_SAME_PAIRS if both_pairs else ())))
    if recipe.model is not None and recipe.model.init == STAGE1:
        _take_over(draft.tree, "model", recipe.model, ("encoder", "width"))
    merge_tree(draft.tree, recipe.stage1.overrides)
    first = draft.override(overrides, OWNERS).parse(Recipe, also)
    check_key(first.stage1 is None, "stage1.recipe", first.name, "a recipe of one stage")
    return first


def _take_over(tree: dict[str, Any], section: str, spec: object, keys: Iterable[str]) -> None:
    """Set keys of a section to the values of `spec`."""
    tree[section] = dict(tree.get(section) or {}) | {key: plain_types(getattr(spec, key)) for key in keys}


def _draft(name: str, *, toy: bool, small: bool = False) -> Draft:
    """Read a recipe by name or path, under the overlay of toys or of small runs if asked."""
    path = recipe_path(name, "train")
    draft = Draft.read(path, RENAMED)
    tree = draft.tree
    if isinstance(tree.get("task"), str) and "network" in tree:
        raise other_kind(str(path), "finetune")
    if toy or small:
        _lay_over(tree, toy=toy)
        if isinstance(tree.get("name"), str):
            tree["name"] = retag(tree["name"], "toy" if toy else "small")
    return draft


def _lay_over(tree: dict[str, Any], *, toy: bool) -> None:
    """Lay the overlay of toys, or of small runs, over a recipe; both share the settings of tasks for few steps."""
    toys = Draft.read(TOY).tree
    overlay = toys if toy else Draft.read(SMALL).tree
    task = str(lookup(tree, "task.name"))
    of_task = [toys.pop("tasks").get(task, {})]
    of_task += [] if toy else [overlay.pop("tasks").get(task, {})]
    for network in ("model", "unet3d"):
        if tree.get(network) is None:
            overlay.pop(network)  # the recipe does not train this network
    if is_timm(str(lookup(tree, "model.encoder"))) and "model" in overlay:
        overlay["model"].pop("width", None)
    if lookup(tree, "model.init") == STAGE1:
        del overlay["model"]["init"]  # a first stage is trained on the same data, so nothing is downloaded
    if toy and lookup(tree, "data.source") != lookup(overlay, "data.source") and isinstance(tree.get("data"), dict):
        tree["data"].pop("options", None)  # those of another source
    for one in (overlay, *of_task):
        merge_tree(tree, one)


def recipe_path(name: str, command: str | None = None) -> Path:
    """The YAML file of a recipe that `geo-pretrain COMMAND` runs, by name or path; without a command, of any recipe.

    Raises `UnknownName`, or `RecipeError` for the name of a recipe that another command runs.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = expanded(name)
        if path.is_file():
            return path
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UnknownName(f"{name!r} {found}; accepted: the path of a recipe's .yaml file, or a recipe's name.")
    for runs, (_, folder) in KINDS.items():
        path = folder / f"{name}.yaml"
        if path.is_file() and command in (None, runs):
            return path
        if path.is_file():
            raise other_kind(name, runs)
    folders = [folder for runs, (_, folder) in KINDS.items() if command in (None, runs)]
    names = [path.stem for folder in folders for path in folder.glob("*.yaml")]
    raise unknown("recipe", name, names, "Or give the path of a .yaml file.")


def other_kind(name: str, command: str) -> RecipeError:
    """The error for a recipe that was given to the wrong command; `command` is the one that runs it."""
    return RecipeError(f"{name} is a {KINDS[command][0]}; run it by `geo-pretrain {command} {name}`.")


def retag(name: str, tag: str) -> str:
    """Replace the tag of a checkpoint name: a run on other data must not carry a published name."""
    return f"{name.partition('.')[0]}.{tag}"


def recipe_of(checkpoint: Checkpoint) -> Recipe | None:
    """Read the recipe of a checkpoint folder, or of its catalog entry; None if neither has one."""
    if "recipe" in checkpoint.roles:
        return load_recipe(str(checkpoint.folder / checkpoint.file_of("recipe")))
    entry = find(checkpoint.name)
    return None if entry is None or entry.recipe is None else load_recipe(entry.recipe)


def changes(before: str, now: str) -> list[str]:
    """List the differences of two recipes in YAML as "key.key: old -> new"; keys in `WITHOUT_EFFECT` do not count.

    Neither does a precision that one of them leaves to the machine.
    """
    return without_auto(config.changes(before, now, Recipe, renames=RENAMED, ignore=WITHOUT_EFFECT))


def without_auto(differences: Iterable[str]) -> list[str]:
    """Drop the difference of a precision to `AUTO`, which is either."""
    return [one for one in differences if not (one.startswith("precision: ") and AUTO in one.split())]
