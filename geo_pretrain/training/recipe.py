"""Recipes of pre-training: the schema, and reading one from its YAML file. One recipe regenerates one checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from geo_pretrain.catalog import find
from geo_pretrain.catalog.license import check_license
from geo_pretrain.checkpoint import Checkpoint
from geo_pretrain.errors import RecipeError, UnknownName, unknown
from geo_pretrain.training import config
from geo_pretrain.training.config import (
    OTHER_KEYS,
    Checks,
    Renamed,
    apply_overrides,
    check_key,
    merge_tree,
    parse,
    plain_types,
    read_tree,
)

RECIPES = Path(__file__).parent / "recipes"
TOY = RECIPES / "overlays" / "toy.yaml"
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
WITHOUT_EFFECT = ("workers", "save_every", "data.path")
_SAME_DATA = ("source", "path", "size", "frames", "license", "options")  # data settings that a first stage takes over
_SAME_PAIRS = ("overlap", "measure", "max_pairs_per_scene")  # the same, where both stages train on pairs

EncoderName = Literal["resnet18", "resnet50"]  # names in backbones.architectures.ENCODERS

T = TypeVar("T")


@dataclass(frozen=True)
class ModelSpec:
    """The 2D U-Net to train."""

    encoder: EncoderName = "resnet18"
    init: str = "imagenet"  # imagenet | moco_v2 | scratch | stage1 | catalog name | checkpoint folder
    width: int = 64  # channels of the stem; everything else scales with it


@dataclass(frozen=True)
class UNet3DSpec:
    """The sparse 3D U-Net to train; it starts from random weights."""

    variant: Literal["34C", "18A", "18B", "18C"] = "34C"  # of backbones.sr_unet
    width: int = 32  # channels of the stem; everything else scales with it
    in_chans: Literal[3] = 3  # RGB, or three ones
    out_chans: int = 32
    stem_kernel: int = 3
    voxel_size: float = 0.025  # m
    bn_momentum: float = 0.1  # of BatchNorm layers outside the residual blocks, as in the released code


@dataclass(frozen=True)
class AugmentSpec:
    """Photometric augmentation, drawn independently for each image. Pri3D uses no flips, crops or rotations."""

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    jitter_prob: float = 0.8
    grayscale_prob: float = 0.2
    blur_prob: float = 0.5
    blur_radius: tuple[float, float] = (0.1, 2.0)  # pixels, Pillow's Gaussian


@dataclass(frozen=True)
class DataSpec:
    """Where frames come from and which pairs are used."""

    source: str = "rooms"
    path: str | None = None  # folder of a data set on disk; rooms renders its own
    size: tuple[int, int] = (240, 320)  # working height and width
    frames: tuple[float, float] = (0.0, 1.0)  # the part of each scene's frames to use, in order of time
    units: Literal["pairs", "frames"] = "pairs"  # frames: single frames, each stored as a pair with itself
    overlap: tuple[float, float] = (0.3, 1.0)  # range of the overlap ratio of pairs
    # How overlap is measured. projective: by projection, as Pri3D's paper says; match_released_code: as the released
    # script does it, by 5 cm voxels within 7.5 cm of each other.
    measure: Literal["projective", "match_released_code"] = "projective"
    max_pairs_per_scene: int | None = None  # chosen at even spacing among the scene's pairs
    license: str | None = None  # SPDX identifier of the data's license; None: the source's own
    options: dict[str, Any] = field(default_factory=dict)  # options of the source, which checks them
    augment: AugmentSpec = AugmentSpec()

    def __post_init__(self) -> None:
        """Check the license, so that a wrong one is found before training."""
        if self.license is not None:
            try:
                check_license(self.license)
            except UnknownName as error:
                raise RecipeError(f"data.license: {error}") from error


@dataclass(frozen=True)
class OptimSpec:
    """The optimizer and its schedule; `batch` counts pairs over all processes and accumulation steps."""

    kind: Literal["sgd", "adam"] = "sgd"
    batch: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    dampening: float = 0.0
    weight_decay: float = 0.0
    # cosine_epoch: constant within an epoch, as in MoCo's released loop
    schedule: Literal["poly", "exponential", "cosine", "cosine_epoch", "constant"] = "poly"
    power: float = 0.9  # poly: lr (1 - s / (S + 1)) ** power
    gamma: float = 0.99  # exponential: lr gamma ** floor(s / every)
    every: int = 1000
    first_decay: bool = False  # exponential: an extra decay after the first step, as in PointContrast's loop
    accumulate: int = 1  # micro-batches of each step
    epochs: float | None = None  # either epochs or steps
    steps: int | None = None
    # pri3d: starts at 0.5, halved every 20 steps, at least 0.001; floor: 0.001 from the first step on
    bn_momentum: Literal["pri3d", "floor", "constant"] = "pri3d"


@dataclass(frozen=True)
class Stage1Spec:
    """The first of two stages. In YAML: `stage1: {recipe: NAME, ...}` with any settings that replace the recipe's."""

    recipe: str  # name or path of the recipe that trains it
    overrides: dict[str, Any] = field(default_factory=dict, metadata=OTHER_KEYS)


