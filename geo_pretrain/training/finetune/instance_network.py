"""SR-UNet for instances: classes of voxels, and the way from each voxel to its instance's center.

Names and shapes of the layers around the U-Net are those of CSC's released code (downstream/insseg).
"""

from __future__ import annotations

from torch import Tensor, nn

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.seeding import seeded
from geo_pretrain.sparse.layers import BatchNorm, Conv3d, ReLU, normalized
from geo_pretrain.sparse.tensor import SparseTensor, cat
from geo_pretrain.training.networks3d import segmentation_srunet


class InstanceSRUNet(nn.Module):
    """A U-Net whose last layer gives logits, and beside it two layers that give offsets.

    For 96 channels, as in SR-UNet34: offsets_pre 96 -> 96, bntr_offset, ReLU, offsets 96 -> 3, both with a bias.
    """

    def __init__(self, unet: SRUNet) -> None:
        super().__init__()
        chans = unet.planes[-1]
        self.unet = unet
        self.offsets_pre = Conv3d(chans, chans, kernel_size=1, bias=True)
        self.bntr_offset = BatchNorm(chans)
        self.offsets = Conv3d(chans, 3, kernel_size=1, bias=True)
        self.relu = ReLU(inplace=True)  # of a norm, which nobody else holds

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Voxels at stride 1 -> the same voxels, [N, out_chans + 3]: logits, then offsets in meters."""
        features = self.unet.pyramid(x)[0]
        moves = self.offsets(normalized(self.offsets_pre, self.bntr_offset, features, self.relu))
        return cat(self.unet.final(features), moves)


def split_output(output: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and offsets [N, 3] (m) from the network's output [N, C + 3]."""
    return output[:, :-3], output[:, -3:]


def instance_srunet(start: SRUNet, classes: int, *, seed: int, transfer: bool = True) -> InstanceSRUNet:
    """An `InstanceSRUNet` shaped like `start` with `classes` logits.

    All new layers are drawn by `seed`, the same whatever is transferred; see `segmentation_srunet`.
    """
    unet = segmentation_srunet(start, classes, seed=seed, transfer=transfer)
    with seeded(seed):
        return InstanceSRUNet(unet)
