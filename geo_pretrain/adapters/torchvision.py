"""Our encoders inside torchvision's networks: its ResNet, DeepLabV3, FCN, Faster R-CNN and Mask R-CNN.

All builders give torchvision's own classes in evaluation mode, with state-dict keys that are torchvision's, the encoder
loaded as a whole or the call fails, all other layers fresh. `pretrained=False` builds the same network with a random
start; `freeze` counts stages of the encoder (`common.freeze_stages`); further options are those of `load_backbone`
that say where to look (`hub`, `revision`, `cache_dir`, `local_files_only`), `in_chans`, `strict`, `device`, `dtype`.
The networks carry `contract`, `transforms` and `load_report` as plain attributes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.segmentation import FCN, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from geo_pretrain.adapters.common import (
    Name,
    check_request,
    equip,
    freeze_stages,
    load_encoder,
    parameter_groups,
    split_options,
)
from geo_pretrain.backbones.encoder import ImageEncoder
from geo_pretrain.backbones.resnet_unet import dilate
from geo_pretrain.backbones.timm_encoder import TimmEncoder
from geo_pretrain.contract import ImageContract, ImageTransform
from geo_pretrain.errors import InputError, require
from geo_pretrain.inputs import check_place, described
from geo_pretrain.loading import load_backbone

__all__ = ["deeplabv3", "faster_rcnn", "fcn", "freeze_stages", "mask_rcnn", "parameter_groups", "resnet"]

ATROUS_RATES = {32: (3, 6, 9), 16: (6, 12, 18), 8: (12, 24, 36)}  # of DeepLab's papers: the same reach in pixels
PYRAMID = 256  # channels of torchvision's feature pyramids
UNDILATED = ("resnet18", "resnet34")  # torchvision refuses to dilate their basic blocks
DROPOUT = 0.1  # of torchvision's FCN
FROZEN = 2  # stages, as Detectron2 and torchvision freeze under pre-trained weights
NORMS = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d}
SLACK = 0.05  # beyond [0, 1], for resampling that overshoots
FREE = {
    "decoder": "torchvision's ResNet has none; use load_backbone",
    "out_indices": "torchvision's ResNet gives no maps; use load_backbone",
    "freeze": "call freeze_stages(network, count) afterwards",
}
OURS = {  # what torchvision calls otherwise or what is not free here
    "weights": "use pretrained=True or False, and load_state_dict for a whole network",
    "weights_backbone": "use pretrained=True or False",
    "trainable_backbone_layers": "use freeze, which is 5 minus it",
    "trainable_layers": "use freeze, which is 5 minus it",
    "norm_layer": "use norm='frozen' or 'batch'",
    "backbone": "it is that of the name given first",
    "image_mean": "it comes from the contract; set network.transform.image_mean to change it",
    "image_std": "it comes from the contract; set network.transform.image_std to change it",
    "output_stride": "the feature pyramid needs stride 32",
}


def resnet(name: str, *, num_classes: int = 1000, **load_kwargs: Any) -> ResNet:
    """A `torchvision.models.ResNet` in evaluation mode with the encoder of a checkpoint and a fresh classifier `fc`.

    `load_kwargs` are those of `load_backbone` that leave the class as it is: where to look, `pretrained`, `in_chans`,
    `output_stride` (ResNet-50 and deeper, as in torchvision), `strict`, `device`, `dtype`. The network carries
    `contract`, `transforms` and `load_report` as plain attributes. Raises ValueError or `UnknownName` for other
    arguments, ValueError for networks of another width than torchvision's.

    >>> resnet("pri3d_view_geo_r18", num_classes=10, pretrained=False).fc.out_features
    10
    """
    check_request(num_classes, 0)
    split_options("torchvision's ResNet", load_kwargs, ("pretrained", "output_stride"), FREE)
    with torch.random.fork_rng(devices=[]):  # the classifier starts the same, whatever is drawn for the encoder
        encoder: Any = load_backbone(name, **load_kwargs)
    if getattr(encoder, "host_name", None) is None:
        raise ValueError(f"{name!r} is not a ResNet of torchvision's width 64; use load_backbone.")
    if encoder.output_stride != 32 and encoder.host_name in UNDILATED:
        raise ValueError(
            f"output_stride={encoder.output_stride}: torchvision dilates ResNet-50 and deeper; accepted: 32."
        )
    network: ResNet = equip(_host(encoder, num_classes), encoder, 0)
    return network


def deeplabv3(
    name: Name,
    *,
    num_classes: int,
    pretrained: bool = True,
    freeze: int = 0,
    output_stride: int = 16,
    aux_loss: bool = False,
    atrous_rates: Sequence[int] | None = None,
    **options: Any,
) -> DeepLabV3:
    """torchvision's DeepLabV3: [B, C, H, W] -> {"out": logits [B, num_classes, H, W]}, and "aux" with `aux_loss`.

    Atrous rates are (6, 12, 18) at stride 16 and twice that at 8, unless given. torchvision's own builder has stride 8,
    and ResNet-50 and deeper; here shallower ones are dilated, too, by the same rule.
    """
    encoder = _segmentation_encoder("DeepLabV3", name, num_classes, pretrained, freeze, output_stride, options)
    rates = ATROUS_RATES[output_stride] if atrous_rates is None else atrous_rates
    head = DeepLabHead(_channels(encoder, 4), num_classes, rates)
    network: DeepLabV3 = equip(DeepLabV3(*_segmentation_parts(encoder, head, num_classes, aux_loss)), encoder, freeze)
    return network


def fcn(
    name: Name,
    *,
    num_classes: int,
    pretrained: bool = True,
    freeze: int = 0,
    output_stride: int = 8,
    aux_loss: bool = False,
    dropout: float = DROPOUT,
    **options: Any,
) -> FCN:
    """torchvision's FCN: [B, C, H, W] -> {"out": logits [B, num_classes, H, W]}, and "aux" (layer3) with `aux_loss`.

    `dropout`: before the last layer; torchvision has 0.1.
    """
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}; accepted: a number from 0 up to, but not, 1.")
    encoder = _segmentation_encoder("FCN", name, num_classes, pretrained, freeze, output_stride, options)
    head = FCNHead(_channels(encoder, 4), num_classes)
    head[3] = nn.Dropout(dropout)
    network: FCN = equip(FCN(*_segmentation_parts(encoder, head, num_classes, aux_loss)), encoder, freeze)
    return network


def faster_rcnn(
    name: Name,
    *,
    num_classes: int,
    pretrained: bool = True,
    freeze: int | None = None,
    norm: Literal["frozen", "batch"] | None = None,
    pyramid: int = PYRAMID,
    **options: Any,
) -> FasterRCNN:
    """torchvision's Faster R-CNN on a feature pyramid (FPN); its options (`min_size`, `box_score_thresh`, ...) hold.

    Input is torchvision's: a list of images [C, H, W] in [0, 1], **not** normalized, since the network does that, with
    the mean and std of the contract (`network.transform`); values outside raise ValueError. So `network.transforms`
    only brings an image into [0, 1]. `num_classes` counts the background, which is class 0.

    With pretrained weights two stages are frozen and the encoder's BatchNorms are `FrozenBatchNorm2d`, as in
    Detectron2 and torchvision. A random start trains everything with BatchNorm, as torchvision's does: a frozen random
    stem would make a poor baseline of it. `freeze` and `norm` say otherwise for either.
    `pyramid`: channels of the feature pyramid and of the heads' input.
    """
    network: FasterRCNN = _detector(FasterRCNN, name, num_classes, pretrained, freeze, norm, pyramid, options)
    return network


def mask_rcnn(
    name: Name,
    *,
    num_classes: int,
    pretrained: bool = True,
    freeze: int | None = None,
    norm: Literal["frozen", "batch"] | None = None,
    pyramid: int = PYRAMID,
    **options: Any,
) -> MaskRCNN:
    """torchvision's Mask R-CNN on a feature pyramid (FPN); everything as in `faster_rcnn`, with masks."""
    network: MaskRCNN = _detector(MaskRCNN, name, num_classes, pretrained, freeze, norm, pyramid, options)
    return network


