"""Frozen image networks that teach 3D ones, by an encoder's last map, a U-Net's dense features, or classes.

PPKT (Liu et al., 2021) takes layer4 of torchvision's ResNet-50; Janda et al. (2022) the dense features of their first
stage; the baselines of PPKT a classifier's or a segmentation network's distribution. A teacher gets no gradients and
stays in evaluation mode whatever mode its student is in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from geo_pretrain import hub
from geo_pretrain.backbones.architectures import HOST_WIDTH, Arch, encoder_arch
from geo_pretrain.backbones.build import build_encoder
from geo_pretrain.backbones.timm_names import contract_for, is_timm
from geo_pretrain.catalog.moco import IMAGENET_STARTS
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import GeoPretrainError, RecipeError, WeightsMismatch
from geo_pretrain.files import read_sealed
from geo_pretrain.loading import load_backbone
from geo_pretrain.tensors import load_tensors
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from geo_pretrain.training.initialize import imagenet_classifier, initialize_encoder
from geo_pretrain.training.networks import (
    IMAGENET,
    SCRATCH,
    PretrainedInit,
    build_segmenter,
    coarse_logits,
    last_convolution,
)
from geo_pretrain.training.recipe import ModelSpec
from geo_pretrain.training.tasks import csail

OF_ANY_ENCODER = (IMAGENET, *IMAGENET_STARTS, SCRATCH)  # start weights for an encoder that is named beside them
Layer: TypeAlias = Literal["logits", "features"]  # of a segmentation network; features: what its last layer takes


class Teacher(nn.Module):
    """A frozen image network. Its state is part of the task's, so that a resumed run keeps its teacher.

    `contract` says what images it takes, `arch` what it is (None: a network of no architecture of the zoo),
    `out_chans` how many channels its map has.
    """

    def __init__(self, network: nn.Module, contract: ImageContract, out_chans: int, arch: Arch | None = None) -> None:
        super().__init__()
        self.network, self.contract, self.out_chans, self.arch = network, contract, out_chans, arch
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W], normalized -> float32 [B, out_chans, h, w], without gradients.

        The last map of an encoder (stride 32), or dense features (or logits) of a network that has them.
        """
        maps = self.network(images)
        return (maps[-1] if isinstance(maps, list) else cast(Tensor, maps)).float()


def load_teacher(weights: str, encoder: str = "resnet50", *, dense: bool = False) -> Teacher:
    """Load the frozen network that `weights` names, with its contract.

    Args:
        weights: "imagenet" (torchvision's IMAGENET1K_V1), "moco_v2", "moco_v2_800ep", "scratch" (random, drawn from
            torch's global generator), or what `load_backbone` accepts: a name of the catalog, a checkpoint folder, a
            hub's address.
        encoder: name of the network, for the first four.
        dense: features of the whole U-Net, where the checkpoint has one, instead of the encoder's last map.

    Raises:
        RecipeError: `dense` of an encoder alone, or a checkpoint that is not an image network.
        GeoPretrainError: weights that cannot be found, as `load_backbone` and `initialize_encoder` raise.
    """
    if weights in OF_ANY_ENCODER:
        if dense:
            raise RecipeError(
                f"Teacher {weights!r} is an encoder alone and has no dense features; accepted: its last map "
                "(dense false), or a checkpoint with a decoder."
            )
        network: Any = build_encoder(encoder)
        if weights != SCRATCH:
            _initialize(network, weights, encoder)
        chans = network.feature_info[-1]["num_chs"]
        contract = contract_for(encoder, ImageContract())
        return Teacher(network, contract, chans, encoder_arch(encoder, width=HOST_WIDTH))
    opened = hub.open(weights)
    if not isinstance(opened.contract, ImageContract):
        raise RecipeError(f"Teacher {weights!r} is {opened.arch}; accepted: a network for images.")
    if dense and not opened.arch.has_decoder:
        raise RecipeError(f"Teacher {weights!r} is an encoder alone; accepted: dense false, or one with a decoder.")
    network = load_backbone(weights, decoder=dense)
    chans = network.out_chans if dense else network.feature_info[-1]["num_chs"]
    return Teacher(network, opened.contract, chans, opened.arch if dense else opened.arch.encoder_alone)


def load_classifier(weights: str, encoder: str = "resnet50") -> tuple[Teacher, nn.Linear]:
    """Load torchvision's image classifier: a `Teacher`, and the layer from its pooled last map to its classes.

    Raises `RecipeError` for other weights than "imagenet", which have no classifier.
    """
    if weights != IMAGENET or is_timm(encoder):
        named = encoder if weights == IMAGENET else weights
        raise RecipeError(
            f"Teacher {named!r} has no classifier; accepted: --set task.teacher=imagenet, whose torchvision file has "
            "one (a ResNet's), or --set task.targets=features, which takes channels of any teacher's pooled map for "
            "classes."
        )
    teacher = load_teacher(weights, encoder)
    return teacher, cast(nn.Linear, imagenet_classifier(encoder).fc)