@dataclass(frozen=True)
class Recipe:
    """Everything needed to regenerate a checkpoint."""

    name: str
    task: dict[str, Any]  # {name: ..., and the task's own settings}, which the task checks
    model: ModelSpec | None = None  # the 2D network, if the task trains one
    unet3d: UNet3DSpec | None = None  # the 3D network, if the task trains one
    data: DataSpec = DataSpec()
    optim: OptimSpec = OptimSpec()
    # Trained first, on the same data (see `load_stage1`). Where this recipe says "stage1", such as in model.init or
    # task.teacher, the resulting checkpoint is used.
    stage1: Stage1Spec | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    workers: int = 4  # data loading processes of each training process; they do not change the result
    save_every: int = 500  # steps between saved states

    def __post_init__(self) -> None:
        """Check ranges, and settings that depend on each other."""
        data, optim, check = self.data, self.optim, Checks()
        check("name" in self.task, "task.name", self.task, "the name of a pretext task")
        one = (optim.steps is None) != (optim.epochs is None)
        check(one, "optim.steps / optim.epochs", (optim.steps, optim.epochs), "exactly one of the two")
        for key, value in {
            "optim.batch": optim.batch,
            "optim.accumulate": optim.accumulate,
            "optim.every": optim.every,
            "save_every": self.save_every,
            **({} if self.model is None else {"model.width": self.model.width}),
            **({} if self.unet3d is None else {"unet3d.width": self.unet3d.width}),
        }.items():
            check(value >= 1, key, value, "a whole number from 1 up")
        if self.unet3d is not None:
            check(self.unet3d.voxel_size > 0, "unet3d.voxel_size", self.unet3d.voxel_size, "meters above 0")
        check(optim.steps is None or optim.steps >= 1, "optim.steps", optim.steps, "from 1 up")
        check(self.workers >= 0, "workers", self.workers, "0 (load in the training process) or more")
        check(min(data.size) >= 32, "data.size", data.size, "[height, width], each from 32 up")
        for key, (low, high) in {"data.overlap": data.overlap, "data.frames": data.frames}.items():
            check(0 <= low < high <= 1, key, [low, high], "[low, high] with 0 <= low < high <= 1")
        stepwise = optim.steps is not None and optim.epochs is None
        epochs = "a number, for the schedule cosine_epoch"
        check(not (stepwise and optim.schedule == "cosine_epoch"), "optim.epochs", None, epochs)
        if optim.accumulate >= 1:
            whole = optim.batch % optim.accumulate == 0
            check(whole, "optim.batch", optim.batch, "a multiple of accumulate", given=["optim.accumulate"])
        check.done()

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