def _segmentation_encoder(
    host: str, name: Name, num_classes: int, pretrained: bool, freeze: int, output_stride: int, options: dict[str, Any]
) -> Any:
    own = ("num_classes", "pretrained", "freeze", "output_stride", "aux_loss")
    load, _ = split_options(f"torchvision's {host}", options, own, OURS)
    check_request(num_classes, freeze)
    return load_encoder(name, f"torchvision's {host}", pretrained=pretrained, output_stride=output_stride, **load)


def _segmentation_parts(
    encoder: ImageEncoder, head: nn.Module, num_classes: int, aux_loss: bool
) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    layers = {"layer4": "out"} | ({"layer3": "aux"} if aux_loss else {})
    aux = FCNHead(_channels(encoder, 3), num_classes) if aux_loss else None
    if isinstance(encoder, TimmEncoder):
        return NamedMaps(encoder, {"out": -1} | ({"aux": -2} if aux_loss else {})), head, aux
    return IntermediateLayerGetter(_host(encoder), layers), head, aux


def _detector(
    host: Any,
    name: Name,
    num_classes: int,
    pretrained: bool,
    freeze: int | None,
    norm: str | None,
    pyramid: int,
    options: dict[str, Any],
) -> Any:
    title = f"torchvision's {host.__name__}"
    accepted = {"size_divisible", "fixed_size"}  # of its transform
    for host_class in (FasterRCNN, host):
        accepted |= set(inspect.signature(host_class.__init__).parameters)
    load, rest = split_options(title, options, accepted - {"self", "num_classes", "kwargs", *OURS}, OURS)
    stages = (FROZEN if pretrained else 0) if freeze is None else freeze
    check_request(num_classes, stages, least=2)
    norm = norm or ("frozen" if pretrained else "batch")
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; accepted: {', '.join(map(repr, NORMS))}.")
    if isinstance(pyramid, bool) or not isinstance(pyramid, int) or pyramid < 1:
        raise ValueError(f"pyramid is {pyramid!r}; accepted: a whole number of channels from 1 up (torchvision: 256).")
    encoder = load_encoder(name, title, pretrained=pretrained, **load)
    contract: ImageContract = encoder.contract
    if isinstance(encoder, TimmEncoder):
        if norm == "frozen":
            encoder.model = require("timm", "adapters").layers.freeze_batch_norm_2d(encoder.model)
        backbone: nn.Module = TimmPyramid(encoder, pyramid)
    else:
        body = _host(encoder, norm_layer=NORMS[norm])
        layers = {f"layer{stage}": str(stage - 1) for stage in range(1, 5)}
        backbone = BackboneWithFPN(body, layers, [_channels(encoder, stage) for stage in range(1, 5)], pyramid)
    statistics = {"image_mean": list(contract.mean), "image_std": list(contract.std)}
    network = host(backbone, num_classes=num_classes, **statistics, **rest)
    network.register_forward_pre_hook(refuse_others)
    network.transform.register_forward_pre_hook(refuse_normalized)
    return equip(network, encoder, stages, _unnormalized(contract))


