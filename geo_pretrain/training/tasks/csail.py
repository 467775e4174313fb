"""Scene parsing networks of ADE20K's authors, read from their files encoder_epoch_N.pth and decoder_epoch_N.pth.

Repository CSAILVision/semantic-segmentation-pytorch (BSD-3-Clause), mit_semseg/models/{resnet,models}.py: a ResNet with
three 3x3 convolutions for a stem, dilated to stride 8, under a C1 or a pyramid pooling head, each with or without deep
supervision. Published are resnet50dilated and resnet101dilated with ppm_deepsup and resnet18dilated with either head.
No such file was at hand: names and shapes are those of that code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geo_pretrain.backbones.resnet_unet import dilate
from geo_pretrain.errors import RecipeError, WeightsMismatch, some
from geo_pretrain.training.initialize import read_weights_file

BLOCKS = {18: "layer1.1.conv2", 50: "layer1.2.conv3", 101: "layer3.22.conv3"}  # a layer that marks each depth
BINS = (1, 2, 3, 6)  # of the pooled pyramid
WIDTH = 512  # channels of the pyramid and under its last layer
# Of their synchronized BatchNorm, which no inference reads; num_batches_tracked is younger than some of the files.
BOOKKEEPING = ("num_batches_tracked", "_tmp_running_mean", "_tmp_running_var", "_running_iter")


class DeepStemResNet(nn.Module):
    """A ResNet of stride 8 with three convolutions for a stem."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        from torchvision.models import resnet

        network = getattr(resnet, f"resnet{depth}")(weights=None)
        block = type(network.layer1[0])
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv3, self.bn3 = nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128)
        self.maxpool = network.maxpool
        network.inplanes = 128
        self.layer1 = network._make_layer(block, 64, len(network.layer1))
        dilate(network, 8)
        self.layer2, self.layer3, self.layer4 = network.layer2, network.layer3, network.layer4

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W], normalized -> the map of layer4 [B, C, H/8, W/8]."""
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = self.layer2(self.layer1(self.maxpool(x)))
        found: Tensor = self.layer4(self.layer3(x))
        return found


class C1(nn.Module):
    """A plain fully convolutional head: 3x3, norm, ReLU, 1x1."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.cbr = _conv_norm(channels, channels // 4, 3)
        self.conv_last = nn.Conv2d(channels // 4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The encoder's last map -> logits."""
        logits: Tensor = self.conv_last(self.cbr(x))
        return logits


class PyramidPooling(nn.Module):
    """PSPNet's head: the map beside its means over 1, 4, 9 and 36 parts of the image."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.ppm = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(k), *_conv_norm(channels, WIDTH, 1)) for k in BINS)
        first = _conv_norm(channels + len(BINS) * WIDTH, WIDTH, 3)
        self.conv_last = nn.Sequential(*first, nn.Dropout2d(0.1), nn.Conv2d(WIDTH, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The encoder's last map -> logits."""
        pooled = [F.interpolate(part(x), x.shape[-2:], mode="bilinear", align_corners=False) for part in self.ppm]
        logits: Tensor = self.conv_last(torch.cat([x, *pooled], 1))
        return logits


class SceneParser(nn.Module):
    """Encoder and head as one network: normalized images [B, 3, H, W] -> logits [B, classes, H/8, W/8]."""

    def __init__(self, depth: int, head: type[C1] | type[PyramidPooling], classes: int) -> None:
        super().__init__()
        self.encoder = DeepStemResNet(depth)
        self.decoder = head(512 if depth == 18 else 2048, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.encoder(images))
        return logits


def read_parser(folder: Path) -> SceneParser:
    """Read the network of the last epoch that a folder has both files of, in evaluation mode.

    Raises `RecipeError` when there are none, `CheckpointError` for unreadable ones, `WeightsMismatch` for others'.
    """
    epochs = {part: _epochs(folder, part) for part in ("encoder", "decoder")}
    both = sorted(epochs["encoder"].keys() & epochs["decoder"].keys())
    if not both:
        raise RecipeError(
            f"{str(folder)!r} has no encoder_epoch_N.pth and decoder_epoch_N.pth of one N, nor results.json; accepted: "
            "the folder of those files, or of a finished run of `geo-pretrain finetune`."
        )
    states = {part: _plain(read_weights_file(found[both[-1]])) for part, found in epochs.items()}
    last = states["decoder"].get("conv_last.weight", states["decoder"].get("conv_last.4.weight"))
    depth = max((depth for depth, layer in BLOCKS.items() if f"{layer}.weight" in states["encoder"]), default=None)
    if last is None or depth is None:
        raise WeightsMismatch(
            f"{folder}: accepted is an encoder resnet18dilated, resnet50dilated or resnet101dilated with a decoder c1 "
            f"or ppm (with or without _deepsup); the files have {some(list(states['encoder']), 3)} and "
            f"{some(list(states['decoder']), 3)}."
        )
    head = C1 if "conv_last.weight" in states["decoder"] else PyramidPooling
    network = SceneParser(depth, head, len(last))
    for part, state in states.items():
        _load(network.get_submodule(part), state, epochs[part][both[-1]])
    return network.eval()


def _epochs(folder: Path, part: str) -> dict[int, Path]:
    found = (
        (re.fullmatch(rf"{part}_epoch_(\d+)\.pth", path.name), path) for path in folder.glob(f"{part}_epoch_*.pth")
    )
    return {int(match[1]): path for match, path in found if match}


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("module."): value for key, value in state.items()}


def _load(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load weights strictly; heads of deep supervision, the classifier and bookkeeping are left out."""
    own = network.state_dict()
    given = {
        key: value
        for key, value in state.items()
        if not key.endswith(BOOKKEEPING) and "deepsup" not in key and not key.startswith("fc.")
    }
    wanted = {key for key in own if not key.endswith(BOOKKEEPING)}
    wrong = sorted(given.keys() ^ wanted) + [key for key in given.keys() & wanted if given[key].shape != own[key].shape]
    if wrong:
        raise WeightsMismatch(f"{path}: {len(wrong)} keys differ from those of ADE20K's authors: {some(wrong, 3)}.")
    network.load_state_dict(own | given)


def _conv_norm(channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())
