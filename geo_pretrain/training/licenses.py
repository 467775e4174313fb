"""The license chain of trained weights: the strictest terms of all data and weights that a run uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geo_pretrain import hub
from geo_pretrain.backbones.architectures import encoder_arch
from geo_pretrain.backbones.timm_names import is_timm, timm_license
from geo_pretrain.catalog import find
from geo_pretrain.catalog.license import LICENSES, License, strictest
from geo_pretrain.catalog.moco import IMAGENET_STARTS
from geo_pretrain.errors import GeoPretrainError
from geo_pretrain.files import expanded, read_sealed
from geo_pretrain.training.data.sources.registry import data_license, weights_terms
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from geo_pretrain.training.initialize import FILE, PACKAGE, weights_file
from geo_pretrain.training.recipe import STAGE1, Recipe

IMAGENET_TERMS = "LicenseRef-ImageNet-terms"
UNKNOWN_TERMS = "LicenseRef-unknown"


def run_license(recipe: Recipe, settings: Mapping[str, Any], starts: Mapping[str, Path] = {}) -> License:
    """Compute the license of the weights that a recipe trains: the strictest terms of data, start weights and teacher.

    Args:
        recipe: the recipe. 3D networks always start from random weights.
        settings: all settings of the recipe's task with their defaults; a teacher counts also where it is the default.
        starts: maps "stage1" to the folder of the trained first stage. Before it is trained, the terms of the catalog
            entry that its recipe is named after count.

    Raises:
        GeoPretrainError: start weights or a teacher cannot be found.
    """
    dataset, terms = data_license(recipe.data)
    model, teacher = recipe.model, settings.get("teacher")
    start, taught_by = Origin(), Origin()
    if model is not None:
        start = _origin(_weights(recipe, model.init, starts), model.encoder)
    if teacher is not None:
        file = settings.get("teacher_file")
        if file is not None and (expanded(file) / "results.json").is_file():
            teacher = str(expanded(file))  # a fine-tuned network states its own terms
        taught_by = _origin(_weights(recipe, teacher, starts), settings.get("teacher_encoder", "resnet50"))
    base = f"random weights; teacher: {taught_by.name}" if taught_by.name else "none (random weights)"
    mixed = (("ImageNet", IMAGENET_TERMS),) if settings.get("mix", "none") != "none" else ()
    datasets = dict([(dataset, terms), *mixed, *start.datasets, *taught_by.datasets])
    weights = strictest(
        weights_terms(recipe.data), *(more for _, more in mixed), start.terms or terms, taught_by.terms or terms
    )
    return License(code="MIT", weights=weights, datasets=tuple(datasets.items()), base_model=start.name or base)


@dataclass(frozen=True)
class Origin:
    """Weights that a run builds on, with their terms; all fields are empty for random weights."""

    name: str = ""
    terms: str = ""  # license of the weights
    datasets: tuple[tuple[str, str], ...] = ()  # data sets the weights were trained on, each with its license


def _weights(recipe: Recipe, value: str, starts: Mapping[str, Path]) -> str:
    """Name or folder of the weights in a setting; for a first stage not trained yet, the name of its recipe."""
    if value == STAGE1 and STAGE1 not in starts and recipe.stage1 is not None:
        return recipe.stage1.recipe
    return recipe.start_of(value, starts)


def finetuned_license(dataset: str, terms: str, backbone: str, encoder: str, where: Mapping[str, Any] = {}) -> License:
    """The license of a network that is fine-tuned on `dataset`, under `terms`, from a backbone.

    `encoder`: of the recipe; `where`: `hub`, `revision`, ... of `load_backbone`. A backbone whose terms cannot be found
    has unknown ones, which are the strictest.
    """
    try:
        start = _origin(backbone, encoder, where)
    except GeoPretrainError:
        start = _unknown(backbone)
    weights = strictest(terms, start.terms or terms)
    datasets = {dataset: terms, **{name: own for name, own in start.datasets if name != dataset}}
    base = start.name or "none (random weights)"
    return License(code="MIT", weights=weights, datasets=tuple(datasets.items()), base_model=base)


def _origin(weights: str, encoder: str, where: Mapping[str, Any] = {}) -> Origin:
    """Look up name, terms and data sets of start weights or of a teacher."""
    if weights == "scratch":
        return Origin()
    terms = IMAGENET_TERMS
    if weights.startswith((FILE, PACKAGE)):
        return _of_file(weights)
    if weights == "imagenet" and is_timm(encoder):
        by_lower = {known.lower(): known for known in LICENSES}  # as timm writes them
        own = by_lower.get(timm_license(encoder).lower(), UNKNOWN_TERMS)
        name = f"{encoder} ({own}; ImageNet terms: non-commercial research)"
        return Origin(name, strictest(own, terms), (("ImageNet", terms),))
    if weights == "imagenet":
        network = f"torchvision {encoder_arch(encoder).title} IMAGENET1K_V1"
        name = f"{network} (BSD-3-Clause; ImageNet terms: non-commercial research)"
        return Origin(name, terms, (("ImageNet", terms),))
    if weights in IMAGENET_STARTS:
        name = "MoCo v2 ResNet-50 without labels (CC-BY-NC-4.0; ImageNet terms: non-commercial research)"
        return Origin(name, strictest("CC-BY-NC-4.0", terms), (("ImageNet", terms),))
    if weights == "ade20k":
        terms = "LicenseRef-ADE20K-terms"
        return Origin(f"fully convolutional ResNet of ADE20K ({terms})", terms, (("ADE20K", terms),))
    if (Path(weights) / "results.json").is_file():
        return _finetuned(Path(weights))
    entry = None if Path(weights).is_dir() else find(weights)
    described = entry or hub.open(weights, **where)
    name, license = weights if entry else described.name, described.license
    return Origin(f"{name} ({license.weights})", license.weights, license.datasets)


def _of_file(start: str) -> Origin:
    """Start weights in a file or a package: nothing says what they learned from, so their terms are unknown."""
    path = weights_file(start)
    return _unknown(start if start.startswith(PACKAGE) else f"{FILE}{path.name}")


def _unknown(name: str) -> Origin:
    """Weights of unknown terms, which are the strictest; brackets in a name would be read as a license."""
    name = name.translate({ord("("): "[", ord(")"): "]"})
    return Origin(f"{name} ({UNKNOWN_TERMS})", UNKNOWN_TERMS, ((f"what {name} learned from", UNKNOWN_TERMS),))


def _finetuned(folder: Path) -> Origin:
    """Name, terms and data sets of the weights in a fine-tuning folder: those of its backbone and of its labels.

    A backbone that can no longer be found has unknown terms, which are the strictest.
    """
    results = read_sealed(folder / "results.json")
    backbone, source = results["backbone"]["name"], results["data"]["source"]
    labels = results["data"].get("licence") or ("MIT" if source == "rooms" else "LicenseRef-data-owner")
    try:
        start = _origin(backbone, load_finetune_recipe(str(folder / "recipe.yaml")).network.encoder)
    except GeoPretrainError:
        start = _unknown(backbone)
    terms = strictest(labels, start.terms or labels)
    name = f"{results['recipe']} fine-tuned from {backbone} ({terms})"
    return Origin(name, terms, ((source, labels), *start.datasets))