class NamedMaps(nn.Module):
    """An encoder of timm as torchvision's networks take theirs: images -> maps by name."""

    def __init__(self, encoder: TimmEncoder, names: Mapping[str, int]) -> None:
        super().__init__()
        self.encoder, self.names = encoder, dict(names)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x [B, C, H, W], normalized -> the encoder's maps `names` by index."""
        maps = self.encoder(x)
        return {name: maps[index] for name, index in self.names.items()}


class TimmPyramid(nn.Module):
    """torchvision's `BackboneWithFPN` around the last four maps of an encoder of timm, with `.body` and `.fpn`."""

    def __init__(self, encoder: TimmEncoder, channels: int) -> None:
        super().__init__()
        count = min(len(encoder.feature_info), 4)
        self.body = NamedMaps(encoder, {str(number): number - count for number in range(count)})
        sizes = [int(info["num_chs"]) for info in encoder.feature_info[-count:]]
        self.fpn = FeaturePyramidNetwork(sizes, channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x [B, C, H, W], normalized -> the levels of the pyramid."""
        levels: dict[str, Tensor] = self.fpn(self.body(x))
        return levels


def refuse_others(network: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raise `InputError` for what is no list of float images [C, H, W]; runs before torchvision asks their sizes."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not inputs:  # none: given by their name
        return
    host: Any = network
    chans, line = len(host.contract.channels), "network([network.transforms(image) for image in images])"
    images: Any = inputs[0]
    batch = isinstance(images, Tensor) and images.ndim == 4
    if not batch and not isinstance(images, list | tuple):
        one = "network([network.transforms(image)])"
        raise InputError(f"This network takes a list of images [{chans}, H, W]; got {described(images)}. {one}")
    if not len(images):
        raise InputError(f"The list of images is empty; accepted: at least one [{chans}, H, W]. Leave it out.")
    weight = next(network.parameters())
    for image in images:
        if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != chans or not image.numel():
            raise InputError(
                f"This network takes a list of images [{chans}, H, W]; one is {described(image)}. {line} makes them."
            )
        if not image.is_floating_point():
            raise InputError(f"An image is {image.dtype}; accepted: float in [0, 1]: {line}.")
        check_place(image, weight, "Images", "image")


def refuse_normalized(transform: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raise `InputError` for float images that are visibly not in [0, 1]; runs before torchvision normalizes them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return  # values are not there yet
    for index, image in enumerate(inputs[0]):
        if not isinstance(image, Tensor) or not image.is_floating_point() or not image.numel():
            continue  # torchvision says what it thinks of those
        low, high = (float(bound) for bound in image.aminmax())
        if not (low >= -SLACK and high <= 1 + SLACK):  # so written, NaN is refused too
            raise InputError(
                f"Image {index} spans [{low:.4g}, {high:.4g}]; accepted: values in [0, 1], which the network normalizes"
                " itself. Below 0 it was probably normalized already (network.transforms gives what is right here); up "
                "to 255 it needs dividing by 255."
            )


def _unnormalized(contract: ImageContract) -> ImageTransform:
    """Transform any image into float [C, H, W] in [0, 1]; the host normalizes and resizes."""
    count = len(contract.channels)
    return replace(contract, mean=(0.0,) * count, std=(1.0,) * count).transforms(resize=False)


def _host(encoder: Any, num_classes: int = 1, norm_layer: type[nn.Module] = nn.BatchNorm2d) -> ResNet:
    """torchvision's ResNet with the tensors and dilation of an encoder and a fresh classifier."""
    builder = getattr(torchvision.models, encoder.host_name)
    with torch.device("meta"):  # nothing is drawn that would be overwritten
        network: ResNet = builder(weights=None, norm_layer=norm_layer)
        network.conv1 = nn.Conv2d(encoder.in_chans, 64, kernel_size=7, stride=2, padding=3, bias=False)
    network.fc = nn.Linear(network.fc.in_features, num_classes)
    dilate(network, encoder.output_stride)
    classifier = {f"fc.{key}": value for key, value in network.fc.state_dict().items()}
    network.load_state_dict({**encoder.state_dict(), **classifier}, assign=True)
    return network


def _channels(encoder: ImageEncoder, stage: int) -> int:
    """Channels of the output of layer1 to layer4, or of the fourth to the last map of another encoder."""
    return int(encoder.feature_info[stage - 5]["num_chs"])
