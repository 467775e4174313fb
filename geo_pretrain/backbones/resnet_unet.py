"""torchvision's ResNet as a feature pyramid, and the residual U-Net of Pri3D on top of it.

Hou et al., "Pri3D: Can 3D Priors Help 2D Representation Learning?", ICCV 2021 (network written from its description).
Blocks are torchvision's, so encoder weights move to and from torchvision without renaming; decoder keys are those of
the published checkpoints. `width` scales every layer: 64 is the real network, 8 a tiny version for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from geo_pretrain.backbones.base import EncoderDecoder, FeatureEncoder
from geo_pretrain.backbones.encoder import HOST_WIDTH, Stages
from geo_pretrain.backbones.enlarged import convolve_enlarged, is_transformed, pays, stands_for
from geo_pretrain.inputs import check_images

if TYPE_CHECKING:
    from torchvision.models.resnet import BasicBlock, Bottleneck

# depth -> name of the block's class in torchvision and timm, blocks of each stage
BLOCKS = {
    18: ("BasicBlock", (2, 2, 2, 2)),
    34: ("BasicBlock", (3, 4, 6, 3)),
    50: ("Bottleneck", (3, 4, 6, 3)),
    101: ("Bottleneck", (3, 4, 23, 3)),
}
torch.fx.wrap("check_images")  # one node for `torch.fx.symbolic_trace`, which cannot follow its branches
torch.fx.wrap("of_size")
DENSE_STRIDE = 2  # of the U-Nets' output
STAGES = {"stem": ("conv1", "bn1"), **{f"layer{stage}": (f"layer{stage}",) for stage in range(1, 5)}}
# output stride -> dilation of the first block of a stage, and of its others: torchvision's rule
DILATIONS = {32: {}, 16: {"layer4": (1, 2)}, 8: {"layer3": (1, 2), "layer4": (2, 4)}}


class ResNetEncoder(FeatureEncoder):
    """ResNet without pooling and classifier: an image in, a pyramid of feature maps out.

    State-dict keys are torchvision's without `fc`. `feature_info` describes the maps `forward` returns, in order, as
    timm does: one dict with "num_chs", "reduction" and "module" a map.

    `output_stride` 16 or 8 replaces the strides of the last one or two stages by dilation with torchvision's rule (the
    first block of a stage keeps the dilation of the stage before), for basic blocks too, which torchvision refuses.
    """

    def __init__(
        self,
        depth: int = 18,
        *,
        width: int = 64,
        in_chans: int = 3,
        output_stride: int = 32,
        out_indices: Sequence[int] = (0, 1, 2, 3, 4),
    ) -> None:
        super().__init__()
        block, repeats = _lookup(depth)
        self.depth, self.width, self.in_chans = depth, width, in_chans
        self.output_stride, self.out_indices = output_stride, _check_indices(out_indices)
        self.host_name = f"resnet{depth}" if width == HOST_WIDTH else None
        self.conv1 = nn.Conv2d(in_chans, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = width
        for stage, count in enumerate(repeats):
            planes = width << stage
            self.add_module(f"layer{stage + 1}", _stage(block, channels, planes, count, stride=1 if stage == 0 else 2))
            channels = planes * block.expansion
        dilate(self, output_stride)
        self.feature_info: list[dict[str, Any]] = _feature_info(width, block.expansion, output_stride, self.out_indices)
        _initialize(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [B, in_chans, H, W], normalized -> maps [B, C, H / stride, W / stride] (rounded up), finest first.

        Map 0 is relu(bn1(conv1)) at stride 2, before the max-pooling; 1 to 4 are the outputs of layer1 to layer4.
        """
        check_images(x, self.in_chans, self.conv1.weight)
        self.look_at(x)
        x = self.relu(self.bn1(self.conv1(x)))
        maps = [x]
        x = self.maxpool(x)
        for index in range(1, max(self.out_indices) + 1):  # stages nobody asked for are not computed
            x = getattr(self, f"layer{index}")(x)  # torch 2.7 cannot export get_submodule
            maps.append(x)
        return [maps[index] for index in self.out_indices]

    def stages(self) -> Stages:
        """Five stages: "stem", "layer1" to "layer4"."""
        return resnet_stages(self)


class UpProjection(nn.Module):
    """Resize, then a residual pair of branches that halves the channels: relu(5x5-3x3 branch + 5x5 branch)."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, out_chans, kernel_size=5, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chans)
        self.conv1_2 = nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1, bias=False)
        self.bn1_2 = nn.BatchNorm2d(out_chans)
        self.conv2 = nn.Conv2d(in_chans, out_chans, kernel_size=5, padding=2, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x [B, in_chans, h, w] -> [B, out_chans, *size]. Bilinear, align_corners=True: the weights learned that."""
        first, second = _enlarged_branches(self.conv1, self.conv2, x, size)
        branch = self.bn1_2(self.conv1_2(F.relu(self.bn1(first))))
        return F.relu(branch + self.bn2(second))


