"""SR-UNet: the sparse residual U-Net that PointContrast, CSC, SLidR and Pri3D pre-train.

Choy et al., "4D Spatio-Temporal ConvNets", CVPR 2019 (the family Res16UNet); Xie et al., "PointContrast", ECCV 2020
(the variant 34C). Written from their description; names and shapes are those of the published checkpoints in
MinkowskiEngine 0.5's layout. `width` scales every layer: 32 is the real network, 16 a toy, 8 a tiny version for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geo_pretrain.backbones.base import Backbone, choose_maps
from geo_pretrain.errors import InputError
from geo_pretrain.inputs import check_finite, check_place, described, extremes
from geo_pretrain.sparse.functional import point_rows
from geo_pretrain.sparse.layers import BatchNorm, Conv3d, ConvTranspose3d, ReLU, normalized
from geo_pretrain.sparse.spacing import spacing_doubt
from geo_pretrain.sparse.tensor import SparseTensor, cat

if TYPE_CHECKING:
    from geo_pretrain.contract import VoxelContract, VoxelTransform
    from geo_pretrain.sparse.coordinates import Voxels

REAL_WIDTH = 32
# channels of block1 to block8 at the real width, blocks in each
VARIANTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "34C": ((32, 64, 128, 256, 256, 128, 96, 96), (2, 3, 4, 6, 2, 2, 2, 2)),
    "18A": ((32, 64, 128, 256, 128, 128, 96, 96), (2,) * 8),
    "18B": ((32, 64, 128, 256, 128, 128, 128, 128), (2,) * 8),
    "18C": ((32, 64, 128, 256, 256, 128, 96, 96), (2,) * 8),  # 34C's channels
}
LEVELS = ("block8", "block7", "block6", "block5", "block4")  # the finished maps, finest first: strides 1 to 16


class _ConvNorm(nn.Sequential):
    """A convolution and its norm."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Same voxels."""
        convolution, norm = self
        return normalized(convolution, norm, x)


class BasicBlock(nn.Module):
    """Two 3x3x3 convolutions with a shortcut; 1x1x1 and norm on the shortcut when the channels change."""

    def __init__(self, in_chans: int, out_chans: int, bn_momentum: float) -> None:
        super().__init__()
        self.conv1 = Conv3d(in_chans, out_chans, kernel_size=3)
        self.norm1 = BatchNorm(out_chans)
        self.conv2 = Conv3d(out_chans, out_chans, kernel_size=3)
        self.norm2 = BatchNorm(out_chans)
        self.relu = ReLU(inplace=True)  # of a norm or a sum, which nobody else holds
        self.downsample: nn.Sequential | None = None
        if in_chans != out_chans:
            shortcut = Conv3d(in_chans, out_chans, kernel_size=1)
            self.downsample = _ConvNorm(shortcut, BatchNorm(out_chans, momentum=bn_momentum))

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Same voxels, `out_chans` channels."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = normalized(self.conv1, self.norm1, x, self.relu)
        return normalized(self.conv2, self.norm2, x, self.relu, shortcut)


