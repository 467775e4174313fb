"""The networks that fine-tuning trains: a backbone with pre-trained weights, alone or inside a segmentation network.

`PretrainedInit` says where a backbone's weights come from; `build_segmenter` puts it into the network of a recipe. A
fine-tuned segmentation network can teach a 3D network, so this lies below both pretext tasks and fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geo_pretrain import hub as hubs
from geo_pretrain.adapters.common import encoder_of, freeze_stages, stages_of
from geo_pretrain.backbones.architectures import HOST_WIDTH, unet_arch
from geo_pretrain.backbones.build import build, build_encoder
from geo_pretrain.backbones.resnet_unet import UNet, unet_like
from geo_pretrain.backbones.timm_encoder import is_channels_last
from geo_pretrain.backbones.timm_names import check_timm, contract_for, fitted, is_timm, without_tag
from geo_pretrain.catalog import Entry, find
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import GeoPretrainError, HubError, RecipeError
from geo_pretrain.loading import load_backbone
from geo_pretrain.seeding import seeded
from geo_pretrain.training.checks import check_key
from geo_pretrain.training.initialize import FILE, PACKAGE, initialize_encoder
from geo_pretrain.training.recipe import ModelSpec

if TYPE_CHECKING:
    from geo_pretrain.training.finetune_recipe import NetworkSpec

SCRATCH, IMAGENET = "scratch", "imagenet"
# entries of the catalog that give the shape of an encoder, without their weights
SHAPE_TEMPLATES = {"resnet18": "pri3d_view_geo_r18", "resnet50": "pri3d_view_geo_r50"}
DIVISIBLE = {"fcn": 1, "fpn": 32}  # what the sides of an image must be multiples of; others: of the output stride
AUX_STAGE = 3  # of the encoder, whose map feeds the auxiliary head: layer3 of a ResNet

Transfer = Literal["all", "encoder", "none"]  # which part of a U-Net has pre-trained weights


@dataclass(frozen=True)
class PretrainedInit:
    """Where the backbone of a run comes from.

    "scratch", "imagenet", a name of the catalog, a checkpoint folder, or the weights of an encoder alone: "file:PATH",
    "package:MODULE".
    """

    backbone: str
    encoder: str  # a key of backbones.architectures.ENCODERS, such as "resnet18", or "timm/NAME"
    width: int = HOST_WIDTH
    where: Mapping[str, Any] = field(default_factory=dict)  # load_backbone's hub, revision, cache_dir, ...

    @property
    def named(self) -> bool:
        """Whether it is a checkpoint: a name of the catalog or a folder."""
        return self.backbone not in (SCRATCH, IMAGENET) and not self.of_file

    @property
    def of_file(self) -> bool:
        """Whether it is the weights of an encoder in a file or an installed package."""
        return self.backbone.startswith((FILE, PACKAGE))

    def unet(self, seed: int) -> tuple[UNet, Transfer]:
        """Build Pri3D's U-Net with these weights; returns it and its pre-trained part. The rest is drawn by `seed`."""
        width = self.width
        if self.named:
            arch = self._checked().arch
            if arch.has_decoder:
                return load_backbone(self.backbone, decoder=True, **self.where), "all"
            width = arch.args.get("width", HOST_WIDTH)
        with seeded(seed):
            network: UNet = build(unet_arch(self.encoder, width=width), decoder=True)
        if self.backbone == SCRATCH:
            return network, "none"
        network.encoder.load_state_dict(self._encoder_weights())
        return network, "encoder"

    def host(self, builder: Callable[..., Any], seed: int, **options: Any) -> Any:
        """Build another library's network with these weights; `builder` is one of geo_pretrain.adapters."""
        if self.named:
            self._checked()
        elif self.width != HOST_WIDTH:
            raise RecipeError(
                f"'network.width' is {self.width}, accepted is {HOST_WIDTH}: other libraries' ResNets have it."
            )
        with seeded(seed):
            if self.named:
                return builder(self.backbone, **self.where, **options)
            if is_timm(self.encoder):
                network = builder(self.encoder, pretrained=self.backbone == IMAGENET, **options)
            else:
                network = builder(SHAPE_TEMPLATES[self.encoder], pretrained=False, **options)
        encoder = encoder_of(network)
        if is_timm(self.encoder) and self.of_file:  # the host's keys are timm's, ours are those after "model."
            own = {key.removeprefix("model."): value for key, value in self._encoder_weights().items()}
            encoder.load_state_dict(fitted(self.encoder, encoder.state_dict(), own, self.backbone))
        elif self.of_file or (self.backbone == IMAGENET and not is_timm(self.encoder)):
            encoder.load_state_dict(self._encoder_weights())
        return network

    def contract(self) -> ImageContract:
        """The input contract of the backbone."""
        if self.named:
            return cast(ImageContract, self._checked().contract)
        return contract_for(self.encoder, ImageContract())

    def fetch(self) -> None:
        """Bring the weights here, before any other work. Raises as `unet` and `host` do."""
        if self.named:
            fetch_start(self.backbone, self.where, f"-b scratch --set network.encoder={self.encoder}")
        elif self.backbone != SCRATCH:
            self._encoder_weights()

    def _encoder_weights(self) -> dict[str, Tensor]:
        if self.named:
            return cast(nn.Module, load_backbone(self.backbone, **self.where)).state_dict()
        if self.width != HOST_WIDTH:
            raise RecipeError(
                f"'network.width' is {self.width}, accepted for backbone {self.backbone!r} is {HOST_WIDTH}."
            )
        with torch.random.fork_rng(devices=[]):
            encoder = build_encoder(self.encoder)
        try:
            initialize_encoder(encoder, ModelSpec(encoder=cast(Any, self.encoder), init=self.backbone))
        except GeoPretrainError as error:
            said = str(error).replace("--set model.init=scratch", "--backbone scratch")
            raise type(error)(f"Backbone {self.backbone!r}: {said}") from error
        weights: dict[str, Tensor] = encoder.state_dict()
        return weights

    def _checked(self) -> Entry | hubs.Opened:
        """Open the named checkpoint and check that it has the recipe's encoder; weights are not fetched."""
        entry = find(self.backbone)
        checkpoint = entry or hubs.open(self.backbone, **self.where)
        encoder = checkpoint.arch.encoder_name
        if encoder is None:
            raise RecipeError(
                f"Backbone {self.backbone!r} is {checkpoint.arch}; accepted: a ResNet or a U-Net for images."
            )
        if encoder != without_tag(self.encoder):
            raise RecipeError(
                f"Backbone {self.backbone!r} has the encoder {encoder!r}, the recipe is for {self.encoder!r}: choose "
                f"another, or --set network.encoder={encoder}."
            )
        return checkpoint


