"""The U-Net of self-supervised depth estimation: a ResNet encoder and a decoder with concatenated skips.

Janda et al. pre-train "the ResUNet of Godard et al." to give 16 features for each pixel, and publish no code. This is
the plainest reading: the depth network of Godard et al., "Digging Into Self-Supervised Monocular Depth Estimation",
ICCV 2019, with one linear 3x3 head of 16 channels at full resolution in place of its disparity heads. Written from its
description; their code, whose license is non-commercial, was not used. `width` scales every layer: 64 is the real
network, 8 a tiny version for tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from geo_pretrain.backbones.base import EncoderDecoder
from geo_pretrain.backbones.resnet_unet import ResNetEncoder, of_size
from geo_pretrain.errors import CheckpointError

torch.fx.wrap("of_size")


class DepthDecoder(nn.Module):
    """Levels, each: 3x3 convolution, nearest upsampling by 2, concatenation of the encoder's map, 3x3 convolution.

    Level i goes from stride 2**(i + 1) to 2**i, so that a ResNet has five; without a map of that stride nothing is
    concatenated.
    Every convolution sees a mirrored border and is followed by an ELU, but for the linear `head`; there are no norms.
    State-dict keys are `upconv<level>_<0 or 1>` and `head`, each with weight and bias.
    """

    def __init__(
        self, encoder_chans: Sequence[int], width: int, out_chans: int, strides: Sequence[int] = (2, 4, 8, 16, 32)
    ) -> None:
        """`encoder_chans`, `strides`: of the encoder's maps, finest first. Strides are powers of 2."""
        super().__init__()
        if any(stride.bit_count() != 1 for stride in strides):
            raise CheckpointError(f"Maps have strides {list(strides)}; this decoder, which doubles, needs powers of 2.")
        map_of = {stride: index for index, stride in enumerate(strides)}  # the last one of each stride
        self.levels = [(level, map_of.get(1 << level)) for level in range(strides[-1].bit_length() - 2, -1, -1)]
        chans = encoder_chans[-1]
        for level, index in self.levels:
            up = width // 4 << level
            skip = 0 if index is None else encoder_chans[index]
            self.add_module(f"upconv{level}_0", nn.Conv2d(chans, up, kernel_size=3))
            self.add_module(f"upconv{level}_1", nn.Conv2d(up + skip, up, kernel_size=3))
            chans = up
        self.head = nn.Conv2d(chans, out_chans, kernel_size=3)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """The encoder's maps, finest first -> [B, out_chans, *size]; by default twice the size of the finest."""
        x = maps[-1]
        for level, index in self.levels:
            x = F.elu(self.get_submodule(f"upconv{level}_0")(mirror_border(x)))
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            if index is not None:
                skip = maps[index]
                x = torch.cat([of_size(x, skip.shape[2], skip.shape[3]), skip], dim=1)
            elif size is not None and not level:
                x = of_size(x, *size)
            x = F.elu(self.get_submodule(f"upconv{level}_1")(mirror_border(x)))
        return self.head(mirror_border(x))


class DepthUNet(EncoderDecoder):
    """An encoder, `.encoder`, and a `DepthDecoder`, `.decoder`: dense features at the image's own resolution."""

    decoder: DepthDecoder

    def _dense(self, maps: Sequence[Tensor], x: Tensor) -> Tensor:
        """The decoder's map, of the size of the images `x`."""
        dense: Tensor = self.decoder(maps, (x.shape[2], x.shape[3]))
        return dense


class ResNetDepthUNet(DepthUNet):
    """Dense features at the image's own resolution, from a ResNet and a decoder with concatenated skips.

    `.encoder` and `.decoder` hold all weights. Images are normalized with mean 0.45 and standard deviation 0.225 in
    each channel. Any image of at least 32 x 32 pixels works: where a side is not a multiple of 32 the upsampled maps
    are cropped to the encoder's, and the output has the image's size.
    """

    def __init__(self, depth: int = 18, *, width: int = 64, out_chans: int = 16, in_chans: int = 3) -> None:
        super().__init__()
        self.encoder = ResNetEncoder(depth, width=width, in_chans=in_chans)
        self.out_chans = out_chans
        self.decoder = DepthDecoder([info["num_chs"] for info in self.encoder.feature_info], width, out_chans)


torch.fx.wrap("mirror_border")  # one node for `torch.fx.symbolic_trace`, which cannot follow its branches


def mirror_border(x: Tensor) -> Tensor:
    """x [B, C, H, W] -> [B, C, H + 2, W + 2]: one pixel on every side, mirrored about the outermost row or column.

    A side of one pixel has nothing to mirror and is repeated: the coarsest map of an image of 32 pixels.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # for any size, which cannot be asked
        for axis in (2, 3):
            last = x.shape[axis] - 1
            inside = last - (last - torch.arange(-1, last + 2, device=x.device).abs()).abs()
            x = x.index_select(axis, inside.clamp(min=0))
        return x
    if min(x.shape[2:]) > 1:
        return F.pad(x, (1, 1, 1, 1), mode="reflect")
    x = F.pad(x, (1, 1, 0, 0), mode="reflect" if x.shape[3] > 1 else "replicate")
    return F.pad(x, (0, 0, 1, 1), mode="reflect" if x.shape[2] > 1 else "replicate")
