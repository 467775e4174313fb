"""SR-UNet for classification: the way down, pooled over the whole cloud, and a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geo_pretrain.backbones.sr_unet import SRUNet, encoder_maps
from geo_pretrain.seeding import seeded
from geo_pretrain.sparse.functional import global_pool
from geo_pretrain.sparse.tensor import SparseTensor

ENCODER = ("conv0p1s1.", "bn0.", *(f"{part}{n}" for n in range(1, 5) for part in ("conv", "bn", "block")))


class ClassifierSRUNet(nn.Module):
    """The output of block4, its maximum and its mean over all voxels joined, dropout, and a linear layer.

    512 -> classes for SR-UNet34. No paper states the pooling and the head; with `hidden` channels stand two layers with
    norm and ReLU before the last one, as in MinkowskiEngine's example of ModelNet40 (512). The U-Net's way up is kept,
    frozen and not run, so that the network's folder still holds a whole backbone.
    """

    def __init__(self, unet: SRUNet, classes: int, *, hidden: int = 0, dropout: float = 0.5) -> None:
        super().__init__()
        self.unet = unet
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(name.startswith(ENCODER))
        layers: list[nn.Module] = []
        chans = 2 * unet.planes[3]
        for _ in range(2 if hidden else 0):
            layers += [nn.Linear(chans, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
            chans = hidden
        self.head = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(chans, classes))

    def forward(self, x: SparseTensor) -> Tensor:
        """Voxels at stride 1 of B clouds -> logits [B, classes]."""
        deepest = encoder_maps(self.unet, x)[-1]
        pooled = torch.cat([global_pool(deepest, "max"), global_pool(deepest, "avg")], dim=1)
        logits: Tensor = self.head(pooled)
        return logits


def classifier_srunet(
    start: SRUNet, classes: int, *, seed: int, hidden: int = 0, dropout: float = 0.5
) -> ClassifierSRUNet:
    """A `ClassifierSRUNet` around `start`, whose head is drawn by `seed`: the same one whatever `start` is."""
    with seeded(seed):
        return ClassifierSRUNet(start, classes, hidden=hidden, dropout=dropout)