def fetch_start(name: str, where: Mapping[str, Any], scratch: str) -> None:
    """Fetch a checkpoint's first file of weights; without a network the error names `scratch`, which needs none."""
    try:
        opened = hubs.open(name, **where)
        opened.fetch(*opened.network_roles(decoder=False))
    except HubError as error:
        raise hubs.without_network(error, f"{scratch} begins with random weights.") from error


def build_segmenter(
    spec: NetworkSpec, init: PretrainedInit, classes: int, *, seed: int, coarse: bool = False
) -> tuple[Segmenter, Transfer]:
    """Build the segmentation network of a recipe; returns it and which part of it is pre-trained.

    Labels are 1 to `classes`; a "unet" has an output for class 0, too. New layers are drawn by `seed`. `coarse`: the
    logits of a "fcn" are those of its own stride, not upsampled to the image.
    """
    if spec.kind == "unet":
        pretrained, have = init.unet(seed)
        transferred: Transfer = "encoder" if have == "all" and spec.transfer == "encoder" else have
        unet = segmentation_unet(pretrained, classes + 1, seed=seed, transfer=transferred)
        freeze_stages(unet, spec.freeze)
        return Segmenter(unet, multiple=1, aux=None), transferred
    network = _host(spec, init, classes, seed)
    multiple = spec.output_stride if coarse else DIVISIBLE.get(spec.kind, spec.output_stride)
    aux = None
    if spec.aux:
        with torch.device("meta"):
            channels = build_encoder(spec.encoder).feature_info[AUX_STAGE - 5]["num_chs"]  # the last but one
        with seeded(seed):
            aux = _aux_head(channels, classes)
    segmenter = Segmenter(network, multiple=multiple, aux=aux, coarse=coarse)
    return segmenter, "encoder" if init.backbone != SCRATCH else "none"