class SRUNet(Backbone):
    """Sparse residual U-Net: four strided convolutions to stride 16 and four transposed ones back; skips concatenated.

    `variant` is "34C" (SR-UNet34), "18A" (SR-UNet18), "18B" or "18C"; `planes` and `layers` replace its channels and
    block counts, `width` is then the stem's channels. `normalize` divides each output row by its length, as descriptors
    are. `bn_momentum` reaches the stem, strided, transposed and shortcut norms and not those inside blocks, which keep
    0.1: so it is in the released code. `init`: "me" (uniform, MinkowskiEngine's) or "kaiming" (fan-out, Pri3D's).
    """

    contract: VoxelContract | None

    if TYPE_CHECKING:  # nn.Module's own says Any

        def __call__(self, x: SparseTensor) -> SparseTensor: ...

    def __init__(
        self,
        variant: str = "34C",
        *,
        in_chans: int = 3,
        out_chans: int = 32,
        width: int = REAL_WIDTH,
        stem_kernel: int = 3,
        normalize: bool = False,
        bn_momentum: float = 0.1,
        planes: Sequence[int] | None = None,
        layers: Sequence[int] | None = None,
        init: Literal["me", "kaiming"] = "me",
    ) -> None:
        super().__init__()
        planes, layers = _shape(variant, width, planes, layers)
        self.variant, self.width, self.planes, self.layers = variant, width, planes, layers
        self.in_chans, self.out_chans, self.normalize = in_chans, out_chans, normalize

        def norm(channels: int) -> BatchNorm:
            return BatchNorm(channels, momentum=bn_momentum)

        def blocks(in_chans: int, number: int) -> nn.Sequential:
            chans = planes[number - 1]
            first = BasicBlock(in_chans, chans, bn_momentum)
            return nn.Sequential(first, *(BasicBlock(chans, chans, bn_momentum) for _ in range(layers[number - 1] - 1)))

        self.conv0p1s1 = Conv3d(in_chans, width, kernel_size=stem_kernel)
        self.bn0 = norm(width)
        chans = width
        for number in range(1, 5):  # down: conv1p1s2 .. conv4p8s2
            self.add_module(f"conv{number}p{1 << number - 1}s2", Conv3d(chans, chans, kernel_size=2, stride=2))
            self.add_module(f"bn{number}", norm(chans))
            self.add_module(f"block{number}", blocks(chans, number))
            chans = planes[number - 1]
        skips = (width, *planes[:3])
        for number in range(4, 8):  # up: convtr4p16s2 .. convtr7p2s2
            up = planes[number]
            self.add_module(f"convtr{number}p{256 >> number}s2", ConvTranspose3d(chans, up, kernel_size=2, stride=2))
            self.add_module(f"bntr{number}", norm(up))
            self.add_module(f"block{number + 1}", blocks(up + skips[7 - number], number + 1))
            chans = up
        self.final = Conv3d(chans, out_chans, kernel_size=1, bias=True)
        self.relu = ReLU(inplace=True)  # of a norm or a sum, which nobody else holds
        if init == "kaiming":
            _kaiming(self)
        elif init != "me":
            raise ValueError(f"init is {init!r}; accepted: 'me', 'kaiming'.")

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """One dict a map of `pyramid`, as timm does: "num_chs", "reduction" (stride in voxels) and "module"."""
        channels = reversed(self.planes[3:])
        return [
            {"num_chs": chans, "reduction": 1 << level, "module": module}
            for level, (chans, module) in enumerate(zip(channels, LEVELS, strict=True))
        ]

    @property
    def transforms(self) -> VoxelTransform:
        """The callable that turns points (and their colors) into this network's voxels, as in pre-training."""
        if self.contract is None:
            # not an AttributeError: nn.Module would hide it behind "has no attribute 'transforms'"
            raise RuntimeError(
                "This network was built without a contract, so voxel size and features it expects are unknown. "
                "Networks from load_backbone carry one; or set network.contract = VoxelContract(...)."
            )
        return self.contract.transforms()

    def forward(self, x: SparseTensor) -> SparseTensor:
        """x at stride 1 with `in_chans` channels, scaled as the contract says -> the same voxels, [N, out_chans]."""
        return self._output(self.pyramid(x)[0])

    def pyramid(self, x: SparseTensor) -> list[SparseTensor]:
        """The finished maps of the U-Net at strides 1, 2, 4, 8, 16: outputs of block8, block7, block6, block5, block4.

        Channels and strides stand in `feature_info`.
        """
        self._check(x)
        return finished_maps(self, x, cat)

    def forward_intermediates(
        self, x: SparseTensor, indices: int | Sequence[int] | None = None, *, intermediates_only: bool = False
    ) -> Any:
        """The network's output and the maps of `pyramid` (`indices`: see `choose_maps`), under timm's name."""
        maps = self.pyramid(x)
        intermediates = choose_maps(maps, indices)
        return intermediates if intermediates_only else (self._output(maps[0]), intermediates)

    def encode_points(
        self,
        points: Any,
        features: Any = None,
        *,
        out: Literal["pyramid", "final"] = "pyramid",
        batch: Any = None,
    ) -> Tensor:
        """Features of points [N, 3] (m), arrays or tensors on any device -> [N, D], on the network's device.

        Voxelizes as the contract says (`features` [N, C]: see `VoxelTransform`; None for networks trained on ones),
        runs, and gives each point the row of the voxel it lies in. `out` "pyramid" concatenates all maps, finest first
        (832 channels for 34C); "final" is the network's output. `batch` [N]: the cloud each point belongs to.
        """
        if out not in ("pyramid", "final"):
            raise ValueError(f"out is {out!r}; accepted: 'pyramid', 'final'.")
        voxels, weight = self.transforms(points, features, batch=batch), self.final.kernel
        self.look_at_spacing(voxels)
        coords = voxels.coords.to(weight.device)
        x = SparseTensor(coords, voxels.feats.to(weight))
        maps = self.pyramid(x) if out == "pyramid" else [self(x)]
        voxel_feats = torch.cat([m.feats[point_rows(m, coords)] for m in maps], dim=1)
        return voxel_feats[voxels.inverse.to(weight.device)]

    def look_at_spacing(self, voxels: Voxels) -> None:
        """Warn of points that seem not to be in meters: no voxel touches another, or all are one."""
        size = getattr(self.contract, "voxel_size", None)
        if isinstance(size, int | float) and not torch.compiler.is_compiling():  # of cylinders each voxel has its own
            self._warn(spacing_doubt(voxels.coords, len(voxels.inverse), size, "points * {}"))

    def _output(self, finest: SparseTensor) -> SparseTensor:
        out = self.final(finest)
        if not self.normalize:
            return out
        return out.with_sorted_feats(F.normalize(out.computed_feats, dim=1), dtype=out.dtype)

    def _check(self, x: SparseTensor) -> None:
        if not isinstance(x, SparseTensor):
            traced = " torch.fx cannot trace sparse tensors; the maps are at hand in `pyramid`." if _is_proxy(x) else ""
            shown = f" ({described(x)})" if hasattr(x, "shape") and not traced else ""
            raise InputError(
                f"Got {type(x).__name__}{shown}; accepted: a SparseTensor. For points: encode_points(points).{traced}"
            )
        if x.stride != 1:
            raise InputError(f"The voxels are at stride {x.stride}; accepted: stride 1.")
        given = x.computed_feats.shape[1]
        if given != self.in_chans:
            wanted = "" if self.contract is None else f" ({self.contract})"
            raise InputError(
                f"This network takes {self.in_chans} feature channels{wanted}; got {given}. "
                f"load_backbone(..., in_chans={given}) adapts the stem."
            )
        check_place(x, self.final.kernel, "Features", "voxels")
        first, span = not self._looked, None
        if first or x.device.type == "cpu":  # looking makes a GPU wait
            span = extremes(x.computed_feats)
        if span is None:
            return
        self._looked = True
        check_finite(x.computed_feats, span, "features", "feats")
        if self.contract is not None and not self._doubted:
            said = self.contract.doubt(x.sorted_feats.detach())
            self._doubted = said is not None
            self._warn(said)