def _enlarged_branches(conv1: Any, conv2: Any, x: Tensor, size: tuple[int, int]) -> Sequence[Tensor]:
    """Both convolutions of the enlarged map, computed at the small size where that is quicker and says the same."""
    recorded = is_transformed()  # first: torch 2.7 cannot compile what `stands_for` asks
    if not recorded and stands_for(conv1) and stands_for(conv2) and pays(x, conv1.weight, size):
        return [convolve_enlarged(x, conv.weight, size) for conv in (conv1, conv2)]
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    return conv1(x), conv2(x)


class UNetDecoder(nn.Module):
    """Up-projections to stride 2; the encoder's maps are added, not concatenated, and one of stride 2 is not used.

    Channels fall as the stride does, but not below `narrowest`; a map that has another number of them is brought to it
    by a 1x1 convolution (`join1`, ...), which ResNets do not need. Where there is no map for a stride, as below that of
    a vision transformer's patches, an up-projection doubles the last one.
    """

    def __init__(
        self, chans: Sequence[int], out_chans: int, *, strides: Sequence[int] = (4, 8, 16, 32), narrowest: int = 1
    ) -> None:
        """`chans`, `strides`: of the encoder's maps, finest first; strides above 2."""
        super().__init__()
        self.steps = _decoder_steps(strides)
        self.finest = strides[0]
        width = chans[-1]
        for number, (stride, index) in enumerate(self.steps, 1):
            narrower = max(narrowest, chans[-1] * stride // strides[-1])
            self.add_module(f"up{number}", UpProjection(width, narrower))
            if index is not None and chans[index] != narrower:
                self.add_module(f"join{number}", nn.Conv2d(chans[index], narrower, kernel_size=1))
            width = narrower
        self.conv0 = nn.Conv2d(width, out_chans, kernel_size=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of strides above 2, finest first -> [B, out_chans, h, w] at stride 2: twice the size of one at 4."""
        x = maps[-1]
        for number, (stride, index) in enumerate(self.steps, 1):
            up = getattr(self, f"up{number}")  # torch 2.7 cannot export get_submodule
            if index is None:
                x = up(x, _at_stride(maps[0], self.finest, stride))
            else:
                skip = maps[index]
                joined = getattr(self, f"join{number}")(skip) if hasattr(self, f"join{number}") else skip
                x = up(x, _size(skip)) + joined
        dense: Tensor = self.conv0(x)
        return dense


def _decoder_steps(strides: Sequence[int]) -> list[tuple[int, int | None]]:
    """Stride of each up-projection's output and the index of the map that is added there; None: there is none."""
    steps: list[tuple[int, int | None]] = [(strides[index], index) for index in range(len(strides) - 2, -1, -1)]
    stride = 1 << (strides[0] - 1).bit_length() - 1  # the largest power of 2 below the finest map's
    while stride >= DENSE_STRIDE:
        steps.append((stride, None))
        stride //= 2
    return steps


def _at_stride(finest: Tensor, have: int, stride: int) -> tuple[int, int]:
    """The size at `stride` of what a map of stride `have` covers, which may be a little more than the image."""
    height, width = _size(finest)
    if have % stride == 0:
        return have // stride * height, have // stride * width
    return have * height // stride, have * width // stride


class UNet(EncoderDecoder):
    """An encoder, `.encoder`, and a decoder, `.decoder`: one feature vector for every second pixel in both directions.

    The decoder's map may cover a row or column more than the image, which is cut off. Encoders that leave out the last
    pixels of a side that their stride does not divide, as ConvNeXt does, give less: the border is repeated there.
    """

    decoder: UNetDecoder

    def _dense(self, maps: Sequence[Tensor], x: Tensor) -> Tensor:
        """The decoder's map at half the size of the images `x`."""
        deep = [one for one, info in zip(maps, self.feature_info, strict=True) if info["reduction"] > DENSE_STRIDE]
        return of_size(self.decoder(deep), (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)


def of_size(dense: Tensor, height: int, width: int) -> Tensor:
    """A map cut at the bottom and the right, or continued there by its border."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # which cannot ask how large a map of any size is
        for axis, side in ((2, height), (3, width)):
            inside = torch.arange(side, device=dense.device).clamp(max=dense.shape[axis] - 1)
            dense = dense.index_select(axis, inside)
        return dense
    dense = dense[:, :, :height, :width]
    lacking = height - dense.shape[2], width - dense.shape[3]
    return F.pad(dense, (0, lacking[1], 0, lacking[0]), mode="replicate") if any(lacking) else dense


class ResNetUNet(UNet):
    """The dense 2D network of Pri3D: one feature vector for every second pixel in both directions.

    `out_chans` defaults to the pre-training width: width / 2 times the block's expansion, so 32 for ResNet-18 and 128
    for ResNet-50. `.encoder` and `.decoder` hold all weights. Any image of at least 32 x 32 pixels works. The decoder
    doubles layer1's map; where a side is not a multiple of 4 that is a row or column more than side / 2, rounded up,
    which is cut off. The released network keeps it; all other values are the same.
    """

    def __init__(self, depth: int = 18, *, width: int = 64, out_chans: int | None = None, in_chans: int = 3) -> None:
        super().__init__()
        self.encoder = ResNetEncoder(depth, width=width, in_chans=in_chans)
        stage_chans = [info["num_chs"] for info in self.encoder.feature_info[1:]]
        self.out_chans = stage_chans[0] // 2 if out_chans is None else out_chans
        self.decoder = UNetDecoder(stage_chans, self.out_chans)

    def _dense(self, maps: Sequence[Tensor], x: Tensor) -> Tensor:
        """The decoder's map, cut to the size of the stem's."""
        return of_size(self.decoder(maps[1:]), *_size(maps[0]))


def unet_like(encoder: Any, out_chans: int) -> UNet:
    """A randomly initialized U-Net whose encoder has the shape of `encoder`."""
    if not isinstance(encoder, ResNetEncoder):
        like: UNet = encoder.unet(out_chans)
        return like
    return ResNetUNet(encoder.depth, width=encoder.width, out_chans=out_chans, in_chans=encoder.in_chans)


def resnet_stages(network: nn.Module) -> Stages:
    """The stages of any ResNet under torchvision's names: this package's, torchvision's, smp's or timm's."""
    return [(name, [network.get_submodule(module) for module in modules]) for name, modules in STAGES.items()]


def dilate(network: nn.Module, output_stride: int) -> None:
    """Bring a ResNet of stride 32 to `output_stride` 16 or 8 by torchvision's rule, as `load_backbone` does.

    In a dilated stage the first block keeps the dilation of the stage before. With another rule the same weights
    compute something else.
    """
    if output_stride not in DILATIONS:
        raise ValueError(f"output_stride is {output_stride!r}; accepted: 8, 16 or 32.")
    for name, (first, rest) in DILATIONS[output_stride].items():
        stage: Any = network.get_submodule(name)
        _dilate_stage(stage, first, rest)


def _dilate_stage(stage: nn.Sequential, first: int, rest: int) -> None:
    """Give a built stage stride 1, its first block dilation `first` and all others `rest`; weights stay as they are.

    In a basic block only the strided convolution takes `first`: what follows it sees the finer grid. So the new
    network computes the old one's values at every grid point the old one had.
    """
    block: Any
    for index, block in enumerate(stage):
        is_bottleneck = hasattr(block, "conv3")
        strided, *others = [block.conv2] if is_bottleneck else [block.conv1, block.conv2]
        _set_dilation(strided, first if index == 0 else rest)
        for conv in others:
            _set_dilation(conv, rest)
        if index == 0 and block.downsample is not None:
            block.downsample[0].stride = (1, 1)
        block.stride = 1


def _set_dilation(conv: nn.Conv2d, dilation: int) -> None:
    conv.stride, conv.padding, conv.dilation = (1, 1), (dilation, dilation), (dilation, dilation)


def _lookup(depth: int) -> tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]:
    if depth not in BLOCKS:
        raise ValueError(f"Unknown ResNet depth {depth!r}; accepted: {', '.join(map(str, BLOCKS))}.")
    from torchvision.models import resnet  # here: point networks do without torchvision, which loads slowly

    name, repeats = BLOCKS[depth]
    return getattr(resnet, name), repeats


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_chans: int, planes: int, count: int, *, stride: int
) -> nn.Sequential:
    out_chans = planes * block.expansion
    shortcut = None
    if stride != 1 or in_chans != out_chans:
        shortcut = nn.Sequential(
            nn.Conv2d(in_chans, out_chans, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(out_chans)
        )
    first = block(in_chans, planes, stride, shortcut)
    return nn.Sequential(first, *(block(out_chans, planes) for _ in range(count - 1)))


def _feature_info(width: int, expansion: int, output_stride: int, out_indices: Sequence[int]) -> list[dict[str, Any]]:
    info = [{"num_chs": width, "reduction": 2, "module": "relu"}]
    for stage in range(4):
        reduction = min(4 << stage, output_stride)
        info.append({"num_chs": (width << stage) * expansion, "reduction": reduction, "module": f"layer{stage + 1}"})
    return [info[index] for index in out_indices]


def _initialize(encoder: nn.Module) -> None:
    """Draw convolutions from N(0, sqrt(2 / (k * k * out channels))), as torchvision and Pri3D do."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:  # drawing nothing takes torch milliseconds
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _check_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    indices = tuple(out_indices)
    if not indices or any(index not in range(5) for index in indices) or list(indices) != sorted(set(indices)):
        raise ValueError(
            f"out_indices is {indices!r}; accepted: numbers from 0 (stride 2) to 4 (stride 32), each once, rising."
        )
    return indices


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]