def check_options(spec: NetworkSpec) -> None:
    """Raise `RecipeError` for options that the builder of a segmentation network refuses; no weights are made."""
    if is_timm(spec.encoder):
        check_timm(spec.encoder)
    try:
        if spec.kind != "unet":
            with torch.device("cpu" if is_timm(spec.encoder) else "meta"):  # timm's part has weights, which are moved
                _host(spec, PretrainedInit(SCRATCH, spec.encoder, HOST_WIDTH, {}), 1, 0)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        check_key(False, "network.options", spec.options, f"what {spec.kind} takes: {error}".rstrip("."))


def _host(spec: NetworkSpec, init: PretrainedInit, classes: int, seed: int) -> Any:
    """Another library's segmentation network with the weights of `init`."""
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.options.items()}
    fixed = {"num_classes": classes, "output_stride": spec.output_stride, "freeze": spec.freeze}
    library = "torchvision" if spec.kind == "fcn" else "smp"
    return init.host(resolve_name(f"geo_pretrain.adapters.{library}:{spec.kind}"), seed, **fixed, **options)


def segmentation_unet(pretrained: UNet, classes: int, *, seed: int, transfer: Transfer = "all") -> UNet:
    """Copy a U-Net with a new last layer of `classes` logits.

    `transfer` says which weights are those of `pretrained`: "all" but `decoder.conv0` (Pri3D's protocol), "encoder", or
    "none". The others are drawn by `seed`, the same ones whatever is transferred.
    """
    with seeded(seed):
        network = unet_like(pretrained.encoder, classes)
    prefixes = {"all": ("encoder.", "decoder.up", "decoder.join"), "encoder": ("encoder.",), "none": ()}[transfer]
    kept = {key: value for key, value in pretrained.state_dict().items() if key.startswith(prefixes)}
    network.load_state_dict(network.state_dict() | kept)
    return network


class Segmenter(nn.Module):
    """A segmentation network of any library as one call: normalized images -> logits of classes 0.. or 1.., float32."""

    def __init__(self, network: nn.Module, *, multiple: int, aux: nn.Module | None, coarse: bool = False) -> None:
        super().__init__()
        self.network, self.multiple, self.aux, self.coarse = network, multiple, aux, coarse
        self._aux_map: Tensor | None = None
        self._channels_last = False
        if aux is not None:
            encoder: Any = encoder_of(network)
            self._channels_last = is_channels_last(encoder)
            stages_of(encoder)[AUX_STAGE][1][-1].register_forward_hook(self._keep)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, 3, H, W] -> logits [B, classes, h, w] and, in training mode, logits of the auxiliary head."""
        height, width = images.shape[-2:]
        down, right = -height % self.multiple, -width % self.multiple
        padded_images = F.pad(images, (0, right, 0, down)) if down or right else images
        logits = coarse_logits(self.network, padded_images) if self.coarse else self.network(padded_images)
        logits = logits["out"] if isinstance(logits, dict) else logits
        features, self._aux_map = self._aux_map, None
        aux = self.aux(features).float() if self.aux is not None and self.training else None
        size, padded = (height, width), (height + down, width + right)
        logits = _uncovered(logits.float(), size, padded)
        return logits, None if aux is None else _uncovered(aux, size, padded)

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._aux_map = output.permute(0, 3, 1, 2) if self._channels_last else output


def coarse_logits(network: Any, images: Tensor) -> Tensor:
    """The logits [B, classes, h, w] of torchvision's FCN or DeepLabV3, whose forward would upsample them."""
    logits: Tensor = network.classifier(network.backbone(images)["out"])
    return logits


def last_convolution(network: nn.Module) -> nn.Conv2d:
    """The layer of a segmentation network that makes its logits: the last convolution, of no auxiliary head."""
    layers = [
        layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d) and not name.startswith(("aux.", "aux_classifier."))
    ]
    return layers[-1]


def _aux_head(channels: int, classes: int) -> nn.Sequential:
    """PSPNet's auxiliary head: 3x3 to a quarter of the channels, norm, dropout 0.1, 1x1."""
    inner = channels // 4
    return nn.Sequential(
        nn.Conv2d(channels, inner, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.1),
        nn.Conv2d(inner, classes, kernel_size=1),
    )


def _uncovered(logits: Tensor, size: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """Crop the logits of a padded image to the image, rounded up to whole cells."""
    rows, columns = (-(-given * own // all) for given, own, all in zip(logits.shape[-2:], size, padded, strict=True))
    return logits[..., :rows, :columns]