def torchvision_segmenter(path: Path, layer: Layer = "logits") -> Teacher:
    """Load a segmentation network as a `Teacher` that gives logits [B, classes, h, w], before upsampling, or features.

    `path`: a state dict (.pth, .safetensors) of torchvision's FCN or DeepLabV3 with a ResNet of depth 50 or 101. Raises
    `WeightsMismatch` when it is of another network.
    """
    from torchvision.models import segmentation

    if not path.is_file():
        raise RecipeError(f"'task.teacher_file' is {str(path)!r}, accepted is an existing .pth or .safetensors file.")
    if path.suffix == ".safetensors":
        state = load_tensors(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    state = {key: value for key, value in state.items() if not key.startswith("aux_classifier.")}
    last = state.get("classifier.4.weight")
    if last is None or "backbone.conv1.weight" not in state:
        raise WeightsMismatch(
            f"{path}: no 'backbone.conv1.weight' and 'classifier.4.weight' among keys such as {list(state)[:3]}; "
            "accepted is a state dict of torchvision's fcn_resnet50, fcn_resnet101, deeplabv3_resnet50 or _resnet101."
        )
    kind = "fcn" if "classifier.0.weight" in state else "deeplabv3"
    depth = 101 if "backbone.layer3.22.conv1.weight" in state else 50
    build = getattr(segmentation, f"{kind}_resnet{depth}")
    network = build(weights=None, weights_backbone=None, num_classes=len(last), aux_loss=False)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsMismatch(f"{path}: does not fit torchvision's {kind}_resnet{depth}: {error}") from error
    return _segmenter(network, ImageContract(), len(last), layer)


def csail_segmenter(folder: Path, layer: Layer = "logits") -> Teacher:
    """Load the files encoder_epoch_N.pth and decoder_epoch_N.pth of ADE20K's authors as a `Teacher`, see csail.py."""
    network = csail.read_parser(folder)
    return _segmenter(network, ImageContract(), last_convolution(network).out_channels, layer)


def finetuned_segmenter(folder: Path, layer: Layer = "logits") -> Teacher:
    """Load the network of a finished `geo-pretrain finetune` run as a `Teacher`: logits before upsampling, or features.

    Raises `RecipeError` when the run is of another downstream task.
    """
    results = read_sealed(folder / "results.json")
    if results["task"] != "segmentation":
        raise RecipeError(f"Teacher {str(folder)!r} was fine-tuned for {results['task']}, accepted is segmentation.")
    recipe = load_finetune_recipe(str(folder / "recipe.yaml"))
    state = load_tensors(folder / "model.safetensors", results.get("model", {}).get("sha256"), "results.json")
    width = HOST_WIDTH
    if not is_timm(recipe.network.encoder):
        width = len(next(v for key, v in state.items() if key.endswith("conv1.weight") and v.shape[1] == 3))
    # Random weights of the same shape, then the run's: the backbone that it started from need not be there any more.
    init = PretrainedInit(SCRATCH, recipe.network.encoder, width)
    contract = _finetuned_contract(results, recipe.network.encoder, folder)
    classes = len(results["data"]["classes"])
    coarse = recipe.network.kind == "fcn"
    network, _ = build_segmenter(recipe.network, init, classes, seed=recipe.seed, coarse=coarse)
    network.load_state_dict(state)
    # A U-Net has an output for class 0, "unlabelled", which nothing has trained.
    return _segmenter(network, contract, classes, layer, first=1 if recipe.network.kind == "unet" else 0)


def _segmenter(network: nn.Module, contract: ImageContract, classes: int, layer: Layer, first: int = 0) -> Teacher:
    chans = classes if layer == "logits" else last_convolution(network).in_channels
    return Teacher(_Dense(network, first, layer), contract, chans)


def _finetuned_contract(results: dict[str, Any], encoder: str, folder: Path) -> ImageContract:
    """How a fine-tuning run normalized its images: as its backbone does.

    Raises `RecipeError` when it was written before runs stated that, and the backbone cannot be asked any more.
    """
    if "contract" in results:
        try:
            return ImageContract.from_dict(results["contract"])
        except (TypeError, ValueError) as error:
            raise RecipeError(
                f"Teacher {str(folder)!r}: 'contract' in its results.json cannot be read: {error}"
            ) from None
    backbone = results["backbone"]["name"]
    try:
        return PretrainedInit(backbone, encoder).contract()
    except GeoPretrainError as error:
        raise RecipeError(
            f"Teacher {str(folder)!r}: its results.json has no 'contract' and its backbone {backbone!r}, whose images "
            f"it took, cannot be found ({error}). Accepted: put that back, or fine-tune again."
        ) from error


class _Dense(nn.Module):
    """A segmentation network of another library, asked for its logits or for the features under them."""

    def __init__(self, network: nn.Module, first: int, layer: Layer) -> None:
        super().__init__()
        self.network, self.first = network, first
        self._features: Tensor | None = None
        if layer == "features":
            last_convolution(network).register_forward_pre_hook(self._keep)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> logits [B, classes, h, w] without the `first` ones, or features [B, C, h, w]."""
        network: Any = self.network
        output = coarse_logits(network, images) if hasattr(network, "classifier") else network(images)
        logits: Tensor = output[0] if isinstance(output, tuple) else output
        features, self._features = self._features, None
        return logits[:, self.first :] if features is None else features

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._features = inputs[0]


def _initialize(network: nn.Module, weights: str, encoder: str) -> None:
    try:
        initialize_encoder(network, ModelSpec(encoder=cast(Any, encoder), init=weights))
    except GeoPretrainError as error:
        said = str(error).replace("--set model.init=scratch", "--set task.teacher=NAME or a checkpoint folder")
        raise type(error)(f"Teacher {weights!r}: {said}") from error