def list_recipes() -> list[str]:
    """Names of the pre-training recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(
    name: str,
    overrides: Iterable[str] = (),
    *,
    toy: bool = False,
    also: Sequence[Callable[[Recipe], object]] = (),
) -> Recipe:
    """Read a recipe by name or by the path of a YAML file, and apply `key=value` overrides such as `optim.lr=0.05`.

    Args:
        name: a recipe of the package, or the path of a file ending in .yaml.
        overrides: texts `key.key=value`.
        toy: apply recipes/overlays/toy.yaml: the same task on small rooms, which a CPU trains in minutes.
        also: further checks of the recipe, such as of its task's settings; see `config.parse`.

    Raises:
        UnknownName: there is no such recipe.
        RecipeError: names every mistake in the file and the overrides.
    """
    tree, path = _recipe_tree(name, toy=toy)
    apply_overrides(tree, overrides, RENAMED)
    return parse(Recipe, tree, where=str(path), also=also)


def load_stage1(recipe: Recipe, overrides: Iterable[str] = (), *, toy: bool = False) -> Recipe:
    """Read the recipe that trains the first stage of `recipe`; `overrides` and `toy` as in `load_recipe`.

    The first stage takes over the seed and the data of `recipe`, also the choice of pairs where both train on pairs,
    and the 2D network where `recipe` continues training it. Settings in the section `stage1` win over these.
    """
    if recipe.stage1 is None:
        raise RecipeError(f"recipe {recipe.name}: key 'stage1' is missing.")
    tree, path = _recipe_tree(recipe.stage1.recipe, toy=toy)
    tree |= {"seed": recipe.seed, "workers": recipe.workers}
    both_pairs = recipe.data.units == "pairs" == tree.get("data", {}).get("units", "pairs")
    _take_over(tree, "data", recipe.data, (*_SAME_DATA, *(_SAME_PAIRS if both_pairs else ())))
    if recipe.model is not None and recipe.model.init == STAGE1:
        _take_over(tree, "model", recipe.model, ("encoder", "width"))
    merge_tree(tree, recipe.stage1.overrides)
    apply_overrides(tree, overrides, RENAMED)
    first = parse(Recipe, tree, where=f"{path}, changed by stage1 of recipe {recipe.name}")
    check_key(first.stage1 is None, "stage1.recipe", first.name, "a recipe of one stage")
    return first


def _take_over(tree: dict[str, Any], section: str, spec: object, keys: Iterable[str]) -> None:
    """Set keys of a section to the values of `spec`."""
    values = {key: plain_types(getattr(spec, key)) for key in keys}
    tree[section] = dict(tree.get(section) or {}) | {key: value for key, value in values.items() if value is not None}
    for key, value in values.items():
        if value is None:
            tree[section].pop(key, None)


def _recipe_tree(name: str, *, toy: bool) -> tuple[dict[str, Any], Path]:
    """Read a recipe as nested mappings; returns them with the path of the file."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise unknown("recipe", name, list_recipes(), "Or give the path of a .yaml file.")
    tree = read_tree(path, RENAMED)
    if toy:
        overlay = read_tree(TOY)
        task_overlay = overlay.pop("tasks").get(tree.get("task", {}).get("name"), {})
        for network in ("model", "unet3d"):
            if tree.get(network) is None:
                overlay.pop(network)  # the recipe does not train this network
        if (tree.get("model") or {}).get("init") == STAGE1:
            del overlay["model"]["init"]  # a first stage is trained on rooms too, so nothing is downloaded
        merge_tree(tree, overlay)
        merge_tree(tree, task_overlay)
        tree["name"] = retag(str(tree.get("name")), "toy")
    return tree, path


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
    """List the differences of two recipes in YAML as "key.key: old -> new"; keys in `WITHOUT_EFFECT` do not count."""
    return config.changes(before, now, Recipe, renames=RENAMED, ignore=WITHOUT_EFFECT)
