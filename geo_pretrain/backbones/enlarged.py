"""A convolution of an enlarged map, computed on the small map: the same result from a quarter of the products.

Bilinear enlarging mixes places and a convolution mixes channels, tap by tap, so the two commute: every tap is multiplied
at the small size, and the products are enlarged, shifted and added by two small matrices, across and then down.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST = 1 << 25  # values of all taps that are held at a time: 128 MB in float32


def convolve_enlarged(x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """`conv2d(interpolate(x, size, bilinear, align_corners), weight, padding=K // 2)`, from fewer products.

    x [B, C, h, w], weight [O, C, K, K] with K odd, `size` (H, W) -> [B, O, H, W] in channels-last order. Right for any
    sizes; it multiplies less than the plain way where a map grows by more than about 1.3 in both directions.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    out_chans, in_chans, taps, _ = weight.shape
    height, width = x.shape[-2:]
    down, across = (
        _taps(small, large, taps).to(device=x.device, dtype=x.dtype)
        for small, large in zip((height, width), size, strict=True)
    )
    kernel = weight.permute(3, 2, 0, 1).reshape(taps * taps * out_chans, in_chans).t()
    at_once = max(1, LARGEST // (kernel.shape[1] * height * width))
    with torch.autocast(x.device.type, enabled=False):
        parts = [_convolve(part, kernel, down, across, taps) for part in x.permute(0, 2, 3, 1).split(at_once)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).permute(0, 3, 1, 2)


def _convolve(x: Tensor, kernel: Tensor, down: Tensor, across: Tensor, taps: int) -> Tensor:
    """x [B, h, w, C], kernel [C, K (across) * K (down) * O] -> [B, H, W, O]."""
    batch, height, width, in_chans = x.shape
    products = x.reshape(-1, in_chans) @ kernel
    wide = torch.matmul(across, products.view(batch * height, width * taps, -1))
    wide = wide.view(batch, height, len(across), taps, -1).transpose(2, 3).reshape(batch, height * taps, -1)
    return torch.matmul(down, wide).view(batch, len(down), len(across), -1)


@lru_cache(maxsize=64)
def _taps(small: int, large: int, taps: int) -> Tensor:
    """Along one axis: what place i of the enlarged map takes from place j of the small one by tap k, [large, small * K].

    Taps beyond the enlarged map's border take nothing, as padding with zeros does.
    """
    with torch.inference_mode(False), torch.no_grad():
        enlarge = F.interpolate(torch.eye(small, dtype=torch.float64)[None, None], size=(large, small), mode="bilinear", align_corners=True)
        padded = F.pad(enlarge[0, 0], (0, 0, taps // 2, taps // 2))
        return torch.stack([padded[tap : tap + large] for tap in range(taps)], dim=2).flatten(1)
