"""An image network and a point network with one feature space: pixels and points compare by cosine similarity.

PPKT (Liu et al., 2021) and Janda et al. (2022) teach points by pixels; Pri3D (Hou et al., 2021) learns both. Their
folders hold the two networks and what projects their features, and `load_pair` puts them together.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geo_pretrain.backbones.base import ImageBackbone
from geo_pretrain.backbones.build import GOLDEN_SIZE, build, golden_values
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.errors import CheckpointError, WeightsMismatch
from geo_pretrain.sparse.functional import point_rows
from geo_pretrain.sparse.tensor import SparseTensor

if TYPE_CHECKING:
    from geo_pretrain.checkpoint import Pairing
    from geo_pretrain.contract import ImageContract, ImageTransform, VoxelContract, VoxelTransform

THINNED = 8  # every so many rows and columns of the golden features of an image are kept
INTERPOLATIONS: Mapping[str, dict[str, Any]] = {
    "corners": {"mode": "bilinear", "align_corners": True},
    "bilinear": {"mode": "bilinear", "align_corners": False},
    "nearest": {"mode": "nearest"},
}


class FeaturePair(nn.Module):
    """The image network and the point network of a checkpoint with their projections, in evaluation mode.

    `.image_network` and `.point_network` are the networks alone; `.image_transforms` and `.point_transforms` turn an
    image, and points, into what they take; `.dim` is the number of channels of the common space.
    """

    def __init__(
        self,
        image_network: ImageBackbone,
        point_network: SRUNet,
        *,
        image_projection: nn.Linear | None = None,
        point_projection: nn.Linear | None = None,
        interpolation: str = "bilinear",
    ) -> None:
        super().__init__()
        self.image_network, self.point_network = image_network, point_network
        self.image_projection, self.point_projection = image_projection, point_projection
        self.interpolation = interpolation
        self.dim = point_network.out_chans if point_projection is None else point_projection.out_features
        self.eval()

    @classmethod
    def from_states(
        cls, network: Any, pairing: Pairing, partner: Mapping[str, Tensor], heads: Mapping[str, Tensor]
    ) -> FeaturePair:
        """Pair a network with the partner that `pairing` describes.

        `partner` are the tensors of the file with the partner's weights, `heads` those of the projections. Raises
        `WeightsMismatch` when tensors are missing or do not fit.
        """
        with torch.device("meta"):
            other = build(pairing.arch, decoder=pairing.arch.has_decoder)
        state = {k.removeprefix(pairing.prefix): v for k, v in partner.items() if k.startswith(pairing.prefix)}
        try:
            other.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise WeightsMismatch(f"The weights of {pairing.arch} do not fit it: {error}") from error
        other.contract, other.name = pairing.contract, network.name
        image, point = (network, other) if isinstance(network, ImageBackbone) else (other, network)
        like = next(network.parameters())
        pair = cls(
            image,
            point,
            image_projection=_projection(pairing.image_projection, heads),
            point_projection=_projection(pairing.point_projection, heads),
            interpolation=pairing.interpolation,
        )
        return pair.to(device=like.device, dtype=like.dtype)

    @property
    def image_contract(self) -> ImageContract:
        """The input that the image network expects."""
        return cast("ImageContract", self.image_network.contract)

    @property
    def point_contract(self) -> VoxelContract:
        """The voxels that the point network expects."""
        return cast("VoxelContract", self.point_network.contract)

    @property
    def image_transforms(self) -> ImageTransform:
        """The transform from an image to the input of `encode_image`: resizes and normalizes."""
        return self.image_network.transforms

    @property
    def point_transforms(self) -> VoxelTransform:
        """The callable that turns points and their colors into voxels."""
        return self.point_network.transforms

    def encode_image(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W], normalized -> a feature of length 1 for every pixel: [B, dim, H, W].

        At 480 x 640 and 128 channels that is 157 MB an image; `image_map` is the same before it is made large.
        """
        maps = self.image_map(images)
        size = (images.shape[2], images.shape[3])
        if maps.shape[2:] != size:
            maps = F.interpolate(maps, size=size, **INTERPOLATIONS[self.interpolation])
        return F.normalize(maps, dim=1)

    def image_map(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W], normalized -> projected features [B, dim, h, w] of the network's own resolution.

        Not normalized: upsampling comes first.
        """
        maps = self.image_network(images)
        maps = maps[-1] if isinstance(maps, list) else maps
        if self.image_projection is None:
            return cast(Tensor, maps)
        return F.conv2d(maps, self.image_projection.weight[:, :, None, None], self.image_projection.bias)

    def encode_points(self, points: Any, colors: Any = None, *, batch: Any = None, colours: Any = None) -> Tensor:
        """Points [N, 3] (m) and colors [N, 3], arrays or tensors -> a feature of length 1 for every point: [N, dim].

        A point has the feature of its voxel. `colors` and `batch`: see `SRUNet.encode_points`. `colours` is the former
        name of `colors`.
        """
        if colours is not None:
            if colors is not None:
                raise TypeError("encode_points got 'colors' and 'colours', its former name; give one of them.")
            warnings.warn("'colours' is now 'colors'.", FutureWarning, stacklevel=2)
            colors = colours
        voxels, weight = self.point_transforms(points, colors, batch=batch), self.point_network.final.kernel
        self.point_network.look_at_spacing(voxels)
        coords = voxels.coords.to(weight.device)
        x = SparseTensor(coords, voxels.feats.to(weight))
        voxel_features = self.encode_voxels(x)[point_rows(x, coords)]
        return voxel_features[voxels.inverse.to(weight.device)]

    def encode_voxels(self, x: SparseTensor) -> Tensor:
        """Voxels as `point_transforms` makes them -> a feature of length 1 for each, in the order of `x.coords`."""
        feats = self.point_network(x).feats
        if self.point_projection is not None:
            feats = self.point_projection(feats)
        return F.normalize(feats, dim=1)


def pair_golden(pair: FeaturePair) -> dict[str, Tensor]:
    """Seeded inputs for both networks and their features, on the CPU in float32.

    "input.image", "input.coords", "input.feats"; "pair.image", thinned, and "pair.points".
    """
    generator = torch.Generator().manual_seed(1)
    contract = pair.point_contract
    values = golden_values(pair.point_network, ones=not contract.given_channels, offset=contract.offset)
    voxels = {key: value for key, value in values.items() if key != "output"}
    channels = len(pair.image_contract.channels)
    golden = voxels | {"input.image": torch.randn((1, channels, *GOLDEN_SIZE), generator=generator)}
    return golden | pair_outputs(pair, golden)


@torch.no_grad()
def pair_outputs(pair: FeaturePair, golden: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The features of the inputs in `golden`, under the names that `pair_golden` gives."""
    image = pair.encode_image(golden["input.image"])[..., ::THINNED, ::THINNED]
    return {
        "pair.image": image.contiguous(),
        "pair.points": pair.encode_voxels(SparseTensor(golden["input.coords"], golden["input.feats"])),
    }


def _projection(name: str | None, heads: Mapping[str, Tensor]) -> nn.Linear | None:
    """The linear layer under a name among the heads, from a Linear's tensors or a 1x1 convolution's."""
    if name is None:
        return None
    if f"{name}.weight" not in heads:
        raise CheckpointError(f"The file of projections has no {name + '.weight'!r}; it has: {', '.join(heads)}.")
    weight, bias = heads[f"{name}.weight"].flatten(1), heads.get(f"{name}.bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}), assign=True)
    return layer
