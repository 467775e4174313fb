"""SR-UNet34 in spconv's layers: the peer that `benchmarks.sparse` measures. Same channels, random weights."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from geo_pretrain.sparse import peer_spconv

PLANES, LAYERS, STEM = (32, 64, 128, 256, 256, 128, 96, 96), (2, 3, 4, 6, 2, 2, 2, 2), 32
MARGIN = 16  # cells of the coarsest stride


def _spconv() -> Any:
    """The library, made to train without a GPU."""
    peer_spconv.library()
    return importlib.import_module("spconv.pytorch")


class _Unit(nn.Module):
    """Convolution and norm."""

    def __init__(self, convolution: nn.Module, channels: int) -> None:
        super().__init__()
        self.convolution, self.norm = convolution, nn.BatchNorm1d(channels)

    def forward(self, x: Any) -> Any:
        x = self.convolution(x)
        return x.replace_feature(self.norm(x.features))


class _Block(nn.Module):
    """Two 3x3x3 convolutions with a shortcut."""

    def __init__(self, spconv: Any, in_chans: int, out_chans: int, key: str) -> None:
        super().__init__()
        self.first, self.second = (
            _Unit(spconv.SubMConv3d(chans, out_chans, 3, bias=False, indice_key=key), out_chans)
            for chans in (in_chans, out_chans)
        )
        self.shortcut: nn.Module = nn.Identity()
        if in_chans != out_chans:
            self.shortcut = nn.Sequential(nn.Linear(in_chans, out_chans, bias=False), nn.BatchNorm1d(out_chans))

    def forward(self, x: Any) -> Any:
        shortcut = self.shortcut(x.features)
        x = _relu(self.first(x))
        x = self.second(x)
        return x.replace_feature(torch.relu(x.features + shortcut))


class SpconvUNet(nn.Module):
    """Features [N, in_chans] on coordinates int32 [N, 4] to [N, out_chans]."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.spconv = spconv = _spconv()
        stem = spconv.SubMConv3d(in_chans, STEM, 3, bias=False, indice_key="same0")
        self.stem, chans, skips = _Unit(stem, STEM), STEM, [STEM]
        self.strided, self.raised, self.blocks = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for number, (planes, layers) in enumerate(zip(PLANES, LAYERS, strict=True)):
            if number < 4:
                down = spconv.SparseConv3d(chans, chans, 2, 2, bias=False, indice_key=f"step{number}")
                self.strided.append(_Unit(down, chans))
            else:
                up = spconv.SparseInverseConv3d(chans, planes, 2, bias=False, indice_key=f"step{7 - number}")
                self.raised.append(_Unit(up, planes))
                chans = planes + skips[7 - number]
            key = f"same{number + 1 if number < 4 else 7 - number}"
            blocks = [_Block(spconv, planes if i else chans, planes, key) for i in range(layers)]
            self.blocks.append(nn.Sequential(*blocks))
            chans = planes
            skips.append(chans)
        self.final = nn.Linear(chans, out_chans)

    def forward(self, feats: Tensor, coords: Tensor) -> Tensor:
        """Coordinates are moved to begin near 0, at a multiple of the coarsest stride."""
        low = coords.amin(dim=0) // MARGIN * MARGIN
        low[0] = 0
        moved = coords - low
        shape = (moved[:, 1:].amax(dim=0) + 1 + MARGIN).tolist()
        x = self.spconv.SparseConvTensor(feats, moved, shape, int(coords[:, 0].max()) + 1)
        x = _relu(self.stem(x))
        skips = [x.features]
        for strided, blocks in zip(self.strided, self.blocks[:4], strict=True):
            x = blocks(_relu(strided(x)))
            skips.append(x.features)
        skips.pop()
        for raised, blocks in zip(self.raised, self.blocks[4:], strict=True):
            x = _relu(raised(x))
            x = blocks(x.replace_feature(torch.cat([x.features, skips.pop()], dim=1)))
        return self.final(x.features)


def _relu(x: Any) -> Any:
    return x.replace_feature(torch.relu(x.features))