def _is_proxy(x: object) -> bool:
    return type(x).__module__.startswith("torch.fx")


def encoder_maps(network: Any, x: Any) -> list[Any]:
    """The maps on the way down of an `SRUNet` at strides 1, 2, 4, 8, 16; the last is the output of block4."""
    module = network.get_submodule
    maps = [normalized(network.conv0p1s1, network.bn0, x, network.relu)]
    for number in range(1, 5):
        x = normalized(module(f"conv{number}p{1 << number - 1}s2"), module(f"bn{number}"), maps[-1], network.relu)
        maps.append(module(f"block{number}")(x))
    return maps


def finished_maps(network: Any, x: Any, cat: Callable[[Any, Any], Any]) -> list[Any]:
    """The maps of `SRUNet.pyramid`, of any network with the same layers; `cat` joins the channels of two maps."""
    module, skips = network.get_submodule, encoder_maps(network, x)
    maps = [skips.pop()]
    for number in range(4, 8):
        x = normalized(module(f"convtr{number}p{256 >> number}s2"), module(f"bntr{number}"), maps[-1], network.relu)
        maps.append(module(f"block{number + 1}")(cat(x, skips.pop())))
    return maps[::-1]


def _shape(
    variant: str, width: int, planes: Sequence[int] | None, layers: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and block counts of block1 to block8."""
    if variant not in VARIANTS:
        raise ValueError(f"Unknown SR-UNet variant {variant!r}; accepted: {', '.join(VARIANTS)}.")
    if width < 1:
        raise ValueError(f"width is {width!r}; accepted: whole numbers from 1 up (32 is the real network).")
    own_planes, own_layers = VARIANTS[variant]
    planes = [chans * width // REAL_WIDTH for chans in own_planes] if planes is None else planes
    layers = own_layers if layers is None else layers
    if not len(planes) == len(layers) == 8 or min(*planes, *layers) < 1:
        raise ValueError(f"planes are {tuple(planes)}, layers {tuple(layers)}; accepted: eight positive numbers each.")
    return tuple(planes), tuple(layers)


def _kaiming(network: nn.Module) -> None:
    """Draw convolutions from N(0, sqrt(2 / (K * out channels))); transposed ones stay MinkowskiEngine's."""
    for module in network.modules():
        if isinstance(module, Conv3d):
            kernel = module.kernel
            fan_out = kernel.shape[-1] * (kernel.shape[0] if kernel.ndim == 3 else 1)
            nn.init.normal_(kernel, std=(2 / fan_out) ** 0.5)
